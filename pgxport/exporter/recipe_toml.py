# SPDX-License-Identifier: Apache-2.0
"""Recipes as TOML files: read strictly, each mistake named with its rule; written so that reading gives an equal recipe.

Knows no weights and no engine: whether a rule matches anything
is `Recipe.check`'s, what can be run is `targets.py`'s.
"""

import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pgxport.errors import DiskError, UsageError
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipes import RECIPE_NAMES

MAX_BYTES = 1_000_000
HEADER = """\
# How the weights of this bundle are stored: the effective recipe, written by pgx export.
# The first rule whose pattern matches a weight decides. Keys and defaults: docs/reference/recipes.md
"""
# A recipe's name becomes part of file names and of reports.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CACHES = ("float32", "float16", "int8")
# What a type is called, and how to write one.
TYPES = {
    bool: ("a boolean", "true or false"),
    int: ("an integer", "digits alone"),
    float: ("a decimal number", "it with a point, like 0.5"),
    str: ("a string", "it in quotes"),
}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Returns the values a field may have: those of a Literal, else types.

    >>> _alternatives(Literal[4, 8] | None), _alternatives(bool)
    ((4, 8), (<class 'bool'>,))
    """
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [part for part in get_args(hint) if part is not NoneType]
    return tuple(value for part in parts for value in _alternatives(part)) or (hint,)


# The keys of a rule that are not called as the field of Scheme.
KEYS = {"group_size": "group", "shortlist": "screen"}
FIELDS = {key: field for field, key in KEYS.items()}
VALUES = {KEYS.get(name, name): _alternatives(hint) for name, hint in get_type_hints(Scheme).items()} | {
    "dtype": ("float32", "float16", "bfloat16"),
    "bits": (4, 8),
    "group": (16, 32, 64, 128, 256),
    "rotate": (16, 32, 64, 128),
}
TOP_KEYS = ("name", "cache", "rule")
RULE_KEYS = ("weights", *VALUES)
# What does not go together: when, and the message. Each stands for a quantized scheme.
CLASHES: tuple[tuple[Callable[[Scheme], bool], str], ...] = (
    (
        lambda s: s.bits == 4 and s.activations != "float",
        'activations = "{s.activations}" multiplies int8 by int8, and bits is 4; write bits = 8, or activations = "float"',
    ),
    (
        lambda s: s.format == "e4m3" and (s.bits != 8 or s.group_size is not None or not s.symmetric),
        'format = "e4m3" is of 8 bits with a scale for each row; write bits = 8, and take group and symmetric out',
    ),
    (
        lambda s: s.format == "e4m3" and (s.method != "nearest" or s.scaling != "none"),
        'format = "e4m3" is rounded to the nearest, as its input is; take method and scaling out',
    ),
    (
        lambda s: s.format == "e4m3" and s.activations != "static",
        'format = "e4m3" multiplies inputs in FP8, with the scale of their calibration; write activations = "static" beside it',
    ),
    (
        lambda s: s.group_size is not None and s.activations != "float",
        'group = {s.group_size} beside activations = "{s.activations}", which has one scale for each row; take group out',
    ),
    (
        lambda s: s.bits == 4 and s.group_size is None,
        "bits = 4 has too few steps for a whole row; write group = 32 beside it, or another power of two from 16 to 256",
    ),
    (
        lambda s: s.shortlist and s.bits != 8,
        "screen = true looks for the likeliest tokens in 4 bits first, and bits is {s.bits}; write bits = 8, or take screen out",
    ),
    (
        lambda s: s.prefill8 and s.activations != "float",
        'prefill8 = true multiplies a prefix by integer products, and activations = "{s.activations}" does already; take prefill8 out',
    ),
    (
        lambda s: s.alpha != Scheme.alpha and s.scaling != "smoothquant",
        'alpha = {s.alpha} is the exponent of SmoothQuant, and scaling is "{s.scaling}"; write scaling = "smoothquant", or take alpha out',
    ),
    (
        lambda s: not 0 <= s.alpha <= 1,
        "alpha = {s.alpha} is not between 0, scales by weights alone, and 1, by activations alone; write one like 0.5",
    ),
    (
        lambda s: s.observer != Scheme.observer and s.activations != "static",
        'observer = "{s.observer}" chooses the range of static activations, and these are "{s.activations}"; '
        'write activations = "static", or take observer out',
    ),
)


@dataclass(frozen=True)
class _Table:
    """A table of the file: what it holds, and how a message calls it."""

    path: Path
    where: str
    values: dict[str, Any]

    def error(self, message: str) -> UsageError:
        return UsageError(f"{self.path}, {self.where}: {message}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file (docs/reference/recipes.md).

    Raises:
        UsageError: the file is not a recipe; the message names the rule, the value that was read, and what to write.
        DiskError: it cannot be read.
    """
    top, tables = _parse(path, _read(path))
    for key in top.values:
        if key not in TOP_KEYS:
            raise top.error(_unknown(key, TOP_KEYS, RULE_KEYS, "belongs to a rule; write it under [[rule]]"))
    rules: list[Rule] = []
    decided: dict[str, str] = {}  # pattern -> its rule
    for table in tables:
        for rule in _rules(table):
            if rule.pattern in decided:
                raise table.error(
                    f"{_shown(rule.pattern)} has a rule already, {decided[rule.pattern]}, which decides; take one of the two out"
                )
            decided[rule.pattern] = table.where
            rules.append(rule)
    if not rules:
        raise top.error('the recipe has no rules; add [[rule]], and under it weights = "*" and dtype = "float16"')
    if rules[-1].pattern != "*":
        raise tables[-1].error(
            f'the last rule is for {_shown(rules[-1].pattern)}; end with one for everything else: [[rule]], under it weights = "*"'
        )
    return _named(top, tuple(rules))


