# SPDX-License-Identifier: Apache-2.0
"""A quantized matrix as lazy tensors: its values, then its scales and zero points, all made in one pass over its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.inputs.rotation import block_size, rotated_columns
from pgxport.exporter.packing import pack, pack_zero_points, unpack, unpack_zero_points
from pgxport.exporter.quantize import (
    SHRINK,
    TRIM,
    Gptq,
    Grid,
    Quantized,
    nearest,
    row_scales,
    sqnr,
    to_float8,
)
from pgxport.exporter.recipe import Scheme
from pgxport.exporter.stream import FLOAT8, INT4, LazyTensor, narrow
from pgxport.machine.threads import in_order
from pgxport.models.checkpoint import TensorSource, row_blocks, to_float32

if TYPE_CHECKING:
    from pgxport.exporter.inputs.scaling import InputStatistics

Layout = Literal["blocks", "columns", "rows", "groups"]
T = TypeVar("T")
GPTQ_ROWS = 16  # blocks of rows at once: the loop over columns is paid once for all of them


class QuantizedMatrix:
    """The parts of one matrix [N, K], to be written in this order: `quantized`, `scales`, and `zero_points` where the grid has them.

    Args:
        layout: "blocks", as MatMulNBits reads it: values uint8 [N, G, group_size * bits / 8], scales [N, G];
            "columns", for integer products: values int8 [K, N], scales [N]; "rows": values
            int8 or FP8 [N, K], scales [N]; "groups", as DequantizeLinear reads blocks of
            the first axis: values int8 or int4 [K, N], scales [K / group_size, N].
        source: Where the matrix is read from, in row blocks.
        gain: What the product is multiplied by; it goes into the scales.
        dtype: That of the scales.
    """

    def __init__(
        self,
        path: str,
        source: TensorSource,
        scheme: Scheme,
        layout: Layout,
        *,
        gain: float = 1.0,
        dtype: Any = np.float32,
        statistics: InputStatistics | None = None,
    ):
        assert scheme.bits is not None, f"Bug: {path} is stored in floats"
        self.path, self.shape, self.scheme, self.layout, self.gain = path, source.shape(path), scheme, layout, gain
        self.compensation: np.ndarray | None = None  # [N], what rounding takes from the mean output
        self._source, self._statistics = source, statistics
        self._grid = Grid(scheme.bits, scheme.group_size, scheme.symmetric)
        self._signal = self._noise = 0.0
        self._scales: list[np.ndarray] = []
        self._zero_points: list[np.ndarray] = []
        n, k = self.shape
        dtype = np.dtype(dtype)
        self.zero_points: LazyTensor | None = None
        if layout == "blocks":
            assert scheme.group_size is not None, f"Bug: {path} has no group"
            groups = -(-k // scheme.group_size)
            packed = (n, groups, scheme.group_size * scheme.bits // 8)
            self.quantized = LazyTensor(f"{path}.codes", np.dtype(np.uint8), packed, self._blocks)
            self.scales = LazyTensor(f"{path}.scales", dtype, (n, groups), lambda: self._made(self._scales, dtype))
            if not scheme.symmetric:
                zero_points = (n, -(-groups * scheme.bits // 8))
                self.zero_points = LazyTensor(
                    f"{path}.zeros", np.dtype(np.uint8), zero_points, lambda: self._made(self._zero_points, np.uint8)
                )
        else:
            shape = (n, k) if layout == "rows" else (k, n)
            kind = FLOAT8 if scheme.format == "e4m3" else np.dtype(np.int8) if scheme.bits == 8 else INT4
            self.quantized = LazyTensor(f"{path}.codes", kind, shape, self._blocks)
            scales = (k // scheme.group_size, n) if layout == "groups" and scheme.group_size else (n,)
            self.scales = LazyTensor(f"{path}.scales", dtype, scales, lambda: self._made(self._scales, dtype))

    @property
    def lazy_tensors(self) -> list[LazyTensor]:
        return [p for p in (self.quantized, self.scales, self.zero_points) if p]

    @property
    def sqnr(self) -> float:
        """Signal to noise of the weights in dB, weighted by the mean square of each input channel where that is known."""
        return sqnr(self._signal, self._noise)

    def dequantized(self, parts: Mapping[str, np.ndarray], start: int, stop: int) -> np.ndarray:
        """Rows of the matrix as they were rounded, float32 [stop - start, K], without the gain.

        Args:
            parts: The arrays of the lazy tensors by name, as they were written.
        """
        quantized, scales = parts[self.quantized.name], parts[self.scales.name]
        if self.layout == "groups":
            if self.scheme.bits == 4:
                quantized = (_unpaired(quantized).reshape(self.quantized.shape) ^ 8).view(np.int8) - np.int8(8)
            wide = np.repeat(scales[:, start:stop].astype(np.float32), self.shape[1] // len(scales), 0)
            return (quantized[:, start:stop].astype(np.float32) * wide).T / np.float32(self.gain)
        scales = scales[start:stop].astype(np.float32) / np.float32(self.gain)
        if self.layout != "blocks":
            quantized = quantized[:, start:stop].T if self.layout == "columns" else quantized[start:stop]
            return quantized.astype(np.float32) * scales[:, None]
        bits, groups = self._grid.bits, scales.shape[1]
        zero_points = np.full(scales.shape, self._grid.middle, np.uint8)
        if self.zero_points:
            zero_points = unpack_zero_points(parts[self.zero_points.name][start:stop], bits, groups)
        return Quantized(self._grid, unpack(quantized[start:stop], bits, self.shape[1]), scales, zero_points).dequantized()

    def _blocks(self) -> Iterator[np.ndarray]:
        """The quantized values as they are stored."""
        if self.scheme.format == "e4m3":
            yield from self._float8()
            return
        whole = np.empty(self.shape[::-1], np.int8) if self.layout in ("columns", "groups") else None
        row = 0
        for q in self._quantized():
            if self.layout == "blocks":
                assert self.scheme.group_size is not None
                self._scales.append(q.scales * np.float32(self.gain))
                if self.zero_points:
                    self._zero_points.append(pack_zero_points(q.zero_points, self._grid.bits))
                yield pack(q.values, self._grid.bits, self.scheme.group_size)
                continue
            scales = q.scales * np.float32(self.gain)
            self._scales.append(scales if self.layout == "groups" else scales[:, 0])
            # Around the middle of the grid, 128 or 8 -> around 0
            signed = (q.values ^ 0x80).view(np.int8) if self.scheme.bits == 8 else q.values.view(np.int8) - np.int8(8)
            if whole is None:
                yield signed
            else:
                whole[:, row : row + len(signed)] = signed.T
                row += len(signed)
        if whole is None:
            return
        for start, stop in row_blocks(len(whole), whole.shape[1]):
            yield _paired(whole[start:stop]) if self.scheme.bits == 4 else whole[start:stop]

    def _quantized(self) -> Iterator[Quantized]:
        quantize = self._method(self._weight())

        def rounded(block: np.ndarray) -> tuple[Quantized, np.ndarray]:
            q = quantize(block)
            return q, replace(q, scales=self._as_stored(q.scales)).dequantized()

        yield from self._rounded(rounded)

    def _as_stored(self, scales: np.ndarray) -> np.ndarray:
        """Scales as what is written stands for, without the gain."""
        if self.scales.dtype == np.float32:
            return scales
        stored = narrow(scales * np.float32(self.gain), self.scales.dtype, f"scales of {self.path}: one")
        return stored.astype(np.float32) / np.float32(self.gain)

    def _float8(self) -> Iterator[np.ndarray]:
        def rounded(block: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
            scales = row_scales(block)
            quantized = to_float8(block, scales)
            return (quantized, scales[:, 0]), quantized.astype(np.float32) * scales

        for quantized, scales in self._rounded(rounded):
            self._scales.append(scales * np.float32(self.gain))
            yield quantized

    def _rounded(self, rounded: Callable[[np.ndarray], tuple[T, np.ndarray]]) -> Iterator[T]:
        """Each block of rows as it is rounded, counting what that loses; `rounded` gives the floats that it stands for as well."""
        (n, k), statistics, weight = self.shape, self._statistics, self._weight()
        self._scales, self._zero_points, self._signal, self._noise = [], [], 0.0, 0.0
        mean = statistics.mean(self.path) if statistics is not None and self.scheme.compensate else None
        gptq = self.scheme.method == "gptq"

        def each(rows: tuple[int, int]) -> tuple[T, float, float, np.ndarray | None]:
            block = self._read(*rows)
            q, floats = rounded(block)
            error = floats - block
            lost = None if mean is None else -error @ mean * np.float32(self.gain)
            return q, _energy(block, weight), _energy(error, weight), lost

        losses: list[np.ndarray] = []
        # GPTQ takes all cores for one block, and seven times its size.
        for q, signal, noise, lost in in_order(each, row_blocks(n, 4 * k // (GPTQ_ROWS if gptq else 1)), 1 if gptq else None):
            self._signal += signal
            self._noise += noise
            losses += [] if lost is None else [lost]
            yield q
        self.compensation = np.concatenate(losses) if mean is not None else None

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows of the matrix, rotated."""
        block = to_float32(self._source.rows(self.path, start, stop))
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise CheckpointError(
                f"{self.path} holds {block[row, column]} at [{start + row}, {column}]; integers cannot stand for it"
            )
        return rotated_columns(block, block_size(self.shape[1], self.scheme.rotate))

    def _weight(self) -> np.ndarray | None:
        """E[x²] of the inputs [K], where it is known"""
        return None if self._statistics is None else self._statistics.square(self.path)

    def _method(self, importance: np.ndarray | None) -> Callable[[np.ndarray], Quantized]:
        if self.scheme.method != "gptq":
            clip, shrink = self.scheme.method != "nearest", TRIM if self.scheme.method == "trim" else SHRINK
            return lambda w: nearest(w, self._grid, clip=clip, shrink=shrink, importance=importance)
        moment = None if self._statistics is None else self._statistics.moment(self.path)
        if moment is None:
            raise UsageError(
                f"{self.path} is to be rounded by gptq, which needs second moments of its inputs; "
                f"calibrate with --moments, or choose the method clip"
            )
        return Gptq(moment, self._grid).quantize

    def _made(self, parts: list[np.ndarray], dtype: Any) -> Iterator[np.ndarray]:
        assert parts, f"Bug: the values of {self.path} were not written before what belongs to them"
        made = np.concatenate(parts)
        made = made.T if self.layout == "groups" else made
        yield narrow(made, np.dtype(dtype), f"scales of {self.path}: one")
        parts.clear()


@dataclass(frozen=True)
class Renamed:
    """One tensor of a source under another name."""

    source: TensorSource
    name: str
    path: str

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._path(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.source.dtype(self._path(name))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.source.rows(self._path(name), start, stop)

    def _path(self, name: str) -> str:
        assert name == self.name, f"Bug: {name} was asked for, and this is {self.name}"
        return self.path


def _paired(quantized: np.ndarray) -> np.ndarray:
    """int8 from -8 to 7, an even number of them -> uint8, the first of a pair in the lower half, as ONNX packs INT4."""
    nibbles = quantized.reshape(-1).view(np.uint8) & 15
    return nibbles[::2] | nibbles[1::2] << 4


def _unpaired(pairs: np.ndarray) -> np.ndarray:
    """uint8 from 0 to 15, twice as many."""
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(-1)


def _energy(w: np.ndarray, weight: np.ndarray | None) -> float:
    squares = np.einsum("ij,ij->j", w, w)
    return float(squares.sum() if weight is None else squares @ weight)
