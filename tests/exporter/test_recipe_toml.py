# SPDX-License-Identifier: Apache-2.0
"""A recipe's file is read as written, or refused with the rule that is wrong, and what is written reads back as the same recipe."""

import os
import re
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgxport.errors import UsageError
from pgxport.exporter import recipe_toml
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipe_toml import invalid, read_recipe, to_toml
from pgxport.exporter.recipes import RECIPE_NAMES, RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"
REST = '[[rule]]\nweights = "*"\ndtype = "float16"\n'
# Every combination of values that Scheme's fields may have alone; the valid ones, by an account of our own.
ALONE = {
    "bits": (None, 4, 8),
    "group_size": (None, 16, 256),
    "dtype": ("float32", "float16", "bfloat16"),
    "symmetric": (True, False),
} | {
    "compensate": (False, True),
    "method": ("nearest", "clip", "gptq"),
    "scaling": ("none", "awq", "smoothquant"),
    "activations": ("float", "dynamic", "static"),
    "observer": ("minmax", "percentile", "entropy", "mse"),
    "rotate": (None, 32),
}
SCHEMES = [Scheme(**dict(zip(ALONE, values, strict=True))) for values in product(*ALONE.values())]


def makes_sense(s: Scheme) -> bool:
    if s.bits is None:
        return s == Scheme(s.dtype)
    if s.activations == "float":
        rounding = s.bits == 8 or s.group_size is not None
        return rounding and s.dtype == "float32" and s.observer == "minmax"
    return s.bits == 8 and s.group_size is None and s.dtype == "float32" and (s.observer == "minmax" or s.activations == "static")


VALID = [scheme for scheme in SCHEMES if makes_sense(scheme)]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rule(*lines: str) -> str:
    """A recipe whose first rule has these lines."""
    return "\n".join(['name = "mine"', "[[rule]]", 'weights = "*_proj.weight"', *lines, "", REST])


def test_a_file_becomes_its_rules_in_order(tmp_path):
    text = """
name = "mine"
cache = "int8"            # optional

[[rule]]
weights = ["*norm*", "*.bias"]

[[rule]]
weights = "language_model.*_proj.weight"
bits = 4
group = 32
symmetric = false
method = "gptq"

[[rule]]
weights = "vision_tower.*.weight"
bits = 8
activations = "static"
observer = "entropy"
compensate = true

[[rule]]
weights = "*"
dtype = "float16"
"""
    assert read_recipe(written(tmp_path, text)) == Recipe(
        "mine",
        (
            Rule("*norm*", Scheme()),
            Rule("*.bias", Scheme()),
            Rule("language_model.*_proj.weight", Scheme(bits=4, group_size=32, symmetric=False, method="gptq")),
            Rule("vision_tower.*.weight", Scheme(bits=8, activations="static", observer="entropy", compensate=True)),
            Rule("*", Scheme("float16")),
        ),
        "int8",
    )


@pytest.mark.parametrize(
    "text",
    [
        '\ufeffname = "mine"\n' + REST,  # as Windows' editors save
        ('name = "mine"\n' + REST).replace("\n", "\r\n"),
        'rule = [{weights = "*", dtype = "float16"}]\nname = "mine"',
        'name = "mine"\n[["rule"]]\n"weights" = \'\'\'*\'\'\'\n\'dtype\' = """\nfloat\\\n   16"""',
        '"n\\u0061me" = "mine"\n  [[ rule ]] # first\n\tweights = [\n\t"*" # all ]\n\t,\n]\ndtype="float16"',
    ],
)
def test_any_way_to_write_the_same_toml_is_the_same_recipe(tmp_path, text):
    assert read_recipe(written(tmp_path, text)) == Recipe("mine", (Rule("*", Scheme("float16")),))


