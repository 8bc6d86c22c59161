# SPDX-License-Identifier: Apache-2.0
"""What is kept of the numbers that flow into a linear: sums, extremes and a histogram, whose sizes no sample changes.

Knows no model: arrays come in under the name of a weight.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pgxport.errors import NumericError
from pgxport.exporter.calibration_file import OBSERVERS, pack, site_tensors

BINS = 4096  # of a histogram; a power of two, so that two histograms of other ranges can be put together exactly
PERCENTILE = 99.99  # of the values lie in the range that the observer of that name keeps
LEVELS = 256  # of the 8-bit grid that a range is to be cut into
# The search for the least divergence goes through all bins for every threshold: 0.1 s at 512, 2 s at 4096.
ENTROPY_BINS, ENTROPY_LEVELS = 512, 128
MOMENT_ROWS = 512  # of a second moment that are added to at once

Histogram = tuple[np.ndarray, np.ndarray]  # counts [BINS], edges [BINS + 1]
Range = tuple[float, float]


class RangeHistogram:
    """A histogram of numbers whose range nobody knows beforehand.

    Its range is ±2ⁿ, the smallest that holds everything, so its bins are the same whatever order the numbers came in.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.low, self.high = np.inf, -np.inf
        self._exponent: int | None = None  # of the range; None while everything is zero

    def add(self, x: np.ndarray) -> None:
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

    def histogram(self, bins: int = BINS) -> Histogram:
        """Counts and edges, with bins put together where fewer are asked for."""
        reach = 2.0 ** (self._exponent or 0)
        return self.counts.reshape(bins, -1).sum(1), np.linspace(-reach, reach, bins + 1)

    def _widen(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent  # zeros are in the bin at zero, which stays where it is
        while self._exponent < exponent:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 4 : 3 * BINS // 4] = pairs
            self._exponent += 1


class LinearInput:
    """What is known so far about one linear's input."""

    def __init__(self, path: str, width: int, *, moments: bool):
        self.path, self.width, self.total = path, width, 0.0  # of the tokens' weights
        self.spread = RangeHistogram()
        self._absmax = np.zeros(width, np.float32)
        self._sums = np.zeros((3, width))  # of x, |x| and x²
        # The lower triangle in blocks of rows, each as wide as its last row: half of the square's memory.
        ends = [min(width, start + MOMENT_ROWS) for start in range(0, width, MOMENT_ROWS)] if moments else []
        self._moment = [np.zeros((end - start, end), np.float32) for start, end in itertools.pairwise([0, *ends])]

    def add(self, x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count x [..., K] in; in means and moments each token counts as its weight [...] says.

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
        self.spread.add(x)
        self.total += float(w.sum(dtype=np.float64))
        for block in self._moment:
            rows, end = block.shape
            block += weighted[:, end - rows : end].T @ x[:, :end]

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything that the calibration file holds about it. The second moment is given away: ask once."""
        ranges = np.array([OBSERVER[name](self.spread) for name in OBSERVERS])
        tensors = site_tensors(self.path, np.stack([self._absmax, *(self._sums / self.total)]), ranges, None)
        if self._moment:
            packed = pack((row for block in self._moment for row in block), self.width)
            tensors[f"moment/{self.path}"] = np.divide(packed, np.float32(self.total), out=packed)
            self._moment.clear()
        return tensors


class InputStatistics:
    """The inputs of linears, and the caches of layers."""

    def __init__(self, *, moments: bool):
        self.inputs: dict[str, str] = {}  # a linear's weight, and the weight whose `LinearInput` holds its input
        self._moments = moments
        self._sites: dict[str, LinearInput] = {}
        self._caches: dict[str, np.ndarray] = {}

    def add_input(self, paths: Sequence[str], x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count x [..., K] in, the input of one linear or of several; each token as its weight [...] says."""
        site = self._sites.get(paths[0])
        if site is None:
            site = self._sites[paths[0]] = LinearInput(paths[0], x.shape[-1], moments=self._moments)
        self.inputs |= dict.fromkeys(paths, paths[0])
        site.add(x, weights)

    def add_cache(self, layer: int, part: str, x: np.ndarray) -> None:
        """Count keys after rotation, or values, in: x [B, K, S, D]"""
        name, top = f"cache/{layer}/{part}", np.abs(x).max((0, 2)).astype(np.float32)
        self._caches[name] = np.maximum(self._caches.get(name, top), top)

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything that the calibration file holds about them. Ask once: second moments are given away."""
        found: dict[str, np.ndarray] = {}
        while self._sites:
            found |= self._sites.pop(next(iter(self._sites))).tensors()
        return found | self._caches


def minmax(spread: RangeHistogram) -> Range:
    """Everything."""
    return spread.low, spread.high


def percentile(spread: RangeHistogram) -> Range:
    """What is left when the outermost numbers of either side are cut off, in whole bins."""
    counts, edges = spread.histogram()
    below = np.cumsum(counts) / counts.sum()
    cut = (100 - PERCENTILE) / 200
    low, high = edges[np.searchsorted(below, cut, "right")], edges[np.searchsorted(below, 1 - cut) + 1]
    return max(float(low), spread.low), min(float(high), spread.high)


def entropy(spread: RangeHistogram) -> Range:
    """The symmetric range that changes the distribution least (Migacz, 2017), as ONNX Runtime finds it."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    counts, edges = spread.histogram(ENTROPY_BINS)
    ends = np.float32(spread.low), np.float32(spread.high)
    collector = HistogramCollector("entropy", False, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same")
    low, high = collector.get_entropy_threshold((counts, edges.astype(np.float32), *ends), ENTROPY_LEVELS)
    return float(low), float(high)


def mse(spread: RangeHistogram) -> Range:
    """The range whose grid of 256 levels has the least squared error; each end is searched while the other is held."""
    counts, edges = spread.histogram()
    seen = counts > 0
    counts, values = counts[seen], ((edges[:-1] + edges[1:]) / 2)[seen]
    low, high = min(spread.low, 0.0), max(spread.high, 0.0)  # a grid has a level at zero

    def error(low: float, high: float) -> float:
        step = (high - low) / (LEVELS - 1)
        if step == 0:
            return 0.0
        zero = round(-low / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, LEVELS - 1) - zero) * step
        return float(counts @ np.square(values - rounded))

    fractions = np.arange(100, 4, -1) / 100
    for _ in range(2):
        high = min((float(f) * max(spread.high, 0.0) for f in fractions), key=lambda end: error(low, end))
        low = min((float(f) * min(spread.low, 0.0) for f in fractions), key=lambda end: error(end, high))
    return low, high


OBSERVER: dict[str, Callable[[RangeHistogram], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
