# SPDX-License-Identifier: Apache-2.0
"""Specs read from published configs, from transformers' own, and the table of sizes."""

from dataclasses import replace

import pytest

from pgxport.errors import CheckpointError, UsageError
from pgxport.models.config import read_config
from pgxport.models.spec import TEXT, TextSpec, published
from pgxport.models.weights import parameters, weight_shapes

# The fields that Google's config.json files state; everything else is left to transformers' defaults.
VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
PALIGEMMA_3B_224 = {
    "model_type": "paligemma", "image_token_index": 257152, "projection_dim": 2048, "hidden_size": 2048,
    "text_config": {
        "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216,
    },
    "vision_config": VISION,
}  # fmt: skip
PALIGEMMA2_28B_896 = {
    "model_type": "paligemma", "image_token_index": 257152, "projection_dim": 4608,
    "text_config": {
        "model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_hidden_layers": 46,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096, "vocab_size": 257216,
        "num_image_tokens": 4096,
    },
    "vision_config": {**VISION, "image_size": 896},
}  # fmt: skip


def test_published_configs_are_the_rows_of_the_table():
    assert read_config(PALIGEMMA_3B_224) == published("paligemma", "3b", 224)
    assert read_config(PALIGEMMA2_28B_896) == published("paligemma2", "28b", 896)


@pytest.mark.parametrize(("family", "size"), TEXT)
def test_the_table_agrees_with_transformers_classes(family, size):
    """transformers builds the model from our numbers on no memory at all; names, shapes and count must be ours."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = published(family, size, 448)
    t, v = spec.text, spec.vision
    text = {
        "model_type": "gemma2" if t.post_norms else "gemma", "hidden_size": t.width, "intermediate_size": t.mlp, "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim, "vocab_size": t.vocab,
    }  # fmt: skip
    vision = {**VISION, "image_size": v.resolution}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=t.width)
    with torch.device("meta"):
        model = transformers.PaliGemmaForConditionalGeneration(config)
    theirs = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(weight_shapes(spec).values()) == theirs
    assert parameters(spec) == sum(p.numel() for p in model.parameters())


def test_transformers_5_saves_what_is_read_back_as_the_same_spec():
    transformers = pytest.importorskip("transformers")
    for config in (PALIGEMMA_3B_224, PALIGEMMA2_28B_896):
        saved = transformers.PaliGemmaConfig(**config).to_dict()
        assert read_config(saved) == read_config(config)


def test_the_query_scale_of_28b_is_not_that_of_its_heads():
    text = published("paligemma2", "28b", 224).text
    assert text.query_scale == 144**-0.5 != text.head_dim**-0.5


def test_without_a_local_window_nothing_else_changes():
    spec = read_config(PALIGEMMA2_28B_896, local_window=False)
    assert (spec.text.window, spec.text.local_layers) == (None, ())
    assert replace(spec, text=TEXT["paligemma2", "28b"]) == published("paligemma2", "28b", 896)


def change(**changes):
    """The 3B config with `part__field` replaced."""
    config = {**PALIGEMMA_3B_224, "text_config": {**PALIGEMMA_3B_224["text_config"]}, "vision_config": {**VISION}}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[f"{part}_config"][name] = value
        else:
            config[part] = value
    return config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llava"}, "llava"),
        ({"text_config": None}, "text_config"),
        ({"text__model_type": "gemma3_text"}, "gemma3_text"),
        ({"text__hidden_size": -1}, "hidden_size"),
        ({"text__hidden_size": "2048"}, "hidden_size"),
        ({"text__num_hidden_layers": True}, "num_hidden_layers"),
        ({"text__num_key_value_heads": 3}, "3 key/value heads"),
        ({"text__head_dim": 7}, "head_dim 7"),
        ({"text__rms_norm_eps": 0}, "rms_norm_eps"),
        ({"text__attention_bias": True}, "attention_bias"),
        ({"text__hidden_activation": "relu"}, "hidden_activation"),
        ({"text__rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"vision__hidden_act": "gelu"}, "hidden_act"),
        ({"vision__image_size": 225}, "225 px"),
        ({"vision__num_attention_heads": 7}, "7 heads"),
    ],
)
def test_a_config_that_pgx_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        read_config(change(**changes))


def test_a_size_nobody_published_names_those_that_were():
    with pytest.raises(UsageError, match="paligemma2 28b"):
        published("paligemma", "28b", 224)
    with pytest.raises(UsageError, match="224, 448, 896"):
        published("paligemma2", "3b", 300)


def test_gemma2_adds_two_norms_a_layer():
    one, two = (TextSpec(64, 2, 128, 4, 1, 16, post_norms=p) for p in (False, True))
    from pgxport.models.weights import _text

    assert len(_text(two)) - len(_text(one)) == 2 * 2
