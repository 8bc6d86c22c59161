# SPDX-License-Identifier: Apache-2.0
"""Text metrics give the numbers of the standard implementations."""

import json
import random
from pathlib import Path

import pytest

from pgxport.metrics import words as text

VQA = json.loads((Path(__file__).parents[1] / "goldens" / "vqa.json").read_text())


def test_an_answer_is_normalised_as_the_vqa_evaluation_code_does():
    wrong = [(raw, clean, text.normalise(raw)) for raw, clean in VQA["normalised"] if text.normalise(raw) != clean]
    assert not wrong, wrong[:5]
    assert len(VQA["normalised"]) > 300


def test_vqa_accuracy_is_the_evaluation_codes():
    for answer, truths, accuracy in VQA["accuracy"]:
        assert text.vqa_accuracy(answer, truths) == pytest.approx(accuracy, abs=1e-12), (answer, truths)


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_so_many_of_ten_people_is_the_published_one(people, accuracy):
    """The values are those that visualqa.org/evaluation.html lists."""
    assert text.vqa_accuracy("yes", ["yes"] * people + ["no"] * (10 - people)) == pytest.approx(accuracy)


def test_textvqa_normalises_what_its_annotators_wrote():
    truths = ["the Stop sign"] * 10
    assert text.textvqa_accuracy("stop sign", truths) == 1.0
    assert text.vqa_accuracy("stop sign", truths) == 0.0


@pytest.mark.parametrize(
    ("answer", "truths", "value"),
    [
        # Worked by hand.
        ("The Coca Cola Company", ["Coca Cola Company", "coca cola"], 1 - 4 / 21),
        ("0.28", ["0.28"], 1.0),
        ("  TRUE   answer ", ["true answer"], 1.0),
        ("abcd", ["abxy"], 0.5),  # exactly the threshold: the challenge's script keeps it
        ("abcd", ["axyz"], 0.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls_of_worked_examples(answer, truths, value):
    assert text.anls(answer, truths) == pytest.approx(value)


def test_anls_is_that_of_the_anls_package_but_at_the_threshold():
    anls = pytest.importorskip("anls")
    rng = random.Random(0)
    for _ in range(300):
        truth = "".join(rng.choice("abC 1") for _ in range(rng.randint(1, 9)))
        answer = "".join(c if rng.random() < 0.7 else rng.choice("abX ") for c in truth)
        ours, theirs = text.anls(answer, [truth, "zzzz"]), anls.anls_score(answer, [truth, "zzzz"])
        assert ours == pytest.approx(theirs) or (ours, theirs) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        # Worked by hand from pix2struct's function.
        ("100", "100", True),
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("0.05", "5%", True),
        ("5%", "5", False),
        ("-9.6", "-10", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("Apple", "apple", True),
        ("apples", "apple", False),
        ("1,000", "1000", False),
        ("nan", "1", False),
        ("2.5 million", "2.5 million", True),
    ],
)
def test_relaxed_accuracy_is_pix2structs(answer, truth, right):
    assert text.relaxed_accuracy(answer, [truth]) == float(right)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is B.", 1),
        ("the answer is b. BECAUSE: it is", 1),
        ("The answer is A.", 0),
        ("B", 1),
        ("(b)", 1),
        ("c.", 0),
        ("A spring.", 1),
        ("springs", 0),
        ("", 0),
        ("Because", 0),
    ],
)
def test_a_choice_is_named_by_letter_or_text(answer, right):
    assert text.choice_accuracy(answer, ["B", "a spring"]) == right


@pytest.mark.parametrize(
    ("answer", "right"), [("yes", 1), ("Yes, there is.", 1), ("no", 0), ("", 0), ("yesterday", 0), ("a cat", 0)]
)
def test_yes_is_a_word_and_not_whatever_is_no_no(answer, right):
    assert text.yes_no_accuracy(answer, ["yes"]) == right


def test_character_errors_are_jiwers():
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(1)
    pairs = []
    for _ in range(100):
        truth = "".join(rng.choice("ABC12") for _ in range(rng.randint(1, 8)))
        pairs.append((truth, "".join(c for c in truth if rng.random() < 0.8) + rng.choice(["", "X", "12"])))
    counts = [text.character_errors(answer, [truth]) for truth, answer in pairs]
    ours = sum(edits for edits, _ in counts) / sum(length for _, length in counts)
    assert ours == pytest.approx(jiwer.cer([t for t, _ in pairs], [a for _, a in pairs]))


def test_character_errors_are_counted_against_the_nearest_truth():
    assert text.character_errors("ABC", ["XYZ", "ABCD"]) == (1, 4)
    assert text.character_errors("ABC", [""]) == (3, 0)


def test_exact_match_minds_case_but_not_the_space_around():
    assert text.exact_match(" a cat\n", ["dog", "a cat"]) == 1.0
    assert text.exact_match("A cat", ["a cat"]) == 0.0
