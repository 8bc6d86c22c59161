# SPDX-License-Identifier: Apache-2.0
"""Lowering for ONNX Runtime: the operators that multiply by a weight, normalize and attend.

`lower_standard.py` has the same functions in standard operators.
Everything else in a graph is the same for every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.recipe import PREFILL, SHORTLIST
from pgxport.models.layers import Transform, rotary_tables, times
from pgxport.models.spec import TextSpec
from pgxport.models.weights import EMBEDDING

if TYPE_CHECKING:
    from pgxport.exporter.graph import GraphBuilder
    from pgxport.exporter.quantized_matrix import QuantizedMatrix

SHORTLIST_TABLE = "lm_head.screen"  # the copy of the output matrix that finds the candidates
CANDIDATES = 64  # tokens


def prefix_copy(path: str) -> str:
    """The name of the copy of a matrix that prefixes are multiplied by."""
    return f"{path}.prefill"


def linear(g: GraphBuilder, x: ir.Value, path: str, gain: float = 1.0) -> ir.Value:
    """x [..., in] times the checkpoint's matrix [out, in] -> [..., out]"""
    scheme = g.recipe.scheme(path)
    if g.phase == "prefill":
        return integer_product(g, x, g.copied(path, "columns", replace(PREFILL, rotate=scheme.rotate), prefix_copy(path), gain))
    if scheme.bits is None:
        # FusedMatMul reads [out, in] as the checkpoint has it: nothing is transposed
        # while writing, and the token table serves lookup and output from the same
        # bytes. (A Transpose node would be folded into a second copy in memory.)
        return g.op("FusedMatMul", x, g.tensor(path, times(gain)), domain="com.microsoft", transB=1)
    if scheme.activations == "float":
        return grouped_product(g, x, g.quantized_matrix(path, "blocks", gain))
    return integer_product(g, x, g.quantized_matrix(path, "columns", gain))