def test_a_recipe_written_by_an_earlier_version_is_read(tmp_path):
    text = """
name = "before"
[[rule]]
weights = "*.embed_tokens.weight"
bits = 8
group = 128
screen = true
[[rule]]
weights = "*"
bits = 4
group = 32
prefill8 = true
"""
    table, rest = read_recipe(written(tmp_path, text)).rules
    assert table.scheme == Scheme(bits=8, group_size=128, shortlist=True)
    assert rest.scheme == Scheme(bits=4, group_size=32, prefill8=True)
    assert "group = 128\nscreen = true\n" in to_toml(read_recipe(tmp_path / "mine.toml"))


MISTAKES = [
    # TOML
    ('name = "mine"\n[[rule]]\nweights = "*"\ndtype = float16', "line 4", ["dtype = float16", "not TOML", "quotes"]),
    ('name = "mine\n' + REST, "line 1", ["not TOML"]),
    (rule("bits = 8", "bits = 8"), "line 5", ["bits = 8", "Cannot overwrite a value"]),
    ('name = "mine"\n\n[[rule]]\nweights = [\n"*"\n\n', "line 5", ["not TOML"]),
    (b'name = "mine"\n# caf\xe9\n' + REST.encode(), "line 2", ["0xe9", "save the file as UTF-8"]),
    (b'\xef\xbb\xbfname = "mine"\n# caf\xe9\n' + REST.encode(), "line 2", ["0xe9"]),
    (rule("bits = 8").encode("utf-16"), "line 1", ["0xff", "UTF-8"]),
    # keys
    ('nmae = "mine"\n' + REST, "at the top", ['"nmae"', 'did you mean "name"?', "name, cache or rule"]),
    ('name = "mine"\n\nversion = 1\n' + REST, "at the top", ['"version" does not exist; choose name, cache or rule']),
    ('name = "mine"\nbits = 4\n' + REST, "at the top", ["bits belongs to a rule", "[[rule]]"]),
    (rule("bits = 8") + 'cache = "int8"', 'rule 2 ("*")', ["cache is the whole recipe's", "above the first [[rule]]"]),
    (rule("bits = 8", "grop = 32"), 'rule 1 ("*_proj.weight")', ['"grop"', 'did you mean "group"?', "observer"]),
    (rule("bits = 8", "[rule.options]", "fast = true"), 'rule 1 ("*_proj.weight")', ['"options" does not exist']),
    (rule("bits = 8") + "[rule.weights]\nbits = 8\n" + REST, "line 9", ["Cannot overwrite"]),
    ('name = "mine"\n[[rule]]\nbits = 8\n[rule.weights]\nbits = 8\n' + REST, "rule 1", ["a table among weights"]),
    (rule("bits = 8") + "[rules]\nbits = 8", "at the top", ['"rules"', 'did you mean "rule"?']),
    ('name = "mine"\n[rule]\nweights = "*"', "at the top", ["rule = a table cannot", "[[rule]]"]),
    ('name = "mine"\n[rule.x]\n', "at the top", ["rule = a table cannot"]),
    ('name = "mine"\nrule = 3', "at the top", ["rule = 3 cannot", "[[rule]]"]),
    ('name = "mine"\nrule = ["*"]', "at the top", ["rule = a list cannot", "[[rule]]"]),
    # weights
    ('name = "mine"\n\n[[rule]]\nbits = 8\n' + REST, "rule 1", ["for which weights", 'write weights = "a pattern"']),
    ('name = "mine"\n[[rule]]\nweights = []\n' + REST, "rule 1", ["for which weights"]),
    ('name = "mine"\n[[rule]]\nweight = "a"\n' + REST, "rule 1", ['"weight"', 'did you mean "weights"?']),
    ('name = "mine"\n[[rule]]\nweights = 3\n' + REST, "rule 1", ["3 among weights", "in quotes"]),
    ('name = "mine"\n[[rule]]\nweights = ["a",\ntrue]\n' + REST, 'rule 1 ("a")', ["true among weights"]),
    ('name = "mine"\n[[rule]]\nweights = ""\n' + REST, "rule 1", ['"" among weights']),
    # values
    (rule('bits = "4"'), 'rule 1 ("*_proj.weight")', ['bits = "4" is not an integer; write 4 or 8']),
    (rule("bits = true"), 'rule 1 ("*_proj.weight")', ["bits = true is not an integer"]),
    (rule("bits = 4.0"), 'rule 1 ("*_proj.weight")', ["bits = 4.0 is not an integer"]),
    (rule("bits = [4]"), 'rule 1 ("*_proj.weight")', ["bits = a list is not an integer"]),
    (rule("bits = 2024-01-01"), 'rule 1 ("*_proj.weight")', ['bits = "2024-01-01" is not an integer']),
    (rule("bits = 3"), 'rule 1 ("*_proj.weight")', ["bits = 3 does not exist; choose 4 or 8"]),
    (rule("bits = 4", "group = 48"), 'rule 1 ("*_proj.weight")', ["group = 48 does not exist; choose 16, 32, 64, 128 or 256"]),
    (rule("bits = 4", "group = 8"), 'rule 1 ("*_proj.weight")', ["group = 8 does not exist"]),
    (rule("bits = 4", "group = 512"), 'rule 1 ("*_proj.weight")', ["group = 512 does not exist"]),
    (rule("bits = 8", "symmetric = 1"), 'rule 1 ("*_proj.weight")', ["symmetric = 1 is not a boolean; write true or false"]),
    (rule("bits = 8", 'compensate = "yes"'), 'rule 1 ("*_proj.weight")', ['compensate = "yes" is not a boolean']),
    (
        rule("bits = 8", 'method = "gtpq"'),
        'rule 1 ("*_proj.weight")',
        ['"gtpq"', 'did you mean "gptq"?', '"nearest", "trim", "clip" or "gptq"'],
    ),
    (rule("bits = 8", "method = 1"), 'rule 1 ("*_proj.weight")', ["method = 1 is not a string", '"nearest"']),
    (rule('dtype = "flaot16"'), 'rule 1 ("*_proj.weight")', ['did you mean "float16"?', '"float32", "float16" or "bfloat16"']),
    (rule('dtype = "fp8"'), 'rule 1 ("*_proj.weight")', ['dtype = "fp8" does not exist; choose "float32"']),
    # values that do not go together
    (
        rule('dtype = "float16"', "bits = 8"),
        'rule 1 ("*_proj.weight")',
        ['dtype = "float16" beside bits = 8', "take one of the two out"],
    ),
    (rule("bits = 8", 'dtype = "float32"'), 'rule 1 ("*_proj.weight")', ['dtype = "float32" beside bits = 8']),
    (rule('method = "gptq"'), 'rule 1 ("*_proj.weight")', ["method is for integers", "write bits = 8 or 4"]),
    (rule('dtype = "float16"', 'scaling = "awq"'), 'rule 1 ("*_proj.weight")', ["scaling is for integers"]),
    (rule("symmetric = true"), 'rule 1 ("*_proj.weight")', ["symmetric is for integers"]),
    (
        rule("bits = 4", 'method = "gptq"'),
        'rule 1 ("*_proj.weight")',
        ["bits = 4 has too few steps for a whole row; write group = 32"],
    ),
    (
        rule("bits = 4", "group = 32", 'activations = "dynamic"'),
        'rule 1 ("*_proj.weight")',
        ['"dynamic" multiplies int8', "bits is 4; write bits = 8"],
    ),
    (
        rule("bits = 8", "group = 32", 'activations = "static"'),
        'rule 1 ("*_proj.weight")',
        ["group = 32", 'activations = "static"', "take group out"],
    ),
    (
        rule("bits = 8", 'activations = "dynamic"', "prefill8 = true"),
        'rule 1 ("*_proj.weight")',
        ["prefill8 = true", '"dynamic" does already'],
    ),
    (rule("bits = 4", "group = 32", "screen = true"), 'rule 1 ("*_proj.weight")', ["screen = true", "bits is 4; write bits = 8"]),
    (
        rule("bits = 8", 'scaling = "awq"', "alpha = 0.7"),
        'rule 1 ("*_proj.weight")',
        ["alpha = 0.7", 'scaling is "awq"', 'scaling = "smoothquant"'],
    ),
    (
        rule("bits = 8", 'scaling = "smoothquant"', "alpha = 1.5"),
        'rule 1 ("*_proj.weight")',
        ["alpha = 1.5 is not between 0", "0.5"],
    ),
    (rule("bits = 8", "rotate = 33"), 'rule 1 ("*_proj.weight")', ["rotate = 33", "16, 32, 64 or 128"]),
    (rule("rotate = 32"), 'rule 1 ("*_proj.weight")', ["rotate", "bits = 8 or 4"]),
    (
        rule("bits = 8", 'observer = "mse"', 'activations = "dynamic"'),
        'rule 1 ("*_proj.weight")',
        ['observer = "mse"', 'these are "dynamic"'],
    ),
    # the whole
    (REST, "at the top", ["no name", 'name = "mine"']),
    ('name = ""\n' + REST, "at the top", ['name = ""', "1 to 64 letters"]),
    ('\nname = "../mine"\n' + REST, "at the top", ['name = "../mine"', "letters"]),
    ('name = "mine\\n"\n' + REST, "at the top", ["letters"]),
    (f'name = "{"a" * 65}"\n' + REST, "at the top", ["1 to 64 letters"]),
    ("name = 4\n" + REST, "at the top", ["name = 4 is not a string; write it in quotes"]),
    (
        'name = "mine"\ncache = "int9"\n' + REST,
        "at the top",
        ['"int9"', 'did you mean "int8"?', '"float32", "float16" or "int8"'],
    ),
    ('name = "mine"\ncache = "bfloat16"\n' + REST, "at the top", ['cache = "bfloat16" does not exist']),
    ('name = "mine"\ncache = 8\n' + REST, "at the top", ["cache = 8 is not a string"]),
    ('name = "mine"\n', "at the top", ["no rules", "add [[rule]]"]),
    ("", "at the top", ["no rules"]),
    ('name = "mine"\n\nrule = []', "at the top", ["no rules"]),
    ('name = "mine"\n[[rule]]\nweights = "*.bias"\n', 'rule 1 ("*.bias")', ['"*.bias"', 'weights = "*"']),
    ('name = "mine"\n' + REST + '[[rule]]\nweights = "*.bias"\n', 'rule 2 ("*.bias")', ['"*.bias"', 'weights = "*"']),
    (rule("bits = 8") + REST, 'rule 3 ("*")', ['"*" has a rule already, rule 2']),
    ('name = "mine"\n[[rule]]\nweights = ["a", "b", "a"]\n' + REST, 'rule 1 ("a")', ['"a" has a rule already, rule 1']),
]


