# SPDX-License-Identifier: Apache-2.0
"""The reader of a PaliGemma's config.json; it reads as transformers does, with the same defaults."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pgxport.errors import CheckpointError
from pgxport.models.schema import Count, FileSchema, Only, Positive, Size, TokenId
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec, without_window

Activation = Literal["gelu_pytorch_tanh", "gelu_new"]  # two names of one function
Eps = Annotated[float, Field(gt=0, le=1)]
StopTokens = TokenId | Annotated[list[TokenId], Field(max_length=1024)]

TRAINING = "of training alone"
OUTPUTS = "of what else a model returns"
CLASSIFIER = "of classifiers"
STORAGE = "of how transformers holds and computes weights"
OTHER = "of another kind of model"
NOTHING = "of no effect in transformers"
ANSWERS = "of answers; read where there is no generation_config.json"
# What transformers 4.57 writes of generation_config.json into every config.json.
OF_ANSWERS = (
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty force_bos_token_to_be_generated forced_bos_token_id forced_eos_token_id length_penalty max_length "
    "min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p"
)
# The keys of every config.json of transformers, 4.57 and 5.x.
EVERY: dict[str, str] = dict.fromkeys(OF_ANSWERS.split(), ANSWERS) | {
    "architectures": NOTHING, "transformers_version": NOTHING, "name_or_path": NOTHING, "_name_or_path": NOTHING, "_commit_hash": NOTHING,
    "auto_map": "code of its author, which pgx never runs", "custom_pipelines": "code of its author, which pgx never runs",
    "task_specific_params": NOTHING, "tokenizer_class": "of the tokenizer, which is read from its own files", "prefix": NOTHING,
    "dtype": STORAGE, "torch_dtype": STORAGE, "use_bfloat16": STORAGE, "tf_legacy_loss": STORAGE, "torchscript": STORAGE,
    "attn_implementation": STORAGE, "_attn_implementation": STORAGE, "_attn_implementation_autoset": STORAGE, "experts_implementation": STORAGE,
    "chunk_size_feed_forward": STORAGE, "use_cache": STORAGE, "tie_last_hidden_states": OUTPUTS,
    "return_dict": OUTPUTS, "output_hidden_states": OUTPUTS, "output_attentions": OUTPUTS,
    "id2label": CLASSIFIER, "label2id": CLASSIFIER, "num_labels": CLASSIFIER, "problem_type": CLASSIFIER, "finetuning_task": CLASSIFIER,
    "decoder_start_token_id": OTHER, "cross_attention_hidden_size": OTHER, "is_decoder": OTHER, "sep_token_id": OTHER,
    "tie_encoder_decoder": OTHER, "initializer_range": TRAINING, "attention_dropout": TRAINING, "gradient_checkpointing": TRAINING,
    "bos_token_id": "of the prompt, whose <bos> is the tokenizer's", "pad_token_id": "of batches, whose padding no token sees",
    "max_position_embeddings": "of the longest sequence, which the bundle's context limits",
}  # fmt: skip
# Those of decoders, which have no effect elsewhere.
OF_DECODERS: dict[str, str] = dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor"), NOTHING)
PLAIN: dict[str, Only] = {
    "quantization_config": ((None,), "which stores weights as another program's integers"),
    "is_encoder_decoder": ((False, None), "which is another architecture"),
    "add_cross_attention": ((False, None), "which is another architecture"),
    "pruned_heads": (({}, None), "which takes heads away"),
    "per_layer_config": ((None, {}), "which gives layers sizes of their own"),
}  # fmt: skip


class VisionConfig(FileSchema):
    """vision_config: SigLIP's sizes. The defaults are those of transformers' SiglipVisionConfig."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    hidden_act: Activation = "gelu_pytorch_tanh"
    layer_norm_eps: Eps = 1e-6

    no_effect: ClassVar[Mapping[str, str]] = EVERY | OF_DECODERS | {
        "eos_token_id": NOTHING, "tie_word_embeddings": NOTHING, "initializer_factor": TRAINING, "projection_size": NOTHING,
        "text_config": NOTHING, "vision_config": NOTHING,
        "vision_use_head": "of the pooling head, whose output PaliGemma does not use",
        "projection_dim": "of the projector, whose weights give its sizes",
        "projector_hidden_act": NOTHING, "num_image_tokens": NOTHING, "num_positions": NOTHING, "vocab_size": NOTHING,
    }  # fmt: skip
    only: ClassVar[Mapping[str, Only]] = PLAIN

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"an image of {self.image_size} px does not divide into patches of {self.patch_size} px")
        if (self.image_size // self.patch_size) ** 2 > 1 << 16:
            raise ValueError(f"an image of {self.image_size} px has more patches of {self.patch_size} px than a bundle's tokens")
        return self


OTHER_ROPE = (
    "factor original_max_position_embeddings attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor "
    "high_freq_factor mscale mscale_all_dim truncate"
)


class RopeConfig(FileSchema):
    """rope_parameters of transformers 5.x, rope_scaling of 4.x: plain rotary embeddings."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: Positive | None = None

    only: ClassVar[Mapping[str, Only]] = {
        "partial_rotary_factor": ((1, 1.0), "which rotates a part of each head"),
        "full_attention": ((), "which gives kinds of layers embeddings of their own"),
        "sliding_attention": ((), "which gives kinds of layers embeddings of their own"),
    }
    no_effect: ClassVar[Mapping[str, str]] = dict.fromkeys(OTHER_ROPE.split(), "of rotary embeddings that are not plain")


class GemmaConfig(FileSchema):
    """text_config of a Gemma 1. The defaults are those of transformers' GemmaConfig: published configs leave most fields out."""

    model_type: Literal["gemma", "gemma2"] = "gemma"
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)] = 256000
    hidden_size: Size = 3072
    intermediate_size: Size = 24576
    num_hidden_layers: Count = 28
    num_attention_heads: Count = 16
    num_key_value_heads: Count = 16
    head_dim: Annotated[int, Field(ge=2, le=1024)] = 256
    rms_norm_eps: Eps = 1e-6
    rope_theta: Positive = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    final_logit_softcapping: Positive | None = None
    eos_token_id: StopTokens | None = 1

    no_effect: ClassVar[Mapping[str, str]] = EVERY | {
        "num_image_tokens": NOTHING, "tie_word_embeddings": "of a decoder alone; that of the whole model decides",
        "attn_logit_softcapping": "of Gemma 2", "query_pre_attn_scalar": "of Gemma 2", "layer_types": "of Gemma 2",
        "hidden_size_per_layer_input": OTHER, "cache_implementation": STORAGE,
    }  # fmt: skip
    only: ClassVar[Mapping[str, Only]] = PLAIN | {
        "attention_bias": ((False, None), "which adds biases"),
        "use_bidirectional_attention": ((None, True), "which hides the prefix from itself"),
        "partial_rotary_factor": ((None, 1, 1.0), "which rotates a part of each head"),
        # transformers 5.x reads hidden_act, and takes "gelu" for the tanh approximation; some 4.x read hidden_activation.
        "hidden_act": (("gelu_pytorch_tanh", "gelu", "gelu_new", None), "which is another activation"),
        "hidden_activation": (("gelu_pytorch_tanh", "gelu", "gelu_new", None), "which is another activation"),
        "sliding_window": ((None,), "which a Gemma 1 does not have"),
    }  # fmt: skip

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not share {self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, which rotary embeddings cannot split")
        return self

    def spec(self) -> TextSpec:
        """The sizes and constants of the decoder."""
        rope = RopeConfig.read(self.rope_scaling or self.rope_parameters or {}, "config.json: text_config.rope_parameters")
        return TextSpec(
            width=self.hidden_size,
            depth=self.num_hidden_layers,
            mlp=self.intermediate_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab=self.vocab_size,
            eps=self.rms_norm_eps,
            rope_theta=self.rope_theta if rope.rope_theta is None else rope.rope_theta,
            query_scale=self.head_dim**-0.5,
            logit_softcap=self.final_logit_softcapping,
        )


class Gemma2Config(GemmaConfig):
    """text_config of a Gemma 2. The defaults are those of transformers' Gemma2Config."""

    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Count = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 4
    query_pre_attn_scalar: Positive = 256.0
    sliding_window: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 4096
    layer_types: Annotated[list[Literal["full_attention", "sliding_attention"]], Field(max_length=1024)] | None = None
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0

    no_effect: ClassVar[Mapping[str, str]] = {
        **{key: why for key, why in GemmaConfig.no_effect.items() if why != "of Gemma 2"},
        "hidden_act": "of Gemma 1; a Gemma 2 reads hidden_activation",
    }
    only: ClassVar[Mapping[str, Only]] = {
        key: rule for key, rule in GemmaConfig.only.items() if key not in ("hidden_act", "sliding_window")
    }

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        return self

    def spec(self) -> TextSpec:
        """The sizes and constants of the decoder."""
        depth = self.num_hidden_layers
        kinds = self.layer_types or ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]
        local = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        return replace(
            super().spec(),
            query_scale=self.query_pre_attn_scalar**-0.5,
            post_norms=True,
            attn_softcap=self.attn_logit_softcapping,
            window=self.sliding_window,
            local_layers=local if self.sliding_window else (),
        )


