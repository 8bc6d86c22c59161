# SPDX-License-Identifier: Apache-2.0
"""The names of a PaliGemma's tensors: those Google published on the hub, and what later writers call the same ones."""

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"

# transformers 4.52 and later hold the towers under `model.`. 5.x drops `vision_model.` besides, and its save_pretrained
# turns the rest back into the published names unless it is told not to (save_original_format=False).
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
TOWER = "vision_tower."
ENCODER = "vision_tower.vision_model."


def canonical(name: str) -> str:
    """The published name of a tensor; a name that no writer of PaliGemma uses comes back as it is.

    >>> canonical("model.language_model.layers.0.self_attn.q_proj.weight")
    'language_model.model.layers.0.self_attn.q_proj.weight'
    >>> canonical("model.vision_tower.post_layernorm.bias"), canonical("multi_modal_projector.linear.bias")
    ('vision_tower.vision_model.post_layernorm.bias', 'multi_modal_projector.linear.bias')
    """
    for theirs, published in RENAMED:
        if name.startswith(theirs):
            name = published + name.removeprefix(theirs)
            break
    if name.startswith(TOWER) and not name.startswith(ENCODER):
        name = ENCODER + name.removeprefix(TOWER)
    return name
