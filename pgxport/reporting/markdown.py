# SPDX-License-Identifier: Apache-2.0
"""report.md: the verdict and the tables. Text from the data is never Markdown or HTML here."""

from collections.abc import Sequence

from pgxport.reporting import tables
from pgxport.reporting.schema import Device, Disagreement, Report
from pgxport.text import markdown as text

SHOWN = 12


def page(report: Report) -> str:
    """Return the whole page."""
    lines = ["# pgx report", "", f"Written {text(report.created)} by pgx {text(report.pgxport)}.", ""]
    if any(device.rows for device in report.devices):
        lines += ["![Time of an answer against quality; the numbers are in the tables](chart.svg)", ""]
    for device in report.devices:
        lines += _device(device)
    return "\n".join(lines)


def _device(device: Device) -> list[str]:
    lines = [f"## {text(device.name)}", ""]
    lines += [f"- {text(finding.text)}" for finding in device.verdict] + [""]
    lines += [line for remark in device.data.remarks for line in (text(remark), "")]
    for table in [*tables.all_tables(device), tables.environment(device)]:
        lines += _table(table)
    if device.disagreements:
        lines += ["### Where answers differ", "", *_disagreements(device.disagreements[:SHOWN], device.reference)]
    return lines


def _table(table: tables.Table) -> list[str]:
    head = [text(cell) for cell in table.head]
    lines = [f"### {text(table.caption)}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(text(cell) for cell in row)} |" for row in table.rows), ""]


def _disagreements(shown: Sequence[Disagreement], reference: str) -> list[str]:
    lines = []
    for d in shown:
        lines += [f"**{text(d.sample)}**, {text(d.task)}: {text(d.prompt)}", "", f"- true: {text(d.truth)}"]
        for said in d.answers:
            if said.label == reference or not said.same:
                score = "" if said.score is None else f" ({text(d.metric)} {said.score:.3g})"
                fault = f" — {text(said.fault)}" if said.fault else ""
                lines.append(f"- {text(said.label)}: {text(said.text) or '(nothing)'}{score}{fault}")
        lines.append("")
    return lines
