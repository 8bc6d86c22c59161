# SPDX-License-Identifier: Apache-2.0
"""Metrics of text: VQA accuracy, ANLS, relaxed accuracy, exact match, multiple choice, character errors.

They follow the standard implementations letter for letter, oddities included, to be comparable.
"""

import re
from collections.abc import Sequence

# An answer's word may lack its apostrophe: "dont". Of two, it may lack either: "couldnt've", "couldn'tve".
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're
they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
CONTRACTIONS = (
    {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    | {word[:i] + word[i + 1 :]: word for word in _MORE_APOSTROPHES.split() for i, c in enumerate(word) if c == "'"}
    | {"somebody'd": "somebodyd"}  # the official table's slip
)
NUMBERS = {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

ANLS_THRESHOLD = 0.5
RELAXED = 0.05


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the answer equals a true one but for white space around it."""
    return float(answer.strip() in [truth.strip() for truth in truths])


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return VQA accuracy: min(matching people / 3, 1), averaged over the sets that leave one person out.

    This is VQAEval of the VQA v2 evaluation code (Antol et al. 2015; GT-Vision-Lab/VQA): the true answers
    lose their punctuation only where people disagree, and never their articles.

    >>> vqa_accuracy("Two!", ["2"] * 2 + ["3"] * 8)
    0.6
    """
    if len(set(truths)) > 1:
        truths = [_without_punctuation(truth) for truth in truths]
    return _leave_one_out(normalise(answer), truths)


def textvqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return VQA accuracy with the true answers normalised too, as TextVQA does (Singh et al. 2019; MMF).

    TextVQA's annotators wrote freely; VQA v2's answers were normalised before they were published.
    """
    return _leave_one_out(normalise(answer), [normalise(truth) for truth in truths])


def _leave_one_out(answer: str, truths: Sequence[str]) -> float:
    same = sum(truth == answer for truth in truths)
    others = [same - (truth == answer) for truth in truths]
    # A single annotator cannot be left out, and decides alone.
    return sum(min(1.0, n / 3) for n in others) / len(truths) if len(truths) > 1 else float(bool(same))


def normalise(answer: str) -> str:
    """Return the answer after VQA's clean-up of punctuation, case, number words, articles, contractions.

    >>> normalise("The  two dogs, arent they?")
    "2 dogs aren't they"
    """
    words = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    numbers = (NUMBERS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in numbers if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    out = text
    thousands = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        # A mark beside a space, or in an answer with a thousands comma, is deleted; another becomes a space.
        out = out.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    # 32 is re.UNICODE, which the official code passes in the place of `count`.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def anls(answer: str, truths: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest true answer, 0 below 0.5 (Biten et al.
    2019).

    As in the script of the DocVQA challenge (rrc.cvc.uab.es), case and runs of spaces do not count, and a
    similarity of exactly 0.5 does, where the paper's formula has 0.

    >>> anls("Recieved", ["received", "sent"])
    0.75
    """
    given = " ".join(answer.lower().split())
    best = 0.0
    for truth in truths:
        true = " ".join(truth.lower().split())
        longest = max(len(given), len(true))
        best = max(best, 1 - levenshtein(given, true) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if a number is within 5 % of the true one, or a text equals it in any case (Masry et al.
    2022).

    As in pix2struct's `relaxed_correctness`, a percentage is read as a fraction, and zero is met exactly.

    >>> relaxed_accuracy("10.4", ["10"]), relaxed_accuracy("4%", ["0.04"]), relaxed_accuracy("1", ["0"])
    (1.0, 1.0, 0.0)
    """
    return float(any(_relaxed_match(answer.strip(), truth.strip()) for truth in truths))


def _relaxed_match(answer: str, truth: str) -> bool:
    given, true = _number(answer), _number(truth)
    if given is not None and true:
        return abs(given - true) / abs(true) <= RELAXED
    return answer.lower() == truth.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def choice_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the answer names the right choice by its letter or its text, `truths` in this order.

    ScienceQA's own form is "The answer is B." (Lu et al. 2022); a bare or bracketed letter counts too.

    >>> choice_accuracy("The answer is B.", ["B", "a spring"]), choice_accuracy("(a)", ["B", "a spring"])
    (1.0, 0.0)
    """
    letter, *texts = truths
    given = answer.strip()
    named = re.match(r"(?:the answer is )?\(?([a-z])\)?\.?$|the answer is \(?([a-z])\)?\.", given, re.IGNORECASE)
    if named:
        return float((named[1] or named[2]).lower() == letter.lower())
    return float(given.rstrip(".").lower() in [text.strip().rstrip(".").lower() for text in texts])


def yes_no_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the answer's first word is the true yes or no.

    POPE's script (Li et al. 2023) counts every answer but no as yes, so that a broken model scores a half;
    here it scores 0.

    >>> yes_no_accuracy("No, there is not.", ["no"]), yes_no_accuracy("", ["yes"])
    (1.0, 0.0)
    """
    first = re.match(r"[a-z]+", answer.strip().lower())
    return float(first is not None and first[0] in [truth.strip().lower() for truth in truths])


def character_errors(answer: str, truths: Sequence[str]) -> tuple[int, int]:
    """Return the edits to the nearest true answer, and that one's length; sums of both give the CER.

    >>> character_errors("AB12", ["A812"])
    (1, 4)
    """
    pairs = [(levenshtein(answer.strip(), truth.strip()), len(truth.strip())) for truth in truths]
    return min(pairs, key=lambda pair: pair[0] / max(pair[1], 1))


def levenshtein(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions between texts (Wagner and Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
