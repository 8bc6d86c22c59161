# SPDX-License-Identifier: Apache-2.0
"""Whether a name matches a pattern is what Python's `re` says, and is known in bounded time."""

import random
import re
import time
import warnings

import pytest

from pgxport.errors import CheckpointError
from pgxport.models.name_pattern import matcher
from pgxport.models.spec import published
from pgxport.models.weights import weight_shapes

NAMES = [
    *(f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 3, 17)),
    "model.vision_tower.encoder.layers.1.mlp.fc1", "model.multi_modal_projector.linear", "lm_head", "q_proj", "", "a]b", "a-b",
]  # fmt: skip
# What people and training programs write.
PATTERNS = [
    "q_proj", "^q_proj", r"model.language_model.layers.3.self_attn.q_proj", r".*language_model.*\.(up_proj|q_proj)",
    r"(.*\.)?(q_proj)$", r"(.*\.)?(^q_proj)$", r"(.*\.)?(layers.[0-9].self_attn.q_proj)$", r"(.*\.)?(layers\.(\d|1[0-7])\..*)$",
    r"^(?!.*vision).*(q_proj|fc1)$", r"^(model)(?=\.).*\.(q_proj|fc1)$", r"(?P<part>model)\.\w+\.layers\.\d{1,2}\..+?",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj)))",
    r"[^.]*", r"[]a]+b", r"[a\-]+b", r"\w+", r"a{,2}.b", r"a{x}", "lm_head|", r"[\w.]+_proj", r".{3,6}", r"\Alm_head\Z",
]  # fmt: skip
SYMBOLS = [
    "a", "b", "c", ".", "\\.", "(", ")", "|", "*", "+", "?", "[", "]", "^", "$", "{1,2}", "{2}", "(?:", "(?!", "(?=", "\\d", "\\b",
    "-", "{", "}", "[^", "\\w", "\\S",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_names_that_re_says(pattern: str):
    matches = matcher(pattern, "here")
    assert [name for name in NAMES if matches(name)] == [name for name in NAMES if re.fullmatch(pattern, name)]


def test_random_patterns_match_as_re_says_or_are_refused():
    rng, judged = random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re's, of patterns that will mean something else one day
        for _ in range(10_000):
            pattern = "".join(rng.choice(SYMBOLS) for _ in range(rng.randint(1, 9)))
            try:
                matches = matcher(pattern, "here")
            except CheckpointError:
                continue
            expected = re.compile(pattern)  # what re refuses is refused
            names = ["".join(rng.choice("aabbc.-0") for _ in range(rng.randint(0, 6))) for _ in range(6)]
            assert [matches(n) for n in names] == [expected.fullmatch(n) is not None for n in names], pattern
            judged += 1
    assert judged > 1000


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(.*)*(.*)*(.*)*x", ".*" * 400 + "x", "(" * 45 + "a*" + ")*" * 45 + "x", "((a{0,1000}){0,1000}){0,1000}b",
        "(?=.*" * 45 + "x" + ")" * 45, "(" * 45 + "a?" + "){1000}" * 45 + "b", "(?!(a|.?)*" * 40 + "c" + ")" * 40 + ".*",
        "(a?b?c?|.*){0,1000}" * 400,
    ],
)  # fmt: skip
def test_no_pattern_takes_for_ever(pattern: str):
    start = time.process_time()
    try:
        matches = matcher(pattern, "here")
        for name in weight_shapes(published("paligemma", "3b", 224)):
            matches(name)
    except CheckpointError as error:
        assert "steps" in str(error)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a)\\1", "\\1 is not read"), ("(?<=a)b", "(?< is not read"), ("(?i)a", "(?i is not read"), ("(?#x)a", "(?# is not read"),
        ("(a", "not closed"), ("a)", "no opening one"), ("[a", "ends in the middle"), ("*a", "nothing stands before"),
        ("a**", "repeated"), ("a*+", "possessive"), ("a{9999}", "more than 1000"), ("a{2,1}", "fewer"), ("[b-a]", "range"),
        ("a" * 9000 + "+", "9,001 characters"), ("(" * 60 + ")" * 60, "groups"), ("a\\", "ends in the middle"),
    ],
)  # fmt: skip
def test_a_pattern_that_is_not_read_is_refused_with_the_reason(pattern: str, why: str):
    with pytest.raises(CheckpointError, match=re.escape(why)):
        matcher(pattern, "adapter_config.json: alpha_pattern")
