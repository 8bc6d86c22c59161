# SPDX-License-Identifier: Apache-2.0
"""The names and shapes of a PaliGemma's weights: as they were published, and as later programs call them."""

from fnmatch import fnmatchcase
from math import prod

from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "language_model.model.embed_tokens.weight"  # also the output matrix, where they are tied
LM_HEAD = "language_model.lm_head.weight"  # the output matrix, where they are not
PAIR = frozenset((EMBEDDING, LM_HEAD))  # one matrix or two, and of one matrix either name may be stored

# transformers 4.52 and later hold the towers under `model.`. 5.x also drops
# `vision_model.`; its save_pretrained turns the other names back into the
# published ones, unless it is called with save_original_format=False.
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
TOWER = "vision_tower."
ENCODER = "vision_tower.vision_model."
# Parts of a name that a wrapper put there: PEFT's model (the prefix and the layer below an adapter), torch.compile, data-parallel
# training and activation checkpoints.
PEFT_PREFIX = "base_model.model."
WRAPPERS = frozenset(("base_layer", "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Tensors that a checkpoint may hold beside its weights -> why no answer depends on them.
UNUSED = {
    "vision_tower.vision_model.head.*": "SigLIP's pooling head, whose output PaliGemma does not use",
    "vision_tower.vision_model.embeddings.position_ids": "a buffer of 0, 1, 2, …",
    "*.rotary_emb.inv_freq": "a buffer that follows from rope_theta",
    "*.rotary_emb.original_inv_freq": "a buffer that follows from rope_theta",
}

PARTS = {
    "vision_tower.": "vision encoder", "multi_modal_projector.": "projector", EMBEDDING: "token table", LM_HEAD: "output matrix",
}  # fmt: skip


def weight_shapes(spec: ModelSpec) -> Shapes:
    """Returns the shape of every tensor by its published name; matrices are [out, in]."""
    h = spec.text.width
    projector: Shapes = {"multi_modal_projector.linear.weight": (h, spec.vision.width), "multi_modal_projector.linear.bias": (h,)}
    return _vision(spec.vision) | projector | _text(spec.text)


def output_matrix(text: TextSpec) -> str:
    """Returns the name of the matrix [V, H] that logits are products of."""
    return EMBEDDING if text.tied else LM_HEAD


def parameters(spec: ModelSpec) -> int:
    """Returns the number of parameters of a checkpoint; a tied output matrix counts once."""
    return sum(prod(shape) for shape in weight_shapes(spec).values())


def _vision(v: VisionSpec) -> Shapes:
    tower = "vision_tower.vision_model"
    shapes: Shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (v.width, 3, v.patch, v.patch),
        f"{tower}.embeddings.patch_embedding.bias": (v.width,),
        f"{tower}.embeddings.position_embedding.weight": (v.image_tokens, v.width),
        f"{tower}.post_layernorm.weight": (v.width,),
        f"{tower}.post_layernorm.bias": (v.width,),
    }
    matrices = {f"self_attn.{part}_proj": (v.width, v.width) for part in ("q", "k", "v", "out")}
    matrices |= {"mlp.fc1": (v.mlp, v.width), "mlp.fc2": (v.width, v.mlp)}
    for i in range(v.depth):
        layer = f"{tower}.encoder.layers.{i}"
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (v.width,), f"{layer}.{norm}.bias": (v.width,)}
    return shapes


def _text(t: TextSpec) -> Shapes:
    model, queries, keys = "language_model.model", t.heads * t.head_dim, t.kv_heads * t.head_dim
    shapes: Shapes = {EMBEDDING: (t.vocab, t.width), output_matrix(t): (t.vocab, t.width), f"{model}.norm.weight": (t.width,)}
    matrices = {
        "self_attn.q_proj": (queries, t.width),
        "self_attn.k_proj": (keys, t.width),
        "self_attn.v_proj": (keys, t.width),
        "self_attn.o_proj": (t.width, queries),
        "mlp.gate_proj": (t.mlp, t.width),
        "mlp.up_proj": (t.mlp, t.width),
        "mlp.down_proj": (t.width, t.mlp),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if t.post_norms else []
    for i in range(t.depth):
        shapes |= {f"{model}.layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{model}.layers.{i}.{norm}.weight": (t.width,) for norm in norms}
    return shapes


def part_of(name: str) -> str:
    """Returns what the part of the model is called that a weight belongs to."""
    return next((part for start, part in PARTS.items() if name.startswith(start)), "decoder")


def why_unused(name: str) -> str | None:
    """Returns why no answer depends on the tensor of this published name; None where one may.

    >>> why_unused("vision_tower.vision_model.head.probe")
    "SigLIP's pooling head, whose output PaliGemma does not use"
    """
    return next((why for pattern, why in UNUSED.items() if fnmatchcase(name, pattern)), None)


def canonical(name: str) -> str:
    """Returns the published name of a tensor; a name that is none of a PaliGemma's comes back unchanged.

    >>> canonical("model.language_model.layers.0.self_attn.q_proj.weight")
    'language_model.model.layers.0.self_attn.q_proj.weight'
    >>> canonical("model.vision_tower.post_layernorm.bias"), canonical("multi_modal_projector.linear.bias")
    ('vision_tower.vision_model.post_layernorm.bias', 'multi_modal_projector.linear.bias')
    >>> canonical("_orig_mod.base_model.model.model.language_model.norm.weight")
    'language_model.model.norm.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    name = ".".join(parts).removeprefix(PEFT_PREFIX)
    for later, published in RENAMED:
        if name.startswith(later):
            name = published + name.removeprefix(later)
            break
    if name.startswith(TOWER) and not name.startswith(ENCODER):
        name = ENCODER + name.removeprefix(TOWER)
    return name
