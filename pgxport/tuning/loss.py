# SPDX-License-Identifier: Apache-2.0
"""The loss of a bundle in points of the task metric, and whether the samples are enough to know it.

Points are hundredths of the metric's best value; with several tasks the loss is the mean of theirs, with
equal weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgxport.metrics import bootstrap
from pgxport.metrics.bootstrap import Curve
from pgxport.metrics.metrics import METRICS, groups, tally
from pgxport.metrics.sample import Sample
from pgxport.runners.outputs import Answer

RULE_OF_THREE = 3.0  # where none of n answers changed, at most 3/n of all do, at 95 % (Hanley and Lippman-Hand, 1983)


@dataclass(frozen=True)
class Loss:
    """Points lost, with the 95 % interval of the paired difference; below zero where the bundle is better.

    Attributes:
        tasks: Points lost by task and metric.
        changed: How many answers are not the reference's.
    """

    points: float
    low: float | None
    high: float | None
    tasks: dict[str, float]
    changed: int
    samples: int

    def doubt(self, limit: float) -> str | None:
        """Return why the samples are too few for the limit, and how many would do; None where they do."""
        if self.low is None or self.high is None:
            return "one picture has no interval; take more with --samples"
        if self.low == self.high:
            hidden = 100 * RULE_OF_THREE / self.samples
            if hidden <= limit:
                return None
            needed = math.ceil(100 * RULE_OF_THREE / limit) if limit > 0 else None
            why = f"no sample's metric changed, so that up to {hidden:.2g} points may be hidden (3 / {self.samples} samples)"
        elif (wide := (self.high - self.low) / 2) > limit:
            needed = math.ceil(self.samples * (wide / limit) ** 2) if limit > 0 else None
            why = f"the interval is ± {wide:.2g} points, wider than the limit of {limit:g}"
        else:
            return None
        return why + (f"; about {needed:,} samples in all would tell" if needed else "; no number of samples tells zero")


def loss(samples: Sequence[Sample], answers: Sequence[Answer], reference: Sequence[Answer]) -> Loss:
    """Compare answers with the reference's to the same samples."""
    curves: dict[str, Curve] = {}
    names: set[str] = set()
    for task, name in dict.fromkeys((s.task, s.metric) for s in samples):
        places = np.array([i for i, s in enumerate(samples) if (s.task, s.metric) == (task, name)])
        curves[f"{task} {METRICS[name].title}"] = _lost(name, places, samples, answers, reference)
        names.add(name)

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.mean([curve(weights) for curve in curves.values()], axis=0)

    estimate = bootstrap.estimate(mean, groups(samples), biased=any(METRICS[name].biased for name in names))
    every = np.ones((1, len(samples)))
    return Loss(
        estimate.value,
        estimate.low,
        estimate.high,
        {name: float(curve(every)[0]) for name, curve in curves.items()},
        sum(a.token_ids != b.token_ids for a, b in zip(answers, reference, strict=True)),
        len(samples),
    )


def _lost(
    name: str, places: np.ndarray, samples: Sequence[Sample], answers: Sequence[Answer], reference: Sequence[Answer]
) -> Curve:
    """Return the points lost of one task, as a function of the weights of all samples."""
    chosen = [samples[i] for i in places]
    now, before = (tally(name, chosen, [run[i] for i in places]).curve for run in (answers, reference))
    metric = METRICS[name]
    best = metric.scale or 1.0
    sign = 100 / best if metric.higher_is_better else -100 / best
    # A draw may hold none of a task's samples; its value is NaN, and bootstrap leaves that draw out.
    return lambda weights: sign * (before(weights[:, places]) - now(weights[:, places]))
