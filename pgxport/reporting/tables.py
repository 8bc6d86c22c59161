# SPDX-License-Identifier: Apache-2.0
"""The tables of a report, cell by cell, the same for every page. Knows no HTML and no Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pgxport.reporting.advice import latency, passes, percent, ratio
from pgxport.reporting.schema import Board, Device, Interval, Rate, Row, Score, Spread

NOT_MEASURED = "not measured"
WORST = 3  # matrices of a bundle; report.json has ten
# Stages in the order of their work, as people call them.
STAGES = {
    "preprocess": "preprocess", "vision": "vision", "projector": "projector", "prefill": "prefill", "first_token": "to the first token",
    "step": "decode step", "decode": "all decode steps", "post": "post", "answer": "whole answer",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A caption, a head and rows; the first cell of a row names it, and numbers are aligned right."""

    id: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def all_tables(device: Device) -> list[Table]:
    """Return the tables that have rows."""
    tables = [
        bundles(device),
        scores(device),
        stages(device),
        throughput(device),
        fidelity(device),
        memory(device),
        rounding(device),
    ]
    return [table for table in tables if table.rows]


def bundles(device: Device) -> Table:
    """Return a row for each bundle, with the figures that decide."""
    columns: dict[str, Callable[[Row], str]] = {
        "status": lambda row: _status(row, device),
        "MB": lambda row: f"{row.bytes / 1e6:.4g}",
        "quality, %": lambda row: interval(row.quality, 100),
        f"of {device.reference}'s": lambda row: percent(row.kept) if row.kept and row.label != device.reference else "",
        "first token, ms": lambda row: spread(row.seconds.get("first_token")),
        "a token, ms": lambda row: spread(row.seconds.get("step")),
        "tokens/s": lambda row: spread(row.tokens_per_second, 1),
        "answer, ms": lambda row: spread(row.seconds.get("answer")),
        "times as long": lambda row: _times(device, row),
        "peak MB": lambda row: f"{row.peak.resident / 1e6:.0f}" if row.peak else NOT_MEASURED,
        "peak VRAM, MB": lambda row: f"{row.peak_vram / 1e6:.0f}" if row.peak_vram is not None else NOT_MEASURED,
        "J an answer": lambda row: "; ".join(f"{e.joules.p50:.3g} ({e.source})" for e in row.energy) or NOT_MEASURED,
        "empty": lambda row: str(row.empty),
        "malformed": lambda row: str(row.malformed),
        "cut off": lambda row: str(row.truncated),
        "refused": lambda row: str(row.refused),
        "clocks": lambda row: "; ".join(row.notes) or "not told",
    }
    rows = []
    for row in device.rows:
        if row.status == "failed":
            # A failed bundle is a row with its reason; what was not measured to the end is not shown.
            rows.append((row.label, columns["status"](row), *[""] * (len(columns) - 1)))
        else:
            rows.append((row.label, *(show(row) for show in columns.values())))
    caption = (
        f"Bundles: {device.data.samples} samples, medians with their 95 % intervals. Quality is the mean over tasks of the metric that "
        f"decides, each as a share of its best; the baseline of what is kept and of times as long is {device.reference}"
    )
    return Table("bundles", caption, ("bundle", *columns), tuple(rows))


def scores(device: Device) -> Table:
    """Return a row for each metric of each task, with its difference to the reference on the same samples."""
    ok = _ok(device)
    given = {row.label: {(s.task, s.metric): s for s in row.scores} for row in ok}
    rows = []
    for key, first in {key: s for scores in given.values() for key, s in scores.items()}.items():
        title = f"{first.task}: {first.title}" + (", decides" if first.decides else "")
        rows.append((title, str(first.samples), *(_score(given[row.label].get(key)) for row in ok)))
    caption = f"Accuracy: value and its 95 % bootstrap interval, and the difference to {device.reference}'s on the same samples"
    return Table("metrics", caption, ("metric", "samples", *(row.label for row in ok)), tuple(rows))


