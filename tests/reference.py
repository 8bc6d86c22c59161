# SPDX-License-Identifier: Apache-2.0
"""Small random PaliGemmas made by transformers: the reference that readers and graphs are compared with.

The shapes are odd on purpose: nothing that ought to be read from the config can be right by accident.
"""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 42, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    # One key/value head; heads × head_dim is not the width.
    "paligemma": {
        "model_type": "gemma", "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": 1, "head_dim": 16,
    },
    # Two query heads a key/value head, a scale that is not head_dim's, and a window shorter than the 9 image tokens.
    "paligemma2": {
        "model_type": "gemma2", "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 5,
    },
}  # fmt: skip
VOCAB = 320
IMAGE_TOKEN = 310


def random_paligemma(folder: Path, *, family: str = "paligemma", seed: int = 0, **overrides: Any) -> Any:
    """Save a random PaliGemma in hub layout and return it, in float32 and for evaluation.

    Args:
        overrides: `vision` and `text` are dictionaries that go over the defaults above; the rest goes to PaliGemmaConfig.
    """
    text = {**TEXT[family], "vocab_size": VOCAB, "max_position_embeddings": 512, **overrides.pop("text", {})}
    vision = {"model_type": "siglip_vision_model", **VISION, **overrides.pop("vision", {})}
    top = {
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": text["hidden_size"],
        "hidden_size": text["hidden_size"],
        **overrides,
    }
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, **top)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


def randomize(model: Any, seed: int) -> None:
    """Give every parameter a random value that keeps activations near one: norms are not 1, and biases not 0."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.ndim > 1:
                # Per output row; the embedding is multiplied by the root of the width.
                p.copy_(noise / p[0].numel() ** 0.5)
                if name.endswith("q_proj.weight"):
                    # Scores large enough for a wrong scale or a missing softcap to show.
                    p.mul_(3.0)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            else:
                # Gemma's norms multiply by 1 + weight, SigLIP's by weight.
                p.copy_((1.0 if "vision_tower" in name else 0.0) + 0.3 * noise)
