# SPDX-License-Identifier: Apache-2.0
"""Fidelity of a bundle to a reference run, whether either is right or not: tokens, logits, broken answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgxport.errors import NumericError
from pgxport.metrics.sample import LOCATING, Sample
from pgxport.runners.outputs import Answer


@dataclass(frozen=True)
class Faults:
    """Counts of answers that are empty, malformed or truncated; one answer may be several of them.

    An empty answer is no fault where nothing is true.
    """

    empty: int
    malformed: int
    truncated: int
    answers: int


def token_agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Return the share of positions with the same token, of the longer answer's length.

    >>> token_agreement([5, 6, 7], [5, 6, 8, 9])
    0.5
    """
    longest = max(len(tokens), len(reference))
    return sum(a == b for a, b in zip(tokens, reference, strict=False)) / longest if longest else 1.0


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Return the first position where two answers differ, an end being a difference; None if equal.

    >>> first_divergence([5, 6], [5, 6, 7]), first_divergence([5], [5])
    (2, None)
    """
    if list(tokens) == list(reference):
        return None
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference)))


def top1_agreement(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return where both would choose the same token after the same prefix, bool [T], from logits [T, V]."""
    _same_shape(logits, reference)
    return logits.argmax(-1) == reference.argmax(-1)


def kl_divergence(logits: np.ndarray, reference: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Return KL(reference ‖ logits) in nats at each position, float64 [T] (Kullback and Leibler 1951).

    Args:
        logits: The bundle's, [T, V], each position after the same prefix as the reference's.
        reference: The reference's, [T, V].
        rows: Token ids, such as those of `<loc…>`; both distributions are then conditioned on these.

    Raises:
        NumericError: a logit is NaN or +inf, or no token of a row is possible. -inf is probability 0.

    >>> kl_divergence(np.array([[0.0, np.log(3)]]), np.array([[0.0, 0.0]])).round(4)
    array([0.1438])
    """
    _same_shape(logits, reference)
    out = np.empty(len(logits))
    for t in range(len(out)):  # a row of 257 k float64 at a time, not [T, V] several times over
        chosen = slice(None) if rows is None else rows
        a, b = _log_softmax(reference[t, chosen], t), _log_softmax(logits[t, chosen], t)
        possible = a > -np.inf
        # Rounding leaves about -1e-17 where the two are the same, and a divergence is never negative.
        out[t] = max(0.0, float(np.sum(np.exp(a[possible]) * (a[possible] - b[possible]))))
    return out


def is_malformed(sample: Sample, answer: Answer) -> bool:
    """Whether a part of an answer could not be parsed, or a locating task's answer locates nothing.

    Of a picture without any of what is asked for, an answer that locates nothing is right.
    """
    nowhere = sample.task in LOCATING and not sample.background and bool(answer.text.strip()) and not answer.boxes
    return bool(answer.warnings) or nowhere


def is_empty(sample: Sample, answer: Answer) -> bool:
    """Whether an answer has no text where the true one has."""
    right = sample.background or any(not truth.strip() for truth in sample.answers)
    return not answer.text.strip() and not right


def faults(samples: Sequence[Sample], answers: Sequence[Answer]) -> Faults:
    """Count the answers that are empty, malformed or truncated."""
    pairs = list(zip(samples, answers, strict=True))
    return Faults(
        empty=sum(is_empty(sample, answer) for sample, answer in pairs),
        malformed=sum(is_malformed(sample, answer) for sample, answer in pairs),
        truncated=sum(answer.truncated for _, answer in pairs),
        answers=len(pairs),
    )


def _same_shape(logits: np.ndarray, reference: np.ndarray) -> None:
    assert logits.shape == reference.shape, f"Bug: logits {logits.shape} against {reference.shape}"
    assert logits.ndim == 2, f"Bug: logits {logits.shape}, not [T, V]"


def _log_softmax(row: np.ndarray, position: int) -> np.ndarray:
    x = row.astype(np.float64)
    if np.isnan(x).any() or (x == np.inf).any() or not (x > -np.inf).any():
        raise NumericError(
            f"position {position}: the logits hold NaN or inf, or no token is possible; a bundle of --precision fp32 shows whether the checkpoint has them"
        )
    x -= x.max()
    return x - np.log(np.exp(x).sum())