@pytest.mark.parametrize(
    ("text", "where", "words"), MISTAKES, ids=[f"{n}: {words[0]}" for n, (_, _, words) in enumerate(MISTAKES)]
)
def test_a_mistake_is_named_with_its_rule_or_line_and_the_fix(tmp_path, text, where, words):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}, {where}: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#" * 1_000_001, "more than 1,000,000 bytes"),
        ("name = " + "[" * 100_000, "cannot be read as TOML"),
        ("name = " + "9" * 5_000, "cannot be read as TOML"),
    ],
)
def test_a_file_that_is_no_recipe_at_all_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        read_recipe(written(tmp_path, text))


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml: does not exist; give a TOML file, or one of the recipes fp32, fp16"):
        read_recipe(tmp_path / "none.toml")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is not a regular file"):
            read_recipe(path)


def test_a_message_does_not_grow_with_the_file(tmp_path):
    for text in (
        f'name = "{"a" * 9999}"\n{REST}',
        f"{'a' * 9999} = 1\n",
        "name = " + "a" * 9999,
        rule(f'method = "{"a" * 9999}"'),
    ):
        with pytest.raises(UsageError) as caught:
            read_recipe(written(tmp_path, text))
        assert len(str(caught.value)) < 600


@settings(deadline=None)
@given(st.text(alphabet="[]{}'\"#=\\, \n\r\tab1.\u2028\x00rule", max_size=60))
def test_whatever_a_file_holds_it_is_a_recipe_or_a_usage_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    for file in (text, f'name = "a"\n[[rule]]\nweights = {text}\n{REST}', f'name = "a"\n{REST}{text}'):
        with suppress(UsageError):
            read_recipe(written(folder, file))


