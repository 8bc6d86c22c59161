# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, statistics and graphs made of arrays in memory, and quantized values read as ONNX Runtime documents them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.recipe import Scheme
from pgxport.runners.ort import session_options

Arrays = dict[str, np.ndarray]


class Tensors:
    """A checkpoint in memory; remembers the blocks of rows that were read."""

    def __init__(self, tensors: Arrays):
        self.tensors = tensors
        self.read: list[tuple[str, int, int]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.read.append((name, start, stop))
        return self.tensors[name][start:stop]


class Observed:
    """Statistics of inputs x [samples, K], the same for every linear; and of a cache's channels."""

    def __init__(self, x: np.ndarray, cache: Mapping[tuple[int, str], np.ndarray] | None = None, *, moments: bool = True):
        self.x, self._cache, self.moments = x, cache or {}, moments

    def absmax(self, path: str) -> np.ndarray:
        return np.abs(self.x).max(0)

    def mean(self, path: str) -> np.ndarray:
        return self.x.mean(0)

    def mean_abs(self, path: str) -> np.ndarray:
        return np.abs(self.x).mean(0)

    def square(self, path: str) -> np.ndarray:
        return (self.x**2).mean(0)

    def moment(self, path: str) -> np.ndarray | None:
        return self.x.T @ self.x / np.float32(len(self.x)) if self.moments else None

    def range(self, path: str, observer: str) -> tuple[float, float]:
        return float(self.x.min()), float(self.x.max())

    def cache(self, layer: int, part: str) -> np.ndarray:
        return self._cache[layer, part]


def run(g: GraphBuilder, feeds: Arrays) -> tuple[Arrays, Arrays]:
    """A graph's outputs in ONNX Runtime on the CPU, and the arrays of its lazy tensors, in the order of writing."""
    parts = {name: np.concatenate(list(p.blocks())).reshape(p.shape).astype(p.dtype) for name, p in g.lazy_tensors.items()}
    for name, array in parts.items():
        g.graph.initializers[name].const_value = ir.tensor(array, name=name)
    model = ir.to_proto(ir.Model(g.graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, session_options(threads=1), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)), parts


def dequantized(scheme: Scheme, layout: str, shape: tuple[int, int], path: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [N, K]: (code - zero) * scale of each number, found one by one where ONNX Runtime's documents say it is.

    MatMulNBits: number k of row n is in block k // group; of 4 bits the even ones are in the lower halves of bytes; zero
    points are packed along a row's blocks in the same way, and are 2**(bits - 1) where there are none.
    """
    quantized, scales, zero_points = (parts.get(f"{path}.{part}") for part in ("codes", "scales", "zeros"))
    assert quantized is not None
    assert scales is not None
    n, k = np.indices(shape)
    if layout != "blocks":
        assert quantized.dtype == np.int8
        assert zero_points is None
        return quantized[(k, n) if layout == "columns" else (n, k)] * scales.astype(np.float32)[n]
    assert quantized.dtype == np.uint8
    block, within = k // scheme.group_size, k % scheme.group_size
    if scheme.bits == 8:
        code, zero = quantized[n, block, within], 128 if zero_points is None else zero_points[n, block].astype(int)
    else:
        code = quantized[n, block, within // 2] >> (within % 2 * 4) & 15
        zero = 8 if zero_points is None else (zero_points[n, block // 2] >> (block % 2 * 4) & 15).astype(int)
    return (code.astype(int) - zero).astype(np.float32) * scales.astype(np.float32)[n, block]
