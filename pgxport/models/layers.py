# SPDX-License-Identifier: Apache-2.0
"""The layers that both towers are made of, and the `Writer` interface that they write to.

Axis letters: B batch, T query tokens, S key tokens, N query
heads, K key/value heads, D head width, H hidden width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from pgxport.models.spec import TextSpec

Transform = Callable[[np.ndarray], np.ndarray]  # changes a block of a weight's rows, in float32
Value = Any  # a node's output where a graph is written, an array where the functions are run eagerly


class Writer(Protocol):
    """The first argument of every model function: writes an ONNX graph (exporter/graph.py) or computes (models/eager.py)."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Prefixes the names inside, so that the path of a weight is its name in the checkpoint."""

    def input(self, name: str, shape: list[int | str], dtype: Any = None) -> Value:
        """Returns a named input of the model, in the dtype of activations unless another is given."""

    def output(self, value: Value, name: str, shape: list[int | str]) -> None:
        """Makes a value a named output of the model."""

    def weight(self, name: str, transform: Transform | None = None) -> Value:
        """Returns a tensor of the checkpoint, by its name in the scope."""

    def op(self, kind: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """Returns the output of one ONNX operator, or a list of them where `outputs` is more than 1."""

    def layer(self, x: Value, write: Callable[["Writer", Value], Value]) -> Value:
        """Returns `write(writer, x)`, one decoder layer on the residual stream x [B, T, H].

        A writer may call `write` twice, to write a prefix and a decode step apart.
        """

    def linear(self, x: Value, name: str, *, bias: bool = False, gain: float = 1.0) -> Value:
        """Multiplies x [..., in] by the matrix `name`.weight [out, in] and adds `name`.bias, both times `gain`."""

    def lm_head(self, x: Value, name: str) -> Value:
        """Multiplies x [B, T, H] by the token table `name` [V, H], which is stored once for lookup and output."""

    def rms_norm(self, x: Value, transform: Transform, *, eps: float) -> Value:
        """Divides x by its root mean square along the last axis, and multiplies by the scope's `weight`, transformed."""

    def layer_norm(self, x: Value, *, eps: float) -> Value:
        """Normalizes x to mean 0 and variance 1 along the last axis, then applies the scope's `weight` and `bias`."""

    def attention(self, q: Value, k: Value, v: Value, *, heads: int, scale: float) -> Value:
        """Attends without a mask: q, k, v [B, T, N*D] -> [B, T, N*D]."""

    def cached_attention(self, q: Value, k: Value, v: Value, *, layer: int, text: TextSpec) -> Value:
        """Rotates q and k, appends k and v to the layer's KV cache, and attends to the whole cache.

        q [B, T, N*D], k and v [B, T, K*D] -> [B, T, N*D]
        """


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
    """Returns cap * tanh(x / cap), as Gemma 2 bounds scores and logits; x where there is no cap."""
    return x if cap is None else g.op("Mul", g.op("Tanh", g.op("Div", x, cap)), cap)


def times(gain: float) -> Transform | None:
    """Returns the transform that multiplies a weight by `gain`; None where `gain` is 1."""
    return None if gain == 1.0 else lambda w: w * np.float32(gain)


def rotary_tables(text: TextSpec, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin [length, D / 2] of rotary embeddings (Su et al., 2021), for halves of a head, not pairs.

    Row 0 is position 1, where PaliGemma begins to count.
    """
    frequency = text.rope_theta ** (-np.arange(0, text.head_dim, 2, dtype=np.float64) / text.head_dim)
    angle = np.arange(1, length + 1, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
