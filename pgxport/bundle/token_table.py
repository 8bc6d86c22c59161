# SPDX-License-Identifier: Apache-2.0
"""The token table of a bundle, mapped: rows are read and dequantized in numpy when they are looked up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgxport.bundle.manifest import TokenTable


class Embedding:
    """The token table, mapped: only the rows that are looked up are read."""

    def __init__(self, file: Path, table: TokenTable):
        self._table = table
        self._bytes = np.memmap(file, np.uint8, "r", shape=(table.nbytes,))
        self._rows = self._bytes[: table.shape[0] * table.row_bytes].reshape(table.shape[0], table.row_bytes)
        if table.scales_offset is not None:
            self._scales = self._bytes[table.scales_offset :].reshape(table.shape[0], -1)

    def __len__(self) -> int:
        return self._table.shape[0]

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, H], not yet scaled."""
        rows, t = self._rows[list(ids)], self._table
        if t.scales_offset is None:
            return _float32(rows, t.dtype)
        if t.group is None:
            quantized = rows.view(np.int8).astype(np.float32)
        elif t.dtype == "int8":
            quantized = rows.astype(np.float32) - np.float32(128)
        else:
            quantized = np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1).astype(np.float32) - np.float32(8)
        assert t.scales_dtype is not None
        scales = np.repeat(_float32(self._scales[list(ids)], t.scales_dtype), t.group or t.shape[1], 1)
        return (quantized * scales)[:, : t.shape[1]]


def _float32(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes [T, n] as numbers."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.view(dtype).astype(np.float32)
