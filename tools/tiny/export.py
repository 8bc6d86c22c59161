# SPDX-License-Identifier: Apache-2.0
"""Write trained weights as a checkpoint in hub layout, as transformers reads it."""

import json
import shutil
from pathlib import Path

import torch
from model import Size, Weights
from safetensors.torch import save_file
from tokenizer import IMAGE_ID
from tokenizer import write as write_tokenizer


def config(s: Size) -> dict:
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": s.vision_width, "intermediate_size": s.vision_mlp, "num_hidden_layers": s.vision_depth,
        "num_attention_heads": s.vision_heads, "patch_size": s.patch, "image_size": s.resolution, "num_image_tokens": s.image_tokens,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": s.eps, "projection_dim": s.width, "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "gemma2", "hidden_size": s.width, "intermediate_size": s.mlp, "num_hidden_layers": s.depth, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "query_pre_attn_scalar": s.query_pre_attn_scalar,
        "sliding_window": s.sliding_window, "attn_logit_softcapping": s.attn_softcap, "final_logit_softcapping": s.logit_softcap,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": s.eps, "vocab_size": s.vocab,
        "num_image_tokens": s.image_tokens, "max_position_embeddings": 1024, "rope_theta": 10000.0, "attention_bias": False,
    }  # fmt: skip
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "dtype": "bfloat16", "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "image_token_index": IMAGE_ID, "hidden_size": s.width,
        "num_hidden_layers": s.depth, "projection_dim": s.width, "text_config": text, "vision_config": vision,
    }  # fmt: skip


def write_checkpoint(weights: Weights, size: Size, folder: Path) -> None:
    """Round to bfloat16 and write every file of a hub repository."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in weights.items() if not k.startswith("head.")}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    generation = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 128}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(partial, size.image_tokens, size.resolution)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
