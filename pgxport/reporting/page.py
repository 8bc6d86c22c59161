# SPDX-License-Identifier: Apache-2.0
"""report.html: one file without scripts and network, a pure function of a report and its pictures.

All text from data passes `esc`; nothing else enters the page but our own constants and the chart's SVG, whose
texts vl-convert escapes. Should both fail, the page's own policy lets no script run and nothing be fetched.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

from pgxport.reporting import chart, tables
from pgxport.reporting.disagreements import word_diff
from pgxport.reporting.schema import Device, Disagreement, Finding, Report, Said
from pgxport.text import terminal_safe

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
KINDS = {
    "best": "Advice", "budget": "Budget", "gate": "Accuracy", "noise": "In doubt", "no gain": "Cost", "failed": "Failed",
}  # fmt: skip
LONG = 32  # characters of a cell in one line
# A cell's words -> its colour; the words stay, for readers who do not see the colour.
TONES = {"passes": "good", "better": "good", "worse": "bad", "inside the noise": "doubt"}


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page."""
    sections = [_device(device, n, pictures, titled=len(report.devices) > 1) for n, device in enumerate(report.devices)]
    style = files("pgxport.reporting").joinpath("page.css").read_text()
    devices = "".join(f'<li><a href="#device-{n}">{esc(d.name)}</a></li>' for n, d in enumerate(report.devices))
    navigation = f'<nav aria-label="Devices"><ul>{devices}</ul></nav>' if len(report.devices) > 1 else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>pgx report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the verdict</a>\n<header><h1>pgx report: accuracy against latency</h1>\n'
        f'<p class="soft">Written {esc(report.created)} by pgx {esc(report.pgxport)}.</p>{navigation}</header>\n'
        f'<main id="main">\n{"".join(sections)}</main>\n</body>\n</html>\n'
    )


def esc(text: str) -> str:
    """Escape text of any origin for an element or a quoted attribute.

    >>> esc('"><script>')
    '&quot;&gt;&lt;script&gt;'
    """
    return html.escape(terminal_safe(text), quote=True)


def _device(device: Device, n: int, pictures: Mapping[str, bytes], *, titled: bool) -> str:
    findings = "".join(_finding(finding) for finding in device.verdict)
    shown = "".join(_table(table, n, device) for table in tables.all_tables(device))
    remarks = "".join(f"<p>{esc(remark)}</p>\n" for remark in device.data.remarks)
    differ = "".join(_disagreement(d, device.reference, pictures) for d in device.disagreements)
    if differ:
        differ = (
            f'<h3 id="differ-{n}">Where answers differ, failures first</h3>\n<p class="soft">{_diff_key(device)}</p>\n{differ}'
        )
    elif device.rows:
        differ = (
            "<h3>Where answers differ</h3>\n<p>No answer differs from the reference's, or there is none to compare with.</p>\n"
        )
    heading = esc(device.name) if titled else f"Verdict on {esc(device.name)}"
    return (
        f'<section aria-labelledby="device-{n}">\n<h2 id="device-{n}">{heading}</h2>\n'
        f'<p class="soft">{_asked(device)}</p>\n{remarks}<ul class="verdict">{findings}</ul>\n{_chart(device)}{shown}{differ}'
        f"{_table(tables.environment(device), n, device)}</section>\n"
    )


def _asked(device: Device) -> str:
    d, e = device.data, device.environment
    return esc(
        f"{d.samples} samples of {d.source}; {e.engine}, threads: {e.threads or 'as the engine chooses'}; "
        f"reference: {device.reference}; gate {device.gate:.4g}; intervals are 95 %."
    )


def _finding(finding: Finding) -> str:
    return f'<li class="{esc(finding.kind.replace(" ", "-"))}"><b>{KINDS[finding.kind]}</b>{esc(finding.text)}</li>\n'


def _chart(device: Device) -> str:
    drawn = chart.device_svg(device)
    if drawn is None:
        return "<p>No bundle was measured to its end, so there is no chart.</p>\n"
    # One picture to a screen reader, described in words, rather than each of its marks.
    drawn = re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", drawn[drawn.index("<svg") :])
    return (
        f'<figure class="chart" role="img" aria-label="{esc(chart.describe(device))}" tabindex="0">\n{drawn}\n'
        f"<figcaption>Up and to the left is better. The lines are 95 % intervals, a dot's area is the bundle's size, and what lies "
        f"below the dashed line fails the gate; the numbers are in the table below.</figcaption></figure>\n"
    )