def test_a_scheme_is_valid_exactly_where_its_parts_go_together():
    assert [s for s in SCHEMES if (invalid(s) is None) != makes_sense(s)] == []


def test_a_scheme_made_in_python_is_judged_as_one_from_a_file():
    assert invalid(replace(Scheme(), dtype="int8")) == 'dtype = "int8" does not exist; choose "float32", "float16" or "bfloat16"'
    assert "bits = true" in str(invalid(Scheme(bits=True)))
    assert "group = 100" in str(invalid(Scheme(bits=4, group_size=100)))


def test_every_field_of_a_scheme_is_a_key_of_a_rule():
    assert set(recipe_toml.RULE_KEYS) == {"weights", *(recipe_toml.KEYS.get(field.name, field.name) for field in fields(Scheme))}
    for values in recipe_toml.VALUES.values():
        assert all(value in recipe_toml.TYPES for value in values if isinstance(value, type))


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in RECIPES for name in RECIPES[target]])
def test_every_named_recipe_is_read_back_as_it_was_written(tmp_path, target, name):
    recipe = RECIPES[target][name]
    assert read_recipe(written(tmp_path, to_toml(recipe))) == recipe


PATTERNS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda pattern: pattern != "*")
MADE = st.builds(
    lambda name, patterns, schemes, cache: Recipe(
        name, tuple(Rule(p, s) for p, s in zip([*patterns, "*"], schemes, strict=False)), cache
    ),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(lambda name: name not in RECIPE_NAMES),
    st.lists(PATTERNS, unique=True, max_size=5),
    st.lists(st.sampled_from(VALID), min_size=6, max_size=6),
    st.sampled_from([None, "float32", "float16", "int8"]),
)


