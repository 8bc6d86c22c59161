# SPDX-License-Identifier: Apache-2.0
"""Match a layer's name against a regular expression from a stranger's file, as Python's `re` does, in bounded time.

`re` tries one way after another, which some patterns make take for ever. Here every place where a match could stand is
known at once, as a set (Thompson, 1968), and the steps are counted. Only whether a name
matches is asked, so greedy and lazy are the same.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from pgxport.errors import CheckpointError

MAX_PATTERN = 8192  # characters; the patterns of training programs that name every kind of layer take 1,000
MAX_DEPTH = 50
MAX_REPEATS = 1000
MAX_STEPS = 5_000_000  # about 3 s; the longest patterns of training programs take 1.5 million for all names of a 28B
# A name, alone or as PEFT asks for a name's end: of these `re` knows at once whether they match.
PLAIN = re.compile(r"\(\.\*\\\.\)\?\(\^?[\w.-]*\)\$|[\w.-]*")
# From the places where a part of a pattern may begin in a name, those where it may end.
Part = Callable[[str, frozenset[int]], frozenset[int]]
Is = Callable[[str], bool]

ESCAPES: dict[str, Is] = {
    "d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace,
    "D": lambda c: not c.isdecimal(), "W": lambda c: not (c.isalnum() or c == "_"), "S": lambda c: not c.isspace(),
}  # fmt: skip

ANCHORS = ("^", "$", "\\A", "\\Z", "\\b", "\\B")


def matcher(pattern: str, where: str, budget: "Budget | None" = None) -> Callable[[str], bool]:
    """Returns whether a whole name matches a pattern, as `re.fullmatch` says; names hold no line breaks.

    Args:
        where: The file and the key that hold the pattern, for messages.
        budget: Shared by patterns that one file holds; None: this one has its own.

    >>> matcher(r"(?!.*vision).*\\.(q|v)_proj", "x")("model.language_model.layers.0.self_attn.q_proj")
    True

    Raises:
        CheckpointError: it is no regular expression, or of a kind that is not read: backreferences, lookbehinds, flags.
    """
    if PLAIN.fullmatch(pattern):
        plain = re.compile(pattern)
        return lambda name: plain.fullmatch(name) is not None
    whole = _Parser(pattern, where, budget or Budget()).parse()
    return lambda name: len(name) in whole(name, frozenset((0,)))


@dataclass
class Budget:
    """The steps that the patterns of one file may still take."""

    left: int = MAX_STEPS


@dataclass
class _Parser:
    """Turns a pattern into nested functions of sets of places, by recursive descent."""

    text: str
    where: str
    budget: Budget
    at: int = 0
    depth: int = 0

    def parse(self) -> Part:
        if len(self.text) > MAX_PATTERN:
            raise self._fault(f"it has {len(self.text):,} characters; at most {MAX_PATTERN:,} are read")
        part = self._either()
        if self.at < len(self.text):
            raise self._fault("a closing bracket has no opening one")
        return part

    def _either(self) -> Part:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._fault(f"more than {MAX_DEPTH} groups lie in one another")
        ways = [self._sequence()]
        while self._skip("|"):
            ways.append(self._sequence())
        self.depth -= 1
        return lambda name, places: frozenset().union(*(way(name, places) for way in ways))

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start = self.at
            part = self._single()
            parts.append(self._repeated(part, anchor=self.text[start : self.at] in ANCHORS))

        def sequence(name: str, places: frozenset[int]) -> frozenset[int]:
            for part in parts:
                if not places:
                    break
                places = part(name, places)
            return places

        return sequence

    def _repeated(self, part: Part, *, anchor: bool) -> Part:
        bounds = self._bounds()
        if bounds is None:
            return part
        if anchor:
            raise self._fault("a place is repeated, where nothing stands")
        self._skip("?")  # lazy
        if self._peek() in "*+?" or (self._peek() == "{" and self._bounds() is not None):
            raise self._fault("a repeat is repeated, or possessive")
        least, most = bounds
        return lambda name, places: _repeat(part, name, places, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        """Reads *, +, ? or {m,n}; a brace that is none of these is a plain character to `re`."""
        start = self._peek()
        if start in ("*", "+", "?"):
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[start]
        end = self.text.find("}", self.at)
        if start != "{" or end < 0:
            return None
        least, comma, most = self.text[self.at + 1 : end].partition(",")
        if not all(not n or (n.isascii() and n.isdigit()) for n in (least, most)) or not (least or comma):
            return None
        if max(len(least), len(most)) > 4 or max(int(least or 0), int(most or 0)) > MAX_REPEATS:
            raise self._fault(f"something is repeated more than {MAX_REPEATS} times")
        if most and int(most) < int(least or 0):
            raise self._fault("the most repeats are fewer than the least")
        self.at = end + 1
        return int(least or 0), (int(most) if most else None) if comma else int(least)

    def _single(self) -> Part:
        c = self.text[self.at]
        if self._bounds() is not None:
            raise self._fault(f"nothing stands before {c!r}")
        self.at += 1
        if c == "(":
            return self._group()
        if c == "[":
            return self._one(self._set())
        if c == ".":
            return self._one(lambda c: c != "\n")
        if c == "^":
            return lambda name, places: places & {0}
        if c == "$":
            return lambda name, places: places & {len(name)}
        if c == "\\":
            return self._escape()
        return self._one(lambda d: d == c)

    def _one(self, test: Is) -> Part:
        def one(name: str, places: frozenset[int]) -> frozenset[int]:
            self.budget.left -= 10 + len(places)  # a call costs about as much as ten places
            if self.budget.left < 0:
                raise self._fault(f"to match the names of the layers takes more than {MAX_STEPS:,} steps")
            return frozenset(p + 1 for p in places if p < len(name) and test(name[p]))

        return one

    def _group(self) -> Part:
        ahead = None
        if self._skip("?"):
            kind = self._peek()
            self.at += 1
            if kind in ("=", "!"):
                ahead = kind
            elif kind == "P" and self._skip("<"):
                end = self.text.find(">", self.at)
                if not self.text[self.at : end].isidentifier():
                    raise self._fault("a group has no sound name")
                self.at = end + 1
            elif kind != ":":
                raise self._fault(f"(?{kind} is not read; of groups (…), (?:…), (?P<name>…), (?=…) and (?!…) are")
        inner = self._either()
        if not self._skip(")"):
            raise self._fault("an opening bracket is not closed")
        if ahead is None:
            return inner

        @cache  # lookaheads in one another would be asked about the same places again and again
        def holds(name: str, place: int) -> bool:
            return bool(inner(name, frozenset((place,)))) == (ahead == "=")

        return lambda name, places: frozenset(p for p in places if holds(name, p))

    def _escape(self) -> Part:
        c = self._take()
        if c in ESCAPES:
            return self._one(ESCAPES[c])
        if c == "A":
            return lambda name, places: places & {0}
        if c == "Z":
            return lambda name, places: places & {len(name)}
        if c in "bB":
            return lambda name, places: frozenset(p for p in places if _edge(name, p) == (c == "b"))
        if c.isalnum() and c.isascii():
            raise self._fault(f"\\{c} is not read")
        return self._one(lambda d: d == c)

    def _set(self) -> Is:
        """Reads […] after its bracket; a range, an escape or a character at a time."""
        negated, first, tests = self._skip("^"), True, list[Is]()
        while first or self._peek() != "]":
            first = False
            low = self._member()
            ranged = self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "")
            self.at += ranged
            high = self._member() if ranged else low
            if isinstance(low, str) and isinstance(high, str) and low <= high:
                tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
            elif callable(low) and not ranged:
                tests.append(low)
            else:
                raise self._fault("a range in […] has no sound end")
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negated

    def _member(self) -> str | Is:
        c = self._take()
        if c != "\\":
            return c
        c = self._take()
        if c in ESCAPES:
            return ESCAPES[c]
        if c.isalnum() and c.isascii():
            raise self._fault(f"\\{c} in […] is not read")
        return c

    def _peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else "\n"

    def _take(self) -> str:
        if self.at >= len(self.text):
            raise self._fault("it ends in the middle")
        self.at += 1
        return self.text[self.at - 1]

    def _skip(self, c: str) -> bool:
        found = self.text.startswith(c, self.at)
        self.at += found
        return found

    def _fault(self, why: str) -> CheckpointError:
        shown = self.text if len(self.text) <= 200 else self.text[:200] + "..."
        return CheckpointError(
            f"{self.where}: {shown!r} is no regular expression that pgx reads: {why} (at character {self.at}); write plain "
            f"names of layers there, or the expression in simpler terms"
        )


def _edge(name: str, place: int) -> bool:
    word = ESCAPES["w"]
    return (place > 0 and word(name[place - 1])) != (place < len(name) and word(name[place]))


def _repeat(part: Part, name: str, places: frozenset[int], least: int, most: int | None) -> frozenset[int]:
    for _ in range(least):
        before, places = places, part(name, places)
        if places == before:
            break
    ends, new, count = places, places, least
    while new and (most is None or count < most):
        new = part(name, new) - ends
        ends, count = ends | new, count + 1
    return ends
