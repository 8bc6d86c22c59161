# SPDX-License-Identifier: Apache-2.0
"""How far two models' opinions of the next token lie apart: Kullback-Leibler divergence of logits, in numpy alone."""

import numpy as np

from pgxport.errors import NumericError


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) in nats of each row of logits [T, V] -> float64 [T] (Kullback and Leibler, 1951).

    Raises:
        NumericError: a logit is NaN or +inf, or no token of a row is possible. -inf is a token that cannot come.

    >>> divergence(np.array([[0.0, 0.0]]), np.array([[0.0, np.log(3)]])).round(4)
    array([0.1438])
    """
    assert p.ndim == 2, f"Bug: logits {p.shape}, not [T, V]"
    assert p.shape == q.shape, f"Bug: logits {p.shape} against {q.shape}"
    out = np.empty(len(p))
    for t in range(len(p)):  # a row of 257 k float64 at a time, not [T, V] several times over
        a, b = _log_softmax(p[t], t), _log_softmax(q[t], t)
        possible = a > -np.inf
        # Rounding leaves about -1e-17 where the two are the same, and a divergence is never negative.
        out[t] = max(0.0, float(np.sum(np.exp(a[possible]) * (a[possible] - b[possible]))))
    return out


def _log_softmax(row: np.ndarray, position: int) -> np.ndarray:
    x = row.astype(np.float64)
    if np.isnan(x).any() or (x == np.inf).any() or not (x > -np.inf).any():
        raise NumericError(
            f"position {position}: the logits hold NaN or inf, or no token is possible; run pgx verify on the bundle"
        )
    x -= x.max()
    return x - np.log(np.exp(x).sum())
