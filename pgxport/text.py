# SPDX-License-Identifier: Apache-2.0
"""Text for people: made safe for a terminal, Markdown or YAML; lists of names, sizes, durations, tables."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

# Patterns are compiled by `re` when they are first used: `pgx --help` needs none.
# CSI and OSC sequences first, or their letters stay; then other controls, and marks that reorder a line.
CONTROL = (
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def terminal_safe(text: str) -> str:
    """The text without what a terminal would obey: escape sequences, controls, and marks that reorder a line.

    >>> terminal_safe("a \\x1b[31mred\\x1b[0m cat")
    'a red cat'
    """
    return re.sub(CONTROL, "", text)


def listed(names: Iterable[str], most: int = 5, *, between: str = ", ") -> str:
    """The first names, then a count of the others.

    >>> listed("abc"), listed("abcdefg")
    ('a, b, c', 'a, b, c, d, e and 2 more')
    """
    every = list(names)
    return between.join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def size(count: float) -> str:
    """Bytes in three significant digits and decimal units.

    >>> size(999), size(1_750_000_000), size(999_900_000), size(5e12)
    ('999 B', '1.75 GB', '1 GB', '5000 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:  # 999.5 of a unit round to 1000, which is one of the next
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, minutes, or hours and minutes.

    >>> duration(59), duration(150), duration(9000)
    ('59 s', '2 min', '2 h 30 min')
    """
    minutes = int(seconds // 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows of cells as lines of plain text, with two spaces between columns.

    Args:
        rows: Each with the same number of cells.
        right: The columns, counted from 0, that are aligned on the right, as figures should be.

    >>> print(table([["a", "1"], ["long", "200"]], right=[1]))
    a       1
    long  200
    """
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        grid.add_column(no_wrap=True, overflow="crop", justify="right" if column in right else "left")
    for row in rows:
        grid.add_row(*(Text(" ".join(cell.splitlines())) for cell in row))
    # A character takes at most two columns of a terminal.
    width = sum(2 + 2 * max(map(len, column)) for column in zip(*rows, strict=True))
    console = Console(file=StringIO(), width=max(1, width), color_system=None, force_terminal=False, _environ={})
    with console.capture() as lines:
        console.print(grid)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())


# Markdown's characters anywhere, those at the beginning of a block, and those that make an address of a text.
SPECIAL = r"([\\`*_\[\]|~$@]|^[#+=-]|(?<=^[0-9])[.)]|:(?=//)|(?<=www)\.)"
# Characters that JSON leaves as they are in a string, and YAML does not print.
UNPRINTABLE = "[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]"
LONE = "[\ud800-\udfff]"  # half of a character, which UTF-8 cannot encode

Plain = str | int | float | Sequence["Plain"] | Mapping[str, "Plain"]


def markdown(text: str) -> str:
    """The text on one line, with each character of Markdown's or HTML's syntax escaped.

    >>> markdown("<b>|*x*")
    '&lt;b&gt;\\\\|\\\\*x\\\\*'
    """
    plain = " ".join(terminal_safe(text).split())
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(SPECIAL, r"\\\1", escaped)


def yaml(value: Plain, indent: int = 0) -> str:
    """Nested lists and objects as a YAML document; every text is quoted, and the keys are our own.

    >>> print(yaml({"tags": ["onnx", "no"], "card": {"kl": 0.5}}), end="")
    tags:
      - "onnx"
      - "no"
    card:
      kl: 0.5
    """
    space = " " * indent
    if isinstance(value, str | int | float):
        return _scalar(value) + "\n"
    lines = []
    for key, inner in value.items() if isinstance(value, Mapping) else ((None, v) for v in value):
        head = "-" if key is None else f"{key}:"
        below = yaml(inner, indent + 2)
        if isinstance(inner, str | int | float):
            lines.append(f"{space}{head} {below}")
        elif key is None:  # an object begins on the line of its dash
            lines.append(f"{space}- {below[indent + 2 :]}")
        else:
            lines.append(f"{space}{head}\n{below}")
    return "".join(lines)


def _scalar(value: str | int | float) -> str:
    """A value as JSON, which YAML reads, with the characters escaped that YAML does not print."""
    if isinstance(value, float):
        number = repr(value)
        # Without a point YAML 1.1 takes 1e-07 for text.
        return number if "." in number else number.replace("e", ".0e")
    text = json.dumps(re.sub(LONE, "\ufffd", value) if isinstance(value, str) else value, ensure_ascii=False)
    return re.sub(UNPRINTABLE, lambda match: f"\\u{ord(match[0]):04x}", text)