@settings(deadline=None)
@given(MADE)
@example(Recipe("a", (Rule('\x00\x1f\x7f\x85\u2028\\"\U0001f600', Scheme()), Rule("*", Scheme()))))
def test_any_recipe_is_read_back_as_it_was_written(tmp_path_factory, recipe):
    text = to_toml(recipe)
    assert read_recipe(written(tmp_path_factory.getbasetemp(), text)) == recipe
    assert to_toml(recipe) == text


def test_only_what_differs_from_the_default_is_written():
    recipe = Recipe("a", (Rule("*norm*", Scheme()), Rule("*", Scheme(bits=8, symmetric=False))), "int8")
    header, _, text = to_toml(recipe).partition("name")
    assert all(line.startswith("# ") for line in header.splitlines())
    assert f"name{text}" == (
        'name = "a"\ncache = "int8"\n\n[[rule]]\nweights = "*norm*"\n\n[[rule]]\nweights = "*"\nbits = 8\nsymmetric = false\n'
    )


@pytest.mark.skipif(not PAGE.exists(), reason="the wheel is tested without the repository")
def test_the_page_shows_recipes_that_can_be_read(tmp_path):
    shown = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert shown
    for text in shown:
        recipe = read_recipe(written(tmp_path, text))
        assert read_recipe(written(tmp_path, to_toml(recipe))) == recipe


@pytest.mark.skipif(not PAGE.exists(), reason="the wheel is tested without the repository")
def test_the_page_has_every_key_with_its_default_and_its_values():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert set(rows) == {"name", "cache", *recipe_toml.RULE_KEYS}
    for field in fields(Scheme):
        key = recipe_toml.KEYS.get(field.name, field.name)
        values, default, _ = (cell.strip() for cell in rows[key].split("|"))
        assert default == ("" if field.default is None else f"`{recipe_toml._toml(field.default)}`")
        for value in recipe_toml.VALUES[key]:
            if value is float:
                assert "decimal number" in values
                continue
            assert f"`{'true' if value is bool else recipe_toml._toml(value)}`" in values
