# SPDX-License-Identifier: Apache-2.0
"""Turn measurements into the rows of a report: a pure function of samples, answers and times."""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pgxport.bundle.manifest import Parity
from pgxport.metrics import bootstrap, fidelity
from pgxport.metrics.bootstrap import Curve, Resampled
from pgxport.metrics.metrics import METRICS, cider_is_defined, groups, metrics_for, tally
from pgxport.metrics.sample import Sample
from pgxport.reporting import schema
from pgxport.reporting.asking import TokenAgreement
from pgxport.reporting.measured import Asked, answer_of
from pgxport.reporting.shared_pass import SubjectRun
from pgxport.runners.outputs import Answer

WORST = 10  # matrices that rounding changed most


@dataclass(frozen=True)
class Subset:
    """The samples of one task that one metric can judge."""

    task: str
    metric: str
    decides: bool
    at: tuple[int, ...]


def subsets(samples: Sequence[Sample]) -> list[Subset]:
    """Return which metric is taken over which samples; the first of a task decides.

    CIDEr-D is not shown beside another metric where it says nothing.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for i, sample in enumerate(samples):
        for metric in metrics_for(sample):
            places.setdefault((sample.task, metric), []).append(i)
    deciding = {(s.task, s.metric) for s in samples}
    shown = {
        key: at for key, at in places.items() if key in deciding or key[1] != "cider" or cider_is_defined(samples[i] for i in at)
    }
    return [Subset(task, metric, (task, metric) in deciding, tuple(at)) for (task, metric), at in shown.items()]


@dataclass(frozen=True)
class Judged:
    """A run's curves: one of each subset over all samples, and the quality."""

    curves: Mapping[Subset, Curve]
    quality: Curve


def judge(samples: Sequence[Sample], answers: Sequence[Answer], parts: Sequence[Subset]) -> Judged:
    """Return the metrics of a run, as functions of how often each sample counts."""
    curves = {part: _restricted(samples, answers, part) for part in parts}
    deciding = [(METRICS[part.metric], curves[part]) for part in parts if part.decides]

    def quality(weights: np.ndarray) -> np.ndarray:
        shares = [c(weights) / m.scale if m.higher_is_better else 1 - c(weights) for m, c in deciding]
        return np.mean(shares, axis=0)

    return Judged(curves, quality)


def rows(samples: Sequence[Sample], keys: Sequence[str], runs: Sequence[SubjectRun], reference: int) -> tuple[schema.Row, ...]:
    """Return a row for each run, in their order."""
    parts, drawn = subsets(samples), groups(samples)
    whole = [run.reason is None and all(key in run.asked for key in keys) for run in runs]
    theirs = _answers(runs[reference], keys) if whole[reference] else None
    judged = judge(samples, theirs, parts) if theirs else None
    before = _drawn(judged, drawn) if judged else None
    made = []
    for i, (run, complete) in enumerate(zip(runs, whole, strict=True)):
        if not complete:
            made.append(_failed(run, keys))
            continue
        answers = _answers(run, keys)
        mine = judge(samples, answers, parts)
        now = before if before and i == reference else _drawn(mine, drawn)
        scores = [_score(part, now[part], before[part] if before and i != reference else None) for part in parts]
        kept = _kept(mine, judged, drawn) if judged else None
        near = _fidelity(run, answers, theirs, keys) if theirs and i != reference else None
        made.append(
            _row(run, keys, samples, answers).model_copy(
                update={
                    "quality": _interval(bootstrap.estimate(mine.quality, drawn)),
                    "kept": kept,
                    "scores": tuple(s for s in scores if s),
                    "fidelity": near,
                }
            )
        )
    return tuple(made)


def pairs(samples: Sequence[Sample], keys: Sequence[str], runs: Sequence[SubjectRun]) -> tuple[schema.Pair, ...]:
    """Compare the qualities and the times of every two runs that came to their end."""
    whole = [run for run in runs if run.reason is None and all(key in run.asked for key in keys)]
    parts, drawn = [part for part in subsets(samples) if part.decides], groups(samples)
    quality = {run.label: bootstrap.draw(judge(samples, _answers(run, keys), parts).quality, drawn) for run in whole}
    compared = []
    for n, first in enumerate(whole):
        for second in whole[n + 1 :]:
            change = quality[second.label].change(quality[first.label])
            compared.append(
                schema.Pair(
                    first=first.label, second=second.label, quality=_interval(change), latency=_ratio(first, second, keys)
                )
            )
    return tuple(compared)


def _restricted(samples: Sequence[Sample], answers: Sequence[Answer], part: Subset) -> Curve:
    at = np.array(part.at)
    inner = tally(part.metric, [samples[i] for i in at], [answers[i] for i in at]).curve
    return lambda weights: inner(weights[:, at])


def _drawn(judged: Judged, groups: Sequence[Hashable]) -> dict[Subset, Resampled]:
    """Draw each metric's samples once, for its interval and for the difference to another run."""
    return {part: bootstrap.draw(_over(part, curve), [groups[at] for at in part.at]) for part, curve in judged.curves.items()}


