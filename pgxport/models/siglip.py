# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: SigLIP So400m/14 (Zhai et al., 2023) without its pooling head."""

from pgxport.models.layers import Value, Writer, gelu, layer_norm
from pgxport.models.spec import ModelSpec, VisionSpec


def vision_encoder(g: Writer, spec: ModelSpec) -> None:
    """Writes the vision encoder: pixel_values [B, 3, R, R] in [-1, 1] -> image_hidden [B, image tokens, vision width]."""
    v = spec.vision
    x = g.input("pixel_values", ["batch", 3, v.resolution, v.resolution])
    with g.scope("vision_tower.vision_model"):
        x = embeddings(g, x, v)
        for i in range(v.depth):
            with g.scope(f"encoder.layers.{i}"):
                x = block(g, x, v)
        x = layer_norm(g, x, "post_layernorm", v.eps)
    g.output(x, "image_hidden", ["batch", v.image_tokens, v.width])


def embeddings(g: Writer, pixels: Value, v: VisionSpec) -> Value:
    with g.scope("embeddings"):
        with g.scope("patch_embedding"):
            x = g.op("Conv", pixels, g.weight("weight"), g.weight("bias"), strides=[v.patch, v.patch])
        # [B, width, rows, columns] -> [B, rows * columns, width]
        x = g.op("Transpose", g.op("Reshape", x, [0, v.width, -1]), perm=[0, 2, 1])
        with g.scope("position_embedding"):
            return g.op("Add", x, g.weight("weight"))


def block(g: Writer, x: Value, v: VisionSpec) -> Value:
    x = g.op("Add", x, attention(g, layer_norm(g, x, "layer_norm1", v.eps), v))
    return g.op("Add", x, mlp(g, layer_norm(g, x, "layer_norm2", v.eps)))


def attention(g: Writer, x: Value, v: VisionSpec) -> Value:
    with g.scope("self_attn"):
        q, k, val = (g.linear(x, f"{part}_proj", bias=True) for part in "qkv")
        y = g.attention(q, k, val, heads=v.heads, scale=(v.width // v.heads) ** -0.5)
        return g.linear(y, "out_proj", bias=True)


def mlp(g: Writer, x: Value) -> Value:
    with g.scope("mlp"):
        return g.linear(gelu(g, g.linear(x, "fc1", bias=True)), "fc2", bias=True)
