# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of adapters, a row block at a time and in float32: neither a merged matrix nor B @ A ever exists whole.

LoRA (Hu et al., 2021): W + s · B @ A. DoRA (Liu et al., 2024): each row of that, scaled to a norm that was learned. AdaLoRA
(Zhang et al., 2023): B @ (A · E). PiSSA (Meng et al., 2024) and OLoRA (Büyükakyüz, 2024) first take from W what B @ A began as.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from pgxport.models.safetensors import DTYPES, Stored, Tensor, refuse_non_finite

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Changed:
    """A weight with an adapter's change, in float32: rounding to the base's dtype would lose what the adapter learned."""

    base: Tensor
    change: Callable[[np.ndarray, int, int], np.ndarray]  # (float32 rows start to stop of the base, start, stop)
    source: Stored  # what messages name

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES["F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows = self.change(_float32(self.base, start, stop), start, stop)
        refuse_non_finite(rows, start, self.source.name, self.source.file)
        return rows


@dataclass(frozen=True)
class Matrices:
    """The parts of one layer's LoRA.

    Attributes:
        a: [r, in], of a convolution [r, in, h, w]; of an embedding [r, rows].
        b: [out, r], of a convolution [out, r, 1, 1]; of an embedding [columns, r].
        scale: The factor of B @ A.
        e: AdaLoRA's singular values [r, 1].
        magnitude: DoRA's norms: one a row, of an embedding one a column.
        start: "pissa" or "olora", where training began with a part of the base weight in B @ A.
    """

    a: Stored
    b: Stored
    scale: float
    e: Stored | None = None
    magnitude: Stored | None = None
    start: str | None = None


def linear(base: Tensor, m: Matrices) -> Changed:
    """The weight of a linear layer or a convolution with its LoRA, [out, in] or [out, in, h, w]."""
    if m.start:
        base = _without_start(base, m)

    def change(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        a = _whole(m.a).reshape(m.a.shape[0], -1)
        if m.e:
            a = a * _whole(m.e)
        update = _float32(m.b, start, stop).reshape(stop - start, -1) @ a
        update *= np.float32(m.scale)
        update += rows.reshape(update.shape)
        if m.magnitude:
            # PEFT's names call it the norm by columns: those of the transposed weight.
            with np.errstate(divide="ignore", invalid="ignore"):
                update *= (_whole(m.magnitude).reshape(-1)[start:stop] / np.linalg.norm(update, axis=1))[:, None]
        return update.reshape(rows.shape)

    return Changed(base, change, m.b)


def embedding(base: Tensor, m: Matrices) -> Changed:
    """An embedding with its LoRA, [rows, columns]: W + s · (B @ A)ᵀ."""

    def plain(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        update = _columns(m.a, start, stop).T @ _whole(m.b).T
        update *= np.float32(m.scale)
        update += rows
        return update

    @cache  # a pass over the whole embedding
    def factors() -> np.ndarray:
        squares = np.zeros(base.shape[1])
        for start in range(0, base.shape[0], BLOCK_ROWS):
            stop = min(base.shape[0], start + BLOCK_ROWS)
            squares += np.square(plain(_float32(base, start, stop), start, stop), dtype=np.float64).sum(axis=0)
        assert m.magnitude, "Bug: no magnitude"
        with np.errstate(divide="ignore", invalid="ignore"):
            return (_whole(m.magnitude).reshape(-1) / np.sqrt(squares)).astype(np.float32)

    def normed(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        return plain(rows, start, stop) * factors()

    return Changed(base, normed if m.magnitude else plain, m.b)


def shifted(base: Tensor, bias: Stored, scale: float) -> Changed:
    """A bias [out] with that of B (PEFT's lora_bias): both are added to the layer's output."""
    return Changed(base, lambda rows, start, stop: rows + np.float32(scale) * _float32(bias, start, stop), bias)


def with_rows(base: Tensor, indices: Sequence[int], values: Stored) -> Changed:
    """A matrix in which row indices[i] is row i of `values`."""
    places = {index: i for i, index in enumerate(indices)}
    order = np.array(sorted(places), dtype=np.int64)

    def change(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        for index in order[np.searchsorted(order, start) : np.searchsorted(order, stop)].tolist():
            rows[index - start] = _float32(values, places[index], places[index] + 1)[0]
        return rows

    return Changed(base, change, values)


def _without_start(base: Tensor, m: Matrices) -> Changed:
    """The base weight less what B @ A was set to before training, which PEFT takes from it again whenever it loads."""
    rank, factor = m.a.shape[0], np.float32(m.scale if m.start == "olora" else 1)

    def change(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        b, a = _start(base, rank, m.start)  # type: ignore[arg-type]  # every tensor is a frozen dataclass
        return rows - factor * (b[start:stop] @ a)

    return Changed(base, change, m.b)


@lru_cache(maxsize=1)  # one layer's blocks are read one after the other
def _start(base: Tensor, rank: int, start: str | None) -> tuple[np.ndarray, np.ndarray]:
    """[out, r] and [r, in]: W's projection on its `rank` leading singular vectors (PiSSA), or on its first columns (OLoRA)."""
    w = _float32(base, 0, base.shape[0]).astype(np.float64)
    if start == "olora":
        left = np.linalg.qr(w[:, :rank])[0]
    elif w.shape[0] <= w.shape[1]:
        left = np.linalg.eigh(w @ w.T)[1][:, -rank:]
    else:
        right = np.linalg.eigh(w.T @ w)[1][:, -rank:]
        return (w @ right).astype(np.float32), right.T.astype(np.float32)
    return left.astype(np.float32), (left.T @ w).astype(np.float32)


def _columns(stored: Stored, start: int, stop: int) -> np.ndarray:
    """Columns start to stop of a stored matrix: a few bytes of each row."""
    size, width = stored.dtype.itemsize, stored.shape[1]
    rows = (
        Stored(stored.file, stored.name, stored.offset + (i * width + start) * size, stored.dtype, (stop - start,))
        for i in range(stored.shape[0])
    )
    return np.stack([_whole(row) for row in rows])


def _whole(stored: Stored) -> np.ndarray:
    return _float32(stored, 0, stored.shape[0])


def _float32(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    return tensor.rows(start, stop).astype(np.float32)
