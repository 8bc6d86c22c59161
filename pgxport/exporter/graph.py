# SPDX-License-Identifier: Apache-2.0
"""Write an ONNX graph: named scopes, operators, and weights that stay in the checkpoint until the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ml_dtypes  # noqa: F401  before onnx_ir: it registers bfloat16 and int4 with numpy
import numpy as np
import onnx_ir as ir

from pgxport import __version__
from pgxport.bundle.manifest import GraphInfo, TensorInfo
from pgxport.errors import UsageError
from pgxport.exporter import lower_onnxruntime as lower
from pgxport.exporter import lower_standard
from pgxport.exporter.inputs.equivalent import InputChange
from pgxport.exporter.inputs.lower_inputs import changed_input
from pgxport.exporter.quantized_matrix import Layout, QuantizedMatrix, Renamed
from pgxport.exporter.recipe import Recipe, Scheme
from pgxport.exporter.stream import LazyTensor, narrow
from pgxport.exporter.targets import Target
from pgxport.models.checkpoint import TensorSource, row_blocks, to_float32
from pgxport.models.layers import Transform, times
from pgxport.models.spec import TextSpec

if TYPE_CHECKING:
    from pgxport.exporter.inputs.scaling import InputStatistics

Place = tuple[str, int, int]  # file, offset, length
Phase = Literal["prefill", "step"]
PHASES: tuple[tuple[str, Phase], ...] = (("then_branch", "prefill"), ("else_branch", "step"))


class Dialect(Protocol):
    """A module of lowerings: the operators of one kind of engine."""

    def linear(self, g: GraphBuilder, x: ir.Value, path: str, gain: float = 1.0) -> ir.Value: ...

    def lm_head(self, g: GraphBuilder, x: ir.Value, path: str) -> ir.Value: ...

    def rms_norm(self, g: GraphBuilder, x: ir.Value, transform: Transform, eps: float) -> ir.Value: ...

    def layer_norm(self, g: GraphBuilder, x: ir.Value, eps: float) -> ir.Value: ...

    def attention(self, g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value: ...

    def cached_attention(
        self, g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec
    ) -> ir.Value: ...

    def add_greedy_outputs(self, g: GraphBuilder) -> None: ...


@dataclass(frozen=True)
class LayerOutput:
    """An output of the graph that a layer computes inside a branch."""

    value: ir.Value
    name: str
    shape: Sequence[int | str]
    dtype: Any


Branch = Callable[["GraphBuilder"], Sequence[ir.Value]]  # writes nodes, and returns the values that leave the branch
DIALECTS: Mapping[str, Dialect] = {"onnxruntime": lower, "standard": lower_standard}


class GraphBuilder:
    """One graph being written. Implements `pgxport.models.layers.Writer`."""

    def __init__(
        self,
        name: str,
        source: TensorSource,
        recipe: Recipe,
        target: Target,
        *,
        context_length: int = 0,
        statistics: InputStatistics | None = None,
        changes: Mapping[str, InputChange] | None = None,
    ):
        self.name, self.source, self.recipe, self.target = name, source, recipe, target
        self.context_length = context_length  # the longest prefix and answer together that a decoder is written for
        self.statistics = statistics  # of activations, from calibration
        self.changes = changes or {}  # of the inputs of linears, by weight
        self.lazy_tensors: dict[str, LazyTensor] = {}
        self.matrices: dict[str, QuantizedMatrix] = {}  # by weight
        self.copies: set[str] = set()  # names of those that stand beside others for the same weight
        self.rounded: dict[tuple[Any, ...], lower.Rounded] = {}
        self.shared: dict[tuple[Any, ...], Any] = {}  # values that many nodes read, by what they are
        self._lower = DIALECTS[target.dialect]
        self.graph = ir.Graph((), (), nodes=(), name=name, opset_imports=dict(target.opsets))
        self.body = self.graph  # where nodes are appended: the graph, or a branch of it
        self.nodes: list[ir.Node] = []  # of the graph and its branches, in the order of writing
        self.phase: Phase | None = None  # which of the two a layer is written for, where they have weights of their own
        self.results: list[LayerOutput] | None = None  # outputs of a layer inside a branch, which leave it by the `If`
        # One dtype for all activations of a graph, by the weights it is to multiply most of.
        self.dtype = np.dtype(target.compute(recipe.rules[-1].scheme.dtype))
        self.cache_dtype = np.dtype(recipe.cache or self.dtype)
        self._initializers: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._inputs: dict[str, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        yield
        self._scope.pop()

    def path(self, name: str) -> str:
        return ".".join([*self._scope, name])

    # Values -------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = None) -> ir.Value:
        """Adds an input. Without a dtype it holds activations: float32 outside, cast to the dtype that the graph computes in."""
        if name not in self._inputs:
            value = _value(name, np.dtype(dtype or np.float32), shape)
            self.graph.inputs.append(value)
            self._inputs[name] = value if dtype else self.cast(value, np.dtype(np.float32), self.dtype)
        return self._inputs[name]

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str], dtype: Any = None) -> None:
        """Adds an output; activations leave the graph as float32."""
        if self.results is not None:
            self.results.append(LayerOutput(value, name, shape, dtype))
            return
        value = value if dtype else self.cast(value, self.dtype, np.dtype(np.float32))
        value.name, value.shape = name, ir.Shape(shape)
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype or np.float32))
        self.graph.outputs.append(value)

    def cast(self, value: ir.Value, have: np.dtype, want: np.dtype) -> ir.Value:
        return value if have == want else self.op("Cast", value, to=int(ir.DataType.from_numpy(want)))

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> ir.Value:
        """Returns a number or short list of the architecture as a constant; the checkpoint has none of these.

        Python's floats become activations, and its integers int64; numpy's stay what they are. Equal ones
        are stored once, but for those with a name: what is measured should not decide how large a graph is.
        """
        if dtype is None and not isinstance(value, np.generic | np.ndarray):
            dtype = self.dtype if np.asarray(value).dtype.kind == "f" else np.int64
        array = np.asarray(value, dtype)
        key = (name, array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = name or f"constant_{len(self._constants)}"
            value = self._constants[key] = _value(name, array.dtype, array.shape)
            value.const_value = ir.tensor(array, name=name)
            self.graph.register_initializer(value)
        return self._constants[key]

    def table(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray], dtype: Any = None) -> ir.Value:
        """Returns a large constant, which is computed when it is written."""
        kind = np.dtype(dtype or self.dtype)
        return self.inside(self.graph).initializer(LazyTensor(name, kind, shape, lambda: iter([make().astype(kind)])))

    def weight(self, name: str, transform: Transform | None = None, dtype: Any = None) -> ir.Value:
        return self.tensor(self.path(name), transform, dtype)

    def tensor(self, path: str, transform: Transform | None = None, dtype: Any = None) -> ir.Value:
        """A tensor of the checkpoint by its whole name, stored as the recipe says, and cast to activations unless a dtype is given."""
        if path not in self._weights:
            scheme = self.recipe.scheme(path)
            if scheme.bits is not None:
                raise UsageError(
                    f"recipe {self.recipe.name!r} rounds {path} to {scheme.bits} bits, and only matrices of linear layers can be "
                    f"rounded; put a rule with a dtype for it before the others"
                )
            top = self.inside(self.graph)  # where both branches of an `If` see the weight
            value = top.initializer(floats := self.floats(path, transform))
            self._weights[path] = top.cast(value, floats.dtype, np.dtype(dtype or self.dtype))
        return self._weights[path]

    def floats(self, path: str, transform: Transform | None = None) -> LazyTensor:
        """Returns a tensor of the checkpoint in the dtype that the recipe says; `initializer` adds it."""
        dtype = np.dtype(self.recipe.scheme(path).dtype)
        return LazyTensor(path, dtype, self.source.shape(path), lambda: self._blocks(path, dtype, transform))

    def inside(self, body: ir.Graph, phase: Phase | None = None) -> GraphBuilder:
        """Returns a view of this builder that writes nodes into another body; with a phase, its outputs are a layer's results."""
        view = copy(self)
        view.body, view.phase = body, phase
        view.results = self.results if phase is None else []
        return view

    def prefill(self, x: ir.Value) -> ir.Value:
        """Whether x [B, T, …], and with it the decoder, is a prefix and not one token."""
        if ("prefill",) not in self.shared:
            length = self.op("Squeeze", self.op("Shape", x, start=1, end=2))
            self.shared["prefill",] = self.op("Greater", length, 1)
        return self.shared["prefill",]

    def quantized_matrix(self, path: str, layout: Layout, gain: float = 1.0) -> QuantizedMatrix:
        """Quantizes a matrix of the checkpoint; its parts become initializers by `initializer`."""
        if path not in self.matrices:
            scheme = self.recipe.scheme(path)
            dtype = self._scales(scheme, layout)
            self.matrices[path] = QuantizedMatrix(
                path, self.source, scheme, layout, gain=gain, dtype=dtype, statistics=self.statistics
            )
        return self.matrices[path]

    def copied(self, path: str, layout: Layout, scheme: Scheme, name: str, gain: float = 1.0) -> QuantizedMatrix:
        """Quantizes a matrix a second time, in another scheme and under another name."""
        source, dtype = Renamed(self.source, name, path), self._scales(scheme, layout)
        self.matrices[name] = QuantizedMatrix(name, source, scheme, layout, gain=gain, dtype=dtype)
        self.copies.add(name)
        return self.matrices[name]

    def _scales(self, scheme: Scheme, layout: Layout) -> np.dtype[Any]:
        """The type of a matrix's scales."""
        if layout in self.target.wide_scales:
            return np.dtype(np.float32)
        # In groups of 32, scales in float32 would be a fifth of
        # all bytes. What float16 rounds is a hundredth of a step.
        return np.dtype(np.float16) if scheme.bits == 4 and self.target.short_scales else self.dtype

    def activation_range(self, w: QuantizedMatrix) -> tuple[float, float]:
        """Lowest and highest input of a matrix, by its observer.

        Raises:
            UsageError: there was no calibration.
        """
        return self.input_range(w.path, w.scheme.observer)

    def input_range(self, path: str, observer: str) -> tuple[float, float]:
        """Lowest and highest input of the matrix `path`, quantized or not."""
        return self._calibrated(path).range(path, observer)

    def cache_scale(self, layer: int, part: str, text: TextSpec) -> ir.Value:
        """float32 [1, K, 1, D], the step of each channel of an int8 cache."""
        name, shape = f"cache.{layer}.{part}.scale", (1, text.kv_heads, 1, text.head_dim)

        def make() -> np.ndarray:
            largest = self._calibrated(name).cache(layer, part).reshape(shape)
            return np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(127)

        return self.table(name, shape, make, np.float32)

    def _calibrated(self, what: str) -> InputStatistics:
        if self.statistics is None:
            raise UsageError(
                f"recipe {self.recipe.name!r} needs calibration for {what}: run `pgx calibrate`, then pass --calibration FILE"
            )
        return self.statistics

    def _blocks(self, path: str, stored: np.dtype, transform: Transform | None) -> Iterator[np.ndarray]:
        shape = self.source.shape(path)
        for start, stop in row_blocks(shape[0], 4 * prod(shape[1:])):
            block = to_float32(self.source.rows(path, start, stop))
            yield narrow(block if transform is None else transform(block), stored, path)

    def initializer(self, lazy: LazyTensor) -> ir.Value:
        """Adds a lazy tensor as an initializer: its bytes are written later, into the graph's data file.

        It belongs to the branch that is being written, if there is one: without
        VNNI, ONNX Runtime (1.32) makes integer products exact where the weights are
        the graph's own, and not where a branch reads them from the graph around it.
        """
        if lazy.name in self.lazy_tensors:
            return self._initializers[lazy.name]
        self.lazy_tensors[lazy.name] = lazy
        value = _value(lazy.name, lazy.dtype, lazy.shape)
        dtype, shape = ir.DataType.from_numpy(lazy.dtype), ir.Shape(lazy.shape)
        value.const_value = ir.LazyTensor(_unwritten, dtype=dtype, shape=shape, name=lazy.name)
        self.body.register_initializer(value)
        self._initializers[lazy.name] = value
        return value

    # The file -----------------------------------------------------------------------------------------------

    def serialize(self, places: Mapping[str, Place]) -> bytes:
        """The .onnx file, its large weights pointing at (file, offset, length) beside it."""
        for name, value in self._initializers.items():
            file, start, length = places[name]
            assert value.dtype is not None, f"Bug: {name} has no type"
            assert value.shape is not None, f"Bug: {name} has no shape"
            value.const_value = ir.ExternalTensor(file, start, length, value.dtype, shape=value.shape, name=name)
        model = ir.Model(self.graph, ir_version=self.target.ir_version, producer_name="pgxport", producer_version=__version__)
        return ir.to_proto(model).SerializeToString(deterministic=True)

    def info(self) -> GraphInfo:
        return GraphInfo(file=f"{self.name}.onnx", inputs=_tensors(self.graph.inputs), outputs=_tensors(self.graph.outputs))

    # Operators ----------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; Python numbers and lists among its inputs become constants."""
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        name = self.path(f"{kind}_{len(self.nodes)}")
        node = ir.node(kind, values, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, out in enumerate(node.outputs):
            out.name = f"{name}.{i}"
        self.body.append(node)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def branch(self, condition: ir.Value, then: Branch, otherwise: Branch) -> Any:
        """The values that one of two functions writes nodes for; the condition is known when the graph runs."""
        bodies: dict[str, Any] = {}
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            bodies[name] = self._new_body(name)
            bodies[name].outputs.extend(write(self.inside(bodies[name])))
        return self.op("If", condition, outputs=len(bodies["then_branch"].outputs), **bodies)

    def layer(self, x: ir.Value, write: Callable[[GraphBuilder, ir.Value], ir.Value]) -> ir.Value:
        """Writes a layer once; or twice under an `If`, for a prefix and for a new token, if each has weights of its own."""
        if not any(rule.scheme.prefill8 for rule in self.recipe.rules):
            return write(self, x)
        condition = self.prefill(x)
        bodies: dict[str, Any] = {}
        results: list[LayerOutput] = []
        for name, phase in PHASES:
            view = self.inside(self._new_body(name), phase)
            out = write(view, x)
            assert view.results is not None
            results = view.results
            view.body.outputs.extend([out, *(result.value for result in results)])
            bodies[name] = view.body
        out, *values = self.op("If", condition, outputs=1 + len(results), **bodies)
        for value, result in zip(values, results, strict=True):
            self.output(value, result.name, result.shape, result.dtype)
        return out

    def _new_body(self, name: str) -> ir.Graph:
        return ir.Graph((), (), nodes=(), name=f"{self.path(name)}_{len(self.nodes)}")

    def linear(self, x: ir.Value, name: str, *, bias: bool = False, gain: float = 1.0) -> ir.Value:
        path = self.path(f"{name}.weight")
        x = changed_input(self, x, path)
        with self.scope(name):
            y = self._lower.linear(self, x, path, gain)
            return self.op("Add", y, self.weight("bias", self._bias(path, gain))) if bias else y

    def _bias(self, path: str, gain: float) -> Transform | None:
        """What a bias is multiplied by, and given back of what rounding the matrix took; the matrix is written before it."""
        if path not in self.matrices or not self.matrices[path].scheme.compensate:
            return times(gain)

        def compensated(b: np.ndarray) -> np.ndarray:
            lost = self.matrices[path].compensation
            assert lost is not None, f"Bug: the bias of {path} was written before its matrix"
            return b * np.float32(gain) + lost

        return compensated

    def lm_head(self, x: ir.Value, name: str) -> ir.Value:
        return self._lower.lm_head(self, x, name)

    def rms_norm(self, x: ir.Value, transform: Transform, *, eps: float) -> ir.Value:
        return self._lower.rms_norm(self, x, transform, eps)

    def layer_norm(self, x: ir.Value, *, eps: float) -> ir.Value:
        return self._lower.layer_norm(self, x, eps)

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value:
        return self._lower.attention(self, q, k, v, heads=heads, scale=scale)

    def cached_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec) -> ir.Value:
        return self._lower.cached_attention(self, q, k, v, layer=layer, text=text)

    def add_greedy_outputs(self) -> None:
        """Add what the target's runner takes from a decoder beside its logits."""
        self._lower.add_greedy_outputs(self)

    def output_named(self, name: str) -> ir.Value:
        """Returns the output of that name."""
        return next(value for value in self.graph.outputs if value.name == name)

    def needs_opset(self, version: int) -> None:
        """Raise the version of the standard operators to what a node needs, where the target's is lower."""
        self.graph.opset_imports[""] = max(self.graph.opset_imports[""], version)


def _tensors(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    infos = []
    for v in values:
        assert v.name, "Bug: an input or output has no name"
        assert v.dtype is not None, f"Bug: {v.name} has no type"
        assert v.shape is not None, f"Bug: {v.name} has no shape"
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in v.shape)
        infos.append(TensorInfo(name=v.name, dtype=v.dtype.numpy().name, shape=shape))
    return tuple(infos)


def _unwritten() -> ir.TensorProtocol:
    raise AssertionError("Bug: a lazy tensor was read before `serialize` pointed it at its file")


def _value(name: str, dtype: np.dtype, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.from_numpy(dtype)))
