# SPDX-License-Identifier: Apache-2.0
"""pgx diff: the differences of two bundles, in their manifests and in their answers, or of two reports."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pgxport.benchmarking.worker import Progress
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.data.loader import DataOptions
from pgxport.errors import UsageError
from pgxport.reporting import files
from pgxport.reporting.advice import gate_failures, latency, percent, ratio
from pgxport.reporting.report import ReportOptions, report
from pgxport.reporting.schema import Device, Report, Row

SHOWN = 40  # differences, in the rendering for people
# Fields of a manifest that differ between any two bundles, and say nothing that the sizes do not.
LEFT_OUT = ("files", "graphs", "measured", "parity", "ranges")


@dataclass(frozen=True)
class DiffOptions:
    """The two sides to compare. Names and meanings are the command's flags."""

    first: Path
    second: Path
    data: Path | None = None
    format: str | None = None
    limit: int | None = None
    gate: float | None = None
    output: Path | None = None
    engine: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class DiffEntry:
    """One thing that differs; None where one side has none."""

    what: str
    first: str | None
    second: str | None
    says: str = ""


@dataclass(frozen=True)
class Diff:
    """All differences, and why a gate stops them."""

    first: str
    second: str
    changes: list[DiffEntry] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # about the data

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def render(self) -> str:
        """Return the differences as text."""
        if not self.changes:
            return "\n".join([f"{self.first} and {self.second}: no difference", *self.remarks])
        lines = [f"- {self.first}", f"+ {self.second}"]
        for c in self.changes[:SHOWN]:
            lines.append(f"{c.what}: {_absent(c.first)} → {_absent(c.second)}" + (f"  ({c.says})" if c.says else ""))
        if len(self.changes) > SHOWN:
            lines.append(f"and {len(self.changes) - SHOWN} more; --json lists them all")
        return "\n".join([*lines, *self.remarks])


def diff(options: DiffOptions, *, progress: Progress | None = None) -> Diff:
    """Compare two bundles, or two reports.

    Raises:
        UsageError: one is a bundle and the other is not.
        InputError: a report cannot be read.
        IntegrityError: a bundle is not sound.
    """
    bundles = [(path / MANIFEST).exists() for path in (options.first, options.second)]
    if bundles[0] != bundles[1]:
        raise UsageError(f"{options.first} and {options.second}: one is a bundle and the other is not; give two of a kind")
    if not bundles[0]:
        asked = {"--data": options.data, "--format": options.format, "--limit": options.limit, "-o": options.output}
        if wrong := [flag for flag, value in asked.items() if value is not None]:
            raise UsageError(f"{wrong[0]} asks bundles, and {options.first} is a report")
        return _reports(options)
    result = Diff(str(options.first), str(options.second), list(_manifests(options)))
    if options.data is None and options.limit is None:
        if options.gate is not None:
            raise UsageError("--gate needs answers to judge; add --limit 20 for the drawn scenes, or --data")
        return result
    with tempfile.TemporaryDirectory(prefix="pgx-diff-") as scratch:
        given = ReportOptions(
            (str(options.first), str(options.second)),
            options.output or Path(scratch) / "report",
            DataOptions(options.data, options.format, limit=options.limit),
            gate=options.gate or 0,
            engine=options.engine,
            threads=options.threads,
            first_is_reference=True,
        )
        device = report(given, progress=progress).devices[0]
    result.changes.extend(_answers(device))
    result.remarks.extend(device.data.remarks)
    if options.gate is not None:
        result.failures.extend(gate_failures(device))
    return result


def _manifests(options: DiffOptions) -> Iterator[DiffEntry]:
    first, second = (Bundle.open(path, verify=False) for path in (options.first, options.second))
    a, b = (_flat(bundle.manifest.model_dump(exclude=set(LEFT_OUT))) for bundle in (first, second))
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield DiffEntry(key, a.get(key), b.get(key))
    sizes = [{name: info.size for name, info in bundle.manifest.files.items()} for bundle in (first, second)]
    digests = [{name: info.sha256 for name, info in bundle.manifest.files.items()} for bundle in (first, second)]
    for name in dict.fromkeys([*sizes[0], *sizes[1]]):
        if digests[0].get(name) != digests[1].get(name):
            before, after = (f"{size[name]} bytes" if name in size else None for size in sizes)
            yield DiffEntry(name, before, after, "other content of the same size" if before == after else "")
    if (before := _parity(first)) != (after := _parity(second)):
        yield DiffEntry("parity", before, after)
    if first.nbytes != second.nbytes:
        yield DiffEntry("all files", f"{first.nbytes} bytes", f"{second.nbytes} bytes", f"×{second.nbytes / first.nbytes:.3f}")