def stages(device: Device) -> Table:
    """Return p50 / p90 / p99 of each stage."""
    ok = _ok(device)
    rows = []
    for stage, title in STAGES.items():
        if any(stage in row.seconds for row in ok):
            rows.append((title, *(_percentiles(row.seconds.get(stage)) for row in ok)))
    for stage in sorted({s for row in ok for s in row.load_seconds}):
        rows.append((f"once: {stage}", *(_ms(row.load_seconds.get(stage)) for row in ok)))
    return Table(
        "stages", "Latency by stage: p50 / p90 / p99 over samples, ms", ("stage", *(row.label for row in ok)), tuple(rows)
    )


def throughput(device: Device) -> Table:
    """Return the throughput of several answers at a time."""
    rows = [
        (
            row.label,
            str(b.size),
            rate(b.images_per_second),
            rate(b.tokens_per_second),
            f"{b.peak_resident / 1e6:.0f}" if b.peak_resident is not None else NOT_MEASURED,
            f"{b.peak_vram / 1e6:.0f}" if b.peak_vram is not None else NOT_MEASURED,
        )
        for row in _ok(device)
        for b in row.batches
    ]
    head = ("bundle", "at a time", "images/s", "tokens/s", "peak MB", "peak VRAM, MB")
    caption = "Throughput: one picture and prompt several times, answers of one length; median (least–most)"
    return Table("throughput", caption, head, tuple(rows))


def fidelity(device: Device) -> Table:
    """Return how close the answers stay to the reference's, whether those are right or not."""
    rows = []
    for row in _ok(device):
        if (f := row.fidelity) is None:
            continue
        none = f.not_compared or NOT_MEASURED
        rows.append(
            (
                row.label,
                f"{f.identical:.1%} of {f.answers}",
                f"{f.token_agreement:.1%}",
                "none diverged" if f.first_divergence is None else f"{f.first_divergence:.0f} ({f.diverged} diverged)",
                none if f.top1 is None else f"{f.top1:.2%} of {f.positions}",
                none if f.kl is None else f"{f.kl:.2g} (worst {f.kl_worst:.2g})",
                none if f.kl_located is None else f"{f.kl_located:.2g}",
            )
        )
    head = (
        "bundle",
        "same answer",
        "same tokens",
        "first other token, median place",
        "top-1 along its answers",
        "KL, nats",
        "KL of loc and seg",
    )
    caption = (
        f"Fidelity to {device.reference}: how far its answers stay the same, right or not, and what each thinks of the next token "
        f"along them (KL of the reference from the bundle)"
    )
    return Table("fidelity", caption, head, tuple(rows))


def memory(device: Device) -> Table:
    """Return the resident memory of each process."""
    rows = []
    for row in _ok(device):
        for title, held in (("loaded", row.loaded), ("peak", row.peak)):
            cells = [f"{getattr(held, k) / 1e6:.1f}" if held else NOT_MEASURED for k in ("private", "mapped", "resident")]
            rows.append((row.label, title, *cells))
    return Table("memory", "Memory of the process, MB", ("bundle", "when", "private", "mapped files", "resident"), tuple(rows))


def rounding(device: Device) -> Table:
    """Return the matrices that rounding changed most, as the export measured."""
    rows = [
        (row.label, path, f"{decibels:.1f}")
        for row in _ok(device)
        if row.rounding
        for path, decibels in row.rounding.worst[:WORST]
    ]
    return Table(
        "rounding",
        "Rounding of weights, the worst matrices (measured by the export)",
        ("bundle", "weight", "SQNR, dB"),
        tuple(rows),
    )


def _board(board: Board) -> str:
    held = {True: "held", False: "moving with the load", None: "not told"}[board.clocks_held]
    gpu = f"GPU at most {board.gpu_max_mhz:.0f} MHz" if board.gpu_max_mhz else "GPU clock not told"
    release = f"JetPack {board.jetpack or 'not told'} (Jetson Linux {board.l4t})"
    return f"{release}, power mode {board.power_mode or 'not told'}, clocks {held}, {gpu}"


