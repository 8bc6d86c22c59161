# SPDX-License-Identifier: Apache-2.0
"""Graphs for TensorRT compute what transformers computes, for every version: in ONNX Runtime, in OpenVINO as a second engine, and in
ONNX's reference implementation, which alone of the three has bfloat16.

None is TensorRT; tests/exporter/test_tensorrt_builds.py has its parser and its builder read the same graphs.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "onnxruntime", "torch", "transformers")):
    pytest.skip("needs the exporter, an engine and the reference", allow_module_level=True)

import onnx
import torch
from gemma_tokenizer import build_tokenizer
from reference import random_paligemma
from rounded import apart, make_calibration, sample, transformers_logits
from tensorrt_engines import onnxruntime, openvino, reference, teacher_forced_logits
from tokenizers import Tokenizer

from pgxport.activations.calibration_file import Calibration
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipe_toml import to_toml
from pgxport.exporter.targets import TENSORRT
from pgxport.models.weights import EMBEDDING, canonical

# Of the largest logit. In float32 both add up in another order; worst seen 4e-6. float16 keeps eleven bits; worst seen 3.7e-3.
# bfloat16 keeps eight; worst seen 4.4e-2, where transformers' own bfloat16 is 3.1e-2 away.
FLOATS, HALVES, BFLOATS = 1e-4, 1e-2, 1e-1
VERSIONS = list(TENSORRT)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one key/value head": ("paligemma", {}),
    "window shorter than the prefix": ("paligemma2", {}),
    "window shorter than the answer": ("paligemma2", {"sliding_window": 12}),
    "low caps, other layers local": ("paligemma2", {
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
    "no caps, window longer than everything": ("paligemma2", {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 4000,
    }),
}  # fmt: skip
# Whole groups need channels that groups divide.
EVEN = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def make_checkpoint(folder: Path, family: str, text: dict[str, Any]) -> Any:
    build_tokenizer(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = random_paligemma(
        folder, family=family, seed=5, text={**text, "vocab_size": words.get_vocab_size() + 3},
        image_token_index=words.token_to_id("<image>"), **{f"{n}_token_id": words.token_to_id(f"<{n}>") for n in ("bos", "eos", "pad")},
    )  # fmt: skip
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tensorrt") / "checkpoint"
    return folder, make_checkpoint(folder, *request.param)


@pytest.mark.parametrize("trt", VERSIONS)
def test_logits_of_prefill_and_forced_steps_equal_transformers(case, tmp_path, trt):
    folder, model = case
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=folder, target="tensorrt", trt=trt))
    given = sample(folder)
    assert len(given.answer) > 12  # or no window would hide what was generated
    expected = transformers_logits(model, given)
    assert apart(teacher_forced_logits(bundle.path, onnxruntime, given), expected) < FLOATS


@pytest.mark.parametrize("trt", VERSIONS)
def test_a_second_engine_computes_the_same(case, tmp_path, trt):
    """OpenVINO 2026.4 has no TensorScatter, and so no graph for TensorRT 11."""
    if trt != "11":
        pytest.importorskip("openvino")
    folder, model = case
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=folder, target="tensorrt", trt=trt))
    given = sample(folder)
    engine = reference if trt == "11" else openvino
    assert apart(teacher_forced_logits(bundle.path, engine, given), transformers_logits(model, given)) < FLOATS


@pytest.mark.parametrize("trt", VERSIONS)
def test_bfloat16_is_as_near_float32_as_transformers_own(tmp_path, trt):
    folder = tmp_path / "checkpoint"
    model = make_checkpoint(folder, "paligemma2", {})
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=folder, precision="bf16", target="tensorrt", trt=trt))
    given = sample(folder)
    expected = transformers_logits(model, given)
    rounded = transformers_logits(model.bfloat16(), given)
    error, theirs = apart(teacher_forced_logits(bundle.path, reference, given), expected), apart(rounded, expected)
    print(trt, error, theirs)
    assert error < BFLOATS
    assert error < 2 * theirs


@pytest.mark.parametrize("trt", VERSIONS)
def test_half_precision_is_near_float32_and_a_loud_model_stays_finite(tmp_path, trt):
    """A residual stream of a hundred thousand is beyond float16, and is divided; norms, softmax and logits are in float32."""
    folder = tmp_path / "checkpoint"
    model = make_checkpoint(folder, "paligemma", {})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or "projector" in name:
                p.mul_(1e5)
    model.save_pretrained(folder)
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=folder, precision="fp16", target="tensorrt", trt=trt))
    assert bundle.manifest.residual_divisor > 1
    assert bundle.manifest.cache.dtype == "float16"
    given = sample(folder)
    assert apart(teacher_forced_logits(bundle.path, onnxruntime, given), transformers_logits(model, given)) < HALVES


# Fewer bits ------------------------------------------------------------------------------------------------------------

TABLE, DECODER, VISION = "*.embed_tokens.weight", "language_model.*_proj.weight", "vision_tower.*.layers.*.weight"
PROJECTOR = "multi_modal_projector.linear.weight"
ROWS = Scheme(bits=8)


def recipe_of(name: str, decoder: Scheme, other: Scheme, rest: str = "float32") -> Recipe:
    rules = {"*norm*": Scheme(), TABLE: ROWS, DECODER: decoder, VISION: other, PROJECTOR: other, "*": Scheme(rest)}
    return Recipe(name, tuple(Rule(*rule) for rule in rules.items()))


STATIC, FLOAT8 = Scheme(bits=8, activations="static"), Scheme(bits=8, format="e4m3", activations="static")
BITS = {
    "int8": recipe_of("int8", ROWS, ROWS),
    "int4": recipe_of("int4", Scheme(bits=4, group_size=32), ROWS),
    "int4-gptq": recipe_of("int4-gptq", Scheme(bits=4, group_size=16, method="gptq"), ROWS),
    "w8a8": recipe_of("w8a8", STATIC, STATIC),
    "fp8": recipe_of("fp8", FLOAT8, FLOAT8),
    "groups of 8 bits": recipe_of("grouped", Scheme(bits=8, group_size=32), ROWS),
}


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def even(request, tmp_path_factory) -> tuple[Path, Any, Calibration]:
    folder = tmp_path_factory.mktemp("tensorrt") / "checkpoint"
    model = make_checkpoint(folder, request.param, EVEN)
    return folder, model, make_calibration(folder, samples=2)


def write(folder: Path, recipe: Recipe, calibration: Calibration, output: Path, trt: str) -> Bundle:
    (output / "recipe.toml").write_text(to_toml(recipe))
    return export(ExportOptions(
        output=output / "bundle", checkpoint=folder, recipe=output / "recipe.toml", target="tensorrt", trt=trt, parity=0,
        calibration=calibration.path if recipe.calibrated else None,
    ))  # fmt: skip


def stored_weights(bundle: Path) -> dict[str, np.ndarray]:
    """Every weight of a bundle's graphs in floats, read by the onnx package: int4, FP8 and all, times its scales."""
    found: dict[str, np.ndarray] = {}
    for name in ("vision_encoder", "projector", "decoder_step"):
        tensors = onnx.load(bundle / f"{name}.onnx").graph.initializer
        parts = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in tensors}
        for path, quantized in parts.items():
            scales = parts.get(path.removesuffix("codes") + "scales")
            if not path.endswith(".codes") or scales is None:
                found[path] = quantized
            elif scales.ndim == 1:  # a row each
                found[path.removesuffix(".codes")] = quantized * scales[:, None]
            else:
                found[path.removesuffix(".codes")] = (quantized * np.repeat(scales, len(quantized) // len(scales), 0)).T
    return found


@contextmanager
def as_stored(model: Any, bundle: Path, recipe: Recipe, calibration: Calibration) -> Iterator[None]:
    """transformers with the weights that a bundle stores, and with inputs rounded by torch where the recipe says so."""
    before, weights, hooks = {name: p.detach().clone() for name, p in model.named_parameters()}, stored_weights(bundle), []
    with torch.no_grad():
        for name, p in model.named_parameters():
            path = canonical(name)
            # Gemma's norms are stored plus one.
            p.copy_(torch.from_numpy(weights[path] - (path.startswith("language_model") and "norm" in path)))
    for name, module in model.named_modules():
        path = canonical(f"{name}.weight")
        path = EMBEDDING if path == "language_model.lm_head.weight" else path
        if isinstance(module, torch.nn.Linear) and recipe.scheme(path).activations == "static":
            largest = max(map(abs, calibration.range(path, "minmax")))
            hooks.append(module.register_forward_pre_hook(_rounding(recipe.scheme(path).format, largest)))
    yield
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])