def _table(table: tables.Table, n: int, device: Device) -> str:
    name = f"{table.id}-{n}"
    first, *others = table.head
    columns = zip(others, *(row[1:] for row in table.rows), strict=True)
    head = f'<th scope="col">{esc(first)}</th>' + "".join(_head(name, cells) for name, *cells in columns)
    rows = "".join(f"<tr>{_row(row, device)}</tr>\n" for row in table.rows)
    wide = ' class="wide"' if table.id == "environment" else ""
    title, _, rest = table.caption.partition(": ")
    caption = f"<caption><span>{esc(rest)}</span></caption>" if rest else ""  # a caption without a colon is the heading alone
    return (
        f'<h3 id="{name}">{esc(title)}</h3>\n<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">\n'
        f"<table{wide}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )


def _head(name: str, cells: Sequence[str]) -> str:
    """Return the head of a column, aligned as its words or its numbers are."""
    words = ' class="words"' if all(_is_words(cell) for cell in cells) else ""
    return f'<th scope="col"{words}>{esc(name)}</th>'


def _row(row: tuple[str, ...], device: Device) -> str:
    first = f'<th scope="row">{esc(row[0])}</th>'
    return first + "".join(f"<td{_classes(cell)}>{esc(cell)}</td>" for cell in row[1:])


def _classes(cell: str) -> str:
    """Return the class attribute of a cell.

    >>> _classes("inside the noise"), _classes("12.5"), _classes("FAILED: " + "a " * 50)
    (' class="words doubt"', '', ' class="words long bad"')
    """
    tone = next((tone for end, tone in TONES.items() if cell.endswith(end)), "")
    tone = "bad" if cell.startswith(("FAILED", "below ")) else tone
    words = ("words long" if len(cell) > LONG else "words") if _is_words(cell) else ""  # to the left; numbers stand to the right
    classes = f"{words} {tone}".strip()
    return f' class="{classes}"' if classes else ""


def _is_words(cell: str) -> bool:
    return cell[:1].isalpha()


def _diff_key(device: Device) -> str:
    return (
        f"Word differences are from the answer of {esc(device.reference)}: <del>only there</del>, <ins>only here</ins>. "
        f"The first picture has what is true drawn on it."
    )


def _disagreement(d: Disagreement, reference: str, pictures: Mapping[str, bytes]) -> str:
    theirs = next((said.text for said in d.answers if said.label == reference), "")
    figures = _picture(d.picture, f"{d.sample}, with what is true", pictures, f"true: {esc(d.truth)}")
    for said in sorted(d.answers, key=lambda said: said.label != reference):  # the reference's first
        if said.label == reference or not said.same:
            about = f"{said.label} answers {said.text!r} to {d.prompt!r}"
            figures += _picture(said.picture, about, pictures, _said(said, theirs, reference, d))
    same = [said.label for said in d.answers if said.same and said.label != reference]
    agreed = f'<p class="soft">The same as {esc(reference)}: {esc(", ".join(same))}.</p>' if same else ""
    return (
        f'<article><h4>{esc(d.prompt)}</h4>\n<p class="soft">{esc(d.sample)}, {esc(d.task)}, judged by {esc(d.metric)}</p>\n'
        f'<div class="pair">{figures}</div>{agreed}</article>\n'
    )


def _said(said: Said, theirs: str, reference: str, d: Disagreement) -> str:
    pieces = [("same", said.text)] if said.label == reference else word_diff(theirs, said.text)
    tags = {"gone": "del", "new": "ins", "same": "span"}
    text = "".join(f"<{tags[kind]}>{esc(piece)}</{tags[kind]}>" for kind, piece in pieces if piece) or "(nothing)"
    score = "" if said.score is None else f", {said.score:.3g}"
    fault = f'<br><span class="bad">{esc(said.fault)}</span>' if said.fault else ""
    return f'<b>{esc(said.label)}</b>{score}{fault}<br><span class="said">{text}</span>'


def _picture(name: str | None, alt: str, pictures: Mapping[str, bytes], caption: str) -> str:
    content = pictures.get(name) if name else None
    image = ""
    if content:
        image = f'<img alt="{esc(alt)}" loading="lazy" src="data:image/webp;base64,{base64.b64encode(content).decode()}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