def _parity(bundle: Bundle) -> str | None:
    p = bundle.manifest.parity
    return f"KL {p.kl:.2g} nats, top-1 {p.agreement:.2%} of {p.positions}" if p else None


def _answers(device: Device) -> Iterator[DiffEntry]:
    first, second = device.rows
    for row in device.rows:
        if row.status == "failed":
            yield DiffEntry("answers", None, None, f"{row.label} failed: {row.reason}")
    if first.status == second.status == "ok":
        for score in second.scores:
            before = next(s for s in first.scores if (s.task, s.metric) == (score.task, score.metric))
            if score.change and (score.change.value or score.change.low or score.change.high):
                says = f"{score.change.value:+.4f}, {score.change.verdict}"
                yield DiffEntry(f"{score.task}, {score.title}", f"{before.result.value:.4f}", f"{score.result.value:.4f}", says)
        if second.kept:
            yield DiffEntry("quality", "100 %", percent(second.kept), f"{second.measured} samples")
        if second.fidelity:
            yield DiffEntry("same answers", None, f"{second.fidelity.identical:.1%} of {second.fidelity.answers}")
        if times := latency(device, first.label, second.label):
            a, b = (row.seconds["answer"].p50 for row in (first, second))
            yield DiffEntry("answer, median", f"{a * 1e3:.3g} ms", f"{b * 1e3:.3g} ms", f"{ratio(times)} as long")


def _reports(options: DiffOptions) -> Diff:
    first, second = files.read(options.first), files.read(options.second)
    result = Diff(str(options.first), str(options.second))
    devices = [_by_name(one) for one in (first, second)]
    for name in dict.fromkeys([*devices[0], *devices[1]]):
        a, b = (side.get(name) for side in devices)
        if a is None or b is None:
            result.changes.append(DiffEntry(name, "measured" if a else None, "measured" if b else None))
            continue
        if a.data.digest != b.data.digest:
            result.changes.append(DiffEntry(f"{name}: samples", a.data.digest[:16], b.data.digest[:16], "the data is another"))
        rows = [{row.label: row for row in device.rows} for device in (a, b)]
        for label in dict.fromkeys([*rows[0], *rows[1]]):
            _rows(result, f"{name}: {label}", rows[0].get(label), rows[1].get(label), options.gate)
    return result


def _rows(result: Diff, where: str, a: Row | None, b: Row | None, gate: float | None) -> None:
    if a is None or b is None or a.status != b.status:
        states = [None if row is None else row.status if row.status == "ok" else f"failed: {row.reason}" for row in (a, b)]
        result.changes.append(DiffEntry(where, states[0], states[1]))
        if gate is not None and a is not None and a.status == "ok":
            result.failures.append(f"{where}: {states[1] or 'is not in the second report'}")
        return
    shown = {
        "bytes": [str(row.bytes) for row in (a, b)],
        "quality": [f"{row.quality.value:.4f}" if row.quality else "not measured" for row in (a, b)],
        "answer, median": [
            f"{row.seconds['answer'].p50 * 1e3:.3g} ms" if "answer" in row.seconds else "not measured" for row in (a, b)
        ],
    }
    before = {(s.task, s.metric): s for s in a.scores}
    for score in b.scores:
        if old := before.get((score.task, score.metric)):
            shown[f"{score.task}, {score.title}"] = [f"{s.result.value:.4f}" for s in (old, score)]
    result.changes.extend(DiffEntry(f"{where}, {what}", old, new) for what, (old, new) in shown.items() if old != new)
    if gate is not None and a.quality and a.quality.value > 0:
        kept = (b.quality.value if b.quality else 0) / a.quality.value
        if kept < gate:
            result.failures.append(f"{where}: keeps {kept:.1%} of the first report's quality; the gate is {gate:.4g}")


def _by_name(report: Report) -> dict[str, Device]:
    """Return devices by their names; a second one of a name gets a number."""
    devices: dict[str, Device] = {}
    for device in report.devices:
        same = sum(name == device.name or name.startswith(f"{device.name} #") for name in devices)
        devices[f"{device.name} #{same + 1}" if same else device.name] = device
    return devices


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Return nested data as paths and texts.

    >>> _flat({"a": {"b": 1}, "c": [2]})
    {'a.b': '1', 'c': '[2]'}
    """
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()}
    return {path: str(value)}


def _absent(value: str | None) -> str:
    return "none" if value is None else value
