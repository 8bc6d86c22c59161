# SPDX-License-Identifier: Apache-2.0
"""Which tokens a token looks at: the one rule that graphs, the numpy model and the generation loop share."""

import numpy as np


def visible(prefix: int, total: int, window: int | None = None, *, first: int = 0) -> np.ndarray:
    """[T, S] bool: which of `total` tokens each token from `first` on looks at; the first `prefix` ones see each other."""
    i, j = np.arange(first, total)[:, None], np.arange(total)[None, :]
    causal = (j <= i) if window is None else (j <= i) & (i - j < window)
    return causal | ((i < prefix) & (j < prefix))
