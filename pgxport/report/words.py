# SPDX-License-Identifier: Apache-2.0
"""Which words two answers do not share."""

import difflib
import re
from typing import Literal

Kind = Literal["same", "gone", "new"]
# A token of a place is a word, whatever stands around it.
WORD = re.compile(r"<loc[0-9]{4}>|<seg[0-9]{3}>|\s+|[^\s<]+|<")
MAX_WORDS = 400


def word_diff(before: str, after: str) -> list[tuple[Kind, str]]:
    """Pieces of both texts in order; what is longer than 400 words is shown as it is.

    >>> word_diff("a red cat", "a blue cat")
    [('same', 'a '), ('gone', 'red'), ('new', 'blue'), ('same', ' cat')]
    """
    a, b = WORD.findall(before), WORD.findall(after)
    if before == after:
        return [("same", after)] if after else []
    if max(len(a), len(b)) > MAX_WORDS:
        return [("gone", before), ("new", after)]
    found: list[tuple[Kind, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("same", "".join(a[i:j])))
            continue
        found += [(k2, t) for k2, t in (("gone", "".join(a[i:j])), ("new", "".join(b[k:m]))) if t]  # type: ignore[misc]
    return found
