# SPDX-License-Identifier: Apache-2.0
"""pgx card: put a report's measurements into a bundle's model card and manifest; the bundle stays whole and verified."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pgxport.bundle.manifest import CARD, MeasuredAnswers
from pgxport.bundle.model_card import CardResults, card, table
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.errors import UsageError
from pgxport.reporting import files, tables
from pgxport.reporting.schema import Device, Report, Row
from pgxport.text import Plain, listed, markdown

TASK = "image-text-to-text"
NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")  # characters that the hub refuses in the type of a data set


@dataclass(frozen=True)
class CardOptions:
    """The card to write. Names are those of `pgx card`'s flags.

    Attributes:
        report: A report.json, or the folder that holds one; None writes the card of the export.
        dry_run: Return the card, and write nothing.
    """

    bundle: Path
    report: Path | None = None
    dry_run: bool = False


def write_card(options: CardOptions) -> str:
    """Write README.md of a bundle and the manifest's `measured` anew, and return README.md; the folder is exchanged for one with both.

    Killed in the middle, it leaves the old bundle or the new one, either sound.

    Raises:
        IntegrityError: the bundle is not sound.
        UsageError: there is no such report, or it did not measure this bundle.
    """
    bundle = Bundle.open(options.bundle)
    read = files.read(options.report) if options.report else None
    rows = _rows(read, bundle) if read else []
    text = card(bundle.manifest, _card_results(rows) if read else None)
    if not options.dry_run:
        with BundleWriter(bundle.path.resolve(), overwrite=True) as writer:
            for name, info in bundle.manifest.files.items():
                if name != CARD:
                    writer.link(bundle.path / name, info)
            writer.write(CARD, [text.encode()])
            told = {"files": writer.files, "measured": tuple(_answers(device, row) for device, row in rows)}
            writer.commit(bundle.manifest.model_copy(update=told))
    return text


def measured(report: Report, bundle: Bundle) -> CardResults:
    """Return what a report says of a bundle, on every device that measured it.

    Raises:
        UsageError: no device did.
    """
    return _card_results(_rows(report, bundle))


def _rows(report: Report, bundle: Bundle) -> list[tuple[Device, Row]]:
    """Return the bundle's row of every device that measured it to the end, which is one at least."""
    digest = bundle.digest()
    rows = [(d, row) for d in report.devices if (row := next((r for r in d.rows if r.digest == digest), None))]
    if whole := [(device, row) for device, row in rows if row.status == "ok"]:
        return whole
    if rows:
        raise UsageError(f"{bundle.path} failed in this report: {rows[0][1].reason}; measure it again with pgx report")
    labels = listed(sorted({row.label for device in report.devices for row in device.rows}))
    raise UsageError(
        f"this report did not measure {bundle.path} (digest {digest[:12]}), but {labels or 'nothing'}; run pgx report on it"
    )


def _card_results(rows: list[tuple[Device, Row]]) -> CardResults:
    return CardResults(_results(rows), "\n".join(["## Measured\n", *(_device(device, row) for device, row in rows)]))


def _answers(device: Device, row: Row) -> MeasuredAnswers:
    """Return what one device's answers were like, for the manifest."""
    top1, kl = (row.fidelity.top1, row.fidelity.kl) if row.fidelity else (None, None)
    return MeasuredAnswers(
        data=device.data.source,
        samples=row.measured,
        reference=device.reference,
        agreement=top1,
        kl=kl,
        empty=row.empty,
        malformed=row.malformed,
    )


def _device(device: Device, row: Row) -> str:
    """Return the tables of one device: the bundle's row beside its reference's."""
    rows = [r for r in device.rows if r is row or (r.label == device.reference and r.status == "ok")]
    alone = device.model_copy(update={"rows": tuple(rows)})
    e, d = device.environment, device.data
    about = (
        f"On {device.name}, {e.cores} cores, {e.engine}, threads: {e.threads or 'as the engine chooses'}; {d.samples} samples of "
        f"{d.source}; baseline {device.reference}; 95 % intervals in brackets."
    )
    shown = [_turned(tables.bundles(alone)), tables.scores(alone), tables.fidelity(alone), tables.stages(alone)]
    return "\n".join([f"{markdown(about)}\n", *(table(t.head, t.rows) for t in shown if t.rows)])


def _turned(t: tables.Table) -> tables.Table:
    """Turn columns into rows, for which a page has more room, and leave out empty ones."""
    head, *rows = zip(t.head, *t.rows, strict=True)
    return tables.Table(t.id, t.caption, ("", *head[1:]), tuple(row for row in rows if any(row[1:])))


def _results(rows: list[tuple[Device, Row]]) -> list[Mapping[str, Plain]]:
    """Return results for the hub's model-index, one for each task and data set, of the first device."""
    results: dict[tuple[str, str], Mapping[str, Plain]] = {}
    for device, row in rows:
        kind = NO_NAME.sub("-", device.data.format).strip("-.") or "other"
        for task in dict.fromkeys(score.task for score in row.scores):
            metrics: list[Plain] = [
                {"type": NO_NAME.sub("-", score.metric), "value": score.result.value, "name": score.title}
                for score in row.scores
                if score.task == task
            ]
            results.setdefault(
                (device.data.digest, task),
                {"task": {"type": TASK, "name": task}, "dataset": {"type": kind, "name": device.data.source}, "metrics": metrics},
            )
    return list(results.values())
