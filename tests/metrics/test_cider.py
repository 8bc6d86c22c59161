# SPDX-License-Identifier: Apache-2.0
"""CIDEr-D gives pycocoevalcap's numbers, and so does a second formulation with whole vectors."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pgxport.metrics.cider import cider_d, words

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "cider.json").read_text())


def test_scores_are_pycocoevalcaps():
    captions = [caption.split() for caption in GOLDEN["caption_words"]]
    references = [[said.split() for said in group] for group in GOLDEN["reference_words"]]
    assert cider_d(captions, references) == pytest.approx(GOLDEN["scores"], abs=1e-9)


def test_words_are_those_of_the_java_tokenizer():
    pairs = [
        (c, w)
        for cs, ws in zip(GOLDEN["references"], GOLDEN["reference_words"], strict=True)
        for c, w in zip(cs, ws, strict=True)
    ]
    pairs += list(zip(GOLDEN["captions"], GOLDEN["caption_words"], strict=True))
    wrong = [(caption, words(caption), true) for caption, true in pairs if words(caption) != true.split()]
    # Java keeps the point of "no." before a number only.
    assert [caption for caption, _, _ in wrong] == ["A London bus, no. 24, on a busy street."]
    ours = cider_d([words(c) for c in GOLDEN["captions"]], [[words(c) for c in cs] for cs in GOLDEN["references"]])
    assert ours.mean() == pytest.approx(GOLDEN["score"], abs=0.01)


def dense(captions, references):
    """The paper's formula with one vector of counts for each sentence, a column for every n-gram there is."""
    sentences = [(p, s) for p, group in enumerate(references) for s in group]
    everyone = [s for _, s in sentences] + captions
    scores = np.zeros(len(captions))
    for n in range(1, 5):
        grams = [[" ".join(s[i : i + n]) for i in range(len(s) - n + 1)] for s in everyone]
        column = {g: i for i, g in enumerate(sorted({g for row in grams for g in row}))}
        counts = np.zeros((len(everyone), len(column)))
        for row, found in zip(counts, grams, strict=True):
            for g in found:
                row[column[g]] += 1
        seen = np.zeros((len(references), len(column)), bool)
        for (picture, _), row in zip(sentences, counts, strict=False):
            seen[picture] |= row > 0
        vectors = counts * (np.log(len(references)) - np.log(np.maximum(seen.sum(0), 1)))
        norms = np.linalg.norm(vectors, axis=1)
        for j, caption in enumerate(captions):
            mine, row = len(sentences) + j, []
            for k, (picture, truth) in enumerate(sentences):
                if picture == j:
                    length = max(norms[mine] * norms[k], 1e-300)
                    penalty = np.exp(-((len(caption) - len(truth)) ** 2) / 72)
                    row.append(penalty * np.minimum(vectors[mine], vectors[k]) @ vectors[k] / length)
            scores[j] += 10 * np.mean(row) / 4
    return scores


def test_a_second_formulation_agrees_on_random_captions():
    rng = random.Random(0)
    vocabulary = ["a", "cat", "dog", "sits", "on", "the", "red", "mat", "and", "runs"]
    references = [
        [[rng.choice(vocabulary) for _ in range(rng.randint(2, 9))] for _ in range(rng.randint(1, 5))] for _ in range(20)
    ]
    captions = [[w if rng.random() < 0.7 else rng.choice(vocabulary) for w in rng.choice(group)] for group in references]
    assert cider_d(captions, references) == pytest.approx(dense(captions, references), abs=1e-9)


def test_the_only_reference_said_again_scores_ten():
    said = [["a", "red", "cat", "sits", "here"], ["two", "dogs", "run", "over", "grass"]]
    assert cider_d(said, [[s] for s in said]) == pytest.approx([10, 10])


def test_saying_nothing_scores_nothing():
    assert cider_d([[]], [[["a", "cat"]]]).tolist() == [0.0]
