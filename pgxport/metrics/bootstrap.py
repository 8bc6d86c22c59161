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


@dataclass(frozen=True)
class Drawn:
    """A curve's value on all samples, and on each draw of them; with fewer than two pictures there is nothing to draw."""

    value: float
    values: np.ndarray | None
    samples: int

    def estimate(self, *, biased: bool = False) -> Estimate:
        """The value and its interval. Where all agree the interval is a point: it knows only what was drawn.

        Args:
            biased: Drawing a picture twice moves the metric itself, as it does mAP; the interval is moved back by the mean of that.
        """
        return Estimate(self.value, *_interval(self.value, self.values, biased=biased), self.samples)

    def change(self, reference: "Drawn", *, higher_is_better: bool = True, biased: bool = False) -> Difference:
        """The change from the reference, both drawn on the same samples, which takes their difficulty out."""
        values = None if self.values is None or reference.values is None else self.values - reference.values
        found = Drawn(self.value - reference.value, values, self.samples).estimate(biased=biased)
        if found.low is None or found.high is None or found.low <= 0 <= found.high:
            verdict = Verdict.NOISE
        else:
            verdict = Verdict.BETTER if (found.low > 0) == higher_is_better else Verdict.WORSE
        return Difference(found.value, found.low, found.high, found.samples, verdict)


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


def draw(curve: Curve, groups: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Drawn:
    """The curve on all samples and on draws of them.

    Args:
        curve: The metric.
        groups: What is drawn together, a key for each sample.
        draws: How many.
        seed: Of the draws; two runs with the same groups and seed are drawn alike, and may be compared.
    """
    value = float(curve(np.ones((1, len(groups))))[0])
    if len(set(groups)) < 2:
        return Drawn(value, None, len(groups))
    return Drawn(value, np.concatenate([curve(weights) for weights in resamples(groups, draws, seed)]), len(groups))


def estimate(curve: Curve, groups: Sequence[Hashable], *, biased: bool = False, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The value on all samples and its interval, where nothing else is compared with it."""
    return draw(curve, groups, draws, seed).estimate(biased=biased)


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


def _interval(value: float, values: np.ndarray | None, *, biased: bool) -> tuple[float | None, float | None]:
    # A draw may hold no sample that counts, such as none with a true box.
    values = None if values is None else values[~np.isnan(values)]
    if values is None or not len(values):
        return None, None
    if biased:
        values = values + (value - values.mean())
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
