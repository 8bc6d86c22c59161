# SPDX-License-Identifier: Apache-2.0
"""How sure a metric is: 95 % bootstrap intervals of a value and of a difference (Efron and Tibshirani 1993, ch. 13).

Knows no metric: a `Curve` gives its value for any weighting of the samples, and drawing samples again is a weighting.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

DRAWS = 2000
LEVEL = 95.0
BLOCK = 4_000_000  # weights in memory at once

Curve = Callable[[np.ndarray], np.ndarray]  # weights [R, N] of the samples -> values [R]


class Verdict(StrEnum):
    """What a paired difference allows to be said."""

    NOISE = "inside the noise"
    BETTER = "better"
    WORSE = "worse"


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and from how many samples; with fewer than two pictures there is no interval."""

    value: float
    low: float | None
    high: float | None
    samples: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A value minus the reference's on the same samples."""

    verdict: Verdict


def resamples(groups: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each sample is drawn, float64 [R, N] in blocks of R; the samples of one group are drawn together.

    >>> next(resamples("aab", draws=3)).shape
    (3, 3)
    """
    rng = np.random.default_rng(seed)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([numbers[group] for group in groups])
    count = len(numbers)
    left = draws
    while left:
        rows = min(left, max(1, BLOCK // max(len(group_of), 1)))
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        yield times[:, group_of].astype(np.float64)
        left -= rows


def estimate(curve: Curve, groups: Sequence[Hashable], *, biased: bool = False, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The value on all samples and its interval. Where all agree the interval is a point: it knows only what was drawn.

    Args:
        curve: The metric.
        groups: What is drawn together, a key for each sample.
        biased: Drawing a picture twice moves the metric itself, as it does mAP; the interval is moved back by the mean of that.
        draws: How many.
        seed: Of the draws; two runs with the same groups and seed are drawn alike.
    """
    value, low, high = _interval(curve, groups, draws, seed, biased=biased)
    return Estimate(value, low, high, len(groups))


def difference(
    curve: Curve,
    reference: Curve,
    groups: Sequence[Hashable],
    *,
    higher_is_better: bool = True,
    biased: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """The change from the reference and its interval, both drawn on the same samples, which takes their difficulty out."""
    value, low, high = _interval(lambda weights: curve(weights) - reference(weights), groups, draws, seed, biased=biased)
    if low is None or high is None or low <= 0 <= high:
        verdict = Verdict.NOISE
    else:
        verdict = Verdict.BETTER if (low > 0) == higher_is_better else Verdict.WORSE
    return Difference(value, low, high, len(groups), verdict)


def mean(values: Sequence[float] | np.ndarray) -> Curve:
    """The weighted mean of one value a sample."""
    return ratio(values, np.ones(len(values)))


def ratio(parts: Sequence[float] | np.ndarray, wholes: Sequence[float] | np.ndarray) -> Curve:
    """Sum of parts over sum of wholes, NaN where there is no whole: errors over characters, boxes met over true boxes."""
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)

    def curve(weights: np.ndarray) -> np.ndarray:
        top, bottom = weights @ part, weights @ whole
        return np.divide(top, bottom, out=np.full(len(weights), np.nan), where=bottom > 0)

    return curve


def _interval(
    curve: Curve, groups: Sequence[Hashable], draws: int, seed: int, *, biased: bool
) -> tuple[float, float | None, float | None]:
    value = float(curve(np.ones((1, len(groups))))[0])
    if len(set(groups)) < 2:
        return value, None, None
    values = np.concatenate([curve(weights) for weights in resamples(groups, draws, seed)])
    # A draw may hold no sample that counts, such as none with a true box.
    values = values[~np.isnan(values)]
    if not len(values):
        return value, None, None
    if biased:
        values += value - values.mean()
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return value, float(low), float(high)
