# SPDX-License-Identifier: Apache-2.0
"""The model functions, run in numpy: the same functions that write a graph compute it, layer by layer.

Holds a few row blocks of weights, whatever the model's size.
The export measures activation ranges and parity with it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgxport.bundle.mask import visible
from pgxport.models.checkpoint import TensorSource, row_blocks, to_float32
from pgxport.models.gemma import decoder_step
from pgxport.models.layers import Transform, rotary_tables, times
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec, TextSpec
from pgxport.models.weights import EMBEDDING

Observe = Callable[[str, str, np.ndarray], None]  # takes a kind of activation, its place, and the values
Rounding = Callable[[str, str, np.ndarray], np.ndarray]  # takes the same, and returns the values that an engine computes with


@dataclass(frozen=True)
class Segment:
    """The tokens of one sample, and how many of them are its prefix."""

    tokens: int
    prefix: int = 0


class Eager:
    """A `Writer` that computes in numpy.

    Args:
        feeds: The model's inputs by name.
        prefix: The number of tokens that see each other; those after them are causal. Or the samples that lie one after another
            along T, and see nothing of each other.
        observe: Receives each activation.
        rounding: Replaces inputs of linears, and the cache's keys and values.
        last: The number of last tokens whose logits are computed; a graph computes one.
    """

    def __init__(
        self,
        source: TensorSource,
        feeds: dict[str, np.ndarray],
        *,
        prefix: int | Sequence[Segment] = 0,
        dtype: Any = np.float32,
        observe: Observe | None = None,
        rounding: Rounding | None = None,
        last: int = 1,
    ):
        self.source, self.feeds, self._prefix, self.dtype, self.last = source, feeds, prefix, np.dtype(dtype), last
        self.outputs: dict[str, np.ndarray] = {}
        self.observe = observe or (lambda kind, where, values: None)
        self._rounding = rounding or (lambda kind, where, values: values)
        self._scope: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        yield
        self._scope.pop()

    def path(self, name: str) -> str:
        return ".".join([*self._scope, name])

    def input(self, name: str, shape: list[int | str], dtype: Any = None) -> np.ndarray:
        return self.feeds[name].astype(dtype or self.dtype)

    def output(self, value: np.ndarray, name: str, shape: list[int | str]) -> None:
        self.outputs[name] = value

    def weight(self, name: str, transform: Transform | None = None) -> np.ndarray:
        path = self.path(name)
        whole = to_float32(self.source.rows(path, 0, self.source.shape(path)[0]))
        return (whole if transform is None else transform(whole)).astype(self.dtype)

    def layer(self, x: np.ndarray, write: Callable[["Eager", np.ndarray], np.ndarray]) -> np.ndarray:
        return write(self, x)

    def linear(self, x: np.ndarray, name: str, *, bias: bool = False, gain: float = 1.0) -> np.ndarray:
        with self.scope(name):
            self.observe("linear input", self.path("weight"), x)
            y = self._multiply(x, self.path("weight"), gain)
            y = y + self.weight("bias", times(gain)) if bias else y
            self.observe("linear output", self.path("weight"), y)
            return y

    def lm_head(self, x: np.ndarray, name: str) -> np.ndarray:
        self.observe("linear input", name, x)
        return self._multiply(x, name, 1.0)

    def _multiply(self, x: np.ndarray, path: str, gain: float) -> np.ndarray:
        return self._product(self._rounding("linear input", path, x), path, gain)

    def _product(self, x: np.ndarray, path: str, gain: float) -> np.ndarray:
        rows, cols = self.source.shape(path)
        y = np.empty((*x.shape[:-1], rows), self.dtype)
        for start, stop in row_blocks(rows, 4 * cols):
            block = to_float32(self.source.rows(path, start, stop))
            block = block if gain == 1.0 else block * np.float32(gain)
            # Products of half precision are added up in float32, as engines do.
            block = block.astype(self.dtype, copy=False).astype(np.float32, copy=False)
            y[..., start:stop] = x.astype(np.float32, copy=False) @ block.T
        return y

    def segments(self, tokens: int) -> Sequence[Segment]:
        """Returns the samples that so many tokens are of."""
        segments = [Segment(tokens, self._prefix)] if isinstance(self._prefix, int) else self._prefix
        assert sum(s.tokens for s in segments) == tokens, f"Bug: {tokens} tokens are not those of {segments}"
        return segments

    def rms_norm(self, x: np.ndarray, transform: Transform, *, eps: float) -> np.ndarray:
        return self.op("RMSNormalization", x, self.weight("weight", transform), axis=-1, epsilon=eps)

    def layer_norm(self, x: np.ndarray, *, eps: float) -> np.ndarray:
        return self.op("LayerNormalization", x, self.weight("weight"), self.weight("bias"), axis=-1, epsilon=eps)

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, heads: int, scale: float) -> np.ndarray:
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q, k, v))
        return self._each(q, k, v, lambda q, k, v, segment: self._attend(q, k, v, scale, None, None))

    def cached_attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, layer: int, text: TextSpec) -> np.ndarray:
        tokens = q.shape[1]
        q, k, v = (x.reshape(*x.shape[:2], -1, text.head_dim).swapaxes(1, 2) for x in (q, k, v))
        segments = self.segments(tokens)
        # Each sample counts its positions from 1.
        cos, sin = (np.concatenate(t) for t in zip(*(rotary_tables(text, s.tokens) for s in segments), strict=True))

        def rotate(x: np.ndarray) -> np.ndarray:
            a, b = np.split(x, 2, -1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(self.dtype)

        k = rotate(k)
        self.observe("cache key", self.path("key"), k)
        self.observe("cache value", self.path("value"), v)
        k, v = self._rounding("cache key", self.path("key"), k), self._rounding("cache value", self.path("value"), v)
        k, v = (np.repeat(x, text.heads // text.kv_heads, 1) for x in (k, v))
        window = text.window if layer in text.local_layers else None

        def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, segment: Segment) -> np.ndarray:
            mask = visible(segment.prefix, segment.tokens, window)
            return self._attend(q, k, v, text.query_scale, text.attn_softcap, mask)

        return self._each(rotate(q), k, v, attend)

    def _each(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        attend: Callable[[np.ndarray, np.ndarray, np.ndarray, Segment], np.ndarray],
    ) -> np.ndarray:
        """Attends within each sample: q, k, v [B, N, T, D] -> [B, T, N*D]."""
        parts, start = [], 0
        for segment in self.segments(q.shape[2]):
            of_one = slice(start, start := start + segment.tokens)
            parts.append(attend(q[:, :, of_one], k[:, :, of_one], v[:, :, of_one], segment))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def _attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, cap: float | None, mask: np.ndarray | None
    ) -> np.ndarray:
        """Attends one head at a time, scores and softmax in float32: q, k, v [B, N, T, D] -> [B, T, N*D]."""
        out = np.empty(q.shape, self.dtype)
        for head in range(q.shape[1]):
            scores = q[:, head].astype(np.float32) @ k[:, head].astype(np.float32).swapaxes(1, 2) * np.float32(scale)
            self.observe("attention score", self.path("scores"), scores)
            if cap is not None:
                scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
            if mask is not None:
                scores = np.where(mask, scores, np.float32(-np.inf))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = (weights / weights.sum(-1, keepdims=True)) @ v[:, head].astype(np.float32)
        return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)

    def op(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> np.ndarray:
        result = getattr(self, f"_{kind.lower()}")(*inputs, **attributes)
        if kind in ("Add", "Mul"):
            self.observe({"Add": "residual", "Mul": "MLP product"}[kind], self.path(kind), result)
        return result.astype(self.dtype, copy=False)

    def _add(self, a: Any, b: Any) -> np.ndarray:
        return a + b

    def _mul(self, a: Any, b: Any) -> np.ndarray:
        return a * b

    def _div(self, a: Any, b: Any) -> np.ndarray:
        return a / b

    def _tanh(self, x: np.ndarray) -> np.ndarray:
        return np.tanh(x.astype(np.float32))

    def _gelu(self, x: np.ndarray, approximate: str) -> np.ndarray:
        assert approximate == "tanh"
        y = np.empty(x.shape, np.float32)
        # A few tokens at a time: an MLP's activations are the
        # largest arrays here, and GELU makes several of their size.
        for start, stop in row_blocks(x.shape[1], 4 * x.shape[0] * x.shape[2]):
            part = x[:, start:stop].astype(np.float32)
            inner = np.float32(math.sqrt(2 / math.pi)) * (part + np.float32(0.044715) * part * part * part)
            y[:, start:stop] = np.float32(0.5) * part * (1 + np.tanh(inner))
        return y

    def _reshape(self, x: np.ndarray, shape: list[int]) -> np.ndarray:
        return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(shape)])

    def _transpose(self, x: np.ndarray, perm: list[int]) -> np.ndarray:
        return x.transpose(perm)

    def _slice(self, x: np.ndarray, start: list[int], stop: list[int], axis: list[int]) -> np.ndarray:
        assert (start, axis) == ([-1], [1])
        return x[:, -self.last :]

    def _conv(self, x: np.ndarray, w: np.ndarray, b: np.ndarray, strides: list[int]) -> np.ndarray:
        """Convolves patches that do not overlap, as one product of all patches with the kernel."""
        p, (n, c, height, width) = strides[0], x.shape
        patches = x.reshape(n, c, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
        y = patches.astype(np.float32) @ w.reshape(len(w), -1).T.astype(np.float32) + b
        return y.swapaxes(1, 2).reshape(n, len(w), height // p, width // p)

    def _layernormalization(self, x: np.ndarray, w: np.ndarray, b: np.ndarray, axis: int, epsilon: float) -> np.ndarray:
        x = x.astype(np.float32)
        x = x - x.mean(axis, keepdims=True)
        variance = (x * x).mean(axis, keepdims=True)
        self.observe("norm square", self.path("square"), x * x)
        self.observe("variance", self.path("variance"), variance)
        return x / np.sqrt(variance + np.float32(epsilon)) * w + b

    def _rmsnormalization(self, x: np.ndarray, w: np.ndarray, axis: int, epsilon: float) -> np.ndarray:
        x = x.astype(np.float32)
        variance = (x * x).mean(axis, keepdims=True)
        self.observe("norm square", self.path("square"), x * x)
        self.observe("variance", self.path("variance"), variance)
        return x / np.sqrt(variance + np.float32(epsilon)) * w


def inputs_embeds(source: TensorSource, spec: ModelSpec, features: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    """Returns the decoder's input [1, N + T, H]: image features [1, N, H], then the scaled embeddings of T token ids."""
    rows = np.concatenate([to_float32(source.rows(EMBEDDING, t, t + 1)) for t in ids])
    return np.concatenate([features, (rows * np.float32(spec.text.embed_scale))[None]], 1)


@dataclass(frozen=True)
class TokenizedSample:
    """One sample: pixels [1, 3, R, R], the prompt's token ids after the image's, and the answer's."""

    pixels: np.ndarray
    prompt: list[int]
    answer: list[int]


def teacher_forced_logits(
    source: TensorSource,
    spec: ModelSpec,
    sample: TokenizedSample,
    *,
    observe: Observe | None = None,
) -> np.ndarray:
    """Returns the logits [answer tokens + 1, V] for each token of a given answer, and for the token after the last."""

    def run(model: Callable[[Eager, ModelSpec], None], output: str, feed: str, values: np.ndarray) -> np.ndarray:
        prefix, last = spec.image_tokens + len(sample.prompt), len(sample.answer) + 1
        eager = Eager(source, {feed: values}, prefix=prefix, observe=observe, last=last)
        model(eager, spec)
        return eager.outputs[output]

    hidden = run(vision_encoder, "image_hidden", "pixel_values", sample.pixels)
    features = run(projector, "image_features", "image_hidden", hidden)
    embeds = inputs_embeds(source, spec, features, (*sample.prompt, *sample.answer))
    if observe:
        observe("residual", "inputs_embeds", embeds)
    return run(decoder_step, "logits", "inputs_embeds", embeds)[0]