def lm_head(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    """x [B, 1, H] times the output matrix [V, H], whose rows are looked up too, so that they stay rows -> [B, 1, V]

    They are by the runner, if it is the token table, and else by the graph, if there is a shortlist.
    """
    scheme = g.recipe.scheme(path)
    if scheme.bits is not None and not scheme.symmetric and (path == EMBEDDING or scheme.shortlist):
        raise UsageError(
            f"{path} is looked up by rows too, for which its grid has to be symmetric; say symmetric = true in its rule"
        )
    if scheme.shortlist:
        return two_pass_lm_head(g, x, path)
    if scheme.bits is None or scheme.activations == "float":
        return linear(g, x, path)
    table = g.quantized_matrix(path, "rows")
    q = rounded_activations(g, g.op("Reshape", x, [-1, table.shape[1]]), table)
    rows = table.shape[:1]
    zero_points = g.table("lm_head.zeros", rows, lambda: np.zeros(rows, np.int8), np.int8)  # QGemm wants as many as scales
    parts = g.initializer(table.quantized), g.initializer(table.scales), zero_points
    y = g.op("QGemm", q.quantized, q.scale, q.zero, *parts, domain="com.microsoft", transB=1)
    return g.op("Reshape", y if q.tokens is None else g.op("Mul", y, q.tokens), [-1, 1, table.shape[0]])


def two_pass_lm_head(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    """Writes the output matrix in two passes (SVD-softmax, Shim et al., 2017): all tokens in 4 bits, the likeliest again from the table.

    A step reads half the bytes, and the table's rows are all that the graph and the
    lookup share, so that it stays on the disk but for some pages. What the candidates are
    of each other is not touched by the 4 bits; those of the others are a little off.
    """
    scheme = g.recipe.scheme(path)
    table = g.quantized_matrix(path, "blocks" if scheme.activations == "float" else "rows")
    rough = grouped_product(g, x, g.copied(path, "blocks", SHORTLIST, SHORTLIST_TABLE))
    count = min(CANDIDATES, table.shape[0])
    _, likely = g.op("TopK", rough, [count], axis=-1, sorted=0, outputs=2)
    exact = g.op("MatMul", rows_of(g, table, likely), g.op("Unsqueeze", x, [3]))
    return g.op("ScatterElements", rough, likely, g.op("Squeeze", exact, [3]), axis=-1)


def rows_of(g: GraphBuilder, table: QuantizedMatrix, tokens: ir.Value) -> ir.Value:
    """Some rows of a table of 8 bits, in floats: tokens [B, 1, C] -> [B, 1, C, H]"""
    quantized, scales = (g.op("Gather", g.initializer(part), tokens, axis=0) for part in (table.quantized, table.scales))
    quantized = g.op("Cast", quantized, to=int(ir.DataType.from_numpy(g.dtype)))
    scales = g.op("Unsqueeze", g.cast(scales, table.scales.dtype, g.dtype), [-1])
    if table.layout == "rows":
        return g.op("Mul", quantized, scales)
    rows = g.op("Reshape", g.op("Mul", g.op("Sub", quantized, 128.0), scales), [0, 0, 0, -1])
    width = table.shape[1]
    return rows if table.quantized.nbytes == table.shape[0] * width else g.op("Slice", rows, [0], [width], [3])


def grouped_product(g: GraphBuilder, x: ir.Value, w: QuantizedMatrix) -> ir.Value:
    """Float activations by 4 or 8 bits, with a scale for each group of input channels."""
    quantized, scales, *zero_points = (g.initializer(p) for p in w.lazy_tensors)
    return g.op(
        "MatMulNBits",
        x,
        quantized,
        g.cast(scales, w.scales.dtype, g.dtype),
        *zero_points,
        domain="com.microsoft",
        K=w.shape[1],
        N=w.shape[0],
        bits=w.scheme.bits,
        block_size=w.scheme.group_size,
        accuracy_level=4,  # activations in int8, a scale for each group of them; without, kernels are three times slower
    )


def integer_product(g: GraphBuilder, x: ir.Value, w: QuantizedMatrix) -> ir.Value:
    """Activations in 8 bits by weights in 8 bits, with a scale for each output channel."""
    q = rounded_activations(g, x, w)
    y = g.op(
        "MatMulIntegerToFloat",
        q.quantized,
        g.initializer(w.quantized),
        q.scale,
        g.initializer(w.scales),
        q.zero,
        domain="com.microsoft",
    )
    return y if q.tokens is None else g.op("Mul", y, q.tokens)


@dataclass(frozen=True)
class Rounded:
    """Activations in integers, (quantized - zero) * scale, and that times `tokens` [..., 1] where each token has a scale."""

    quantized: ir.Value
    scale: ir.Value
    zero: ir.Value
    tokens: ir.Value | None = None


def rounded_activations(g: GraphBuilder, x: ir.Value, w: QuantizedMatrix) -> Rounded:
    """x in uint8, made once for all products that read it. (Kernels of ONNX Runtime want uint8 by int8; int8 by int8 is slow.)"""
    key = (x.name, w.scheme.activations, w.scheme.observer)
    if key not in g.rounded:
        if w.scheme.activations == "static":
            low, high = g.activation_range(w)
            parts = zip(("scale", "zero"), uint8_grid(low, high), strict=True)
            scale, zero = (g.constant(number, name=f"{w.path}.input.{part}") for part, number in parts)
            g.rounded[key] = Rounded(g.op("QuantizeLinear", x, scale, zero), scale, zero)
        else:
            # A scale for each token: one large token of a thousand would leave the others a few values.
            largest = g.op("Max", g.op("ReduceMax", g.op("Abs", x), [-1], keepdims=1), 1e-30)  # a token may be all zeros
            tokens = g.op("Mul", largest, 1 / 127)
            q = g.op("QuantizeLinear", g.op("Div", x, tokens), np.float32(1), np.uint8(128))
            g.rounded[key] = Rounded(q, g.constant(np.float32(1)), g.constant(np.uint8(128)), tokens)
    return g.rounded[key]


def uint8_grid(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of 256 steps from low to high, zero among them.

    >>> uint8_grid(-1.0, 1.55)
    (np.float32(0.01), np.uint8(100))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(round(-low / float(scale)))


def rms_norm(g: GraphBuilder, x: ir.Value, transform: Transform, eps: float) -> ir.Value:
    return g.op("RMSNormalization", x, g.weight("weight", transform), axis=-1, epsilon=eps)


def layer_norm(g: GraphBuilder, x: ir.Value, eps: float) -> ir.Value:
    return g.op("LayerNormalization", x, g.weight("weight"), g.weight("bias"), axis=-1, epsilon=eps)


def add_greedy_outputs(g: GraphBuilder) -> None:
    """Add nothing: on a CPU the runner takes the likeliest token of the logits itself."""


def attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value:
    """Everything sees everything: q, k, v [B, T, N*D] -> [B, T, N*D]"""
    return g.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=heads, scale=scale)


def cached_attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec) -> ir.Value:
    """Rotate, append to the cache in place, attend to all of it: q [B, T, N*D], k and v [B, T, K*D] -> [B, T, N*D]

    A prefix and a new token may each have a form of their own: the first decomposed, the second fused.
    """
    if text.head_dim % 16:
        raise CheckpointError(
            f"head_dim is {text.head_dim}; target {g.target.name!r} attends with head sizes that are multiples of 16"
        )
    cache = _cache(g, layer, text)
    fused = partial(fused_attention, qkv=(q, k, v), cache=cache, text=text)
    decomposed = partial(prefix_attention, qkv=(q, k, v), cache=cache, text=text)
    if g.phase is None and g.target.decomposed_prefill:
        out, *present = g.branch(g.prefill(q), decomposed, fused)
    else:
        out, *present = decomposed(g) if g.phase == "prefill" else fused(g)
    for part, value in zip(("key", "value"), present, strict=True):
        g.output(value, f"present.{layer}.{part}", cache.shape, g.cache_dtype)
    return out


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache, as inputs of the graph.

    Attributes:
        past: Keys and values [B, K, capacity, D].
        scales: Steps of an int8 cache [1, K, 1, D], of keys and of values; none of a float cache.
        lengths: Tokens in the cache after this call, less one [B].
        bias: 0 where a token looks, and a large negative number outside of the local window [B, 1, T, S]; None: it looks everywhere.
    """

    shape: list[int | str]
    past: list[ir.Value]
    scales: list[ir.Value]
    lengths: ir.Value
    total: ir.Value
    bias: ir.Value | None

    def inner(self, g: GraphBuilder) -> np.dtype[Any]:
        """The type that the fused node computes in: a float cache's own; with an int8 cache, that of the activations."""
        return g.dtype if g.cache_dtype == np.int8 else g.cache_dtype


def _cache(g: GraphBuilder, layer: int, text: TextSpec) -> LayerCache:
    shape: list[int | str] = ["batch", text.kv_heads, "capacity", text.head_dim]
    past = [g.input(f"past_key_values.{layer}.{part}", shape, g.cache_dtype) for part in ("key", "value")]
    lengths = g.input("seqlens_k", ["batch"], np.int32)
    total = g.input("total_sequence_length", [], np.int32)
    local = text.window is not None and layer in text.local_layers and text.window < g.context_length
    bias = g.input("local_bias", ["batch", 1, "tokens", "total"]) if local else None
    quantized = g.cache_dtype == np.int8
    bias = bias and g.cast(bias, g.dtype, g.dtype if quantized else g.cache_dtype)
    if quantized and local and not g.target.biased_int8_cache:
        raise UsageError(
            f"target {g.target.name!r} has no int8 KV cache for a model with a local window of {text.window} tokens in a context of "
            f"{g.context_length}; pass --context {text.window} or --local-window none, or a recipe with another cache"
        )
    scales = [g.cache_scale(layer, part, text) for part in ("key", "value")] if quantized else []
    return LayerCache(shape, past, scales, lengths, total, bias)


def fused_attention(g: GraphBuilder, qkv: Sequence[ir.Value], cache: LayerCache, text: TextSpec) -> list[ir.Value]:
    """Attention and the new cache by one GroupQueryAttention: [out [B, T, N*D], keys, values].

    `causal` 0 is the whole prefix rule: a prefix sees itself both ways, and a single new token sees
    everything before it. Input `local_bias` hides what lies outside the window of a new token.
    """
    inner = cache.inner(g)
    rounding = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"} if cache.scales else {}
    out, *present = g.op(
        "GroupQueryAttention",
        *(g.cast(x, g.dtype, inner) for x in qkv),
        *cache.past,
        cache.lengths,
        cache.total,
        *rotary(g, text, inner),
        None,
        cache.bias,
        *([None, *cache.scales] if cache.scales else ()),
        outputs=3,
        domain="com.microsoft",
        num_heads=text.heads,
        kv_num_heads=text.kv_heads,
        scale=text.query_scale,
        softcap=text.attn_softcap or 0.0,
        do_rotary=1,
        causal=0,
        **rounding,
    )
    return [g.cast(out, inner, g.dtype), *present]


def prefix_attention(g: GraphBuilder, qkv: Sequence[ir.Value], cache: LayerCache, text: TextSpec) -> list[ir.Value]:
    """Writes the attention of a prefix, decomposed: every token sees every other, and the cache is empty before.

    On a CPU the fused kernel, whose softcap is slow, takes 1.5 to 2 times as long. One head at a time:
    the scores of one head of 1,040 tokens stay in the CPU's cache, and those of 4,112 tokens take 68 MB.
    A prefix attends to its keys and values as the cache holds them, rounded; the fused kernel does, too.
    """
    groups, cap = text.heads // text.kv_heads, text.attn_softcap or 1.0
    q, k = (_rotated(g, x, count, text) for x, count in zip(qkv, (text.heads, text.kv_heads), strict=False))
    scales = cache.scales or (None, None)
    (stored_k, k), (stored_v, v) = (_stored(g, x, scale) for x, scale in zip((k, qkv[2]), scales, strict=True))
    queries = _each_head(g, g.op("Mul", _heads(g, q, text.heads, text.head_dim), text.query_scale / cap), text.heads)
    keys = _each_head(g, g.op("Transpose", _heads(g, k, text.kv_heads, text.head_dim), perm=[0, 1, 3, 2]), text.kv_heads)
    values = _each_head(g, _heads(g, v, text.kv_heads, text.head_dim), text.kv_heads)
    outputs = []
    for head, query in enumerate(queries):
        scores = g.op("MatMul", query, keys[head // groups])
        if text.attn_softcap:
            scores = g.op("Mul", g.op("Tanh", scores), cap)
        outputs.append(g.op("MatMul", g.op("Softmax", scores, axis=-1), values[head // groups]))
    out = g.op("Transpose", g.op("Concat", *outputs, axis=1), perm=[0, 2, 1, 3])
    tokens = g.op("Shape", k, start=1, end=2)
    present = [
        g.op("Concat", _heads(g, new, text.kv_heads, text.head_dim), g.op("Slice", old, tokens, [2**31 - 1], [2]), axis=2)
        for new, old in zip((stored_k, stored_v), cache.past, strict=True)
    ]
    return [g.op("Reshape", out, [0, 0, -1]), *present]


def _rotated(g: GraphBuilder, x: ir.Value, heads: int, text: TextSpec) -> ir.Value:
    """[B, T, N*D], turned by the positions from the first on."""
    return g.op("RotaryEmbedding", x, np.array([0]), *rotary(g, text, g.dtype), domain="com.microsoft", num_heads=heads)


def _heads(g: GraphBuilder, x: ir.Value, count: int, head_dim: int) -> ir.Value:
    """[B, T, N*D] -> [B, N, T, D]"""
    return g.op("Transpose", g.op("Reshape", x, [0, 0, count, head_dim]), perm=[0, 2, 1, 3])


def _each_head(g: GraphBuilder, x: ir.Value, count: int) -> Sequence[ir.Value]:
    """[B, N, T, D] -> N of [B, 1, T, D]"""
    return [x] if count == 1 else g.op("Split", x, axis=1, num_outputs=count, outputs=count)


def _stored(g: GraphBuilder, x: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """[B, T, K*D] -> the same in the cache dtype, and as attention reads it from there."""
    if scale is None:
        stored = g.cast(x, g.dtype, g.cache_dtype)
        return stored, g.cast(stored, g.cache_dtype, g.dtype)
    steps = g.op("Reshape", scale, [-1])
    # QuantizeLinear with a scale for each channel of the last axis
    # took 57 ms for 1,040 tokens of 1,024; nothing here takes 3.
    stored = g.op("QuantizeLinear", g.op("Div", x, steps), np.float32(1), np.int8(0))
    return stored, g.op("Mul", g.op("Cast", stored, to=int(ir.DataType.from_numpy(g.dtype))), steps)


def rotary(g: GraphBuilder, text: TextSpec, dtype: np.dtype[Any]) -> list[ir.Value]:
    """cos and sin of every position, as a type that attention computes in."""
    shape, suffix = (g.context_length, text.head_dim // 2), "" if dtype == g.dtype else f".{dtype.name}"

    def table(index: int, name: str) -> ir.Value:
        return g.table(f"rotary.{name}{suffix}", shape, lambda: rotary_tables(text, g.context_length)[index], dtype)

    return [table(index, name) for index, name in enumerate(("cos", "sin"))]
