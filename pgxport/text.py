# SPDX-License-Identifier: Apache-2.0
"""Text of any origin made harmless for where it is written: on a line of Markdown, or as a value of YAML."""

import json
import re
from collections.abc import Mapping, Sequence

# CSI and OSC sequences first, or their letters stay; then every other control, and the marks that reorder a line.
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def terminal_safe(text: str) -> str:
    """The text without what a terminal would obey: escape sequences, controls, and marks that reorder a line.

    >>> terminal_safe("a \\x1b[31mred\\x1b[0m cat")
    'a red cat'
    """
    return CONTROL.sub("", text)


# What Markdown knows anywhere, what it knows at the beginning of a block, and what makes an address of a text.
SPECIAL = re.compile(r"([\\`*_\[\]|~$@]|^[#+=-]|(?<=^[0-9])[.)]|:(?=//)|(?<=www)\.)")
# What JSON leaves as it is in a string, and YAML does not print.
UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")
LONE = re.compile("[\ud800-\udfff]")  # half of a character, which UTF-8 has not

Plain = str | int | float | Sequence["Plain"] | Mapping[str, "Plain"]


def markdown(text: str) -> str:
    """A text on one line, each character that Markdown or HTML knows made harmless.

    >>> markdown("<b>|*x*")
    '&lt;b&gt;\\\\|\\\\*x\\\\*'
    """
    plain = " ".join(terminal_safe(text).split())
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", escaped)


def yaml(value: Plain, indent: int = 0) -> str:
    """A document of nested lists and objects; every text is quoted, and the keys are our own.

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
    """As JSON, which YAML reads, where both agree on what a character is."""
    if isinstance(value, float):
        number = repr(value)
        return number if "." in number else number.replace("e", ".0e")  # without a point YAML 1.1 takes 1e-07 for text
    text = json.dumps(LONE.sub("\ufffd", value) if isinstance(value, str) else value, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