def to_toml(recipe: Recipe) -> str:
    """The text of a recipe's file; keys that have their default are left out."""
    cache = {} if recipe.cache is None else {"cache": recipe.cache}
    text = HEADER + _assignments({"name": recipe.name, **cache})
    for rule in recipe.rules:
        text += "\n[[rule]]\n" + _assignments({"weights": rule.pattern, **_given(rule.scheme)})
    return text


def invalid(scheme: Scheme) -> str | None:
    """Why no weight can be stored by this scheme, and what to change; None if it can.

    >>> invalid(Scheme(bits=4))
    'bits = 4 has too few steps for a whole row; write group = 32 beside it, or another power of two from 16 to 256'
    """
    return _mistake(scheme, _given(scheme))


def _mistake(scheme: Scheme, given: Collection[str]) -> str | None:
    """The first mistake in a scheme. `given` are the keys that someone wrote, be it with their default."""
    for key in given:
        if wrong := _wrong(key, getattr(scheme, FIELDS.get(key, key)), VALUES[key]):
            return wrong
    if scheme.bits is None:
        # An option of quantization on floats would be dropped in silence.
        wrong = "{0} is for integers, and the rule has no bits; write bits = 8 or 4 beside it, or take {0} out"
        return next((wrong.format(key) for key in given if key != "dtype"), None)
    if "dtype" in given:
        return f'dtype = "{scheme.dtype}" beside bits = {scheme.bits}: a weight has one or the other; take one of the two out'
    return next((message.format(s=scheme) for clash, message in CLASHES if clash(scheme)), None)


def _wrong(key: str, value: object, allowed: tuple[Any, ...]) -> str | None:
    """Why a key cannot have a value, or None if it can; `allowed` are values, or types."""
    # Exact types: to Python, true is the integer 1, and 4.0 is equal to 4.
    types = {a if isinstance(a, type) else type(a) for a in allowed}
    choices = _either([TYPES[a][1] if isinstance(a, type) else _shown(a) for a in allowed])
    if type(value) not in types:
        return f"{key} = {_shown(value)} is not {' or '.join(TYPES[t][0] for t in types)}; write {choices}"
    if value in allowed or type(value) in allowed:
        return None
    return f"{key} = {_shown(value)} does not exist; {_choose(value, allowed)}{choices}"


def _unknown(key: str, known: tuple[str, ...], elsewhere: tuple[str, ...], move: str) -> str:
    if key in elsewhere:
        return f"{key} {move}"
    return f"the key {_shown(key)} does not exist; {_choose(key, known)}{_either(known)}"


