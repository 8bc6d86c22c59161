# SPDX-License-Identifier: Apache-2.0
"""A matrix in whole numbers, as promises: its codes, then its scales and zero points, all made in one pass over its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.quantize import Gptq, Grid, Quantized, nearest, pack, pack_zeros, sqnr, unpack, unpack_zeros
from pgxport.exporter.recipe import Scheme
from pgxport.exporter.stream import Promise, narrow, row_blocks, to_float32
from pgxport.models.checkpoint import TensorSource

if TYPE_CHECKING:
    from pgxport.exporter.scaling import Statistics

Layout = Literal["blocks", "columns", "rows"]
GPTQ_ROWS = 16  # blocks of rows at once: the loop over columns is paid once for all of them


class Coded:
    """The parts of one matrix [N, K], to be written in this order: `codes`, `scales`, and `zeros` where the grid has them.

    Args:
        layout: "blocks", as MatMulNBits reads it: codes uint8 [N, G, group * bits / 8], scales [N, G];
            "columns", for integer products: codes int8 [K, N], scales [N]; "rows": codes int8 [N, K], scales [N].
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
        statistics: Statistics | None = None,
    ):
        assert scheme.bits is not None, f"Bug: {path} is stored in floats"
        self.path, self.shape, self.scheme, self.layout, self.gain = path, source.shape(path), scheme, layout, gain
        self.compensation: np.ndarray | None = None  # [N], what rounding takes from the mean output
        self._source, self._statistics = source, statistics
        self._grid = Grid(scheme.bits, scheme.group, scheme.symmetric)
        self._signal = self._noise = 0.0
        self._scales: list[np.ndarray] = []
        self._zeros: list[np.ndarray] = []
        n, k = self.shape
        dtype = np.dtype(dtype)
        self.zeros: Promise | None = None
        if layout == "blocks":
            assert scheme.group is not None, f"Bug: {path} has no group"
            groups = -(-k // scheme.group)
            packed = (n, groups, scheme.group * scheme.bits // 8)
            self.codes = Promise(f"{path}.codes", np.dtype(np.uint8), packed, self._blocks)
            self.scales = Promise(f"{path}.scales", dtype, (n, groups), lambda: self._made(self._scales, dtype))
            if not scheme.symmetric:
                zeros = (n, -(-groups * scheme.bits // 8))
                self.zeros = Promise(f"{path}.zeros", np.dtype(np.uint8), zeros, lambda: self._made(self._zeros, np.uint8))
        else:
            codes = (k, n) if layout == "columns" else (n, k)
            self.codes = Promise(f"{path}.codes", np.dtype(np.int8), codes, self._blocks)
            self.scales = Promise(f"{path}.scales", dtype, (n,), lambda: self._made(self._scales, dtype))

    @property
    def promises(self) -> list[Promise]:
        return [p for p in (self.codes, self.scales, self.zeros) if p]

    @property
    def sqnr(self) -> float:
        """Signal to noise of the weights in dB, weighted by the mean square of each input channel where that is known."""
        return sqnr(self._signal, self._noise)

    def dequantized(self, parts: Mapping[str, np.ndarray], start: int, stop: int) -> np.ndarray:
        """Rows of the matrix as they were rounded, float32 [stop - start, K], without the gain.

        Args:
            parts: The promises' arrays by name, as they were written.
        """
        codes, scales = parts[self.codes.name], parts[self.scales.name][start:stop].astype(np.float32) / np.float32(self.gain)
        if self.layout != "blocks":
            codes = codes[:, start:stop].T if self.layout == "columns" else codes[start:stop]
            return codes.astype(np.float32) * scales[:, None]
        bits, groups = self._grid.bits, scales.shape[1]
        zeros = np.full(scales.shape, self._grid.middle, np.uint8)
        if self.zeros:
            zeros = unpack_zeros(parts[self.zeros.name][start:stop], bits, groups)
        return Quantized(self._grid, unpack(codes[start:stop], bits, self.shape[1]), scales, zeros).dequantized()

    def _blocks(self) -> Iterator[np.ndarray]:
        """The codes as they are stored."""
        whole = np.empty(self.shape[::-1], np.int8) if self.layout == "columns" else None
        row = 0
        for q in self._quantized():
            if self.layout == "blocks":
                assert self.scheme.group is not None
                self._scales.append(q.scales * np.float32(self.gain))
                if self.zeros:
                    self._zeros.append(pack_zeros(q.zeros, self._grid.bits))
                yield pack(q.codes, self._grid.bits, self.scheme.group)
                continue
            self._scales.append(q.scales[:, 0] * np.float32(self.gain))
            signed = (q.codes ^ 0x80).view(np.int8)  # 0 … 255 around 128 -> -128 … 127
            if whole is None:
                yield signed
            else:
                whole[:, row : row + len(signed)] = signed.T
                row += len(signed)
        if whole is not None:
            yield whole

    def _quantized(self) -> Iterator[Quantized]:
        (n, k), statistics = self.shape, self._statistics
        self._scales, self._zeros, self._signal, self._noise = [], [], 0.0, 0.0
        weight = None if statistics is None else statistics.square(self.path)  # E[x²] of the inputs
        mean = statistics.mean(self.path) if statistics is not None and self.scheme.compensate else None
        quantize, lost = self._method(weight), []
        for start, stop in row_blocks(n, 4 * k // (GPTQ_ROWS if self.scheme.method == "gptq" else 1)):
            block = to_float32(self._source.rows(self.path, start, stop))
            if not np.isfinite(block).all():
                row, column = np.argwhere(~np.isfinite(block))[0]
                raise CheckpointError(
                    f"{self.path} holds {block[row, column]} at [{start + row}, {column}]; whole numbers cannot stand for it"
                )
            q = quantize(block)
            error = q.dequantized() - block
            self._signal += _energy(block, weight)
            self._noise += _energy(error, weight)
            if mean is not None:
                lost.append(-error @ mean * np.float32(self.gain))
            yield q
        self.compensation = np.concatenate(lost) if mean is not None else None

    def _method(self, importance: np.ndarray | None) -> Callable[[np.ndarray], Quantized]:
        if self.scheme.method != "gptq":
            clip = self.scheme.method == "clip"
            return lambda w: nearest(w, self._grid, clip=clip, importance=importance)
        moment = None if self._statistics is None else self._statistics.moment(self.path)
        if moment is None:
            raise UsageError(
                f"{self.path} is to be rounded by gptq, which needs second moments of its inputs; "
                f"calibrate with --moments, or choose the method clip"
            )
        return Gptq(moment, self._grid).quantize

    def _made(self, parts: list[np.ndarray], dtype: Any) -> Iterator[np.ndarray]:
        assert parts, f"Bug: the codes of {self.path} were not written before what belongs to them"
        yield narrow(np.concatenate(parts), np.dtype(dtype), f"scales of {self.path}: one")
        parts.clear()


def _energy(w: np.ndarray, weight: np.ndarray | None) -> float:
    squares = np.einsum("ij,ij->j", w, w)
    return float(squares.sum() if weight is None else squares @ weight)
