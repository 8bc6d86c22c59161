# SPDX-License-Identifier: Apache-2.0
"""Statistics of a stream equal the plain numpy definitions on all of its numbers at once."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from pgxport.activations.observe import (
    BINS,
    ENTROPY_BINS,
    ENTROPY_LEVELS,
    LEVELS,
    PERCENTILE,
    InputObserver,
    LinearInput,
    Needs,
    RangeHistogram,
    entropy,
    mse,
    percentile,
)
from pgxport.activations.statistics import OBSERVERS
from pgxport.errors import NumericError

RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.normal(0, 3, 40_000),
    "heavy tails": RNG.standard_t(3, 40_000),
    "one side, as after a GELU": np.maximum(RNG.normal(0, 2, 40_000), -0.17),
    "far from zero": RNG.normal(70, 1, 40_000),
    "negative": -np.abs(RNG.normal(0, 1e-4, 40_000)),
    "large": RNG.normal(0, 1e5, 40_000),
}


@pytest.fixture(params=DATA.values(), ids=DATA.keys())
def x(request) -> np.ndarray:
    return request.param.astype(np.float32)


def histogram_of(x: np.ndarray, parts: int = 7) -> RangeHistogram:
    """A histogram to which the numbers are added in parts, the smallest first, so that its range grows."""
    histogram = RangeHistogram()
    for part in np.array_split(x[np.argsort(np.abs(x))], parts):
        histogram.add(part)
    return histogram


def test_a_histogram_is_numpys_over_everything_whatever_the_order(x):
    counts, edges = histogram_of(x).counts_and_edges()
    again, same = histogram_of(x[::-1], 3).counts_and_edges()
    expected, _ = np.histogram(x.astype(np.float64), BINS, range=(edges[0], edges[-1]))
    assert np.array_equal(counts, expected)
    assert np.array_equal(counts, again)
    assert np.array_equal(edges, same)
    assert edges[-1] / 2 <= np.abs(x).max() < edges[-1]


def test_zeros_are_counted_before_and_after_anything_else():
    histogram = RangeHistogram()
    for values in (np.zeros(5), np.array([0.75, -0.5]), np.zeros(3)):
        histogram.add(values.astype(np.float32))
    counts, edges = histogram.counts_and_edges()
    assert np.array_equal(counts, np.histogram([0.0] * 8 + [0.75, -0.5], BINS, range=(edges[0], edges[-1]))[0])


def test_the_ranges_of_nothing_but_zeros_are_zero():
    site = LinearInput("zero", 3, moments=False)
    site.add(np.zeros((4, 3), np.float32))
    assert not site.tensors()["range/zero"].any()


def test_a_percentile_is_numpys_within_a_bin(x):
    low, high = percentile(histogram_of(x))
    cut = (100 - PERCENTILE) / 2
    expected = np.percentile(x, [cut, 100 - cut], method="inverted_cdf")
    width = 2 * 2.0 ** np.frexp(np.abs(x).max())[1] / BINS
    assert np.abs([low, high] - expected).max() <= 1.01 * width
    assert x.min() <= low < high <= x.max()


def divergence(x: np.ndarray, reach: float, end: float) -> float:
    """The KL divergence of x in 128 levels of ±end from x in bins; values outside are clipped (Migacz, 2017)."""
    width = 2 * reach / ENTROPY_BINS
    half = round(end / width)
    counts, _ = np.histogram(x, ENTROPY_BINS, range=(-reach, reach))
    inside = counts[ENTROPY_BINS // 2 - half : ENTROPY_BINS // 2 + half + 1].astype(float)
    clipped = inside.copy()
    clipped[0] += counts[: ENTROPY_BINS // 2 - half].sum()
    clipped[-1] += counts[ENTROPY_BINS // 2 + half + 1 :].sum()
    levels = np.minimum(np.arange(len(inside)) // (len(inside) // ENTROPY_LEVELS), ENTROPY_LEVELS - 1)
    members = np.bincount(levels, clipped != 0, ENTROPY_LEVELS)
    spread_evenly = (np.bincount(levels, inside, ENTROPY_LEVELS) / np.maximum(members, 1))[levels]
    p, q = (v + 1e-4 for v in (clipped, spread_evenly))
    return float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum())


@pytest.mark.parametrize("name", ["normal", "heavy tails", "large"])
def test_entropy_finds_nearly_the_least_divergence(name):
    x = DATA[name].astype(np.float32)
    reach = 2.0 ** np.frexp(np.abs(x).max())[1]
    low, high = entropy(histogram_of(x))
    ends = np.arange(ENTROPY_LEVELS // 2, ENTROPY_BINS // 2) * 2 * reach / ENTROPY_BINS
    found = [divergence(x, reach, end) for end in ends]
    ours = divergence(x, reach, min(max(-low, high), ends[-1]))
    # Not the same to the last bin: ONNX Runtime smooths empty bins and rounds means down.
    assert ours <= min(found) + 0.1 * (max(found) - min(found))
    assert x.min() <= low < high <= x.max()


def squared_error(x: np.ndarray, low: float, high: float) -> float:
    x = x.astype(np.float64)
    step = (high - low) / (LEVELS - 1)
    zero = round(-low / step)
    return float(np.square(x - (np.clip(np.rint(x / step) + zero, 0, LEVELS - 1) - zero) * step).mean())


def test_mse_finds_a_range_that_no_other_beats_by_much(x):
    low, high = mse(histogram_of(x))
    ends = [f * max(x.max(), 0) for f in np.linspace(0.05, 1, 60)], [f * min(x.min(), 0) for f in np.linspace(0.05, 1, 60)]
    best = min(squared_error(x, a, b) for a in ends[1] for b in ends[0] if b > a)
    assert low <= 0 <= high
    assert squared_error(x, low, high) <= 1.1 * best


def test_a_sites_numbers_are_those_of_all_tokens_together():
    x = (RNG.normal(0, 1, (50, 7)) * np.arange(1, 8) + 0.5).astype(np.float32)
    site = LinearInput("a", 7, moments=True)
    for part in (x[:20].reshape(2, 10, 7), x[20:21], x[21:]):
        site.add(part)
    found, whole = site.tensors(), x.astype(np.float64)
    expected = [np.abs(whole).max(0), whole.mean(0), np.abs(whole).mean(0), (whole**2).mean(0)]
    assert np.allclose(found["inputs/a"], expected, rtol=1e-6)
    assert np.allclose(found["moment/a"], (whole.T @ whole / 50)[np.tril_indices(7)], rtol=1e-5, atol=1e-5)
    assert found["range/a"][OBSERVERS.index("minmax")].tolist() == [x.min(), x.max()]


def test_a_wide_sites_moment_is_summed_in_blocks():
    x = RNG.normal(0, 1, (30, 1100)).astype(np.float32)
    site = LinearInput("a", 1100, moments=True)
    site.add(x)
    expected = (x.T @ x / 30)[np.tril_indices(1100)]
    assert np.abs(site.tensors()["moment/a"] - expected).max() < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad):
    x = np.ones((3, 5), np.float32)
    x[1, 2] = bad
    with pytest.raises(NumericError, match=r"layers\.3\.fc1.*channel 2"):
        LinearInput("layers.3.fc1", 5, moments=False).add(x)


def test_linears_that_share_an_input_are_stored_once():
    statistics = InputObserver(Needs(moments=frozenset()))
    statistics.add_input(["q", "k", "v"], np.ones((1, 2, 3), np.float32))
    statistics.add_cache(0, "key", np.array([[[[1.0, -5.0]], [[2.0, 3.0]]]]))
    statistics.add_cache(0, "key", np.array([[[[-2.0, 1.0]], [[0.0, 4.0]]]]))
    assert statistics.inputs == {"q": "q", "k": "q", "v": "q"}
    tensors = statistics.tensors()
    assert tensors.keys() == {"inputs/q", "range/q", "cache/0/key"}
    assert tensors["cache/0/key"].tolist() == [[2, 5], [2, 4]]
