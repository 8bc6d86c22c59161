# SPDX-License-Identifier: Apache-2.0
"""The result of a tune: probes, whole bundles, which of them keep the limits, and the recipe's file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pgxport.exporter.recipe_toml import HEADER, to_toml
from pgxport.text import table
from pgxport.tuning.bundles import MeasuredRecipe, rules_text


@dataclass(frozen=True)
class Limits:
    """Points of the task metric, milliseconds an answer, bytes of the bundle; None: no limit."""

    points: float
    ms: float | None = None
    nbytes: int | None = None

    def excess(self, m: MeasuredRecipe) -> float:
        """Return by how much a bundle is over its limits, as parts of the limits; 0 where it keeps them."""
        over = [(m.loss.points, self.points), (m.ms, self.ms), (m.nbytes, self.nbytes)]
        return sum(max(0.0, value - limit) / (limit or 1.0) for value, limit in over if limit is not None)


@dataclass(frozen=True)
class Probe:
    """One group by itself in one candidate, all others in floats."""

    group: str
    candidate: str
    measured: MeasuredRecipe


@dataclass(frozen=True)
class Mix:
    """A proposal of the search, measured, and the sums that were expected from its probes."""

    measured: MeasuredRecipe
    names: Mapping[str, str]  # group -> candidate
    expected_kl: float
    expected_ms: float


@dataclass(frozen=True)
class Tuning:
    """All that was measured.

    Attributes:
        facts: Model, samples, machine, versions.
        base: The model with every group in floats.
        skipped: The names of recipes and probes that could not be measured, and why.
    """

    facts: Mapping[str, Any]
    limits: Limits
    named: tuple[MeasuredRecipe, ...]
    base: MeasuredRecipe
    probes: tuple[Probe, ...]
    mixes: tuple[Mix, ...]
    skipped: tuple[str, ...]

    @property
    def wholes(self) -> list[MeasuredRecipe]:
        """Named recipes and mixes, the smallest first."""
        return sorted([*self.named, *(mix.measured for mix in self.mixes)], key=lambda m: (m.nbytes, m.kl))

    @property
    def front(self) -> list[MeasuredRecipe]:
        """The bundles that no other dominates in size, time and loss; of equal losses a smaller KL is better."""
        return [m for m in self.wholes if not any(_dominates(other, m) for other in self.wholes)]

    @property
    def winner(self) -> MeasuredRecipe | None:
        """The smallest bundle that keeps every limit, named recipes among them; None where none does."""
        return next((m for m in self.wholes if self.limits.excess(m) == 0), None)

    @property
    def nearest(self) -> MeasuredRecipe:
        """The bundle that keeps the limits, or is least over them."""
        return min(self.wholes, key=lambda m: (self.limits.excess(m), m.nbytes, m.kl))

    def comparisons(self) -> dict[str, str]:
        """Return for each named recipe a mix no larger and no farther from float32, or why there is none."""
        texts = {}
        for m in self.named:
            same = [x for x in self.mixes if rules_text(x.measured.recipe) == rules_text(m.recipe)]
            better = [x for x in self.mixes if x.measured.nbytes <= m.nbytes and x.measured.kl <= m.kl and x not in same]
            fitting = [x for x in self.mixes if x.measured.nbytes <= m.nbytes]
            if better:
                best = min(better, key=lambda x: x.measured.kl).measured
                texts[m.label] = (
                    f"{best.label} beats it: {best.nbytes / 1e6:.2f} MB to {m.nbytes / 1e6:.2f}, KL {best.kl:.2g} to {m.kl:.2g}; "
                    f"points lost {best.loss.points:+.2f} to {m.loss.points:+.2f}"
                )
            elif same:
                texts[m.label] = f"{same[0].measured.label} is the same recipe, the best of its size"
            elif fitting:
                x = min(fitting, key=lambda x: x.measured.kl)
                texts[m.label] = (
                    f"no mix is better at its size: {x.measured.label} was expected to have KL {x.expected_kl:.2g} and has {x.measured.kl:.2g}, "
                    f"to its {m.kl:.2g}; "
                    + ("losses do not add up here" if x.expected_kl <= m.kl else "no choice of the candidates is as close")
                )
            else:
                texts[m.label] = "no mix is as small: its schemes are not among the candidates"
        return texts

    def refusal(self) -> str | None:
        """Return why no recipe was written; None where one was."""
        if self.winner:
            return None
        n, limits = self.nearest, self.limits
        wanted = [f"{limits.points:g} points lost"]
        wanted += [f"{limits.ms:g} ms"] if limits.ms is not None else []
        wanted += [f"{limits.nbytes / 1e6:g} MB"] if limits.nbytes is not None else []
        return (
            f"none of {len(self.wholes)} recipes keeps {', '.join(wanted)}; nothing was written. The nearest, {n.label}, loses "
            f"{n.loss.points:.2f} points, takes {n.ms:.1f} ms and has {n.nbytes / 1e6:.2f} MB: raise a limit, or give --calibration and more "
            f"--candidates"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data: bytes, milliseconds, nats and points."""
        keeps = {m.label: self.limits.excess(m) == 0 for m in self.wholes}
        ahead = {m.label for m in self.front}
        return {
            **self.facts, "limits": asdict(self.limits), "winner": self.winner.label if self.winner else None, "nearest": self.nearest.label,
            "wholes": [m.to_json() | {"keeps_limits": keeps[m.label], "on_front": m.label in ahead} for m in self.wholes],
            "mixes": {x.measured.label: {"names": x.names, "expected_kl": x.expected_kl, "expected_ms": x.expected_ms} for x in self.mixes},
            "float": self.base.to_json(), "probes": [{"group": p.group, "candidate": p.candidate, **p.measured.to_json()} for p in self.probes],
            "named": self.comparisons(), "skipped": self.skipped,
        }  # fmt: skip