def _score(part: Subset, mine: Resampled, reference: Resampled | None) -> schema.Score | None:
    metric, change = METRICS[part.metric], None
    if reference is not None:
        d = mine.change(reference, higher_is_better=metric.higher_is_better, biased=metric.biased)
        if changed := _interval(d):
            change = schema.Change(**changed.model_dump(), verdict=d.verdict.value)
    value = _interval(mine.estimate(biased=metric.biased))
    if value is None:
        return None
    return schema.Score(
        task=part.task,
        metric=part.metric,
        title=metric.title,
        decides=part.decides,
        best=metric.scale,
        samples=len(part.at),
        higher_is_better=metric.higher_is_better,
        result=value,
        change=change,
    )


def _over(part: Subset, curve: Curve) -> Curve:
    """Return the curve as a function of its own samples' weights, which are drawn by themselves."""
    width, at = max(part.at) + 1, np.array(part.at)

    def own(weights: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(weights), width))
        whole[:, at] = weights
        return curve(whole)

    return own


def _kept(mine: Judged, reference: Judged, drawn: Sequence[Hashable]) -> schema.Interval | None:
    if not float(reference.quality(np.ones((1, len(drawn))))[0]) > 0:
        return None  # a share of 0 is not defined

    def share(weights: np.ndarray) -> np.ndarray:
        before = reference.quality(weights)
        return np.divide(mine.quality(weights), before, out=np.full(len(before), np.nan), where=before > 0)

    return _interval(bootstrap.estimate(share, drawn))


def retimed(rows: Sequence[schema.Row], runs: Sequence[SubjectRun], keys: Sequence[str]) -> tuple[schema.Row, ...]:
    """Return the rows of the same answers with the times of these runs."""
    return tuple(
        row if row.status == "failed" else row.model_copy(update=_cost(run, keys)) for row, run in zip(rows, runs, strict=True)
    )


def retimed_pairs(pairs: Sequence[schema.Pair], runs: Sequence[SubjectRun], keys: Sequence[str]) -> tuple[schema.Pair, ...]:
    """Return the pairs of the same answers with the times of these runs."""
    named = {run.label: run for run in runs}
    return tuple(p.model_copy(update={"latency": _ratio(named[p.first], named[p.second], keys)}) for p in pairs)


def _row(run: SubjectRun, keys: Sequence[str], samples: Sequence[Sample], answers: Sequence[Answer]) -> schema.Row:
    asked = [run.asked[key] for key in dict.fromkeys(keys)]
    broken = fidelity.faults(samples, answers)
    facts = run.facts
    return schema.Row(
        label=run.label,
        name=facts["name"],
        recipe=facts["recipe"],
        target=facts["target"],
        status="ok",
        digest=facts["digest"],
        bytes=facts["bytes"],
        measured=len(asked),
        refused=sum(a.refused is not None for a in asked),
        empty=broken.empty,
        malformed=broken.malformed,
        truncated=broken.truncated,
        rounding=_rounding(facts.get("parity")),
    ).model_copy(update=_cost(run, keys))


def _cost(run: SubjectRun, keys: Sequence[str]) -> dict[str, object]:
    """Return the fields of a row that depend on the machine: times, memory, energy, clocks."""
    asked = [run.asked[key] for key in dict.fromkeys(keys)]
    stages = {stage for a in asked for stage in a.seconds}
    rates = [1 / a.seconds["step"] for a in asked if a.seconds.get("step", 0) > 0]
    sources = dict.fromkeys(source for a in asked for source in a.joules)
    opened = run.opened[-1] if run.opened else None
    peaks = [a.peak for a in run.asked.values() if a.peak]
    energy = [schema.Energy(source=s, joules=spread([a.joules[s] for a in asked if s in a.joules])) for s in sources]
    return {
        "seconds": {stage: spread([a.seconds[stage] for a in asked if stage in a.seconds]) for stage in stages},
        "tokens_per_second": spread(rates) if rates else None,
        "load_seconds": opened.seconds if opened else {},
        "loaded": opened.loaded if opened else None,
        "peak": schema.Memory(**{k: max(getattr(p, k) for p in peaks) for k in ("private", "mapped", "resident")})
        if peaks
        else None,
        "peak_vram": max((a.vram for a in run.asked.values() if a.vram is not None), default=None),
        "energy": tuple(energy),
        "notes": tuple(notes(asked)),
    }


def _failed(run: SubjectRun, keys: Sequence[str]) -> schema.Row:
    facts = {"name": "?", "recipe": "?", "target": "?", "digest": "", "bytes": 0, **run.facts}
    answered = sum(key in run.asked for key in set(keys))
    reason = run.reason or f"measured on {answered} of {len(set(keys))} samples only"
    return schema.Row(
        label=run.label,
        name=facts["name"],
        recipe=facts["recipe"],
        target=facts["target"],
        digest=facts["digest"],
        bytes=facts["bytes"],
        status="failed",
        reason=reason,
        exit_code=run.exit_code,
        measured=answered,
    )


