# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints beside the same model in transformers, and the logits of each, teacher-forced.

A bundle's integers are put into the transformers model, and its linears round their inputs as the engine's kernels do, so
that the two have to agree nearly as floats do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from gemma_tokenizer import build_tokenizer
from in_memory import dequantized
from reference import random_paligemma
from scipy.linalg import hadamard
from tokenizers import Tokenizer

from pgxport.activations.calibration_file import Calibration
from pgxport.bundle.reader import Bundle
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.exporter.check.parity import scene
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipes import RECIPES
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.eager import TokenizedSample
from pgxport.models.weights import EMBEDDING, LM_HEAD, canonical
from pgxport.runners.runner import Runner
from pgxport.runners.saved_tokenizer import find_tokenizer

FAMILIES = ("paligemma", "paligemma2")
NORMS, TABLE, DECODER, REST = "*norm*", "*.embed_tokens.weight", "language_model.*_proj.weight", "*"
VISION, PROJECTOR = "vision_tower.*.layers.*.weight", "multi_modal_projector.linear.weight"
_STATIC = Scheme(bits=8, activations="static", observer="percentile")


def recipe_of(name: str, decoder: Scheme, table: Scheme, vision: Scheme, cache: str | None = None) -> Recipe:
    rules = {NORMS: Scheme(), TABLE: table, DECODER: decoder, VISION: vision, PROJECTOR: vision, REST: Scheme("float16")}
    return Recipe(name, tuple(Rule(*rule) for rule in rules.items()), cache)


_INT4 = Scheme(bits=4, group_size=32)
# What needs calibration, and what named recipes leave out.
MIXED = {
    "int8": RECIPES["cuda"]["int8"], "int4": RECIPES["cuda"]["int4"], "w8a8": RECIPES["cuda"]["w8a8"],
    "zeros": recipe_of("zeros", replace(_INT4, symmetric=False), Scheme(bits=4, group_size=16), Scheme(bits=8, group_size=16, symmetric=False)),
    "static": recipe_of("static", _STATIC, _STATIC, _STATIC),
    "cached": recipe_of("cached", _INT4, Scheme(bits=8, group_size=64), Scheme(bits=8, group_size=64), "int8"),
    "turned": recipe_of(
        "turned", replace(_INT4, symmetric=False, scaling="smoothquant", alpha=0.7, rotate=16), Scheme(bits=8, group_size=32),
        Scheme(bits=8, activations="dynamic", scaling="smoothquant", alpha=0.7, rotate=32),
    ),
    "half cache": recipe_of("half", _INT4, Scheme(bits=8, group_size=64), Scheme(bits=8, group_size=64), "float16"),
    "everything": Recipe("everything", (
        Rule(NORMS, Scheme()), Rule(TABLE, Scheme(bits=8, group_size=32)), Rule("*.fc2.weight", replace(_STATIC, compensate=True)),
        Rule(PROJECTOR, replace(_STATIC, compensate=True)),
        Rule(DECODER, Scheme(bits=4, group_size=32, method="gptq", scaling="awq")),
        Rule(VISION, replace(_STATIC, scaling="smoothquant", method="gptq", compensate=True)), Rule(REST, Scheme("float16")),
    ), "int8"),
}  # fmt: skip


