# SPDX-License-Identifier: Apache-2.0
"""pgx bench: time and memory of bundles side by side, and which differences are real."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from pgxport.benchmarking.intervals import Ratio, paired_ratio, summary, verdict
from pgxport.benchmarking.measure import Batches, WholeAnswers, Work, worker
from pgxport.benchmarking.worker import Measurement, Progress, Worker, interleave
from pgxport.machine.conditions import describe_machine
from pgxport.machine.memory import ProcessMemory
from pgxport.machine.nvml import find_nvml
from pgxport.text import size, table

STAGES = {
    "verify": "verify (sha256)",
    "load": "load",
    "preprocess": "preprocess",
    "vision": "vision",
    "projector": "projector",
    "prefill": "prefill",
    "first_token": "to the first token",
    "step": "decode step",
    "overhead": "  of it outside the engine",
    "post": "post",
    "answer": "whole answer",
}
RANKED = ("first_token", "step", "answer")


@dataclass(frozen=True)
class Bench:
    """The measurements of one call of `bench`, and the conditions that they hold for."""

    measurements: list[Measurement]
    work: Work
    repetitions: int
    engine: str
    threads: int | None
    machine: dict[str, Any]

    def comparisons(self) -> list[tuple[str, Measurement, Measurement, Ratio | None]]:
        """Stage, first, second, and their ratio, of every two bundles that were measured to the end."""
        whole = [m for m in self.measurements if m.reason is None]
        return [
            (stage, a, b, paired_ratio(a.seconds[stage], b.seconds[stage]))
            for a, b in combinations(whole, 2)
            for stage in a.seconds
            if (stage.partition("/")[0] in RANKED or stage.startswith(("step@", "prefill@"))) and stage in b.seconds
        ]

    def to_json(self) -> dict[str, Any]:
        """The bench as plain data, in seconds and bytes."""
        return {
            "machine": self.machine,
            "engine": self.engine,
            "threads": self.threads,  # null: the engine's choice
            "repetitions": self.repetitions,
            "work": {"kind": self.work.kind, **asdict(self.work)},
            "spread": "low and high are the least and the most of all repetitions, after one warm-up that is not among them",
            "bundles": [measurement_json(m) for m in self.measurements],
            "comparisons": [
                {"stage": stage, "first": a.label, "second": b.label, "says": verdict(a.label, b.label, ratio)}
                | (asdict(ratio) | {"differs": ratio.differs} if ratio else {})
                for stage, a, b, ratio in self.comparisons()
            ],
        }


def bench(
    bundles: Sequence[str | Path],
    work: Work | None = None,
    *,
    repetitions: int = 5,
    engine: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure bundles in turn, each in a process of its own. One that fails is a row with its reason."""
    work, conditions = work or WholeAnswers(), describe_machine()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(label, str(bundle), work, engine=engine, threads=threads))
            for label, bundle in zip(labels(map(str, bundles)), bundles, strict=True)
        ]
        measured = interleave(workers, repetitions, progress)
        return Bench(_with_memory(workers, measured, work, engine), work, repetitions, engine, threads, conditions)


def _with_memory(workers: Sequence[Worker], measured: Sequence[Measurement], work: Work, engine: str) -> list[Measurement]:
    """The measurements with the GPU memory of each process and the peaks of batches, read after the work."""
    nvml, completed = find_nvml(engine), []
    for process, m in zip(workers, measured, strict=True):
        more: dict[str, Any] = {}
        if m.reason is None:
            more["peak_vram"] = nvml.held_by(process.pid) if nvml else None
        if isinstance(work, Batches) and m.reason is None:
            more |= process.ask({}) or {}
        completed.append(replace(m, facts=m.facts | more))
    if nvml:
        nvml.close()
    return completed


def labels(paths: Iterable[str]) -> list[str]:
    """A unique name for each path; a bundle measured against itself shows the noise of the machine.

    >>> labels(["a", "b", "a"])
    ['a', 'b', 'a #2']
    """
    counts: Counter[str] = Counter()
    names = []
    for path in paths:
        counts[path] += 1
        names.append(path if counts[path] == 1 else f"{path} #{counts[path]}")
    return names


def measurement_json(m: Measurement) -> dict[str, Any]:
    """A measurement as plain data, with the summary of each stage."""
    stages = {stage: asdict(summary(values)) | {"all": values} for stage, values in m.seconds.items()}
    plain: dict[str, Any] = {"label": m.label, "status": "failed" if m.reason else "ok", "reason": m.reason, **m.facts}
    plain |= {"stages": stages}
    if "step" in m.seconds:
        plain["tokens_per_second"] = asdict(summary([1 / s for s in m.seconds["step"]]))
    for batch in _sizes([m]):
        rates = {"images_per_second": f"answer/{batch}", "tokens_per_second": f"step/{batch}"}
        plain.setdefault("batches", {})[str(batch)] = {
            rate: asdict(summary([batch / s for s in m.seconds[stage]])) for rate, stage in rates.items()
        } | {f"peak_{kind}": held for kind, held in m.facts["peaks"][str(batch)].items()}
    return plain | {"memory": {"loaded": _memory_json(m.loaded), "peak": _memory_json(m.peak)}}


