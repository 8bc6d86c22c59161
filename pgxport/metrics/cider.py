# SPDX-License-Identifier: Apache-2.0
"""CIDEr-D: how much a caption agrees with people's captions of the picture (Vedantam et al. 2015).

The numbers are those of pycocoevalcap, which tokenizes in Java; `words` does that here.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the Gaussian penalty on a difference in length, in words

Ngrams = Counter[tuple[str, ...]]

# Abbreviations keep their points; words keep what stands inside them (3.5, 10:30, x-ray, o'clock); of the
# marks, Penn Treebank's names for brackets stay words, because COCO's list of marks to drop has them in
# capitals only.
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.|[^\W_]+(?:[-.,:/&_'][^\W_]+)*|[][(){}#$%&@+*=/£€]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# A clitic is a word of its own.
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_FUSED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me"}


def words(caption: str) -> list[str]:
    """Lower-case words without punctuation, as Stanford's PTBTokenizer and COCO's list of marks leave them.

    >>> words("A dog's x-ray, isn't it?")
    ['a', 'dog', "'s", 'x-ray', 'is', "n't", 'it']
    """
    tokens: list[str] = []
    for word in _WORD.findall(caption.lower().replace("\u2019", "'")):
        tail: list[str] = []
        while match := _CLITIC.match(word):
            word, tail = match[1], [match[2], *tail]
        tokens += [*_FUSED.get(word, _BRACKETS.get(word, word)).split(), *tail]
    return tokens


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Return the score of each caption, float64 [N] in 0..10; the corpus' score is their mean.

    Args:
        captions: The words of each picture's caption.
        references: The words of each of people's captions of it. Together they decide how rare an n-gram is.
    """
    truths = [[_ngrams(words) for words in people] for people in references]
    pictures = Counter(ngram for people in truths for ngram in set().union(*people))
    rarity = {ngram: math.log(len(truths) / count) for ngram, count in pictures.items()}
    unseen = math.log(max(len(truths), 1))
    return np.array(
        [
            10 * float(np.mean([_similarity(_ngrams(caption), truth, rarity, unseen) for truth in people]))
            for caption, people in zip(captions, truths, strict=True)
        ]
    )


def _ngrams(words: Sequence[str]) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _similarity(caption: Ngrams, truth: Ngrams, rarity: dict[tuple[str, ...], float], unseen: float) -> float:
    """The mean over n of the cosine of two tf-idf vectors; a repeated n-gram counts at most as often as the
    truth has it."""
    product, of_caption, of_truth = np.zeros(LONGEST), np.zeros(LONGEST), np.zeros(LONGEST)
    for ngram, count in caption.items():
        weight = rarity.get(ngram, unseen) ** 2
        of_caption[len(ngram) - 1] += count**2 * weight
        product[len(ngram) - 1] += min(count, truth[ngram]) * truth[ngram] * weight
    for ngram, count in truth.items():
        of_truth[len(ngram) - 1] += count**2 * rarity.get(ngram, unseen) ** 2
    norm = np.sqrt(of_caption * of_truth)
    cosine = np.divide(product, norm, out=np.zeros(LONGEST), where=norm > 0)
    longer = _length(caption) - _length(truth)
    return float(cosine.mean()) * math.exp(-(longer**2) / (2 * SIGMA**2))


def _length(ngrams: Ngrams) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 1)
