# SPDX-License-Identifier: Apache-2.0
"""The reader of a PaliGemma's config.json; it reads as transformers does, with the same defaults."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pgxport.errors import CheckpointError
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec, without_window


def read_config(config: Mapping[str, Any], *, local_window: bool = True) -> ModelSpec:
    """Returns the spec that a PaliGemma's config.json describes, with transformers' defaults for absent fields.

    Args:
        local_window: Whether generated tokens see only a window of the prefix in Gemma 2's local layers, as
            transformers has it; the training code has no window.

    Raises:
        CheckpointError: the config is not a PaliGemma's, or asks for something that pgx does not compute.
    """
    if config.get("model_type") != "paligemma":
        raise CheckpointError(f"config.json: model_type is {config.get('model_type')!r}, and pgx exports 'paligemma' only")
    vision, text = _section(config, "vision_config"), _section(config, "text_config")
    family = {"gemma": "paligemma", "gemma2": "paligemma2"}.get(text.get("model_type", "gemma"))
    if family is None:
        raise CheckpointError(f"config.json: text_config.model_type is {text['model_type']!r}; PaliGemma has 'gemma' or 'gemma2'")
    v = VisionSpec(
        resolution=_int(vision, "image_size", 224),
        width=_int(vision, "hidden_size", 768),
        depth=_int(vision, "num_hidden_layers", 12),
        heads=_int(vision, "num_attention_heads", 12),
        mlp=_int(vision, "intermediate_size", 3072),
        patch=_int(vision, "patch_size", 16),
        eps=_float(vision, "layer_norm_eps", 1e-6),
    )
    _only(vision, "vision_config", {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)})
    _only(text, "text_config", {"attention_bias": (False,), "hidden_activation": (None, "gelu_pytorch_tanh")})
    if v.width % v.heads:
        raise CheckpointError(f"config.json: vision_config.hidden_size {v.width} does not divide into {v.heads} heads")
    if v.resolution % v.patch:
        raise CheckpointError(f"config.json: an image of {v.resolution} px does not divide into patches of {v.patch} px")
    t = _gemma_text(text, gemma2=family == "paligemma2")
    if t.heads % t.kv_heads:
        raise CheckpointError(f"config.json: {t.heads} query heads do not share {t.kv_heads} key/value heads evenly")
    if t.head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {t.head_dim} is odd, which rotary embeddings cannot split")
    spec = ModelSpec(family, v, t)
    return spec if local_window else without_window(spec)


def _gemma_text(text: Mapping[str, Any], *, gemma2: bool) -> TextSpec:
    # The defaults are those of transformers' GemmaConfig and
    # Gemma2Config: published configs leave most fields out.
    depth = _int(text, "num_hidden_layers", 26 if gemma2 else 28)
    spec = TextSpec(
        width=_int(text, "hidden_size", 2304 if gemma2 else 3072),
        depth=depth,
        mlp=_int(text, "intermediate_size", 9216 if gemma2 else 24576),
        heads=_int(text, "num_attention_heads", 8 if gemma2 else 16),
        kv_heads=_int(text, "num_key_value_heads", 4 if gemma2 else 16),
        head_dim=_int(text, "head_dim", 256),
        vocab=_int(text, "vocab_size", 256000),
        eps=_float(text, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(text),
    )
    if not gemma2:
        return replace(spec, query_scale=spec.head_dim**-0.5)
    kinds = text.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]
    if len(kinds) != depth or set(kinds) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json: text_config.layer_types has {len(kinds)} entries {sorted(set(kinds))} for {depth} layers"
        )
    local = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    window = text.get("sliding_window", 4096)
    return replace(
        spec,
        query_scale=_float(text, "query_pre_attn_scalar", 256) ** -0.5,
        post_norms=True,
        attn_softcap=_cap(text, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(text, "final_logit_softcapping", 30.0),
        window=window,
        local_layers=local if window else (),
    )


def _rope_theta(text: Mapping[str, Any]) -> float:
    # transformers 4.x writes rope_theta beside the other fields, 5.x a table of its own.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rotary embeddings of type {kind!r}; PaliGemma has plain ones ('default')")
    return float(rope.get("rope_theta", text.get("rope_theta", 10000.0)))


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"config.json: {name} is {type(section).__name__}, not an object; give the config.json of a PaliGemma"
        )
    return section


def _int(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive integer")
    return value


def _float(section: Mapping[str, Any], key: str, default: float) -> float:
    value = section.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive number")
    return float(value)


def _cap(section: Mapping[str, Any], key: str, default: float) -> float | None:
    return None if section.get(key, default) is None else _float(section, key, default)


def _only(section: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if section.get(key, values[0]) not in values:
            raise CheckpointError(f"config.json: {where}.{key} is {section[key]!r}; pgx computes {values[-1]!r} only")
