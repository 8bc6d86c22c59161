# SPDX-License-Identifier: Apache-2.0
"""The tiny PaliGemma 2 in plain PyTorch functions over a dictionary of weights, made for training on a CPU.

Computes what transformers computes (`check` in train.py holds it to that), and two things transformers has no call for:
many questions of one picture in one pass, and a "shared" mode in which the picture's keys and values do not look at the
question, so that they are computed once for all questions. The last part of training is in the exact mode.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    resolution: int = 112
    patch: int = 14
    vision_width: int = 128
    vision_depth: int = 6
    vision_heads: int = 4
    vision_mlp: int = 512
    width: int = 128
    depth: int = 4
    mlp: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    query_pre_attn_scalar: int = 24
    sliding_window: int = 128
    attn_softcap: float = 50.0
    logit_softcap: float = 30.0
    vocab: int = 1728
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.resolution // self.patch

    @property
    def image_tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class Questions:
    """A padded batch: ids [N, L] = prompt, newline, answer, eos; `image` [N] says which picture; `prefix` [N] the prompt's length."""

    ids: Tensor
    image: Tensor
    prefix: Tensor


def initial_weights(s: Size, location_rows: slice) -> Weights:
    w: Weights = {}

    def matrix(name: str, rows: int, cols: int, gain: float = 1.0, *, bias: bool = False) -> None:
        w[f"{name}.weight"] = torch.randn(rows, cols) * gain / math.sqrt(cols)
        if bias:
            w[f"{name}.bias"] = torch.zeros(rows)

    v = "vision_tower.vision_model"
    w[f"{v}.embeddings.patch_embedding.weight"] = torch.randn(s.vision_width, 3, s.patch, s.patch) / math.sqrt(3 * s.patch**2)
    w[f"{v}.embeddings.patch_embedding.bias"] = torch.zeros(s.vision_width)
    w[f"{v}.embeddings.position_embedding.weight"] = torch.randn(s.image_tokens, s.vision_width) * 0.3
    for i in range(s.vision_depth):
        layer = f"{v}.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            w[f"{layer}.{norm}.weight"], w[f"{layer}.{norm}.bias"] = torch.ones(s.vision_width), torch.zeros(s.vision_width)
        for part in "qkv":
            matrix(f"{layer}.self_attn.{part}_proj", s.vision_width, s.vision_width, bias=True)
        matrix(f"{layer}.self_attn.out_proj", s.vision_width, s.vision_width, 0.4, bias=True)
        matrix(f"{layer}.mlp.fc1", s.vision_mlp, s.vision_width, bias=True)
        matrix(f"{layer}.mlp.fc2", s.vision_width, s.vision_mlp, 0.4, bias=True)
    w[f"{v}.post_layernorm.weight"], w[f"{v}.post_layernorm.bias"] = torch.ones(s.vision_width), torch.zeros(s.vision_width)
    matrix("multi_modal_projector.linear", s.width, s.vision_width, bias=True)

    table = torch.randn(s.vocab, s.width) / math.sqrt(s.width)
    table[location_rows] = location_code(location_rows.stop - location_rows.start, s.width)
    w["language_model.model.embed_tokens.weight"] = table
    for i in range(s.depth):
        layer = f"language_model.model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            # Gemma stores the gain minus one; a small gain behind each branch starts it near the identity.
            w[f"{layer}.{norm}.weight"] = torch.full((s.width,), -0.6 if norm.startswith("post") else 0.0)
        matrix(f"{layer}.self_attn.q_proj", s.heads * s.head_dim, s.width)
        matrix(f"{layer}.self_attn.k_proj", s.kv_heads * s.head_dim, s.width)
        matrix(f"{layer}.self_attn.v_proj", s.kv_heads * s.head_dim, s.width)
        matrix(f"{layer}.self_attn.o_proj", s.width, s.heads * s.head_dim)
        matrix(f"{layer}.mlp.gate_proj", s.mlp, s.width)
        matrix(f"{layer}.mlp.up_proj", s.mlp, s.width)
        matrix(f"{layer}.mlp.down_proj", s.width, s.mlp)
    w["language_model.model.norm.weight"] = torch.zeros(s.width)
    return w


def location_code(bins: int, width: int) -> Tensor:
    """Rows of unit norm in which neighbouring bins are alike: sines and cosines, louder where slow."""
    cycles = torch.logspace(-1, 5.5, width // 2, base=2.0)
    angle = 2 * math.pi * torch.arange(bins)[:, None] / bins * cycles
    rows = torch.cat([angle.sin(), angle.cos()], 1) * (cycles**-0.35).repeat(2)
    return rows / rows.norm(dim=1, keepdim=True)


def vision(w: Weights, s: Size, pixels: Tensor) -> Tensor:
    """pixels [B, 3, R, R] in -1..1 -> [B, N, vision width]"""
    v = "vision_tower.vision_model"
    n, head_dim = pixels.shape[0], s.vision_width // s.vision_heads
    patches = pixels.reshape(n, 3, s.grid, s.patch, s.grid, s.patch).permute(0, 2, 4, 1, 3, 5).reshape(n, s.image_tokens, -1)
    kernel = w[f"{v}.embeddings.patch_embedding.weight"]
    x = F.linear(patches, kernel.reshape(len(kernel), -1), w[f"{v}.embeddings.patch_embedding.bias"])
    x = x + w[f"{v}.embeddings.position_embedding.weight"]
    for i in range(s.vision_depth):
        layer = f"{v}.encoder.layers.{i}"
        h = _layer_norm(w, f"{layer}.layer_norm1", x, s)
        q, k, val = (
            _linear(w, f"{layer}.self_attn.{p}_proj", h).unflatten(-1, (s.vision_heads, head_dim)).transpose(1, 2) for p in "qkv"
        )
        h = ((q * head_dim**-0.5) @ k.mT).softmax(-1) @ val
        h = h.transpose(1, 2).flatten(2)
        x = x + _linear(w, f"{layer}.self_attn.out_proj", h)
        h = _layer_norm(w, f"{layer}.layer_norm2", x, s)
        x = x + _linear(w, f"{layer}.mlp.fc2", F.gelu(_linear(w, f"{layer}.mlp.fc1", h), approximate="tanh"))
    return _layer_norm(w, f"{v}.post_layernorm", x, s)


def project(w: Weights, features: Tensor) -> Tensor:
    return _linear(w, "multi_modal_projector.linear", features)


def decode_exact(w: Weights, s: Size, image: Tensor, batch: Questions, *, softcap: bool) -> Tensor:
    """image features [B, N, H] and questions [Q, L] -> the text's hidden states [Q, L, H]; the whole prefix sees itself."""
    n = s.image_tokens
    x = torch.cat([image[batch.image], _embed(w, s, batch.ids, image.dtype)], 1)
    at = torch.arange(x.shape[1])
    prefix = n + batch.prefix[:, None, None]
    inside = (at[None, None, :] < prefix) & (at[None, :, None] < prefix)
    causal = at[None, None, :] <= at[None, :, None]
    full = _additive(inside | causal, x.dtype)
    local = _additive(inside | (causal & (at[:, None] - at[None, :] < s.sliding_window)), x.dtype)
    rope = _rope(s, at + 1, x.dtype)
    for i in range(s.depth):

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = local if i % 2 == 0 else full) -> Tensor:
            return _attend(q, k, v, mask, s, softcap=softcap)

        x = _block(w, f"language_model.model.layers.{i}", x, rope, attend, s)
    return _rms_norm(w, "language_model.model.norm", x[:, n:], s)


def decode_shared(w: Weights, s: Size, image: Tensor, batches: list[Questions]) -> list[Tensor]:
    """As `decode_exact`, but the picture does not see the question: one picture pass for all of its questions."""
    n = s.image_tokens
    x, texts = image, [_embed(w, s, b.ids, image.dtype) for b in batches]
    image_rope = _rope(s, torch.arange(n) + 1, x.dtype)
    plans = []
    for b in batches:
        at = torch.arange(b.ids.shape[1])
        own = (at[None, None, :] < b.prefix[:, None, None]) | (at[None, None, :] <= at[None, :, None])
        far = (at[:, None] + n - torch.arange(n)[None, :] < s.sliding_window)[None] | (
            at[None, :, None] < b.prefix[:, None, None]
        )
        seen = torch.ones_like(far)
        plans.append((_rope(s, at + n + 1, x.dtype), [_additive(torch.cat([m, own], 2), x.dtype) for m in (far, seen)]))
    for i in range(s.depth):
        layer, shared = f"language_model.model.layers.{i}", []

        def attend_image(q: Tensor, k: Tensor, v: Tensor, shared: list = shared) -> Tensor:
            shared += [k, v]
            return _attend(q, k, v, None, s, softcap=False)

        x = _block(w, layer, x, image_rope, attend_image, s)
        for j, (b, (rope, masks)) in enumerate(zip(batches, plans, strict=True)):

            def attend_text(
                q: Tensor, k: Tensor, v: Tensor, shared: list = shared, b: Questions = b, mask: Tensor = masks[i % 2]
            ) -> Tensor:
                k, v = (torch.cat([whole[b.image], part], 2) for whole, part in zip(shared, (k, v), strict=True))
                return _attend(q, k, v, mask, s, softcap=False)

            texts[j] = _block(w, layer, texts[j], rope, attend_text, s)
    return [_rms_norm(w, "language_model.model.norm", t, s) for t in texts]


def logits(w: Weights, s: Size, hidden: Tensor) -> Tensor:
    """[M, H] -> float32 [M, V]"""
    raw = F.linear(hidden, w["language_model.model.embed_tokens.weight"]).float()
    return torch.tanh(raw / s.logit_softcap) * s.logit_softcap


def _embed(w: Weights, s: Size, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(ids, w["language_model.model.embed_tokens.weight"]).to(dtype) * math.sqrt(s.width)


def _block(w: Weights, layer: str, x: Tensor, rope, attend, s: Size) -> Tensor:
    h = _rms_norm(w, f"{layer}.input_layernorm", x, s)
    q, k, v = (_linear(w, f"{layer}.self_attn.{p}_proj", h).unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for p in "qkv")
    h = attend(_rotate(q, rope), _rotate(k, rope), v).transpose(1, 2).flatten(2)
    x = x + _rms_norm(w, f"{layer}.post_attention_layernorm", _linear(w, f"{layer}.self_attn.o_proj", h), s)
    h = _rms_norm(w, f"{layer}.pre_feedforward_layernorm", x, s)
    h = F.gelu(_linear(w, f"{layer}.mlp.gate_proj", h), approximate="tanh") * _linear(w, f"{layer}.mlp.up_proj", h)
    return x + _rms_norm(w, f"{layer}.post_feedforward_layernorm", _linear(w, f"{layer}.mlp.down_proj", h), s)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: Size, *, softcap: bool) -> Tensor:
    k, v = (z.repeat_interleave(s.heads // s.kv_heads, 1) for z in (k, v))
    # Written out: on a CPU the fused attention's backward pass costs several times this.
    scores = (q * s.query_pre_attn_scalar**-0.5) @ k.mT
    if softcap:
        scores = torch.tanh(scores / s.attn_softcap) * s.attn_softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, T, S] -> [B, 1, T, S] to be added to the scores"""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e9)[:, None]


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _layer_norm(w: Weights, name: str, x: Tensor, s: Size) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], s.eps)


def _rms_norm(w: Weights, name: str, x: Tensor, s: Size) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"] + 1, s.eps)


def _rope(s: Size, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
    return torch.cat([angle.cos()] * 2, 1).to(dtype), torch.cat([-angle.sin(), angle.sin()], 1).to(dtype)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([b, a], -1) * rope[1]
