# SPDX-License-Identifier: Apache-2.0
"""Where a Scheme meets a Target: the operators that multiply by a weight, and those that attend.

Everything else in a graph is the same for every engine and precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pgxport.errors import CheckpointError
from pgxport.models.layers import times
from pgxport.models.spec import TextSpec

if TYPE_CHECKING:
    import onnx_ir as ir

    from pgxport.exporter.graph import GraphBuilder


def linear(g: GraphBuilder, x: ir.Value, path: str, gain: float = 1.0) -> ir.Value:
    """x [..., in] times the checkpoint's matrix [out, in] -> [..., out]"""
    # FusedMatMul reads [out, in] as the checkpoint has it: nothing is transposed while writing, and the token table serves
    # lookup and output from the same bytes. (A Transpose node would be folded into a second copy in memory.)
    return g.op("FusedMatMul", x, g.tensor(path, times(gain)), domain="com.microsoft", transB=1)


def attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, scale: float) -> ir.Value:
    """Everything sees everything: q, k, v [B, T, N*D] -> [B, T, N*D]"""
    return g.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=heads, scale=scale)


def cached_attention(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, *, layer: int, text: TextSpec) -> ir.Value:
    """Rotate, append to the cache in place, attend to all of it: q [B, T, N*D], k and v [B, T, K*D] -> [B, T, N*D]

    One GroupQueryAttention with `causal` 0 is the whole prefix rule: a prefix sees itself both ways, and a single new
    token sees everything before it. What a window hides from a new token comes in as `local_bias`.
    """
    if text.head_dim % 16:
        raise CheckpointError(
            f"head_dim is {text.head_dim}; target {g.target.name!r} attends with head sizes that are multiples of 16"
        )
    shape: list[int | str] = ["batch", text.kv_heads, "capacity", text.head_dim]
    past = [g.input(f"past_key_values.{layer}.{part}", shape, g.dtype) for part in ("key", "value")]
    lengths = g.input("seqlens_k", ["batch"], np.int32)  # tokens in the cache after this call, less one
    total = g.input("total_sequence_length", [], np.int32)
    rows = (g.context_length, text.head_dim // 2)
    cos = g.table("rotary.cos", rows, lambda: rotary_tables(text, g.context_length)[0])
    sin = g.table("rotary.sin", rows, lambda: rotary_tables(text, g.context_length)[1])
    local = text.window is not None and layer in text.local_layers and text.window < g.context_length
    bias = g.input("local_bias", ["batch", 1, "tokens", "total"]) if local else None
    out, *present = g.op(
        "GroupQueryAttention", q, k, v, *past, lengths, total, cos, sin, None, bias, outputs=3, domain="com.microsoft",
        num_heads=text.heads, kv_num_heads=text.kv_heads, scale=text.query_scale, softcap=text.attn_softcap or 0.0, do_rotary=1, causal=0,
    )  # fmt: skip
    for part, value in zip(("key", "value"), present, strict=True):
        g.output(value, f"present.{layer}.{part}", shape)
    return out


def rotary_tables(text: TextSpec, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [length, D / 2] (Su et al., 2021, half-split). Row 0 is position 1, where PaliGemma begins to count."""
    frequency = text.rope_theta ** (-np.arange(0, text.head_dim, 2, dtype=np.float64) / text.head_dim)
    angle = np.arange(1, length + 1, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
