# SPDX-License-Identifier: Apache-2.0
"""A weight as a promise: its shape and type now, its bytes later, a few rows at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pgxport.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

BLOCK_BYTES = 4 << 20  # of float32; the export holds a few of them. Larger ones leave the processor's cache, at half the speed


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


def to_float32(block: np.ndarray) -> np.ndarray:
    """Widen exactly; bfloat16 is the upper half of a float32, which is quicker to say than to convert."""
    if block.dtype == BFLOAT16:
        return (block.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.astype(np.float32, copy=False)


def narrow(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Round to the stored type.

    Raises:
        CheckpointError: a value lies beyond the type's range, which would store it as infinity.
    """
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        rounded = block.astype(dtype)
    if dtype == np.float16 and not np.isfinite(rounded).all():
        worst = float(np.abs(block).max())
        raise CheckpointError(f"{name} holds {worst:g}, and float16 ends at 65504; use --precision bf16 or fp32")
    return rounded
