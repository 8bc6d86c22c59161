# SPDX-License-Identifier: Apache-2.0
"""Reports made up for tests, of as few numbers as a page needs."""

from typing import Any

from pgxport.reporting import advice as verdict
from pgxport.reporting.schema import (
    Data,
    Device,
    Disagreement,
    Environment,
    Fidelity,
    Interval,
    Memory,
    Pair,
    Report,
    Rounding,
    Row,
    Said,
    Score,
    Spread,
)


def around(value: float, margin: float) -> Interval:
    return Interval(value=value, low=value - margin, high=value + margin)


def spread(p50: float, margin: float = 0.0) -> Spread:
    return Spread(p50=p50, p90=p50 * 1.1, p99=p50 * 1.3, low=p50 - margin, high=p50 + margin, count=50)


def row(label: str, ms: float = 10.0, quality: float = 0.9, megabytes: float = 10.0, **more: Any) -> Row:
    """A bundle that was measured to its end."""
    score = Score(
        task="answer", metric="exact_match", title="exact match", decides=True, higher_is_better=True, best=1.0, samples=50,
        result=around(quality, 0.02), change=None,
    )  # fmt: skip
    given = {
        "label": label, "name": label, "recipe": "int8", "target": "cpu", "status": "ok", "digest": "0" * 64,
        "bytes": int(megabytes * 1e6), "measured": 50, "quality": around(quality, 0.02), "scores": (score,),
        "seconds": {"answer": spread(ms / 1e3, ms / 1e4), "first_token": spread(ms / 2e3), "step": spread(ms / 1e5)},
        "tokens_per_second": spread(1e5 / ms), "peak": Memory(private=1_000_000, mapped=2_000_000, resident=3_000_000),
        "fidelity": Fidelity(identical=1.0, token_agreement=1.0, first_divergence=None, diverged=0, answers=50),
        "rounding": Rounding(positions=10, kl=0.1, agreement=1.0, worst=(("a.weight", 20.0),)),
    }  # fmt: skip
    return Row(**{**given, **more})


def failed(label: str, reason: str) -> Row:
    return Row(
        label=label, name="?", recipe="?", target="?", status="failed", reason=reason, exit_code=4, digest="", bytes=0, measured=0
    )


def pair(first: Row, second: Row, margin: float = 0.02) -> Pair:
    """The two as they are, every ratio and difference known to within the margin."""
    if first.quality is None or second.quality is None:
        return Pair(first=first.label, second=second.label, quality=None, latency=None)
    times = second.seconds["answer"].p50 / first.seconds["answer"].p50
    return Pair(
        first=first.label, second=second.label, quality=around(second.quality.value - first.quality.value, margin),
        latency=Interval(value=times, low=times / (1 + margin), high=times * (1 + margin)),
    )  # fmt: skip


def device(*rows: Row, name: str = "a machine", gate: float = 0.99, margin: float = 0.02, **more: Any) -> Device:
    """The first row is the reference; what each keeps of its quality is worked out."""
    base = rows[0].quality
    kept = [
        r.model_copy(update={"kept": around(r.quality.value / base.value, margin)})
        if r.quality and base and base.value and i
        else r
        for i, r in enumerate(rows)
    ]
    ok = [r for r in kept if r.status == "ok"]
    given = {
        "name": name, "command": "pgx report a b -o report",
        "environment": Environment(
            processor=name, cores=4, memory_bytes=8_000_000_000, system="Linux", engine="cpu", threads=None, load_average=0.5,
            governor=None, max_mhz=None, energy=(), versions={"pgxport": "0"},
        ),
        "data": Data(
            format="folder", source="data", digest="0" * 64, samples=50, tasks={"answer": 50}, records=50, skipped=0
        ),
        "reference": rows[0].label, "gate": gate, "rows": tuple(kept), "verdict": (), "disagreements": (),
        "pairs": tuple(pair(a, b, margin) for i, a in enumerate(ok) for b in ok[i + 1 :]),
    }  # fmt: skip
    made = Device(**{**given, **more})
    return made.model_copy(update={"verdict": verdict.findings(made)})


def report(*devices: Device) -> Report:
    return Report(pgxport="0", created="2026-01-01T00:00:00+00:00", devices=devices)


def disagreement(texts: dict[str, str], **more: Any) -> Disagreement:
    """The first text is the reference's."""
    first = next(iter(texts.values()))
    said = tuple(Said(label=label, text=text, score=float(text == first), same=text == first) for label, text in texts.items())
    given = {"sample": "s1", "task": "answer", "prompt": "answer en what?", "truth": first, "metric": "exact match"}
    return Disagreement(**{**given, "answers": said, **more})