def make_checkpoint(folder: Path, family: str, *, seed: int = 7, **config: Any) -> Any:
    """A random checkpoint of odd shapes; the same model, in transformers."""
    build_tokenizer(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = random_paligemma(
        folder, family=family, seed=seed, text={"vocab_size": words.get_vocab_size() + 3},
        image_token_index=words.token_to_id("<image>"), **{f"{n}_token_id": words.token_to_id(f"<{n}>") for n in ("bos", "eos", "pad")},
        **config,
    )  # fmt: skip
    model.set_attn_implementation("eager")
    return model


def make_calibration(folder: Path, *, samples: int = 3, moments: bool = True) -> Calibration:
    name = folder.with_name(f"{folder.name}-{samples}-{moments}.safetensors")
    return calibrate(CalibrateOptions(output=name, checkpoint=folder, samples=samples, moments=moments))


def sample(folder: Path, index: int = 0) -> TokenizedSample:
    checkpoint = Checkpoint.open(folder)
    return scene(index, read_config(checkpoint.config), find_tokenizer(checkpoint.path, checkpoint.config).words())


def engine_logits(bundle: Path, given: TokenizedSample) -> np.ndarray:
    """[answer tokens + 1, V] of ONNX Runtime on the CPU, whatever the bundle's target: the prefix at once, then token by token."""
    opened = Bundle.open(bundle)
    with Runner(Bundle(bundle, opened.manifest.model_copy(update={"target": "cpu"})), threads=1) as runner:
        pipeline, m = runner, runner.manifest
        embeds = pipeline.prefix(pipeline.encode_pixels(given.pixels), [m.token_ids.image] * m.image_tokens + given.prompt)
        decoder = pipeline.decoder(embeds.shape[1] + len(given.answer))
        logits = [decoder.feed(embeds).copy()]
        return np.stack([*logits, *(decoder.feed(pipeline.embed([token])).copy() for token in given.answer)])


@torch.no_grad()
def transformers_logits(model: Any, given: TokenizedSample) -> np.ndarray:
    """[answer tokens + 1, V], all tokens in one pass."""
    image = model.config.image_token_id
    prefix = [image] * model.config.text_config.num_image_tokens + given.prompt
    whole = torch.tensor([[*prefix, *given.answer]])
    kinds = torch.tensor([[0] * len(prefix) + [1] * len(given.answer)])
    out = model(
        input_ids=whole, pixel_values=torch.from_numpy(given.pixels), token_type_ids=kinds, attention_mask=torch.ones_like(whole)
    )
    return out.logits[0, len(prefix) - 1 :].float().numpy()


def stored_arrays(bundle: Path) -> dict[str, np.ndarray]:
    """Every initializer of a bundle's graphs, as the onnx package reads it."""
    found = {}
    for name in ("vision_encoder", "projector", "decoder_step"):
        for tensor in onnx.load(bundle / f"{name}.onnx").graph.initializer:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return found


def stored_matrix(path: str, shape: tuple[int, ...], scheme: Scheme, parts: dict[str, np.ndarray]) -> np.ndarray:
    """A quantized matrix, in floats again."""
    layout = "blocks" if scheme.activations == "float" else "rows" if path in (EMBEDDING, LM_HEAD) else "columns"
    return dequantized(scheme, layout, shape, path, parts)


@contextmanager
def rounded_as(
    model: Any, bundle: Path, recipe: Recipe, *, inputs: bool, calibration: Calibration | None = None
) -> Iterator[None]:
    """transformers with the weights that a bundle stores; and, where that is asked for, with inputs rounded as its kernels do."""
    before, parts, hooks = {name: p.detach().clone() for name, p in model.named_parameters()}, stored_arrays(bundle), []
    untied = any(name.startswith(LM_HEAD) for name in parts)
    heads = {"o_proj": model.config.text_config.head_dim, "out_proj": _vision_head(model.config.vision_config)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            path = canonical(name)
            if path == EMBEDDING and untied:  # of no graph
                stored = Bundle.open(bundle).token_table().rows(range(len(p)))
            elif recipe.scheme(path).bits:
                stored = stored_matrix(path, tuple(p.shape), recipe.scheme(path), parts)
            else:
                stored = parts[path]
            # Gemma's norms are stored plus one.
            stored = stored - 1 if path.startswith("language_model") and "norm" in path else stored
            p.copy_(torch.from_numpy(stored.astype(np.float32)))
    for name, module in model.named_modules():
        path = canonical(f"{name}.weight")
        path = EMBEDDING if path == LM_HEAD and not untied else path
        if not isinstance(module, torch.nn.Linear) or not recipe.scheme(path).bits:
            continue
        # A rotation of whole blocks of a head is in the rows of v_proj.
        block, head = _block(module, recipe.scheme(path)), heads.get(path.split(".")[-2])
        block = 1 if head and head % block == 0 else block
        if block > 1 or f"input.{path}.factor" in parts:
            hooks.append(module.register_forward_pre_hook(_changing(parts.get(f"input.{path}.factor"), block)))
        if inputs:
            hooks.append(module.register_forward_pre_hook(_rounding(recipe.scheme(path), path, calibration)))
    yield
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])


def _vision_head(config: Any) -> int:
    return config.hidden_size // config.num_attention_heads


def _block(linear: torch.nn.Linear, scheme: Scheme) -> int:
    """The largest power of two that divides a linear's inputs and is not above what the scheme asks for."""
    return max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if linear.in_features % n == 0 and n <= (scheme.rotate or 1))


def _changing(factor: np.ndarray | None, block: int) -> Any:
    def change(module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        x = given[0] if factor is None else given[0] * torch.from_numpy(factor.astype(np.float32))
        turn = torch.from_numpy((hadamard(block) / block).astype(np.float32))
        return (x.unflatten(-1, (-1, block)) @ turn).flatten(-2)

    return change


def _rounding(scheme: Scheme, path: str, calibration: Calibration | None) -> Any:
    def static(module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        low, high = (min(calibration.range(path, scheme.observer)[0], 0.0), max(calibration.range(path, scheme.observer)[1], 0.0))
        step = (high - low) / 255
        return torch.fake_quantize_per_tensor_affine(given[0], step, round(-low / step), 0, 255)

    def dynamic(module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        parts = given[0].split(scheme.group_size or given[0].shape[-1], -1)
        steps = [part.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127 for part in parts]
        return torch.cat([torch.round(part / step) * step for part, step in zip(parts, steps, strict=True)], -1)

    return static if scheme.activations == "static" else dynamic


def apart(got: np.ndarray, expected: np.ndarray) -> float:
    """Of the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())