class PaliGemmaConfig(FileSchema):
    """config.json, without its two sections."""

    model_type: Literal["paligemma"]
    image_token_index: TokenId | None = None
    image_token_id: TokenId | None = None
    eos_token_id: StopTokens | None = None
    tie_word_embeddings: bool = True

    no_effect: ClassVar[Mapping[str, str]] = EVERY | OF_DECODERS | {
        "vision_config": "read by a schema of its own", "text_config": "read by a schema of its own",
        "hidden_size": "of the decoder, whose own config says it", "vocab_size": "of the decoder, whose own config says it",
        "projection_dim": "of the projector, whose weights give its sizes", "num_hidden_layers": NOTHING, "ignore_index": TRAINING,
        "image_seq_length": "of the processor", "num_image_tokens": NOTHING,
    }  # fmt: skip
    only: ClassVar[Mapping[str, Only]] = PLAIN


# What PaliGemmaConfig of transformers takes for a section that is not there.
NO_VISION = {"hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
NO_TEXT = {
    "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1,
    "vocab_size": 257152,
}  # fmt: skip


def read_config(config: Mapping[str, Any], *, local_window: bool = True) -> ModelSpec:
    """Returns the spec that a PaliGemma's config.json describes, with transformers' defaults for absent fields.

    Args:
        local_window: Whether generated tokens see only a window of the prefix in Gemma 2's local layers, as
            transformers has it; the training code has no window.

    Raises:
        CheckpointError: the config is not a PaliGemma's, or asks for something that pgx does not compute.
    """
    PaliGemmaConfig.read(config, "config.json")
    vision, text = _section(config, "vision_config", NO_VISION), _section(config, "text_config", NO_TEXT)
    v = VisionConfig.read(vision, "config.json: vision_config")
    schema = Gemma2Config if text.get("model_type") == "gemma2" else GemmaConfig
    spec = ModelSpec(
        "paligemma2" if schema is Gemma2Config else "paligemma",
        VisionSpec(
            resolution=v.image_size,
            width=v.hidden_size,
            depth=v.num_hidden_layers,
            heads=v.num_attention_heads,
            mlp=v.intermediate_size,
            patch=v.patch_size,
            eps=v.layer_norm_eps,
        ),
        schema.read(text, "config.json: text_config").spec(),
    )
    return spec if local_window else without_window(spec)


def _section(config: Mapping[str, Any], name: str, absent: dict[str, Any]) -> Mapping[str, Any]:
    section = absent if config.get(name) is None else config[name]
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"config.json: {name} is {type(section).__name__}, not an object; give the config.json of a PaliGemma"
        )
    return section