def _fidelity(run: SubjectRun, answers: Sequence[Answer], theirs: Sequence[Answer], keys: Sequence[str]) -> schema.Fidelity:
    # Samples that share a picture and a prompt share an answer, which counts once.
    once = {key: (a.token_ids, b.token_ids) for key, a, b in zip(keys, answers, theirs, strict=True)}
    token_ids = list(once.values())
    diverged = [at for a, b in token_ids if (at := fidelity.first_divergence(a, b)) is not None]
    lines = [run.teacher_forced[key].agreement for key in once if key in run.teacher_forced]
    compared = [agreement for agreement in lines if agreement]
    total = TokenAgreement.total(compared)
    refused = [line.refused for line in run.teacher_forced.values() if line.refused]
    return schema.Fidelity(
        identical=statistics.fmean(float(a == b) for a, b in token_ids),
        token_agreement=statistics.fmean(fidelity.token_agreement(a, b) for a, b in token_ids),
        first_divergence=statistics.median(diverged) if diverged else None,
        diverged=len(diverged),
        answers=len(token_ids),
        followed=len(compared),
        positions=total.positions,
        top1=total.agreed / total.positions if total.positions else None,
        kl=total.kl / total.positions if total.positions else None,
        kl_worst=total.kl_worst if total.positions else None,
        kl_located=total.kl_located / total.located if total.located else None,
        not_compared=refused[0] if refused else None,
    )


def spread(values: Sequence[float]) -> schema.Spread:
    """Return percentiles, and the interval of the median from order statistics (Conover 1999, ch. 3.2).

    >>> spread([3.0, 1.0, 2.0]).p50
    2.0
    """
    ordered = np.sort(np.asarray(values, np.float64))
    p50, p90, p99 = (float(p) for p in np.percentile(ordered, (50, 90, 99)))
    count = len(ordered)
    margin = 1.96 * count**0.5 / 2
    first, last = int(np.floor(count / 2 - margin)), int(np.ceil(count / 2 + margin))
    inside = first >= 0 and last < count
    low, high = (float(ordered[first]), float(ordered[last])) if inside else (None, None)
    return schema.Spread(p50=p50, p90=p90, p99=p99, low=low, high=high, count=count)


def notes(asked: Sequence[Asked]) -> list[str]:
    """Describe the clocks: whether they were held back or that is not known, their range, and the heat."""
    texts = []
    if times := sum(a.throttled or 0 for a in asked):
        texts.append(f"throttled {times} times")
    slowed = Counter(reason for a in asked for reason in a.slowed)
    texts += [f"{reason} at the end of {count} of {len(asked)} answers" for reason, count in slowed.items()]
    if not texts:
        known = any(a.throttled is not None or a.gpu_mhz is not None for a in asked)
        texts.append("not throttled" if known else "throttling not told")
    for name, clocks in (("clock", [a.mhz for a in asked if a.mhz]), ("GPU clock", [a.gpu_mhz for a in asked if a.gpu_mhz])):
        if clocks and min(clocks) < 0.9 * max(clocks):
            texts.append(f"{name} between {min(clocks):.0f} and {max(clocks):.0f} MHz")
    if heat := [a.celsius for a in asked if a.celsius]:
        texts.append(f"up to {max(heat):.0f} °C")
    return texts


def _ratio(first: SubjectRun, second: SubjectRun, keys: Sequence[str]) -> schema.Interval | None:
    """Return the geometric mean over samples of the second's time over the first's."""
    both = [(first.asked[k].seconds.get("answer"), second.asked[k].seconds.get("answer")) for k in dict.fromkeys(keys)]
    logs = np.array([np.log(b / a) for a, b in both if a and b])
    if len(logs) < 2:
        return None
    e = bootstrap.estimate(bootstrap.mean(logs), range(len(logs)))
    value, low, high = (None if x is None else float(np.exp(x)) for x in (e.value, e.low, e.high))
    assert value is not None
    return schema.Interval(value=value, low=low, high=high)


def _rounding(parity: Mapping[str, object] | None) -> schema.Rounding | None:
    if parity is None:
        return None
    measured = Parity.model_validate(parity)
    worst = tuple(measured.losses[:WORST])
    return schema.Rounding(positions=measured.positions, kl=measured.kl, agreement=measured.agreement, worst=worst)


def _answers(run: SubjectRun, keys: Sequence[str]) -> list[Answer]:
    known: dict[str, Answer] = {}
    return [known[key] if key in known else known.setdefault(key, answer_of(run.asked[key])) for key in keys]


def _interval(e: bootstrap.Estimate) -> schema.Interval | None:
    """Return the estimate as an interval; None where there was nothing to judge."""
    return None if math.isnan(e.value) else schema.Interval(value=e.value, low=e.low, high=e.high)
