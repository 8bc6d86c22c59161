# SPDX-License-Identifier: Apache-2.0
"""Choose one option for each group: the recipes that lose least for every size. Pure functions of numbers.

Losses are taken to add up, as HAWQ-V2 (Dong et al., 2020, arXiv 1911.03852) takes the perturbations of layers and HAWQ-V3
(Yao et al., 2021, arXiv 2011.10680) those of its integer program. What is left is a multiple-choice knapsack (Kellerer, Pferschy
and Pisinger, 2004, ch. 11), solved for all sizes at once by dynamic programming, exactly but for the rounding of costs to bins.
Losses do not add up in truth, so whoever uses this measures what it proposes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SIZE_BINS = 4096
TIME_BINS = 64


@dataclass(frozen=True)
class Option:
    """What one scheme for one group changes, beside the same model in floats."""

    name: str
    nbytes: int
    ms: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """An option's name for each group, and the sums of what they change."""

    names: Mapping[str, str]
    nbytes: int
    ms: float
    loss: float


def front(table: Mapping[str, Sequence[Option]], *, max_ms: float | None = None) -> list[Choice]:
    """The choices that lose least for their size, smallest first; each loses less than those before.

    Args:
        max_ms: Leave out choices that change the time by more. Times are rounded up, so that none is beyond it. Where
            no choice is so fast, there is none.
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
            losses, there = least[: shape[0] - size, : shape[1] - time] + option.loss, after[size:, time:]
            better = losses < there
            there[better] = losses[better]
            taken[size:, time:][better] = i
        least = after
        steps.append(taken)
    found = []
    for size in range(shape[0]):
        time = int(least[size].argmin())
        if np.isfinite(least[size, time]):
            found.append(_back(table, steps, (sizes, times), (size, time)))
    return _undominated(found)


def spread(found: Sequence[Choice], count: int) -> list[Choice]:
    """Some of a front, by losses that are evenly apart on a logarithmic scale; the first and the last are among them."""
    if len(found) <= count:
        return list(found)
    low, high = max(found[-1].loss, found[0].loss * 1e-6, 1e-12), max(found[0].loss, 1e-12)
    levels = np.geomspace(high, low, count)
    places = {0, len(found) - 1} | {next((i for i, c in enumerate(found) if c.loss <= level), 0) for level in levels}
    return [found[i] for i in sorted(places)]


def _unit(table: Mapping[str, Sequence[Option]], cost: str, bins: int, *, least: float) -> float:
    """How much of a cost is a bin, so that all there may be fits."""
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
    """The options that led to a place of the last table."""
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


def _undominated(found: Sequence[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.nbytes, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept
