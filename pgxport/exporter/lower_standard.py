# SPDX-License-Identifier: Apache-2.0
"""Lowering for TensorRT: the functions of `lower_onnxruntime.py`, in standard operators alone.

TensorRT takes precision from the graph: casts, and QuantizeLinear and
DequantizeLinear around what it shall multiply in fewer bits. Norms, softmax
and logits are in float32 in graphs of half precision; products are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pgxport.errors import UsageError
from pgxport.exporter.quantize import FLOAT8_LARGEST
from pgxport.exporter.recipe import Scheme
from pgxport.exporter.stream import FLOAT8
from pgxport.models.layers import Transform, rotary_tables, times
from pgxport.models.spec import TextSpec
from pgxport.models.weights import EMBEDDING

if TYPE_CHECKING:
    import onnx_ir as ir

    from pgxport.exporter.graph import GraphBuilder

# A score that no softmax sees, and that float16 holds: its exponential
# is 0 beside that of any score within 104 of 0 in float32.
HIDDEN = np.float32(-30000)
FLOAT32 = np.dtype(np.float32)
END = 2**31 - 1


def linear(g: GraphBuilder, x: ir.Value, path: str, gain: float = 1.0) -> ir.Value:
    """x [..., in] times the checkpoint's matrix [out, in] -> [..., out]"""
    scheme = g.recipe.scheme(path)
    if scheme.bits is None:
        # As the checkpoint has it: nothing is transposed while writing,
        # and an engine with two profiles holds less of it twice.
        return g.op("MatMul", x, _transposed(g, g.tensor(path, times(gain))))
    if scheme.activations == "static":
        x = rounded_activations(g, x, path)
    if scheme.group_size is None:
        return g.op("MatMul", x, rows_product(g, path, gain))
    return g.op("MatMul", x, groups_product(g, path, gain))


def lm_head(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    """x [B, 1, H] times the output matrix [V, H]; if it is the token table, its rows are looked up too, and stay rows -> [B, 1, V]"""
    scheme = g.recipe.scheme(path)
    if path == EMBEDDING and scheme.bits is not None and (scheme.bits, scheme.group_size, scheme.format) != (8, None, "int"):
        raise UsageError(
            f"{path} is looked up by rows too, which for target {g.target.name!r} are int8 with one scale each or floats; "
            f"write bits = 8 without a group in its rule"
        )
    return linear(g, x, path)


def rows_product(g: GraphBuilder, path: str, gain: float) -> ir.Value:
    """Dequantizes an 8-bit matrix [out, in] with a scale for each row to floats [in, out]."""
    w = g.quantized_matrix(path, "rows", gain)
    return _transposed(g, g.op("DequantizeLinear", g.initializer(w.quantized), g.initializer(w.scales), axis=0))


def groups_product(g: GraphBuilder, path: str, gain: float) -> ir.Value:
    """Dequantizes a matrix [in, out] with a scale for each group of input channels: the form in which TensorRT keeps 4 bits."""
    group_size, columns = g.recipe.scheme(path).group_size, g.source.shape(path)[1]
    assert group_size is not None, f"Bug: {path} has no group"
    if columns % group_size:
        fits = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
        can = (
            f"write group = {fits[0]} in its rule"
            if fits
            else "give it bits = 8 without a group, or a dtype, by a rule of its own"
        )
        raise UsageError(
            f"recipe {g.recipe.name!r}: {path} has {columns} input channels, of which target {g.target.name!r} writes "
            f"whole groups, and {group_size} do not divide them; {can}"
        )
    w = g.quantized_matrix(path, "groups", gain)
    g.needs_opset(21)
    return g.op("DequantizeLinear", g.initializer(w.quantized), g.initializer(w.scales), axis=0, block_size=group_size)


def rounded_activations(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    """x in 8 bits and back, written once for all products that read it; TensorRT multiplies what is between."""
    scheme = g.recipe.scheme(path)
    key = ("rounded", x.name, scheme.format, scheme.observer)
    if key not in g.shared:
        low, high = g.input_range(path, scheme.observer)
        scale = g.constant(activation_scale(low, high, scheme, g.dtype), name=f"{path}.input.scale")
        zero = g.constant(np.zeros((), FLOAT8 if scheme.format == "e4m3" else np.int8))
        g.shared[key] = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale)
    return g.shared[key]


def activation_scale(low: float, high: float, scheme: Scheme, dtype: np.dtype) -> np.ndarray:
    """The step of a grid around zero that reaches both ends, in the type that the graph computes in.

    >>> activation_scale(-1.0, 1.27, Scheme(bits=8, activations="static"), FLOAT32).round(4)
    np.float32(0.01)
    """
    steps = float(FLOAT8_LARGEST) if scheme.format == "e4m3" else 127.0
    scale = np.asarray(max(-low, high, 0.0) / steps, dtype)
    return scale if scale > 0 else np.asarray(1, dtype)


def rms_norm(g: GraphBuilder, x: ir.Value, transform: Transform, eps: float) -> ir.Value:
    w, x = g.weight("weight", transform, FLOAT32), g.cast(x, g.dtype, FLOAT32)
    if g.target.opset >= 23:
        y = g.op("RMSNormalization", x, w, axis=-1, epsilon=eps)
    else:
        mean = g.op("ReduceMean", g.op("Mul", x, x), [-1], keepdims=1)
        y = g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean, np.float32(eps)))), w)
    return g.cast(y, FLOAT32, g.dtype)


def layer_norm(g: GraphBuilder, x: ir.Value, eps: float) -> ir.Value:
    w, b = (g.weight(part, None, FLOAT32) for part in ("weight", "bias"))
    y = g.op("LayerNormalization", g.cast(x, g.dtype, FLOAT32), w, b, axis=-1, epsilon=eps)
    return g.cast(y, FLOAT32, g.dtype)


def attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value:
    """Everything sees everything: q, k, v [B, T, N*D] -> [B, T, N*D]"""
    q, k, v = (g.op("Reshape", x, [0, 0, heads, -1]) for x in (q, k, v))
    keys = g.op("Transpose", k, perm=[0, 2, 3, 1])
    q, v = (g.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (g.op("Mul", q, scale), v))
    out = g.op("MatMul", _softmax(g, g.cast(g.op("MatMul", q, keys), g.dtype, FLOAT32)), v)
    return g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), [0, 0, -1])


def cached_attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec) -> ir.Value:
    """Rotate, append to the cache, attend to what `visible` shows: q [B, T, N*D], k and v [B, T, K*D] -> [B, T, N*D]

    The query heads of one key head are one matrix of so many times more rows, so that no key is repeated.
    """
    d, cap = text.head_dim, text.attn_softcap
    q, k, v = (g.op("Reshape", x, [0, 0, n, d]) for x, n in ((q, text.heads), (k, text.kv_heads), (v, text.kv_heads)))
    q, k = (_rotated(g, x, text) for x in (q, k))
    # What is capped comes divided by the cap.
    q = g.op("Mul", g.op("Transpose", q, perm=[0, 2, 1, 3]), text.query_scale / (cap or 1.0))
    q = g.op("Reshape", q, [0, text.kv_heads, -1, d])
    visible = _visible(g, layer, text)
    attend = _attend_to_delta if g.target.cache_kind == "delta" else _attend_to_update
    out = attend(g, q, k, v, visible, layer=layer, text=text)
    out = g.op("Transpose", g.op("Reshape", out, [0, text.heads, -1, d]), perm=[0, 2, 1, 3])
    return g.op("Reshape", out, [0, 0, text.heads * d])


def _attend_to_delta(
    g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, seen: ir.Value, *, layer: int, text: TextSpec
) -> ir.Value:
    """q [B, K, G*T, D], k and v [B, T, K, D]: the cache is only read, and the new rows are outputs.

    Past and new keys are multiplied apart, and their scores put together, so that the cache is never copied.
    """
    shape: list[int | str] = ["batch", "past", text.kv_heads, text.head_dim]
    past = [g.input(f"past_key_values.{layer}.{part}", shape, g.cache_dtype) for part in ("key", "value")]
    for part, value in (("key", k), ("value", v)):
        new = g.cast(value, g.dtype, g.cache_dtype)
        g.output(new, f"present.{layer}.{part}", ["batch", "tokens", *shape[2:]], g.cache_dtype)
    past_k, past_v = (g.cast(x, g.cache_dtype, g.dtype) for x in past)
    scores = [g.op("MatMul", q, g.op("Transpose", x, perm=[0, 2, 3, 1])) for x in (past_k, k)]
    weights = _weights(g, g.op("Concat", *scores, axis=-1), seen, text)
    if ("past",) not in g.shared:
        g.shared["past",] = g.op("Shape", past[0], start=1, end=2)
    rows = g.shared["past",]
    parts = g.op("Slice", weights, [0], rows, [3]), g.op("Slice", weights, rows, [END], [3])
    values = (g.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (past_v, v))
    return g.op("Add", *(g.op("MatMul", w, x) for w, x in zip(parts, values, strict=True)))


