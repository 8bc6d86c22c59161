# SPDX-License-Identifier: Apache-2.0
"""Write the files of a report, a pure function of the report and its pictures, and read them back."""

import csv
import io
import stat
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from pgxport.errors import InputError, UsageError
from pgxport.files import disk_errors, write_whole
from pgxport.reporting import chart, markdown, page
from pgxport.reporting.disagreements import named
from pgxport.reporting.measured import FOLDER
from pgxport.reporting.schema import Report, Row

PICTURES = "pictures"
MAX_REPORT = 256 << 20
MAX_PICTURE = 1 << 20
FIDELITY = ("identical", "token_agreement", "first_divergence", "diverged", "top1", "kl", "kl_worst", "kl_located")
# A cell that begins so is a formula to a spreadsheet.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def rendered(report: Report, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the content of every file by name."""
    drawn = chart.svg(report)
    return {
        "report.json": report.model_dump_json(indent=1).encode() + b"\n",
        "results.csv": results_csv(report).encode(),
        "report.md": markdown.page(report).encode(),
        "report.html": page.page(report, pictures).encode(),
        "chart.svg": drawn.encode(),
        "chart.png": chart.png(drawn),
        **{f"{PICTURES}/{name}": content for name, content in pictures.items()},
    }


def write(report: Report, pictures: Mapping[str, bytes], output: Path) -> None:
    """Write every file whole or not at all, report.json last, and delete pictures of an earlier report.

    Raises:
        DiskError: a file cannot be written.
    """
    content = rendered(report, pictures)
    last = content.pop("report.json")
    with disk_errors("cannot write", path=output):
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        for name, data in [*content.items(), ("report.json", last)]:
            write_whole(output / name, data)
        for old in (output / PICTURES).glob("*.webp"):
            if old.name not in pictures:
                old.unlink()


def read(path: Path) -> Report:
    """Read a report.json, given as the file or as its folder.

    Raises:
        UsageError: there is none.
        InputError: it is not a report of this version.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_REPORT:
            raise InputError(f"{path} has {path.stat().st_size} bytes; no report is longer than {MAX_REPORT}")
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such report; `pgx report -o DIR` writes DIR/report.json") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{path}: {where}: {first['msg']}; this pgx reads reports of format 1") from None


def read_pictures(report: Report, folder: Path) -> dict[str, bytes]:
    """Read the pictures that a report names, without those that are missing, links or no WebP."""
    pictures = {}
    for name in sorted(named([d for device in report.devices for d in device.disagreements])):
        file = folder / PICTURES / name
        try:
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_PICTURE:
                content = file.read_bytes()
                if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
                    pictures[name] = content
        except OSError:
            continue
    return pictures


def check_output(output: Path) -> None:
    """Check that an output folder does not exist, is empty, or holds a report.

    Raises:
        UsageError: it is something else.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is not a folder; choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / "report.json").exists() and not (output / FOLDER).is_dir():
        raise UsageError(f"{output} exists and holds no report of pgx; choose another -o")


def results_csv(report: Report) -> str:
    """Return a row for each bundle, in seconds and bytes; a cell that was not measured is empty."""
    rows = [(device.name, row) for device in report.devices for row in device.rows]
    scores = list(dict.fromkeys((s.task, s.metric) for _, row in rows for s in row.scores))
    stages = list(dict.fromkeys(stage for _, row in rows for stage in sorted(row.seconds)))
    fixed = ["device", "bundle", "recipe", "target", "status", "reason", "digest", "bytes", "samples"]
    counts = ["refused", "empty", "malformed", "truncated"]
    head = [*fixed, *counts]
    head += [f"{name}{part}" for name in ("quality", "kept") for part in ("", "_low", "_high")]
    head += [f"{task} {metric}{part}" for task, metric in scores for part in ("", "_low", "_high", "_change", "_verdict")]
    head += [f"{stage}_{p}_seconds" for stage in stages for p in ("p50", "p90", "p99")]
    head += [
        "tokens_per_second",
        "peak_private_bytes",
        "peak_mapped_bytes",
        "peak_resident_bytes",
        "peak_vram_bytes",
        "joules_per_answer",
        *FIDELITY,
        "load_seconds",
        "clocks",
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_cell(name) for name in head])
    for device, row in rows:
        writer.writerow([_cell(value) for value in (device, *_values(row, scores, stages))])
    return file.getvalue()


def _values(row: Row, scores: list[tuple[str, str]], stages: list[str]) -> list[object]:
    ok = row.status == "ok"
    values: list[object] = [row.label, row.recipe, row.target, row.status, row.reason, row.digest, row.bytes, row.measured]
    values += [row.refused, row.empty, row.malformed, row.truncated] if ok else [None] * 4
    for interval in (row.quality, row.kept):
        values += [interval.value, interval.low, interval.high] if interval else [None] * 3
    given = {(s.task, s.metric): s for s in row.scores}
    for key in scores:
        if score := given.get(key):
            change = (score.change.value, score.change.verdict) if score.change else (None, None)
            values += [score.result.value, score.result.low, score.result.high, *change]
        else:
            values += [None] * 5
    for stage in stages:
        spread = row.seconds.get(stage)
        values += [spread.p50, spread.p90, spread.p99] if spread else [None] * 3
    values.append(row.tokens_per_second.p50 if row.tokens_per_second else None)
    values += [row.peak.private, row.peak.mapped, row.peak.resident] if row.peak else [None] * 3
    values.append(row.peak_vram)
    values.append(sum(e.joules.p50 for e in row.energy) if row.energy else None)
    values += [getattr(row.fidelity, name) if row.fidelity else None for name in FIDELITY]
    values += [sum(row.load_seconds.values()) if row.load_seconds else None, "; ".join(row.notes) or None]
    return values


def _cell(value: object) -> object:
    """
    >>> _cell("=HYPERLINK(1)"), _cell(-1.5)
    ("'=HYPERLINK(1)", -1.5)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