def render(b: Bench) -> str:
    """A bench as text: a row for each stage, a column for each bundle."""
    names = {m.label: chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i, m in enumerate(b.measurements)}
    lines = []
    for m in b.measurements:
        described = (
            f"{m.facts['recipe']} for {m.facts['target']}, {size(m.facts['bytes'])}, manifest {m.facts['manifest_sha256'][:12]}"
            if m.facts
            else ""
        )
        lines.append(f"{names[m.label]}: {m.label}: " + (f"FAILED: {m.reason}" if m.reason else described))
    whole = [m for m in b.measurements if m.reason is None]
    if whole:
        lines += ["", _table(whole, names), ""]
        for stage, first, second, ratio in b.comparisons():
            lines.append(f"{_title(stage)}: {verdict(names[first.label], names[second.label], ratio)}")
    here = b.machine
    threads = f"threads: {b.threads or 'as the engine chooses'}"
    lines += [
        f"{_work(b.work)}; {b.repetitions} repetitions after a warm-up: median (least–most); opened once; bundles in turn, every other time backwards",
        f"{b.engine}, {threads}, {here['cores']} cores of {here['processor']} ({here['vectors']}), load average {here['load_average']} before",
        ", ".join(f"{package} {version}" for package, version in here["versions"].items()),
    ]
    return "\n".join(lines)


def _table(measurements: list[Measurement], names: dict[str, str]) -> str:
    stages = [s for s in STAGES if any(s in m.seconds for m in measurements)]
    stages += [s for m in measurements[:1] for s in m.seconds if s not in STAGES]
    rows = [["", *(names[m.label] for m in measurements)]]
    for stage in stages:
        rows.append([_title(stage), *(_spread(m.seconds.get(stage)) for m in measurements)])
        if stage == "step":
            rate = [[1 / s for s in m.seconds["step"]] for m in measurements]
            rows.append(["tokens a second", *(f"{summary(r).median:.1f} ({min(r):.1f}–{max(r):.1f})" for r in rate)])
    rows += [row for size in _sizes(measurements) for row in _batch_rows(size, measurements)]
    for title, memory in (("loaded", [m.loaded for m in measurements]), ("peak", [m.peak for m in measurements])):
        for kind in ("private", "mapped", "resident"):
            rows.append([f"{title}: {kind}", *(size(getattr(held, kind)) if held else "not told" for held in memory)])
    if any(m.facts.get("target") != "cpu" for m in measurements):
        rows.append(["peak: GPU memory", *(_held(m.facts.get("peak_vram")) for m in measurements)])
    return table(rows)


def _batch_rows(size: int, measurements: list[Measurement]) -> list[list[str]]:
    """Rows of what a batch size gives a second and of the memory it takes."""
    rows = []
    for title, stage in ((f"images a second, {size} at a time", "answer"), (f"tokens a second, {size} at a time", "step")):
        rates = [[size / s for s in m.seconds[f"{stage}/{size}"]] for m in measurements]
        rows.append([title, *(f"{summary(r).median:.4g} ({min(r):.4g}–{max(r):.4g})" for r in rates)])
    for title, kind in ((f"peak: resident, {size} at a time", "resident"), (f"peak: GPU memory, {size} at a time", "vram")):
        held = [m.facts.get("peaks", {}).get(str(size), {}).get(kind) for m in measurements]
        if kind == "resident" or any(m.facts["target"] != "cpu" for m in measurements):
            rows.append([title, *map(_held, held)])
    return rows


def _sizes(measurements: Sequence[Measurement]) -> list[int]:
    """The batch sizes that were measured to the end."""
    return sorted({int(size) for m in measurements for size in m.facts.get("peaks", ())})


def _held(count: int | None) -> str:
    return "not measured" if count is None else size(count)


def _title(stage: str) -> str:
    kind, together, size = stage.partition("/")
    if together:
        return f"{STAGES[kind]}, {size} at a time"
    kind, at, place = stage.partition("@")
    if not at:
        return STAGES[stage]
    return f"prefill of {place}" if kind == "prefill" else f"{STAGES[kind]} after {place}"


def _work(work: Work) -> str:
    if isinstance(work, Batches):
        return (
            f"batches of {', '.join(map(str, work.sizes))} of one image, {work.prompt_tokens} prompt tokens, {work.new_tokens} decode "
            f"steps, eos ignored"
        )
    if isinstance(work, WholeAnswers):
        return f"images: {len(work.images) or 1}, {work.prompt_tokens} prompt tokens, {work.new_tokens} decode steps, eos ignored"
    return f"the decoder alone on random numbers, {work.steps} steps at each past"


def _spread(values: list[float] | None) -> str:
    """Median, least and most of some seconds, in the unit that suits the median.

    >>> _spread([0.0123, 0.012, 0.013])
    '12.3 ms (12.0–13.0)'
    """
    if not values:
        return "not measured"
    s = summary(values)
    scale, unit = (1, "s") if s.median >= 1 else (1e3, "ms") if s.median >= 1e-3 else (1e6, "µs")
    digits = 0 if s.median * scale >= 100 else 1 if s.median * scale >= 10 else 2
    median, low, high = (f"{value * scale:.{digits}f}" for value in (s.median, s.low, s.high))
    return f"{median} {unit}" + (f" ({low}–{high})" if len(values) > 1 else "")


def _memory_json(memory: ProcessMemory | None) -> dict[str, int] | None:
    return asdict(memory) if memory else None
