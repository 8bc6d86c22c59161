# SPDX-License-Identifier: Apache-2.0
"""The layers both towers are made of, and the `Writer` they write to.

Axis letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, D head width, H hidden width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from pgxport.models.spec import TextSpec

Transform = Callable[[np.ndarray], np.ndarray]  # of a block of a weight's rows, in float32
Value = Any  # a node's output in a graph, or an array where the functions are run eagerly


class Writer(Protocol):
    """What a model function is handed: it writes an ONNX graph (exporter/graph.py) or computes (tests/eager.py)."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Prefix the names inside, so that a weight's path is its name in the checkpoint."""

    def input(self, name: str, shape: list[int | str], dtype: Any = None) -> Value:
        """Activations, unless a dtype is given."""

    def output(self, value: Value, name: str, shape: list[int | str]) -> None: ...

    def weight(self, name: str, transform: Transform | None = None) -> Value:
        """A tensor of the checkpoint."""

    def op(self, kind: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any: ...

    def layer(self, x: Value, write: Callable[["Writer", Value], Value]) -> Value:
        """A layer of the decoder: `write` of a writer and the residual stream x [B, T, H]; prefixes and steps may be written apart."""

    def linear(self, x: Value, name: str, *, bias: bool = False, gain: float = 1.0) -> Value:
        """x [..., in] times the matrix `name`.weight [out, in], plus `name`.bias, both times `gain`."""

    def lm_head(self, x: Value, name: str) -> Value:
        """x [B, T, H] times the token table `name` [V, H], which is stored once for lookup and output."""

    def rms_norm(self, x: Value, transform: Transform, *, eps: float) -> Value:
        """x over its root mean square along the last axis, times the scope's `weight`, transformed."""

    def layer_norm(self, x: Value, *, eps: float) -> Value:
        """x less its mean, over its standard deviation along the last axis, times the scope's `weight`, plus its `bias`."""

    def attention(self, q: Value, k: Value, v: Value, *, heads: int, scale: float) -> Value:
        """Everything sees everything: q, k, v [B, T, N*D] -> [B, T, N*D]"""

    def cached_attention(self, q: Value, k: Value, v: Value, *, layer: int, text: TextSpec) -> Value:
        """Rotate, append to the layer's KV cache, attend: q [B, T, N*D], k, v [B, T, K*D] -> [B, T, N*D]"""


def rms_norm(g: Writer, x: Value, name: str, eps: float, gain: float = 1.0) -> Value:
    with g.scope(name):
        # Gemma stores the weight minus one.
        return g.rms_norm(x, lambda w: (w + 1) * np.float32(gain), eps=eps)


def layer_norm(g: Writer, x: Value, name: str, eps: float) -> Value:
    with g.scope(name):
        return g.layer_norm(x, eps=eps)


def gelu(g: Writer, x: Value) -> Value:
    return g.op("Gelu", x, approximate="tanh")


def softcap(g: Writer, x: Value, cap: float | None) -> Value:
    return x if cap is None else g.op("Mul", g.op("Tanh", g.op("Div", x, cap)), cap)


def times(gain: float) -> Transform | None:
    """Multiply a weight by a number as it is written; nothing where the number is 1."""
    return None if gain == 1.0 else lambda w: w * np.float32(gain)


def rotary_tables(text: TextSpec, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [length, D / 2] (Su et al., 2021, half-split). Row 0 is position 1, where PaliGemma begins to count."""
    frequency = text.rope_theta ** (-np.arange(0, text.head_dim, 2, dtype=np.float64) / text.head_dim)
    angle = np.arange(1, length + 1, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