def toml(tuning: Tuning) -> str:
    """Return the winner as a recipe's file, with its measurements as comments."""
    m, facts, limits = tuning.winner, tuning.facts, tuning.limits
    assert m is not None, "Bug: there is no recipe to write"
    machine, versions = facts["machine"], facts["machine"]["versions"]
    about = [
        f"Chosen by pgx tune for {facts['checkpoint']}"
        + (f", calibrated with {facts['calibration']}" if facts["calibration"] else ""),
        f"{m.label}: {m.nbytes / 1e6:.2f} MB, {m.ms:.1f} ms an answer of {facts['answer_tokens']:.1f} tokens; beside float32 ({facts['reference']['bytes'] / 1e6:.2f} MB, {facts['reference']['ms']:.1f} ms):",
        f"{points(m)} points lost of the mean task metric, limit {limits.points:g}; KL {m.kl:.3g} nats, {m.agreement:.2%} of next tokens the same",
        f"on {_counts(facts['samples'])}, {facts['engine']}, {facts['key']['threads'] or 'all'} threads, {machine['processor']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"checkpoint sha256 {facts['key']['checkpoint'][:16]}, samples {facts['key']['samples'][:16]}",
    ]
    about += [f"calibration sha256 {facts['key']['calibration'][:16]}"] if facts["key"]["calibration"] else []
    doubt = m.loss.doubt(limits.points)
    about += [f"In doubt: {doubt}"] if doubt else []
    text = to_toml(replace(m.recipe, name="tuned")).removeprefix(HEADER)
    return "".join(f"# {' '.join(line.split())}\n" for line in about) + text


def points(m: MeasuredRecipe) -> str:
    """Format a loss and its interval.

    >>> from pgxport.tuning.loss import Loss
    >>> from types import SimpleNamespace
    >>> points(SimpleNamespace(loss=Loss(0.5, -1.0, 2.0, {}, 3, 100)))
    '+0.50 (-1.00 – +2.00)'
    """
    loss = m.loss
    return f"{loss.points:+.2f}" + ("" if loss.low is None else f" ({loss.low:+.2f} – {loss.high:+.2f})")


def _counts(samples: Mapping[str, int]) -> str:
    return f"{sum(samples.values())} samples ({', '.join(f'{task} {count}' for task, count in samples.items())})"


def _dominates(a: MeasuredRecipe, b: MeasuredRecipe) -> bool:
    first, second = ((m.nbytes, m.ms, (m.loss.points, m.kl)) for m in (a, b))
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))  # type: ignore[operator]


def render(t: Tuning) -> str:
    """Return the result as text: what each group loses, the whole bundles, and which was chosen."""
    facts, reference = t.facts, t.facts["reference"]
    lines = [
        f"{facts['checkpoint']} on {_counts(facts['samples'])}; {facts['engine']}, {facts['key']['threads'] or 'all'} threads, "
        f"load average {facts['machine']['load_average']} before",
        *facts["remarks"],
        f"float32: {reference['bytes'] / 1e6:.2f} MB, {reference['ms']:.1f} ms an answer of {facts['answer_tokens']:.1f} tokens",
        "", "what each group loses by itself: KL to float32 in nats",
        table(_sensitivity(t)),
        "", "whole bundles; * no other is as small, as quick and loses as little; points of the task metric, 95 % interval",
    ]  # fmt: skip
    front, rows = {m.label for m in t.front}, [["", "MB", "ms", "points lost", "KL", "same next token", "limits", "recipe"]]
    for m in t.wholes:
        cells = [f"{m.nbytes / 1e6:.2f}", f"{m.ms:.1f}", points(m), f"{m.kl:.2g}", f"{m.agreement:.2%}"]
        rows.append(["*" if m.label in front else "", *cells, "holds" if t.limits.excess(m) == 0 else "–", m.label])
    lines += [table(rows), ""]
    lines += [f"{name}: {text}" for name, text in t.comparisons().items()]
    lines += [f"not measured: {reason}" for reason in t.skipped]
    if chosen := t.winner:
        tasks = ", ".join(f"{task} {lost:+.2f}" for task, lost in chosen.loss.tasks.items())
        lines += ["", f"chosen: {chosen.label}, the smallest that holds; points lost by task: {tasks}"]
        beyond = [task for task, lost in chosen.loss.tasks.items() if lost > t.limits.points]
        lines += [f"more than the limit by itself: {', '.join(beyond)}"] if beyond else []
        doubt = chosen.loss.doubt(t.limits.points)
        lines += [f"in doubt: {doubt}"] if doubt else []
    return "\n".join(lines)


def _sensitivity(t: Tuning) -> list[list[str]]:
    names = list(dict.fromkeys(p.candidate for p in t.probes))
    losses = {(p.group, p.candidate): f"{max(0.0, p.measured.kl - t.base.kl):.1e}" for p in t.probes}
    return [
        ["", *names],
        *([group, *(losses.get((group, n), "") for n in names)] for group in dict.fromkeys(p.group for p in t.probes)),
    ]