def _rounding(format: str, largest: float) -> Any:
    def rounded(module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        if format == "int":
            return torch.fake_quantize_per_tensor_affine(given[0], largest / 127, 0, -128, 127)
        scale = np.float32(largest / 448)
        return (given[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return rounded


@pytest.mark.parametrize("trt", ["10.3", "11"])
@pytest.mark.parametrize("name", BITS)
def test_fewer_bits_are_multiplied_as_they_are_stored(even, tmp_path, name, trt):
    """A number between two codes may go to either, and moves what follows; so the median over the tokens of an answer is judged."""
    folder, model, calibration = even
    if name == "groups of 8 bits" and trt == "10.3":
        with pytest.raises(UsageError, match=r"of TensorRT 10\.3 has no groups of 8 bits.*take group out"):
            write(folder, BITS[name], calibration, tmp_path, trt)
        return
    bundle = write(folder, BITS[name], calibration, tmp_path, trt)
    given = sample(folder)
    exact = transformers_logits(model, given)
    with as_stored(model, bundle.path, BITS[name], calibration):
        expected = transformers_logits(model, given)
    got = teacher_forced_logits(bundle.path, onnxruntime, given)
    second = teacher_forced_logits(bundle.path, reference, given)
    error, other, cost = (float(np.median(np.abs(x - expected).max(1)) / np.abs(expected).max()) for x in (got, second, exact))
    print(name, trt, error, other, cost)
    assert max(error, other) < 3e-6
    assert cost > 100 * error  # or the other claim would be none
