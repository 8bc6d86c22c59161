# SPDX-License-Identifier: Apache-2.0
"""Write an ONNX graph: named scopes, operators, and weights that stay in the checkpoint until the file is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import ml_dtypes  # noqa: F401  before onnx_ir: it registers bfloat16 and int4 with numpy
import numpy as np
import onnx_ir as ir

from pgxport import __version__
from pgxport.bundle import GraphInfo, TensorInfo
from pgxport.exporter import lower
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import Promise, narrow, row_blocks, to_float32
from pgxport.exporter.targets import Target
from pgxport.models.checkpoint import TensorSource
from pgxport.models.layers import Transform, times
from pgxport.models.spec import TextSpec

Place = tuple[str, int, int]  # file, offset, length


class GraphBuilder:
    """One graph being written. Implements `pgxport.models.layers.Writer`."""

    def __init__(self, name: str, source: TensorSource, recipe: Recipe, target: Target, *, context_length: int = 0):
        self.name, self.source, self.recipe, self.target = name, source, recipe, target
        self.context_length = context_length  # the longest prefix and answer together that a decoder is written for
        self.promises: dict[str, Promise] = {}
        self.graph = ir.Graph((), (), nodes=(), name=name, opset_imports=dict(target.opsets))
        # One dtype for all activations of a graph, by the weights it is to multiply most of.
        self.dtype = np.dtype(target.compute(recipe.rules[-1].scheme.dtype))
        self._promised: list[str] = []
        self._scope: list[str] = []
        self._inputs: dict[str, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    # Names -------------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        yield
        self._scope.pop()

    def path(self, name: str) -> str:
        return ".".join([*self._scope, name])

    # Values ------------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = None) -> ir.Value:
        """An input of the graph. Without a dtype it is activations: float32 outside, cast to what the graph computes in."""
        if name not in self._inputs:
            value = _value(name, np.dtype(dtype or np.float32), shape)
            self.graph.inputs.append(value)
            self._inputs[name] = value if dtype else self.cast(value, np.dtype(np.float32), self.dtype)
        return self._inputs[name]

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str], dtype: Any = None) -> None:
        """An output of the graph; activations leave it as float32."""
        value = value if dtype else self.cast(value, self.dtype, np.dtype(np.float32))
        value.name, value.shape = name, ir.Shape(shape)
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype or np.float32))
        self.graph.outputs.append(value)

    def cast(self, value: ir.Value, have: np.dtype, want: np.dtype) -> ir.Value:
        return value if have == want else self.op("Cast", value, to=int(ir.DataType.from_numpy(want)))

    def constant(self, value: Any, dtype: Any = None) -> ir.Value:
        """A number or short list that is part of the architecture, not of the checkpoint; fractions are activations."""
        array = np.asarray(value, dtype or (self.dtype if np.asarray(value).dtype.kind == "f" else np.int64))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(_value(name, array.dtype, array.shape), ir.tensor(array, name=name))
        return self._constants[key]

    def table(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        """A large constant, worked out when it is written."""
        if name not in self._weights:
            self._weights[name] = self.promise(Promise(name, self.dtype, shape, lambda: iter([make().astype(self.dtype)])))
        return self._weights[name]

    def weight(self, name: str, transform: Transform | None = None) -> ir.Value:
        return self.tensor(self.path(name), transform)

    def tensor(self, path: str, transform: Transform | None = None) -> ir.Value:
        """A tensor of the checkpoint by its whole name, stored as the recipe says."""
        if path not in self._weights:
            stored = np.dtype(self.recipe.scheme(path).dtype)
            value = self.promise(Promise(path, stored, self.source.shape(path), lambda: self._blocks(path, stored, transform)))
            self._weights[path] = self.cast(value, stored, self.dtype)
        return self._weights[path]

    def _blocks(self, path: str, stored: np.dtype, transform: Transform | None) -> Iterator[np.ndarray]:
        shape = self.source.shape(path)
        for start, stop in row_blocks(shape[0], 4 * prod(shape[1:])):
            block = to_float32(self.source.rows(path, start, stop))
            yield narrow(block if transform is None else transform(block), stored, path)

    def promise(self, promise: Promise) -> ir.Value:
        """An initializer whose bytes are written later, into the graph's data file."""
        self.promises[promise.name] = promise
        self._promised.append(promise.name)
        dtype = ir.DataType.from_numpy(promise.dtype)
        tensor = ir.LazyTensor(_unwritten, dtype=dtype, shape=ir.Shape(promise.shape), name=promise.name)
        return self._initializer(_value(promise.name, promise.dtype, promise.shape), tensor)

    def _initializer(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    # The file ----------------------------------------------------------------------------------------------------

    def serialize(self, places: Mapping[str, Place]) -> bytes:
        """The .onnx file, its large weights pointing at (file, offset, length) beside it."""
        for name in self._promised:
            value = self.graph.initializers[name]
            file, start, length = places[name]
            assert value.dtype is not None, f"Bug: {name} has no type"
            assert value.shape is not None, f"Bug: {name} has no shape"
            value.const_value = ir.ExternalTensor(file, start, length, value.dtype, shape=value.shape, name=name)
        model = ir.Model(self.graph, ir_version=self.target.ir_version, producer_name="pgxport", producer_version=__version__)
        return ir.to_proto(model).SerializeToString(deterministic=True)

    def info(self) -> GraphInfo:
        return GraphInfo(file=f"{self.name}.onnx", inputs=_tensors(self.graph.inputs), outputs=_tensors(self.graph.outputs))

    # Operators ---------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; Python numbers and lists among its inputs become constants."""
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        name = self.path(f"{kind}_{self.graph.num_nodes()}")
        node = ir.node(kind, values, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, out in enumerate(node.outputs):
            out.name = f"{name}.{i}"
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def linear(self, x: ir.Value, name: str, *, bias: bool = False, gain: float = 1.0) -> ir.Value:
        with self.scope(name):
            y = lower.linear(self, x, self.path("weight"), gain)
            return self.op("Add", y, self.weight("bias", times(gain))) if bias else y

    def lm_head(self, x: ir.Value, name: str) -> ir.Value:
        return lower.linear(self, x, name)

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value:
        return lower.attention(self, q, k, v, heads=heads, scale=scale)

    def cached_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec) -> ir.Value:
        return lower.cached_attention(self, q, k, v, layer=layer, text=text)


def _tensors(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    found = []
    for v in values:
        assert v.name, "Bug: an input or output has no name"
        assert v.dtype is not None, f"Bug: {v.name} has no type"
        assert v.shape is not None, f"Bug: {v.name} has no shape"
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in v.shape)
        found.append(TensorInfo(name=v.name, dtype=v.dtype.numpy().name, shape=shape))
    return tuple(found)


def _unwritten() -> ir.TensorProtocol:
    raise AssertionError("Bug: a promise was read before `serialize` pointed it at its file")


def _value(name: str, dtype: np.dtype, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.from_numpy(dtype)))
