# SPDX-License-Identifier: Apache-2.0
"""Statistics of the numbers that flow into a linear: sums, extremes and a histogram, of fixed size.

Knows no model: arrays come in under the name of a weight.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pgxport.activations.calibration_file import OBSERVERS, pack, site_tensors
from pgxport.errors import NumericError

BINS = 4096  # of a histogram; a power of two, so that two bins become one exactly where the range doubles
PERCENTILE = 99.99  # percent of the values that the observer `percentile` keeps
LEVELS = 256  # of the 8-bit grid that covers a range
# The search for the least divergence goes through all bins for every threshold: 0.1 s at 512, 2 s at 4096.
ENTROPY_BINS, ENTROPY_LEVELS = 512, 128
MOMENT_ROWS = 512  # rows of a second moment that one product adds to

Histogram = tuple[np.ndarray, np.ndarray]  # counts [BINS], edges [BINS + 1]
Range = tuple[float, float]


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


class LinearInput:
    """Statistics of one linear's input: of each channel, of all together, and E[x xᵀ] if `moments`."""

    def __init__(self, path: str, width: int, *, moments: bool):
        self.path, self.width, self.total = path, width, 0.0  # the sum of the tokens' weights
        self.histogram = RangeHistogram()
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
        self.histogram.add(x)
        self.total += float(w.sum(dtype=np.float64))
        for block in self._moment:
            rows, end = block.shape
            block += weighted[:, end - rows : end].T @ x[:, :end]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return this input's tensors of the calibration file, once: it hands the second moment over."""
        ranges = np.array([OBSERVER[name](self.histogram) for name in OBSERVERS])
        tensors = site_tensors(self.path, np.stack([self._absmax, *(self._sums / self.total)]), ranges, None)
        if self._moment:
            packed = pack((row for block in self._moment for row in block), self.width)
            tensors[f"moment/{self.path}"] = np.divide(packed, np.float32(self.total), out=packed)
            self._moment.clear()
        return tensors


class InputObserver:
    """Statistics of the inputs of all linears, and of the caches of all layers."""

    def __init__(self, *, moments: bool):
        self.inputs: dict[str, str] = {}  # a linear's weight -> the weight whose `LinearInput` has its input
        self._moments = moments
        self._linear_inputs: dict[str, LinearInput] = {}
        self._caches: dict[str, np.ndarray] = {}

    def add_input(self, paths: Sequence[str], x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add x [..., K], the input of one linear or of several; each token counts by its weight [...]."""
        entry = self._linear_inputs.get(paths[0])
        if entry is None:
            entry = self._linear_inputs[paths[0]] = LinearInput(paths[0], x.shape[-1], moments=self._moments)
        self.inputs |= dict.fromkeys(paths, paths[0])
        entry.add(x, weights)

    def add_cache(self, layer: int, part: str, x: np.ndarray) -> None:
        """Add keys after rotation, or values, x [B, K, S, D]."""
        name, top = f"cache/{layer}/{part}", np.abs(x).max((0, 2)).astype(np.float32)
        self._caches[name] = np.maximum(self._caches.get(name, top), top)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all tensors of the calibration file. Call it once: it hands the second moments over."""
        tensors: dict[str, np.ndarray] = {}
        while self._linear_inputs:
            tensors |= self._linear_inputs.pop(next(iter(self._linear_inputs))).tensors()
        return tensors | self._caches


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