def environment(device: Device) -> Table:
    """Return the machine, the data and the command that the figures hold for."""
    e, d = device.environment, device.data
    rows = {
        "processor": f"{e.processor}{f' ({e.vectors})' if e.vectors else ''}, {e.cores} cores",
        "memory": f"{e.memory_bytes / 1e9:.1f} GB" if e.memory_bytes else "not told",
        "system": e.system,
        "engine": f"{e.engine}, threads: {e.threads or 'as the engine chooses'}",
        "load before": "not told" if e.load_average is None else f"{e.load_average:.2f}",
        "clocks": f"governor {e.governor or 'not told'}, at most {f'{e.max_mhz:.0f} MHz' if e.max_mhz else 'not told'}",
        **({"board": _board(e.board)} if e.board else {}),
        "energy": ", ".join(e.energy) or "not measured: no RAPL, INA3221 or NVML counter can be read here",
        "versions": ", ".join(f"{package} {version}" for package, version in e.versions.items()),
        "data": f"{d.source} ({d.format}), {d.samples} samples of {d.records} records, {d.skipped} skipped: "
        + ", ".join(f"{count} {task}" for task, count in d.tasks.items()),
        "data digest": d.digest[:16],
        "order": "every sample asked of every bundle in turn, once; who begins moves on by one; one warm-up each that is not counted",
        "command": device.command,
    }
    return Table("environment", "Environment", ("what", "value"), tuple(rows.items()))


def interval(i: Interval | None, scale: float = 1.0) -> str:
    """Format a value and its interval.

    >>> interval(Interval(value=0.5, low=0.25, high=0.75), 100)
    '50.0 (25.0–75.0)'
    """
    if i is None:
        return NOT_MEASURED
    digits = 1 if scale >= 100 else 3
    within = "" if i.low is None or i.high is None else f" ({i.low * scale:.{digits}f}–{i.high * scale:.{digits}f})"
    return f"{i.value * scale:.{digits}f}{within}"


def rate(r: Rate) -> str:
    """Format a rate, its least and its most.

    >>> rate(Rate(median=12.345, low=11, high=13))
    '12.3 (11–13)'
    """
    return f"{_short(r.median)} ({_short(r.low)}–{_short(r.high)})"


def spread(s: Spread | None, scale: float = 1e3) -> str:
    """Format a median and its interval, in milliseconds unless `scale` is another."""
    if s is None:
        return NOT_MEASURED
    within = "" if s.low is None or s.high is None else f" ({_short(s.low * scale)}–{_short(s.high * scale)})"
    return f"{_short(s.p50 * scale)}{within}"


def _status(row: Row, device: Device) -> str:
    if row.status == "failed":
        return f"FAILED: {row.reason}"
    if row.label == device.reference:
        return "reference"
    return "passes" if passes(row, device) else f"below {device.gate:.4g}" if row.kept else "not compared"


def _score(s: Score | None) -> str:
    if s is None:
        return NOT_MEASURED
    if s.change is None:
        return interval(s.result)
    if not (s.change.value or s.change.low or s.change.high):
        return f"{interval(s.result)}\nthe same"
    within = "" if s.change.low is None or s.change.high is None else f" ({s.change.low:+.3f} to {s.change.high:+.3f})"
    return f"{interval(s.result)}\n{s.change.value:+.3f}{within}\n{s.change.verdict}"


def _times(device: Device, row: Row) -> str:
    if row.label == device.reference:
        return ""
    times = latency(device, device.reference, row.label)
    return ratio(times) if times else ""


def _percentiles(s: Spread | None) -> str:
    return " / ".join(_short(value * 1e3) for value in (s.p50, s.p90, s.p99)) if s else NOT_MEASURED


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _short(seconds * 1e3)


def _short(value: float) -> str:
    """Format a number in three significant digits, or whole.

    >>> _short(1234.5), _short(12.345), _short(0.012345)
    ('1234', '12.3', '0.0123')
    """
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _ok(device: Device) -> Sequence[Row]:
    return [row for row in device.rows if row.status == "ok"]
