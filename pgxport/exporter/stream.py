# SPDX-License-Identifier: Apache-2.0
"""A weight as a promise: its shape and type now, its bytes later, a few rows at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 16 << 20  # of float32; what the export holds of one weight at any moment, a few times over


@dataclass(frozen=True)
class Promise:
    """A tensor that is written block by block; the blocks joined are its bytes in row-major order."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into (start, stop) pairs of at most `BLOCK_BYTES`, one row at least.

    >>> list(row_blocks(5, BLOCK_BYTES // 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
