# SPDX-License-Identifier: Apache-2.0
"""Choose one option for each group: the recipes that lose least for every size. Pure functions of numbers.

Losses are assumed to add up, as HAWQ-V2 (Dong et al., 2020, arXiv 1911.03852) assumes of the perturbations of
layers and HAWQ-V3 (Yao et al., 2021, arXiv 2011.10680) of its integer program. The problem is then a
multiple-choice knapsack (Kellerer, Pferschy and Pisinger, 2004, ch. 11), solved for all sizes at once by
dynamic programming, exactly but for the rounding of costs to bins. Losses do not really add up, so callers
measure what this proposes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SIZE_BINS = 4096
TIME_BINS = 64


@dataclass(frozen=True)
class Option:
    """The changes that one scheme makes for one group, against the same model in floats."""

    name: str
    nbytes: int
    ms: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """An option's name for each group, and the sums of the options' changes."""

    names: Mapping[str, str]
    nbytes: int
    ms: float
    loss: float


def front(table: Mapping[str, Sequence[Option]], *, max_ms: float | None = None) -> list[Choice]:
    """Return the choices that lose least for their size, smallest first; each loses less than those before.

    Args:
        max_ms: Leave out choices that change the time by more; times are rounded up to bins. The front is
            empty where no choice is so fast.
    """
    sizes = [_bins([o.nbytes for o in options], _unit(table, "nbytes", SIZE_BINS, least=1)) for options in table.values()]
    times, most = [[0] * len(options) for options in table.values()], 0
    if max_ms is not None:
        unit = _unit(table, "ms", TIME_BINS, least=1e-9)
        times = [_bins([o.ms for o in options], unit, up=True) for options in table.values()]
        room = max_ms - sum(min(o.ms for o in options) for options in table.values())
        if room < 0:
            return []
        most = min(math.floor(room / unit + 1e-9), sum(map(max, times)))
    shape = (sum(map(max, sizes)) + 1, most + 1)
    least = np.full(shape, np.inf)  # the least loss of groups so far whose bins add up to exactly these
    least[0, 0] = 0
    steps = []
    for options, size_bins, time_bins in zip(table.values(), sizes, times, strict=True):
        after, taken = np.full(shape, np.inf), np.zeros(shape, np.int8)
        for i, (option, size, time) in enumerate(zip(options, size_bins, time_bins, strict=True)):
            if time > most:
                continue
            losses, kept = least[: shape[0] - size, : shape[1] - time] + option.loss, after[size:, time:]
            better = losses < kept
            kept[better] = losses[better]
            taken[size:, time:][better] = i
        least = after
        steps.append(taken)
    choices = []
    for size in range(shape[0]):
        time = int(least[size].argmin())
        if np.isfinite(least[size, time]):
            choices.append(_back(table, steps, (sizes, times), (size, time)))
    return _undominated(choices)


def spread(choices: Sequence[Choice], count: int) -> list[Choice]:
    """Return some of a front, evenly spaced by the logarithm of their losses, with both ends."""
    if len(choices) <= count:
        return list(choices)
    low, high = max(choices[-1].loss, choices[0].loss * 1e-6, 1e-12), max(choices[0].loss, 1e-12)
    levels = np.geomspace(high, low, count)
    places = {0, len(choices) - 1} | {next((i for i, c in enumerate(choices) if c.loss <= level), 0) for level in levels}
    return [choices[i] for i in sorted(places)]


def _unit(table: Mapping[str, Sequence[Option]], cost: str, bins: int, *, least: float) -> float:
    """Return the width of a bin, so that the largest sum of costs fits."""
    costs = [[getattr(o, cost) for o in options] for options in table.values()]
    return max(sum(max(c) - min(c) for c in costs) / bins, least)


def _bins(costs: Sequence[float], unit: float, *, up: bool = False) -> list[int]:
    low = min(costs)
    return [math.ceil((c - low) / unit - 1e-9) if up else round((c - low) / unit) for c in costs]


def _back(
    table: Mapping[str, Sequence[Option]],
    steps: Sequence[np.ndarray],
    bins: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    at: tuple[int, int],
) -> Choice:
    """Return the options that led to a place of the last table."""
    size, time = at
    picked: dict[str, Option] = {}
    for (group, options), taken, sizes, times in reversed(list(zip(table.items(), steps, *bins, strict=True))):
        i = int(taken[size, time])
        picked[group] = options[i]
        size, time = size - sizes[i], time - times[i]
    names = {group: picked[group].name for group in table}
    return Choice(
        names,
        sum(o.nbytes for o in picked.values()),
        sum(o.ms for o in picked.values()),
        sum(picked[group].loss for group in table),
    )


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept
