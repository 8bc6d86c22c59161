# SPDX-License-Identifier: Apache-2.0
"""The decoder: Gemma (2024) or Gemma 2 (2024), as one graph for prefill and decode steps, which differ in T alone."""

from functools import partial

from pgxport.models.layers import Value, Writer, gelu, rms_norm, softcap
from pgxport.models.spec import ModelSpec, TextSpec
from pgxport.models.weights import output_matrix


def decoder_step(g: Writer, spec: ModelSpec) -> None:
    """Writes the decoder: inputs_embeds [B, T, H] -> logits of the last token [B, 1, V].

    `inputs_embeds` are image features, then scaled token
    embeddings. `g.cached_attention` keeps the keys and values.
    """
    t = spec.text
    x = g.input("inputs_embeds", ["batch", "tokens", t.width])
    with g.scope("language_model.model"):
        for i in range(t.depth):
            with g.scope(f"layers.{i}"):
                x = g.layer(x, partial(block, layer=i, t=t))
        # A prefix needs the logits of its last token only; at 896 px the others would take 4 GB.
        x = stream_norm(g, g.op("Slice", x, [-1], [2**31 - 1], [1]), "norm", t)
    x = softcap(g, g.lm_head(x, output_matrix(t)), t.logit_softcap)
    g.output(x, "logits", ["batch", 1, t.vocab])


def block(g: Writer, x: Value, layer: int, t: TextSpec) -> Value:
    # Gemma 1 adds a branch's last product to the stream, Gemma 2
    # norms it first; whichever is last divides by the divisor.
    gain = 1 / t.residual_divisor
    h = attention(g, stream_norm(g, x, "input_layernorm", t), layer, t, gain=1.0 if t.post_norms else gain)
    if t.post_norms:
        h = rms_norm(g, h, "post_attention_layernorm", t.eps, gain)
    x = g.op("Add", x, h)
    # The same tensor name means a different place in Gemma 1 and Gemma 2.
    h = stream_norm(g, x, "pre_feedforward_layernorm" if t.post_norms else "post_attention_layernorm", t)
    h = mlp(g, h, gain=1.0 if t.post_norms else gain)
    if t.post_norms:
        h = rms_norm(g, h, "post_feedforward_layernorm", t.eps, gain)
    return g.op("Add", x, h)


def stream_norm(g: Writer, x: Value, name: str, t: TextSpec) -> Value:
    """Normalizes the residual stream by RMSNorm; eps / divisor² makes the result independent of the divisor."""
    return rms_norm(g, x, name, t.eps / t.residual_divisor**2)


def attention(g: Writer, x: Value, layer: int, t: TextSpec, *, gain: float) -> Value:
    with g.scope("self_attn"):
        q, k, v = (g.linear(x, f"{part}_proj") for part in "qkv")
        return g.linear(g.cached_attention(q, k, v, layer=layer, text=t), "o_proj", gain=gain)


def mlp(g: Writer, x: Value, *, gain: float) -> Value:
    with g.scope("mlp"):
        return g.linear(g.op("Mul", gelu(g, g.linear(x, "gate_proj")), g.linear(x, "up_proj")), "down_proj", gain=gain)
