# SPDX-License-Identifier: Apache-2.0
"""Medians and paired ratios with intervals: which differences repeated measurements can tell."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 %, for 1, 2, 3, … degrees of freedom; beyond the table its last value, which errs towards
# "cannot tell".
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Median, least and most of some values: a benchmark has too few repetitions for quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second of two took, with the 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1: the runs tell the two apart."""
        return self.low > 1 or self.high < 1


def summary(values: Sequence[float]) -> Summary:
    """Median, least and most.

    >>> summary([3, 1, 2])
    Summary(median=2, low=1, high=3)
    """
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio | None:
    """How many times as long `second` took, from pairs measured one after the other; None of fewer than two.

    The mean and interval are those of the logarithms, so that the answer is the same whichever comes first. A
    disturbance longer than a pair cancels out; one that hits one of the two widens the interval.

    >>> paired_ratio([1.0, 2.0], [2.0, 4.0])
    Ratio(value=2.0, low=2.0, high=2.0)
    """
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    if len(logs) < 2:
        return None
    mean = statistics.fmean(logs)
    margin = T[min(len(logs) - 1, len(T)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(*(math.exp(x) for x in (mean, mean - margin, mean + margin)))


def verdict(first: str, second: str, ratio: Ratio | None) -> str:
    """The result of a comparison in words.

    >>> verdict("A", "B", Ratio(0.8, 0.75, 0.9))
    'B is faster than A (×1.25, 1.11–1.33)'
    """
    if ratio is None:
        return f"{first} and {second} cannot be ranked from one repetition; -r 5 might"
    if not ratio.differs:
        return f"{first} and {second}: no difference that these runs can tell (×{_interval(ratio)})"
    if ratio.value < 1:
        first, second, ratio = second, first, Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    return f"{first} is faster than {second} (×{_interval(ratio)})"


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}, {ratio.low:.2f}–{ratio.high:.2f}"
