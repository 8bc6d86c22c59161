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
        ({"text_config": []}, "text_config"),
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
        ({"vision__image_size": [224, 224]}, "image_size"),
        ({"vision__patch_size": None}, "patch_size"),
        ({"vision__image_size": 4096, "vision__patch_size": 1}, "4096 px"),
        ({"text__num_hidden_layers": 10**12}, "num_hidden_layers is '1000000000000'"),
        ({"text__num_attention_heads": 1 << 31}, "num_attention_heads"),
        ({"text__rope_theta": [10000]}, "rope_theta"),
        ({"text__rope_theta": -1.0}, "rope_theta"),
        ({"text__rope_theta": float("inf")}, "rope_theta"),
        ({"text__rope_parameters": [{}]}, "rope_parameters"),
        ({"text__rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
        ({"text__rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"text__rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"text__partial_rotary_factor": 0.5}, "a part of each head"),
        ({"text__hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"text__final_logit_softcapping": 0}, "final_logit_softcapping"),
        ({"text__sliding_window": 128}, "sliding_window"),
        ({"text__use_bidirectional_attention": False}, "hides the prefix"),
        ({"text__per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"text__eos_token_id": "1"}, "eos_token_id"),
        ({"text__eos_token_id": [1, -1]}, "eos_token_id"),
        ({"text__model_type": "gemma2", "text__layer_types": "full_attention"}, "layer_types"),
        ({"text__model_type": "gemma2", "text__layer_types": ["full_attention"]}, "1 entries for 18 layers"),
        ({"text__model_type": "gemma2", "text__layer_types": [["full_attention"]] * 18}, "layer_types"),
        ({"text__model_type": "gemma2", "text__sliding_window": 0}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"is_encoder_decoder": True}, "another architecture"),
    ],
)
def test_a_config_that_pgx_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        read_config(change(**changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"text__hidden_act": "gelu"}, {}),  # Gemma's first configs; transformers takes it for the tanh approximation
        ({"text__hidden_activation": None}, {}),
        ({"text__eos_token_id": [1, 107]}, {}),
        ({"text__rms_norm_eps": 1e-5}, {"eps": 1e-5}),
        ({"text__final_logit_softcapping": 30}, {"logit_softcap": 30.0}),
        ({"text__rope_theta": 5000}, {"rope_theta": 5000.0}),
        (
            {"text__rope_theta": 5000, "text__rope_parameters": {"rope_theta": 7000.0, "rope_type": "default"}},
            {"rope_theta": 7000.0},
        ),
        ({"text__rope_theta": 5000, "text__rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5000.0}),
        ({"text__rope_scaling": {"type": "default"}, "text__rope_parameters": {"rope_theta": 7000.0}}, {}),
        ({"a_key_of_nobody": {"x": 1}, "auto_map": {"AutoModel": "evil.py"}}, {}),
    ],
)
def test_what_transformers_reads_is_read_alike(changes, text):
    """Each config gives transformers the constants that it gives pgx."""
    transformers = pytest.importorskip("transformers")
    ours = read_config(change(**changes))
    assert ours == replace(published("paligemma", "3b", 224), text=replace(TEXT["paligemma", "3b"], **text))
    theirs = transformers.PaliGemmaConfig(**change(**changes)).text_config
    assert theirs.rope_parameters["rope_theta"] == ours.text.rope_theta
    assert getattr(theirs, "final_logit_softcapping", None) == ours.text.logit_softcap
    assert (theirs.rms_norm_eps, theirs.hidden_act) == (ours.text.eps, "gelu_pytorch_tanh")


def test_a_section_that_is_not_there_is_what_transformers_takes_for_it():
    transformers = pytest.importorskip("transformers")
    spec, theirs = read_config({"model_type": "paligemma"}), transformers.PaliGemmaConfig()
    text, vision = theirs.text_config, theirs.vision_config
    assert (spec.text.width, spec.text.depth, spec.text.mlp, spec.text.heads, spec.text.kv_heads, spec.text.head_dim, spec.text.vocab) == (
        text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads,
        text.head_dim, text.vocab_size,
    )  # fmt: skip
    assert (spec.vision.width, spec.vision.depth, spec.vision.mlp, spec.vision.heads, spec.vision.patch, spec.resolution) == (
        vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size, vision.num_attention_heads, vision.patch_size,
        vision.image_size,
    )  # fmt: skip


def test_a_size_nobody_published_names_those_that_were():
    with pytest.raises(UsageError, match="paligemma2 28b"):
        published("paligemma", "28b", 224)
    with pytest.raises(UsageError, match="224, 448, 896"):
        published("paligemma2", "3b", 300)


def test_gemma2_adds_two_norms_a_layer():
    one, two = (TextSpec(64, 2, 128, 4, 1, 16, post_norms=p) for p in (False, True))
    from pgxport.models.weights import _text

    assert len(_text(two)) - len(_text(one)) == 2 * 2