def _choose(value: object, known: tuple[Any, ...]) -> str:
    near = get_close_matches(str(value), [k for k in known if isinstance(k, str)], n=1)
    return f"did you mean {_shown(near[0])}? Choose " if near else "choose "


def _either(words: Sequence[str]) -> str:
    """
    >>> _either(["4", "8", "16"]), _either(["4"])
    ('4, 8 or 16', '4')
    """
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _rules(table: _Table) -> list[Rule]:
    """The rules of one [[rule]]: as many as it has patterns."""
    for key in table.values:
        if key not in RULE_KEYS:
            raise table.error(_unknown(key, RULE_KEYS, TOP_KEYS, "is the whole recipe's; move it above the first [[rule]]"))
    weights = table.values.get("weights", [])
    patterns = weights if isinstance(weights, list) else [weights]
    if not patterns:
        raise table.error('the rule does not say for which weights it is; write weights = "a pattern", or "*" for all')
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise table.error(f'{_shown(pattern)} among weights is not a pattern; write one in quotes, like "*_proj.weight"')
    given = {key: value for key, value in table.values.items() if key != "weights"}
    scheme = Scheme(**{FIELDS.get(key, key): value for key, value in given.items()})
    if mistake := _mistake(scheme, given):
        raise table.error(mistake)
    return [Rule(pattern, scheme) for pattern in patterns]


def _named(top: _Table, rules: tuple[Rule, ...]) -> Recipe:
    """The recipe of these rules, with the name and the cache that stand above them."""
    if "name" not in top.values:
        raise top.error('the recipe has no name; write name = "mine" above the rules')
    for key, allowed in (("name", (str,)), ("cache", CACHES)):
        if key in top.values and (wrong := _wrong(key, top.values[key], allowed)):
            raise top.error(wrong)
    name = top.values["name"]
    if not NAME.fullmatch(name):
        raise top.error(
            f"name = {_shown(name)}: write 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return Recipe(name, rules, top.values.get("cache"))


def _read(path: Path) -> str:
    try:
        # Opening a FIFO would wait for ever.
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise UsageError(f"{path}: {state}; give a TOML file, or one of the recipes {', '.join(RECIPE_NAMES)}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}; check the permissions and the disk") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: has more than {MAX_BYTES:,} bytes, and a recipe a few hundred; give the recipe's file")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def _parse(path: Path, text: str) -> tuple[_Table, list[_Table]]:
    """The table at the top, and those of the rules."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Its messages end with "(at line 3, column 6)" or "(at end of document)".
        reason, _, place = str(error).rpartition(" (at ")
        found = re.match(r"line (\d+)", place)
        line = int(found[1]) if found else text.rstrip().count("\n") + 1
        text_of_line = text.split("\n")[line - 1].strip()
        raise UsageError(
            f"{path}, line {line}: {_shown(text_of_line)} is not TOML: {reason}; strings are in quotes, lists in brackets"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}; no recipe has such numbers or such nesting") from error
    top = _Table(path, "at the top", values)
    rules = values.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise top.error(
            f"rule = {_shown(rules)} cannot be read as rules; begin each rule with [[rule]], in two pairs of brackets"
        )
    return top, [_Table(path, _rule_name(number, rule), rule) for number, rule in enumerate(rules, 1)]


def _rule_name(number: int, rule: Mapping[str, Any]) -> str:
    """
    >>> _rule_name(3, {"weights": "*_proj.weight"}), _rule_name(1, {"bits": 8})
    ('rule 3 ("*_proj.weight")', 'rule 1')
    """
    weights = rule.get("weights")
    first = weights[0] if isinstance(weights, list) and weights else weights
    return f"rule {number} ({_shown(first)})" if isinstance(first, str) and first else f"rule {number}"


def _given(scheme: Scheme) -> dict[str, Any]:
    """The keys whose values differ from their default."""
    return {KEYS.get(f.name, f.name): getattr(scheme, f.name) for f in fields(scheme) if getattr(scheme, f.name) != f.default}


def _assignments(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: object) -> str:
    """A string, number or boolean in TOML, which is JSON but for surrogates and DEL."""
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def _shown(value: object) -> str:
    """Returns a value as messages show it: as TOML, cut off after 80 characters."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = _toml(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
