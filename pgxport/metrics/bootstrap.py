# SPDX-License-Identifier: Apache-2.0
"""95 % bootstrap intervals of a metric and of a difference between two runs (Efron and Tibshirani 1993).

Knows no metric: a `Curve` gives its value for any weights of the samples, and a draw of samples with
replacement is a weighting.
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
    """What a paired difference shows."""

    NOISE = "inside the noise"
    BETTER = "better"
    WORSE = "worse"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of samples; fewer than two pictures give no interval."""

    value: float
    low: float | None
    high: float | None
    samples: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The value of a run minus the reference's, on the same samples."""

    verdict: Verdict


@dataclass(frozen=True)
class Resampled:
    """A curve's value on all samples, and on the draws of them: [R], or None with fewer than two pictures."""

    value: float
    values: np.ndarray | None
    samples: int

    def estimate(self, *, biased: bool = False) -> Estimate:
        """Return the value and its interval, which is a point where all samples agree.

        Args:
            biased: Drawing a picture twice changes the metric itself, as it does mAP; the interval is moved
                back by the mean of that.
        """
        return Estimate(self.value, *_interval(self.value, self.values, biased=biased), self.samples)

    def change(self, reference: "Resampled", *, higher_is_better: bool = True, biased: bool = False) -> Difference:
        """Return the change from the reference; the same draws take the samples' difficulty out."""
        values = None if self.values is None or reference.values is None else self.values - reference.values
        change = Resampled(self.value - reference.value, values, self.samples).estimate(biased=biased)
        if change.low is None or change.high is None or change.low <= 0 <= change.high:
            verdict = Verdict.NOISE
        else:
            verdict = Verdict.BETTER if (change.low > 0) == higher_is_better else Verdict.WORSE
        return Difference(change.value, change.low, change.high, change.samples, verdict)


def resamples(groups: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each sample is drawn, float64 [R, N] in blocks of R; one group is drawn together.

    >>> next(resamples("aab", draws=3)).shape
    (3, 3)
    """
    rng = np.random.default_rng(seed)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([numbers[group] for group in groups])
    count = len(numbers)
    remaining = draws
    while remaining:
        rows = min(remaining, max(1, BLOCK // max(len(group_of), 1)))
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        yield times[:, group_of].astype(np.float64)
        remaining -= rows


def draw(curve: Curve, groups: Sequence[Hashable], draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Evaluate the curve on all samples and on draws of them.

    Args:
        curve: The metric.
        groups: A key for each sample; samples with one key are drawn together.
        draws: The number of draws.
        seed: The seed of the draws; runs with the same groups and seed have the same draws.
    """
    value = float(curve(np.ones((1, len(groups))))[0])
    if len(set(groups)) < 2:
        return Resampled(value, None, len(groups))
    return Resampled(value, np.concatenate([curve(weights) for weights in resamples(groups, draws, seed)]), len(groups))


def estimate(curve: Curve, groups: Sequence[Hashable], *, biased: bool = False, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return the value on all samples and its interval, for a metric of one run."""
    return draw(curve, groups, draws, seed).estimate(biased=biased)


def mean(values: Sequence[float] | np.ndarray) -> Curve:
    """Return the curve of the weighted mean of one value a sample."""
    return ratio(values, np.ones(len(values)))


def ratio(parts: Sequence[float] | np.ndarray, wholes: Sequence[float] | np.ndarray) -> Curve:
    """Return the curve of sum of parts over sum of wholes, such as errors over characters; NaN over 0."""
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)

    def curve(weights: np.ndarray) -> np.ndarray:
        top, bottom = weights @ part, weights @ whole
        return np.divide(top, bottom, out=np.full(len(weights), np.nan), where=bottom > 0)

    return curve


def _interval(value: float, values: np.ndarray | None, *, biased: bool) -> tuple[float | None, float | None]:
    # A draw may hold no sample that the metric judges, such as none with a true box.
    values = None if values is None else values[~np.isnan(values)]
    if values is None or not len(values):
        return None, None
    if biased:
        values = values + (value - values.mean())
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
