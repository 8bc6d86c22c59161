# SPDX-License-Identifier: Apache-2.0
"""The reader of generation_config.json: the tokens that end an answer, its longest length, and what waits for sampling."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pgxport.bundle.manifest import Generation
from pgxport.errors import CheckpointError
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import NOTHING, OTHER, OUTPUTS, STORAGE, StopTokens
from pgxport.models.schema import FileSchema

MAX_KEPT = 1 << 16  # bytes of JSON that a manifest keeps
SPEED = "of how fast transformers generates"


class GenerationConfig(FileSchema):
    """generation_config.json, as transformers 4.57 and 5.x read it."""

    eos_token_id: StopTokens | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    # What a greedy answer does not depend on, or would if it were computed: the manifest keeps values other than these.
    kept: ClassVar[Mapping[str, Any]] = {
        "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
        "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_return_sequences": 1, "num_beams": 1, "num_beam_groups": 1, "early_stopping": False,
        "length_penalty": 1.0, "diversity_penalty": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "force_words_ids": None, "constraints": None,
        "renormalize_logits": False, "remove_invalid_values": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
        "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None,
        "sequence_bias": None, "token_healing": False, "guidance_scale": None, "watermarking_config": None, "penalty_alpha": None,
        "dola_layers": None, "max_length": 20, "min_length": 0, "min_new_tokens": None, "max_time": None, "stop_strings": None,
    }  # fmt: skip
    no_effect: ClassVar[Mapping[str, str]] = {
        "bos_token_id": "of the prompt, whose <bos> is the tokenizer's", "pad_token_id": "of batches, whose padding no token sees",
        "decoder_start_token_id": OTHER, "is_assistant": SPEED, "num_assistant_tokens": SPEED, "num_assistant_tokens_schedule": SPEED,
        "assistant_confidence_threshold": SPEED, "prompt_lookup_num_tokens": SPEED, "max_matching_ngram_size": SPEED,
        "assistant_early_exit": SPEED, "assistant_lookbehind": SPEED, "target_lookbehind": SPEED, "assistant_ensemble_weight": SPEED,
        "speculation_type": SPEED, "use_mtp": SPEED, "use_cache": SPEED, "compile_config": SPEED, "disable_compile": SPEED,
        "prefill_chunk_size": SPEED, "cache_implementation": STORAGE, "cache_config": STORAGE, "max_cache_len": STORAGE,
        "return_legacy_cache": STORAGE, "low_memory": STORAGE, "continuous_batching_config": STORAGE, "generation_kwargs": NOTHING,
        "output_attentions": OUTPUTS, "output_hidden_states": OUTPUTS, "output_scores": OUTPUTS, "output_logits": OUTPUTS,
        "return_dict_in_generate": OUTPUTS, "transformers_version": NOTHING, "_commit_hash": NOTHING, "_from_model_config": NOTHING,
        "force_bos_token_to_be_generated": OTHER,
        "custom_generate": "code of its author, which pgx never runs", "trust_remote_code": "code of its author, which pgx never runs",
    }  # fmt: skip


# Keys of `kept` that choose among the likeliest tokens, and only where do_sample is true.
SAMPLING = frozenset(("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"))
# Those that only search or length limits read, which greedy generation has not, and the total length, for which pgx has a limit.
SEARCH = frozenset(("early_stopping", "length_penalty", "diversity_penalty", "num_return_sequences", "max_length"))


def read_generation(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Generation:
    """What a checkpoint says of its answers.

    As in transformers 5.x, a generation_config.json says all; where there is none, config.json does, and its
    text_config what it leaves open.

    Args:
        config: config.json.
        generation: generation_config.json; None: there is none.

    Raises:
        CheckpointError: a value is of another type, or out of bounds.
    """
    values, where = generation, "generation_config.json"
    if values is None:
        text = config.get("text_config")
        known = GenerationConfig.keys() - {"max_length", "min_length"}  # 4.x wrote its defaults of these into every config.json
        sections = (text if isinstance(text, Mapping) else {}, config)
        values, where = {k: v for section in sections for k, v in section.items() if k in known and v is not None}, "config.json"
    read = GenerationConfig.read(values, where)
    kept = {k: values[k] for k, plain in GenerationConfig.kept.items() if values.get(k) is not None and values[k] != plain}
    if len(json.dumps(kept)) > MAX_KEPT:
        raise CheckpointError(f"{where}: {max(kept, key=_written(kept))} has more than {MAX_KEPT:,} bytes; take it out")
    stop = read.eos_token_id
    return Generation(
        stop=tuple(dict.fromkeys(stop)) if isinstance(stop, list) else () if stop is None else (stop,),
        max_new_tokens=read.max_new_tokens,
        kept=kept,
    )


def generation_of(checkpoint: Checkpoint) -> Generation:
    """What the files beside a checkpoint, or beside its adapter, say of its answers.

    Raises:
        CheckpointError: as `read_generation`.
    """
    return read_generation(checkpoint.config, checkpoint.json("generation_config.json"))


def _written(kept: Mapping[str, Any]) -> Callable[[str], int]:
    return lambda key: len(json.dumps(kept[key]))


def unheeded(generation: Generation) -> list[str]:
    """The kept keys that would change an answer in transformers, and the greedy answers of a bundle do not heed."""
    samples = generation.kept.get("do_sample") is True
    return [key for key in generation.kept if key not in SEARCH and (samples or key not in SAMPLING)]
