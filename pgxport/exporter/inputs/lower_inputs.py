# SPDX-License-Identifier: Apache-2.0
"""What a graph does to the input of a linear before it is rounded and multiplied, in operators that every engine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pgxport.exporter.inputs.equivalent import Equivalent
from pgxport.exporter.inputs.rotation import input_rotation
from pgxport.exporter.stream import LINE, LazyTensor

if TYPE_CHECKING:
    import onnx_ir as ir

    from pgxport.exporter.graph import GraphBuilder


def changed_input(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    """x [B, T, K] as the matrix `path` is multiplied by it, divided and rotated; written once for all that read it."""
    change = g.changes.get(path)
    if change is None:
        return x
    if change.divided:
        shape = g.source.shape(path)[1:]
        factor = LazyTensor(f"input.{path}.factor", g.dtype, shape, lambda: iter([_factor(g, path).astype(g.dtype)]), LINE)
        x = g.op("Mul", x, g.inside(g.graph).initializer(factor))
    key = ("rotated", x.name, change.block)
    if change.block > 1 and key not in g.shared:
        blocks = g.op("Reshape", x, [0, 0, -1, change.block])
        turned = g.op("MatMul", blocks, g.constant(input_rotation(change.block), g.dtype))
        g.shared[key] = g.op("Reshape", turned, [0, 0, -1])
    return g.shared.get(key, x)


def _factor(g: GraphBuilder, path: str) -> np.ndarray:
    assert isinstance(g.source, Equivalent), f"Bug: nothing says what the input of {path} is divided by"
    return 1 / g.source.column_factors[path]
