# SPDX-License-Identifier: Apache-2.0
"""Fidelity to a reference run: tokens, logits against scipy, and the answers that broke."""

import numpy as np
import pytest

from pgxport.errors import NumericError
from pgxport.metrics.fidelity import (
    Faults,
    faults,
    first_divergence,
    is_malformed,
    kl_divergence,
    token_agreement,
    top1_agreement,
)
from pgxport.metrics.sample import Drawn, Sample
from pgxport.runners.outputs import Answer, parse


@pytest.mark.parametrize(
    ("ours", "theirs", "agreement", "position"),
    [
        ([], [], 1.0, None),
        ([1, 2, 3], [1, 2, 3], 1.0, None),
        ([1, 2, 3], [1, 9, 3], 2 / 3, 1),
        ([1, 2], [1, 2, 3, 4], 0.5, 2),
        ([], [1], 0.0, 0),
        ([5], [6], 0.0, 0),
    ],
)
def test_tokens_agree_up_to_where_they_diverge(ours, theirs, agreement, position):
    assert token_agreement(ours, theirs) == pytest.approx(agreement)
    assert first_divergence(ours, theirs) == position
    assert first_divergence(tuple(theirs), ours) == position


def test_the_divergence_is_scipys():
    special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(0)
    q, p = rng.normal(0, 5, (2, 6, 300)).astype(np.float32)
    theirs = special.rel_entr(special.softmax(p.astype(np.float64), -1), special.softmax(q.astype(np.float64), -1)).sum(-1)
    assert kl_divergence(q, p) == pytest.approx(theirs, rel=1e-9)
    rows = np.array([3, 50, 51, 299])
    some = [special.softmax(x[:, rows].astype(np.float64), -1) for x in (p, q)]
    assert kl_divergence(q, p, rows) == pytest.approx(special.rel_entr(*some).sum(-1), rel=1e-9)


def test_the_divergence_is_stable_where_exponentials_are_not():
    far = np.array([[1e4, 0.0, -1e4], [-3e38, 0.0, 1.0]], np.float32)
    assert kl_divergence(far, far + np.float32(0)).tolist() == [0.0, 0.0]
    assert kl_divergence(np.array([[0.0, 1e4]]), np.array([[1e4, 0.0]]))[0] == pytest.approx(1e4)
    tiny = np.array([[0.0, 1e-6]])
    assert 0 < kl_divergence(tiny, np.zeros((1, 2)))[0] < 1e-12
    assert (kl_divergence(np.full((1, 5), 7.0), np.zeros((1, 5))) == 0).all()  # a shift of all logits is nothing


def test_a_token_that_cannot_come_is_no_nan():
    masked = np.array([[0.0, -np.inf, 0.0]])
    assert kl_divergence(np.zeros((1, 3)), masked)[0] == pytest.approx(np.log(3 / 2))
    assert kl_divergence(masked, np.zeros((1, 3)))[0] == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error_naming_the_position(bad):
    logits = np.zeros((3, 4))
    logits[2, 1] = bad
    with pytest.raises(NumericError, match="position 2"):
        kl_divergence(logits, np.zeros((3, 4)))


def test_top1_agreement_is_of_the_first_largest():
    assert top1_agreement(np.array([[1, 2, 0], [5, 1, 1]]), np.array([[0, 9, 1], [0, 1, 0]])).tolist() == [True, False]


def an(text: str, **more) -> Answer:
    boxes, masks, warnings = parse(text, 100, 100)
    return Answer(text, (), boxes, masks, warnings, **more)


def test_broken_answers_are_counted():
    caption = Sample("c", Drawn(0), "caption en", "caption", "cider", ("a cat",))
    detect = Sample("d", Drawn(0), "detect cat", "detect", "box_accuracy")
    box = "<loc0000><loc0000><loc0100><loc0100> cat"
    pairs = [
        (caption, an("a cat")),
        (caption, an(" \n")),  # empty
        (detect, an(box)),
        (detect, an("")),  # empty: it found nothing, which may be right
        (detect, an("a cat")),  # malformed: asked where, it says what
        (detect, an(f"{box} ; <loc0001> dog")),  # malformed in part
        (caption, an("a a a a", truncated=True)),
    ]
    samples, answers = zip(*pairs, strict=True)
    assert faults(samples, answers) == Faults(empty=2, malformed=2, truncated=1, answers=7)
    assert [is_malformed(s, a) for s, a in pairs] == [False, False, False, False, True, True, False]


def test_an_empty_answer_is_no_fault_where_nothing_is_true():
    empty = Sample("0", Drawn(0), "detect cat", "detect", "box_accuracy", ("",), background=True)
    blank = Sample("1", Drawn(1), "ocr", "ocr", "exact_match", ("",))
    text = Sample("2", Drawn(2), "ocr", "ocr", "exact_match", ("AB",))
    assert faults([empty, blank, text], [Answer("")] * 3) == Faults(empty=1, malformed=0, truncated=0, answers=3)
    assert not is_malformed(empty, Answer("no cat here"))
    assert is_malformed(empty, Answer("<loc0001> cat", warnings=parse("<loc0001> cat", 8, 8)[2]))