def _attend_to_update(
    g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, seen: ir.Value, *, layer: int, text: TextSpec
) -> ir.Value:
    """q [B, K, G*T, D], k and v [B, T, K, D]: TensorScatter writes the new rows into the cache, and all of it is attended to."""
    # TensorRT's update layer wants a fixed length; masks are of the same.
    shape: list[int | str] = ["batch", text.kv_heads, g.context_length, text.head_dim]
    first = g.input("write_indices", ["batch"], np.int64)
    present = []
    for part, value in (("key", k), ("value", v)):
        past = g.input(f"past_key_values.{layer}.{part}", shape, g.cache_dtype)
        new = g.cast(g.op("Transpose", value, perm=[0, 2, 1, 3]), g.dtype, g.cache_dtype)
        whole = g.op("TensorScatter", past, new, first, axis=2, mode="linear")
        g.output(whole, f"present.{layer}.{part}", shape, g.cache_dtype)
        present.append(g.cast(whole, g.cache_dtype, g.dtype))
    scores = g.op("MatMul", q, g.op("Transpose", present[0], perm=[0, 1, 3, 2]))
    return g.op("MatMul", _weights(g, scores, seen, text), present[1])


def add_greedy_outputs(g: GraphBuilder) -> None:
    """Add the likeliest token, and whether all logits are finite: a runner then takes a few bytes of a step from the device."""
    logits = g.output_named("logits")
    g.output(g.op("ArgMax", logits, axis=-1, keepdims=0), "next_token", ["batch", 1], np.int64)
    g.output(g.op("ReduceSumSquare", logits, [1, 2], keepdims=0), "logits_square", ["batch"], np.float32)


def _weights(g: GraphBuilder, scores: ir.Value, seen: ir.Value, text: TextSpec) -> ir.Value:
    """Scores [B, K, G*T, S], of which those that are capped come divided by the cap -> how much each token takes of each value."""
    scores = g.cast(scores, g.dtype, FLOAT32)
    if text.attn_softcap:
        scores = g.op("Mul", g.op("Tanh", scores), np.float32(text.attn_softcap))
    return _softmax(g, g.op("Where", seen, scores, HIDDEN))


def _softmax(g: GraphBuilder, scores: ir.Value) -> ir.Value:
    return g.cast(g.op("Softmax", scores, axis=-1), FLOAT32, g.dtype)


def _visible(g: GraphBuilder, layer: int, text: TextSpec) -> ir.Value:
    """[B, 1, G*T, S], True where a query may look; the runner gives it for each token."""
    local = text.window is not None and layer in text.local_layers and text.window < g.context_length
    shape: list[int | str] = ["batch", 1, "tokens", "keys" if g.target.cache_kind == "delta" else g.context_length]
    g.input("visible", shape, np.bool_)  # which runners give, whether there is a layer that looks so far or not
    name = "local_visible" if local else "visible"
    if (name,) not in g.shared:
        visible = g.input(name, shape, np.bool_)
        groups = text.heads // text.kv_heads
        g.shared[name,] = visible if groups == 1 else g.op("Concat", *[visible] * groups, axis=2)
    return g.shared[name,]


def _rotated(g: GraphBuilder, x: ir.Value, text: TextSpec) -> ir.Value:
    """x [B, T, N, D] turned by its tokens' positions."""
    cos, sin = (_turn(g, part, text) for part in ("cos", "sin"))
    a, b = g.op("Split", x, axis=-1, num_outputs=2, outputs=2)
    first_half = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    return g.op("Concat", first_half, g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin)), axis=-1)


def _turn(g: GraphBuilder, part: str, text: TextSpec) -> ir.Value:
    """cos or sin [T, 1, D / 2] of the tokens' positions."""
    name, rows = f"rotary.{part}", (g.context_length, 1, text.head_dim // 2)
    if (name,) not in g.shared:
        table = g.table(name, rows, lambda: rotary_tables(text, g.context_length)[part == "sin"][:, None])
        g.shared[name,] = g.op("Gather", table, g.input("positions", ["tokens"], np.int64), axis=0)
    return g.shared[name,]


def _transposed(g: GraphBuilder, w: ir.Value) -> ir.Value:
    return g.op("Transpose", w, perm=[1, 0])
