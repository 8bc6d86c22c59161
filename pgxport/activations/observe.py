# SPDX-License-Identifier: Apache-2.0
"""Statistics of the numbers that flow into a linear: sums, extremes and a histogram, of fixed size.

Knows no model: arrays come in under the name of a weight.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from pgxport.activations.statistics import NOT_ASKED, OBSERVERS, pack
from pgxport.errors import NumericError
from pgxport.files import disk_errors
from pgxport.models.checkpoint import row_blocks

BINS = 4096  # of a histogram; a power of two, so that two bins become one exactly where the range doubles
PERCENTILE = 99.99  # percent of the values that the observer `percentile` keeps
LEVELS = 256  # of the 8-bit grid that covers a range
# The search for the least divergence goes through all bins for every threshold: 0.1 s at 512, 2 s at 4096.
ENTROPY_BINS, ENTROPY_LEVELS = 512, 128
MOMENT_ROWS = 512  # rows of a second moment that one product adds to

Histogram = tuple[np.ndarray, np.ndarray]  # counts [BINS], edges [BINS + 1]
Range = tuple[float, float]
Shape = tuple[int, ...]


class RangeHistogram:
    """A histogram of numbers whose range is not known beforehand.

    Its range is ±2ⁿ, the smallest that holds everything, so no order of the numbers changes its bins.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.low, self.high = np.inf, -np.inf
        self._exponent: int | None = None  # n of the range; None while all numbers are zero

    def add(self, x: np.ndarray) -> None:
        """Count finite numbers, an array of any shape."""
        low, high = float(x.min()), float(x.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = max(high, -low)
        if top > 0:
            self._widen(int(np.frexp(np.float64(top))[1]))  # top < 2 ** exponent
        if self._exponent is None:
            self.counts[BINS // 2] += x.size
            return
        # Exact in float32: the product is by a power of two.
        bins = np.floor(np.ldexp(x.reshape(-1), BINS.bit_length() - 2 - self._exponent)).astype(np.int32) + BINS // 2
        self.counts += np.bincount(bins, minlength=BINS)

    def counts_and_edges(self, bins: int = BINS) -> Histogram:
        """Return counts [bins] and edges [bins + 1]; fewer than BINS are sums of neighbours."""
        reach = 2.0 ** (self._exponent or 0)
        return self.counts.reshape(bins, -1).sum(1), np.linspace(-reach, reach, bins + 1)

    def _widen(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent  # zeros stay in the bin at zero
        while self._exponent < exponent:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 4 : 3 * BINS // 4] = pairs
            self._exponent += 1


@dataclass(frozen=True)
class Needs:
    """The statistics that are gathered, by the names of linears' weights; None: of all linears.

    Attributes:
        channels: Linears of whose inputs each channel's absmax, mean, mean |x| and mean square are kept.
        ranges: Linears whose inputs have a range over all channels.
        moments: Linears whose inputs' second moments are kept.
        observers: What gives a range.
        caches: Whether the caches' absmax is kept.
        changed: Linears whose ranges are wanted of their inputs as `Changes` makes them, too.
        changed_values: Whether the cache's values are wanted as `Changes` makes them, too.
    """

    channels: frozenset[str] | None = None
    ranges: frozenset[str] | None = None
    moments: frozenset[str] | None = None
    observers: tuple[str, ...] = OBSERVERS
    caches: bool = True
    changed: frozenset[str] = frozenset()
    changed_values: bool = False

    @property
    def changes(self) -> bool:
        """Whether changed inputs or values are wanted."""
        return bool(self.changed) or self.changed_values

    def __bool__(self) -> bool:
        """Whether anything is to be gathered."""
        return self.caches or any(wanted is None or wanted for wanted in (self.channels, self.ranges, self.moments))


EVERYTHING, NOTHING = Needs(), Needs(frozenset(), frozenset(), frozenset(), (), caches=False)


class Changes(Protocol):
    """What a recipe does to inputs before they are rounded, such as a rotation: of it no statistics of channels tell the range."""

    def changed_input(self, path: str, x: np.ndarray) -> np.ndarray:
        """The input x [..., K] of a linear as it is rounded."""

    def changed_values(self, layer: int, v: np.ndarray) -> np.ndarray:
        """A decoder layer's values v [B, K, S, D] as they are cached."""


class LinearInput:
    """Statistics of one linear's input: of each channel, of all together where `ranges`, and E[x xᵀ] where `moments`."""

    def __init__(self, path: str, width: int, *, moments: bool, ranges: bool = True, observers: Sequence[str] = OBSERVERS):
        self.path, self.width, self.total = path, width, 0.0  # the sum of the tokens' weights
        self.histogram = RangeHistogram() if ranges else None
        self._observers = observers
        self._absmax = np.zeros(width, np.float32)
        self._sums = np.zeros((3, width))  # of x, |x| and x²
        # The lower triangle in blocks of rows, each as wide as its last row: half of the square's memory.
        ends = [min(width, start + MOMENT_ROWS) for start in range(0, width, MOMENT_ROWS)] if moments else []
        self._moment = [np.zeros((end - start, end), np.float32) for start, end in itertools.pairwise([0, *ends])]

    def add(self, x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add x [..., K]; in means and moments each token counts by its weight [...].

        Raises:
            NumericError: not all of it is finite.
        """
        x = np.ascontiguousarray(x.reshape(-1, self.width), np.float32)
        size = np.abs(x)
        self._absmax = np.maximum(self._absmax, size.max(0))
        if not np.isfinite(self._absmax).all():
            channel = int(np.argmax(~np.isfinite(self._absmax)))
            raise NumericError(
                f"the input of {self.path} is not finite in channel {channel}; the checkpoint's weights are unsound"
            )
        w = np.ones(len(x), np.float32) if weights is None else weights.reshape(-1).astype(np.float32)
        weighted = x if weights is None else x * w[:, None]
        for total, values in zip(self._sums, (x, size, np.square(x)), strict=True):
            total += w.astype(np.float64) @ values
        if self.histogram is not None:
            self.histogram.add(x)
        self.total += float(w.sum(dtype=np.float64))
        for block in self._moment:
            rows, end = block.shape
            block += weighted[:, end - rows : end].T @ x[:, :end]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return this input's tensors of the calibration file, once: it hands the second moment over."""
        tensors = {f"inputs/{self.path}": np.stack([self._absmax, *(self._sums / self.total)]).astype(np.float32)}
        if self.histogram is not None:
            tensors[f"range/{self.path}"] = observed_ranges(self.histogram, self._observers)
        if self._moment:
            packed = pack((row for block in self._moment for row in block), self.width)
            tensors[f"moment/{self.path}"] = np.divide(packed, np.float32(self.total), out=packed)
            self._moment.clear()
        return tensors


class InputObserver:
    """Statistics of the inputs of linears, and of the caches of all layers.

    Args:
        folder: Where inputs wait until `changed` is called, if some are wanted changed.
    """

    def __init__(self, needs: Needs = EVERYTHING, folder: Path | None = None):
        self.inputs: dict[str, str] = {}  # a linear's weight -> the weight whose `LinearInput` has its input
        self.needs, self._kept = needs, KeptInputs(folder)
        self._linear_inputs: dict[str, LinearInput] = {}
        self._caches: dict[str, np.ndarray] = {}

    def add_input(self, paths: Sequence[str], x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add x [..., K], the input of one linear or of several; each token counts by its weight [...]."""
        channels, ranges, moments = (
            wanted is None or not wanted.isdisjoint(paths)
            for wanted in (self.needs.channels, self.needs.ranges, self.needs.moments)
        )
        if not (channels or ranges or moments):
            return
        entry = self._linear_inputs.get(paths[0])
        if entry is None:
            entry = LinearInput(paths[0], x.shape[-1], moments=moments, ranges=ranges, observers=self.needs.observers)
            self._linear_inputs[paths[0]] = entry
        self.inputs |= dict.fromkeys(paths, paths[0])
        entry.add(x, weights)
        if not self.needs.changed.isdisjoint(paths):
            self._kept.add(paths[0], x.reshape(-1, x.shape[-1]))

    def add_cache(self, layer: int, part: str, x: np.ndarray) -> None:
        """Add keys after rotation, or values, x [B, K, S, D]."""
        if self.needs.caches:
            name, top = f"cache/{layer}/{part}", np.abs(x).max((0, 2)).astype(np.float32)
            self._caches[name] = np.maximum(self._caches.get(name, top), top)
        if self.needs.changed_values and part == "value":
            self._kept.add(layer, x.transpose(0, 2, 1, 3).reshape(-1, *x.shape[1::2]))

    @property
    def waiting(self) -> bool:
        """Whether there are inputs that are wanted changed."""
        return bool(self._kept)

    def changed(self, changes: Changes) -> dict[str, np.ndarray]:
        """Return the tensors of the inputs that are wanted changed, and let go of these inputs."""
        tensors: dict[str, np.ndarray] = {}
        for layer in self._kept.layers():
            values = (changes.changed_values(layer, v.transpose(1, 0, 2)[None]) for v in self._kept.blocks(layer))
            tensors[f"changed/{layer}/value"] = np.max([np.abs(v).max((0, 2)) for v in values], 0).astype(np.float32)
        for path in sorted(self.needs.changed & self.inputs.keys()):
            histogram = RangeHistogram()
            for x in self._kept.blocks(self.inputs[path]):
                histogram.add(changes.changed_input(path, x))
            tensors[f"changed/{path}"] = observed_ranges(histogram, self.needs.observers)
        self._kept.clear()
        return tensors

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all tensors of the calibration file. Call it once: it hands the second moments over."""
        tensors: dict[str, np.ndarray] = {}
        while self._linear_inputs:
            tensors |= self._linear_inputs.pop(next(iter(self._linear_inputs))).tensors()
        return tensors | self._caches


class KeptInputs:
    """Rows of inputs that wait in files, float32: of a linear by its weight's name, of a layer's values by its number."""

    def __init__(self, folder: Path | None):
        self._folder, self._shapes = folder, dict[str | int, Shape]()

    def __bool__(self) -> bool:
        return bool(self._shapes)

    def layers(self) -> list[int]:
        """The layers whose values wait."""
        return [of for of in self._shapes if isinstance(of, int)]

    def add(self, of: str | int, rows: np.ndarray) -> None:
        """Add rows [n, ...]."""
        file, mode = self._file(of), "ab" if of in self._shapes else "wb"  # a killed run may have left one
        self._shapes[of] = rows.shape[1:]
        with disk_errors(f"cannot write {file}"), open(file, mode) as out:
            out.write(np.ascontiguousarray(rows, np.float32).data)

    def blocks(self, of: str | int) -> Iterator[np.ndarray]:
        """The rows, some at a time."""
        shape = self._shapes[of]
        rows = np.memmap(self._file(of), np.float32, "r").reshape(-1, *shape)
        for start, stop in row_blocks(len(rows), 4 * prod(shape)):
            yield np.array(rows[start:stop])

    def clear(self) -> None:
        """Delete the files."""
        for of in self._shapes:
            self._file(of).unlink()
        self._shapes.clear()

    def _file(self, of: str | int) -> Path:
        assert self._folder is not None, f"Bug: there is no folder for the inputs of {of} to wait in"
        return self._folder / f"kept-{of}"


def observed_ranges(histogram: RangeHistogram, observers: Sequence[str]) -> np.ndarray:
    """[observers, 2] lowest and highest number that each keeps; NOT_ASKED where one is not among the observers wanted."""
    ranges = [OBSERVER[name](histogram) if name in observers else NOT_ASKED for name in OBSERVERS]
    return np.array(ranges, np.float32)


def minmax(histogram: RangeHistogram) -> Range:
    """The range of all values."""
    return histogram.low, histogram.high


def percentile(histogram: RangeHistogram) -> Range:
    """The range without the outermost (100 - PERCENTILE) / 2 percent of either side, in whole bins."""
    counts, edges = histogram.counts_and_edges()
    below = np.cumsum(counts) / counts.sum()
    cut = (100 - PERCENTILE) / 200
    low, high = edges[np.searchsorted(below, cut, "right")], edges[np.searchsorted(below, 1 - cut) + 1]
    return max(float(low), histogram.low), min(float(high), histogram.high)


def entropy(histogram: RangeHistogram) -> Range:
    """The symmetric range that changes the distribution least (Migacz, 2017), by ONNX Runtime's search."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    counts, edges = histogram.counts_and_edges(ENTROPY_BINS)
    ends = np.float32(histogram.low), np.float32(histogram.high)
    collector = HistogramCollector("entropy", False, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same")
    low, high = collector.get_entropy_threshold((counts, edges.astype(np.float32), *ends), ENTROPY_LEVELS)
    return float(low), float(high)


def mse(histogram: RangeHistogram) -> Range:
    """The range whose grid of 256 levels has the least squared error; the search moves one end at a time."""
    counts, edges = histogram.counts_and_edges()
    filled = counts > 0
    counts, values = counts[filled], ((edges[:-1] + edges[1:]) / 2)[filled]
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)  # a grid has a level at zero

    def error(low: float, high: float) -> float:
        step = (high - low) / (LEVELS - 1)
        if step == 0:
            return 0.0
        zero = round(-low / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, LEVELS - 1) - zero) * step
        return float(counts @ np.square(values - rounded))

    fractions = np.arange(100, 4, -1) / 100
    for _ in range(2):
        high = min((float(f) * max(histogram.high, 0.0) for f in fractions), key=lambda end: error(low, end))
        low = min((float(f) * min(histogram.low, 0.0) for f in fractions), key=lambda end: error(end, high))
    return low, high


OBSERVER: dict[str, Callable[[RangeHistogram], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
