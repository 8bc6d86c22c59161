# SPDX-License-Identifier: Apache-2.0
"""Quantized bundles, the whole road: what they compute, what they weigh, how they are made again, what is refused."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "onnxruntime", "torch", "transformers")):
    pytest.skip("needs the exporter, an engine and the reference", allow_module_level=True)

import onnx
import torch
from rounded import (
    DECODER,
    FAMILIES,
    MIXED,
    TABLE,
    engine_logits,
    make_calibration,
    make_checkpoint,
    rounded_as,
    sample,
    stored_arrays,
    transformers_logits,
)
from safetensors.numpy import load_file, save_file

from pgxport.activations import observe
from pgxport.activations.calibration_file import Calibration
from pgxport.bundle.reader import Bundle
from pgxport.errors import CheckpointError, PgxError, UsageError
from pgxport.exporter.export import dry_run, export
from pgxport.exporter.plan import PlanOptions, plan
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipe_toml import read_recipe, to_toml
from pgxport.exporter.targets import TARGETS
from pgxport.models.tiny.scenes import ask, draw
from pgxport.models.weights import canonical
from pgxport.runners.runner import Runner

# Of the largest logit, the median over the tokens of an answer.
# With inputs rounded as the kernels round them: as floats agree (4e-7), unless a number between two codes goes to the other one.
FLOATS = 3e-6
# With float inputs: what eight bits of activations cost these random models. Worst seen: 3.9e-2; and 1.2e-1 where a range that
# three samples gave cuts numbers off.
ACTIVATIONS, CUT_OFF = 0.08, 0.25
# Of fifty answers of the embedded model, how many may differ from float32's. Seen: none.
OTHER_ANSWERS = {"int8": 1, "w8a8": 1}
FAST = [name for name in MIXED if MIXED[name].cache is None]
WITHIN = {"cpu": list(MIXED), "cuda": ["int8", "int4", "zeros", "cached", "half cache"]}


class Case(NamedTuple):
    folder: Path
    model: Any
    calibration: Calibration


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    return made_case(tmp_path_factory.mktemp("quantized") / request.param, request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Case:
    """One family, for what does not depend on it."""
    return made_case(tmp_path_factory.mktemp("quantized") / "one", "paligemma2")


def made_case(folder: Path, family: str) -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(observe.OBSERVER, "entropy", observe.minmax)  # its search takes half of the time here
        return Case(folder, make_checkpoint(folder, family), make_calibration(folder))


def options(case: Case, rules: Recipe, folder: Path, **more: Any) -> ExportOptions:
    """An export by a recipe's file, without a comparison."""
    (folder / "recipe.toml").write_text(to_toml(rules))
    rest = {"calibration": case.calibration.path if rules.calibrated else None, "output": folder / "bundle", "parity": 0}
    return ExportOptions(**{"checkpoint": case.folder, "recipe": folder / "recipe.toml", **rest, **more})


def typical(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.median(np.abs(got - expected).max(1)) / np.abs(expected).max())


# What a bundle computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_logits_are_those_of_transformers_with_the_stored_weights(case, tmp_path, name):
    bundle = export(options(case, MIXED[name], tmp_path))
    errors: dict[bool, list[float]] = {False: [], True: []}
    for i in range(5):
        given = sample(case.folder, i)
        got = engine_logits(bundle.path, given)
        for inputs, found in errors.items():
            with rounded_as(case.model, bundle.path, MIXED[name], inputs=inputs, calibration=case.calibration):
                found.append(typical(got, transformers_logits(case.model, given)))
    print(name, errors)
    assert min(errors[True]) < FLOATS
    assert max(errors[False]) < (CUT_OFF if name == "static" else ACTIVATIONS)
    assert min(errors[False]) > 100 * FLOATS  # or the other claim would be none


def test_rescaled_and_compensated_weights_are_a_model_that_answers_alike(case, tmp_path):
    """AWQ, SmoothQuant, GPTQ and biases at eight bits: transformers with what was stored is near transformers as it was."""
    rules = tuple(
        replace(rule, scheme=replace(rule.scheme, bits=8, activations="dynamic", group_size=None, scaling="awq"))
        if rule.pattern == DECODER else replace(rule, scheme=replace(rule.scheme, observer="minmax")) if rule.pattern != TABLE else rule
        for rule in MIXED["everything"].rules
    )  # fmt: skip
    recipe = Recipe("eight", rules)
    bundle = export(options(case, recipe, tmp_path))
    given = sample(case.folder)
    exact = transformers_logits(case.model, given)
    with rounded_as(case.model, bundle.path, recipe, inputs=False):
        stored = transformers_logits(case.model, given)
    assert 0 < typical(stored, exact) < 0.05  # worst seen: 0.023
    assert typical(engine_logits(bundle.path, given), stored) < CUT_OFF
    # And it is another model: what norms multiply by was divided.
    norm = next(p for name, p in case.model.named_parameters() if name.endswith("layers.0.input_layernorm.weight"))
    divided = stored_arrays(bundle.path)["language_model.model.layers.0.input_layernorm.weight"]
    assert not np.allclose(divided, 1 + norm.detach().numpy(), atol=0.01)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_a_rounded_cache_changes_little_and_takes_less(one, tmp_path, cache):
    """The same bundle with a float cache is the reference; everything else is in float32."""
    found = {}
    for kept in (None, cache):
        (tmp_path / str(kept)).mkdir()
        recipe = Recipe("floats", (Rule("*", Scheme()),), kept)
        bundle = export(options(one, recipe, tmp_path / str(kept)))
        assert bundle.manifest.cache.dtype == (kept or "float32")
        found[kept] = [engine_logits(bundle.path, sample(one.folder, i)) for i in range(2)]
        with Runner(bundle) as runner:
            arrays = runner.session("decoder_step").new_cache({"past_key_values.0.key": (1, 2, 8, 16)}).arrays
            assert arrays["past_key_values.0.key"].dtype == (kept or "float32")
    # float16 has eleven bits, int8 eight, on the range of each channel in calibration. Worst seen: 1.2e-3 and 6.7e-2.
    for got, expected in zip(found[cache], found[None], strict=True):
        assert 0 < typical(got, expected) < {"float16": 0.005, "int8": 0.15}[cache]


@pytest.mark.parametrize("name", WITHIN["cuda"])
def test_graphs_for_cuda_run_on_the_cpus_float16_kernels(case, tmp_path, name):
    made = options(case, MIXED[name], tmp_path, target="cuda")
    # ONNX Runtime 1.31.1: "attention_bias with quantized KV cache is not implemented in GroupQueryAttention cuda kernel."
    if MIXED[name].cache == "int8" and case.folder.name == "paligemma2":
        return refused(made, "has no int8 KV cache for a model with a local window of 5 tokens")
    bundle = export(made)
    m = bundle.manifest
    assert (m.target, m.token_table.scales_dtype, m.cache.dtype) == ("cuda", "float16", MIXED[name].cache or "float16")
    arrays = stored_arrays(bundle.path)
    assert {a.dtype.name for n, a in arrays.items() if n.endswith(".scales")} == {"float16"}
    given = sample(case.folder)
    with rounded_as(case.model, bundle.path, MIXED[name], inputs=False):
        expected = transformers_logits(case.model, given)
    assert typical(engine_logits(bundle.path, given), expected) < ACTIVATIONS


def test_a_loud_model_is_rounded_with_its_stream_divided(tmp_path):
    """The divisor goes into scales, float16 ones among them, and biases beyond float16 come back inside."""
    folder = tmp_path / "loud"
    model = make_checkpoint(folder, "paligemma")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or "projector" in name:
                p.mul_(3e5)
    model.save_pretrained(folder)
    bundle = export(ExportOptions(checkpoint=folder, output=tmp_path / "b", precision="int8", target="cuda", parity=1))
    assert bundle.manifest.residual_divisor >= 64
    assert model.model.multi_modal_projector.linear.bias.abs().max() > 65504
    assert bundle.manifest.parity.kl < 0.01
    given = sample(folder)
    assert typical(engine_logits(bundle.path, given), transformers_logits(model, given)) < ACTIVATIONS


def test_scales_may_be_bfloat16_for_cuda(one, tmp_path):
    scheme = Scheme(bits=8, group_size=32)
    recipe = Recipe(
        "brain", (Rule("*norm*", Scheme()), Rule(TABLE, scheme), Rule(DECODER, scheme), Rule("*", Scheme("bfloat16")))
    )
    bundle = export(options(one, recipe, tmp_path, target="cuda"))
    table = bundle.manifest.token_table
    assert (table.dtype, table.scales_dtype, bundle.manifest.cache.dtype) == ("int8", "bfloat16", "bfloat16")
    w = one.model.get_input_embeddings().weight.detach().numpy()
    assert np.abs(Bundle.open(bundle.path).token_table().rows(range(len(w))) - w).max() < 0.01 * np.abs(w).max()


# What it weighs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "name"), [(t, name) for t, names in WITHIN.items() for name in names])
def test_a_plan_and_a_dry_run_promise_the_sizes_of_the_export(one, tmp_path, target, name):
    window = "none" if (target, MIXED[name].cache) == ("cuda", "int8") else "hf"
    made = options(one, MIXED[name], tmp_path, target=target, local_window=window)
    planned = plan(PlanOptions(checkpoint=one.folder, recipe=made.recipe, target=target, local_window=window))
    promised = dry_run(made)
    written = {name: info.size for name, info in export(made).manifest.files.items()}
    assert planned.files.keys() == written.keys() | {"manifest.json"}
    for file, size in written.items():
        assert planned.files[file] == size or file in planned.estimated, file
    assert promised == {file: size for file, size in written.items() if file not in ("README.md", "recipe.toml")}


@pytest.mark.parametrize("name", MIXED)
def test_the_manifest_counts_what_is_stored(one, tmp_path, name):
    m = export(options(one, MIXED[name], tmp_path)).manifest
    counted: dict[str, int] = {}
    for part in m.stored.values():
        for kind, count in part.items():
            counted[kind] = counted.get(kind, 0) + count
    expected: dict[str, int] = {}
    for path, p in one.model.named_parameters():
        scheme = MIXED[name].scheme(canonical(path))
        kind = f"int{scheme.bits}" if scheme.bits else scheme.dtype
        expected[kind] = expected.get(kind, 0) + p.numel()
    assert counted == expected
    assert sum(counted.values()) == m.parameters


def test_the_token_table_is_stored_once(one, tmp_path):
    """The decoder's lm_head and the lookup share bytes, so no other file has as many."""
    bundle = export(options(one, MIXED["int8"], tmp_path))
    graph = onnx.load(bundle.path / "decoder_step.onnx", load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    assert {p["location"] for n, p in places.items() if "embed_tokens" in n} == {"token_table.bin"}
    assert {p["location"] for n, p in places.items() if "embed_tokens" not in n} == {"decoder_step.data"}


# How it is made again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_a_bundles_own_recipe_makes_the_same_bundle(one, tmp_path, name):
    """Byte for byte, calibration and comparison included."""
    first = export(options(one, MIXED[name], tmp_path, parity=1))
    assert read_recipe(first.path / "recipe.toml") == MIXED[name]
    again = export(options(one, MIXED[name], tmp_path, parity=1, recipe=first.path / "recipe.toml", output=tmp_path / "again"))
    assert contents(first.path) == contents(again.path)


@pytest.mark.parametrize(
    ("target", "precision"),
    # On TensorRT w8a8 is static, and int4 wants channels that groups of 128 divide.
    [
        (t, p)
        for t in TARGETS
        for p in ("fp16", "int8", "int4", "w8a8")
        if (t, p) not in (("cuda", "w8a8"), ("tensorrt", "w8a8"), ("tensorrt", "int4"))
    ],
)
def test_a_named_precision_is_replayed_by_the_recipe_it_leaves(one, tmp_path, target, precision):
    rest: dict[str, Any] = {"checkpoint": one.folder, "target": target, "parity": 0}
    first = export(ExportOptions(**rest, precision=precision, output=tmp_path / "first"))
    again = export(ExportOptions(**rest, recipe=first.path / "recipe.toml", output=tmp_path / "again"))
    assert first.manifest.recipe == precision
    assert contents(first.path) == contents(again.path)


def test_another_calibration_is_another_bundle(one, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(observe.OBSERVER, "entropy", observe.minmax)
        other = make_calibration(one.folder, samples=1)
    first = export(options(one, MIXED["everything"], tmp_path))
    again = export(options(one, MIXED["everything"], tmp_path, calibration=other.path, output=tmp_path / "again"))
    assert first.manifest.provenance.calibration_sha256 == one.calibration.digest != again.manifest.provenance.calibration_sha256
    changed = {name for name, content in contents(first.path).items() if contents(again.path)[name] != content}
    assert {"decoder_step.data", "vision_encoder.data", "manifest.json"} <= changed
    assert changed.isdisjoint({"recipe.toml", "tokenizer.json"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is refused -----------------------------------------------------------------------------------------------------

INT8, INT4, NORMS, REST = (
    Scheme(bits=8, group_size=32),
    Scheme(bits=4, group_size=32),
    Rule("*norm*", Scheme()),
    Rule("*", Scheme()),
)


def rules(*rules: Rule, cache: str | None = None) -> Recipe:
    return Recipe("mine", (*rules, REST), cache)


UP = "language_model.model.layers.1.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Recipe, str]] = {
    "a rule that matches nothing": (
        rules(Rule("*.upp_proj.weight", INT8)), r"the rule for '\*\.upp_proj\.weight' matches no weight; mend it or take it out"
    ),
    "a rule in the shadow of others": (
        rules(Rule("*.mlp.*", INT8), Rule(UP, INT4)), rf"the rule for '{UP}' comes after others that match all it does"
    ),
    "whole numbers for norms": (rules(Rule("*layernorm.weight", INT8)), r"rounds \S*layernorm\.weight to 8 bits, and only matrices"),
    "whole numbers for the convolution": (rules(Rule("*patch_embedding.weight", INT8)), "rounds .*patch_embedding.* only matrices"),
    "whole numbers for positions": (rules(Rule("*position_embedding*", INT8)), "rounds .*position_embedding.* only matrices"),
    "whole numbers for biases": (rules(Rule("vision_tower.*.mlp.*", INT8)), r"rounds \S*bias to 8 bits, and only matrices"),
    "whole numbers for all": (Recipe("mine", (Rule("*", INT8),)), "rounds .* to 8 bits, and only matrices"),
    "a token table with zero points": (
        rules(Rule(TABLE, replace(INT8, symmetric=False))), "embed_tokens.*its grid has to be symmetric; say symmetric = true"
    ),
    "a row of float activations": (rules(Rule(DECODER, Scheme(bits=8))), f"for '{DECODER}' has none; write group = 128".replace("*", r"\*")),
    "zero points of integer products": (
        rules(Rule(DECODER, Scheme(bits=8, symmetric=False, activations="dynamic"))), "symmetric = false; take that out"
    ),
    "scaling of a table whose rows are looked up": (
        rules(Rule(TABLE, replace(INT8, scaling="awq"))), r"embed_tokens\.weight asks for scaling 'awq', which is for the linears"
    ),
    "a rotation of a table whose rows are looked up": (
        rules(Rule(TABLE, replace(INT8, rotate=32))), r"embed_tokens\.weight asks for rotate 32, which is for the linears"
    ),
    "two scalings of one input": (
        rules(Rule("*.up_proj.weight", replace(INT8, scaling="awq")), Rule("*.gate_proj.weight", INT8)),
        r"gate_proj.* asks for scaling 'none' and .*up_proj.* for 'awq', and they have one input",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "says"), REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_does_not_fit_is_refused_and_nothing_is_written(one, tmp_path, recipe, says):
    refused(options(one, recipe, tmp_path, calibration=one.calibration.path), says)


def refused(made: ExportOptions, says: str, kind: type[PgxError] = UsageError, *, early: bool = True) -> None:
    """The export is refused, and so is its dry run where that needs no weight."""
    folder = Path(made.output or "").parent
    before = sorted(folder.iterdir())
    with pytest.raises(kind, match=says):
        export(made)
    if early:
        with pytest.raises(kind, match=says):
            dry_run(made)
    assert sorted(folder.iterdir()) == before


def test_a_weight_that_no_rule_matches_is_refused_with_the_rule(one, tmp_path):
    made = options(one, MIXED["int8"], tmp_path)
    text = to_toml(MIXED["int8"])
    (tmp_path / "recipe.toml").write_text(text[: text.rindex("\n[[rule]]")])
    rule = f'rule {len(MIXED["int8"].rules) - 1} ("{MIXED["int8"].rules[-2].pattern}")'
    refused(made, re.escape(rule) + ": the last rule is for .*; end with one for everything else")


@pytest.mark.usefixtures("no_entropy_search")
def test_a_calibration_of_another_model_is_refused(one, tmp_path):
    make_checkpoint(tmp_path / "other", "paligemma2", seed=8)
    other = make_calibration(tmp_path / "other", samples=1, moments=False)
    made = options(one, MIXED["static"], tmp_path, calibration=other.path)
    refused(made, "was made from 'other' .* and one is another model.*run pgx calibrate on the checkpoint", early=False)


@pytest.mark.usefixtures("no_entropy_search")
def test_gptq_without_second_moments_is_refused_before_a_weight_is_read(one, tmp_path):
    plain = make_calibration(one.folder, samples=1, moments=False)
    recipe = rules(NORMS, Rule(DECODER, replace(INT4, method="gptq")))
    refused(
        options(one, recipe, tmp_path, calibration=plain.path),
        r"without moment/.*which the recipe '\w+' needs.*pgx calibrate --for \S+",
    )


def test_a_recipe_and_a_precision_are_refused_together(one, tmp_path):
    refused(options(one, MIXED["int8"], tmp_path, precision="int8"), r"--precision int8 and --recipe \S+ were both given")


def test_a_calibration_that_is_not_there_is_refused(one, tmp_path):
    refused(options(one, MIXED["static"], tmp_path, calibration=tmp_path / "none"), "there is no such calibration file")


@pytest.mark.parametrize("name", [name for name in MIXED if name not in WITHIN["cuda"]])
def test_what_a_target_has_no_kernels_for_is_refused(one, tmp_path, name):
    refused(options(one, MIXED[name], tmp_path, target="cuda"), "target 'cuda' does not multiply .* activations by 8-bit weights")


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(one, tmp_path):
    shutil.copytree(one.folder, tmp_path / "ck")
    tensors = load_file(tmp_path / "ck" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][5, 2] = np.nan
    save_file(tensors, tmp_path / "ck" / "model.safetensors", {"format": "pt"})
    made = options(one, MIXED["int8"], tmp_path, checkpoint=tmp_path / "ck", calibration=None)
    refused(made, r"layers\.1\.mlp\.up_proj\.weight\S? holds nan at \[5, 2\]", CheckpointError, early=False)


def test_the_command_ends_with_the_exit_code_of_usage_and_one_line(one, tmp_path):
    made = options(one, REFUSED["a rule that matches nothing"][0], tmp_path)
    command = [sys.executable, "-m", "pgxport", "export", "--checkpoint", one.folder, "--recipe", made.recipe, "-o", made.output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == UsageError.exit_code == 2
    assert "matches no weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.toml"]


def test_the_command_prints_what_rounding_cost(one, tmp_path):
    command = [sys.executable, "-m", "pgxport", "export", "--checkpoint", one.folder, "--precision", "int4", "--json"]
    done = subprocess.run([*command, "-o", tmp_path / "b"], capture_output=True, text=True, timeout=60, check=True)
    printed = json.loads(done.stdout)
    assert printed["parity"] == Bundle.open(tmp_path / "b").manifest.parity.model_dump()


# The embedded model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", OTHER_ANSWERS)
def test_answers_of_the_embedded_model_stay_those_of_float32(tiny_112, tmp_path, precision):
    rounded = export(ExportOptions(output=tmp_path / "b", size="tiny", res=112, precision=precision, parity=1)).path
    assert Bundle.open(rounded).nbytes < 0.4 * Bundle.open(tiny_112).nbytes
    other = []
    with Runner.from_pretrained(tiny_112, threads=1) as whole, Runner.from_pretrained(rounded, threads=1) as small:
        for i in range(50):
            scene = draw("test", i)
            prompt = ask(scene, i)[i % 3].prompt
            answers = [runner.answer(scene.image, prompt, max_new_tokens=48).text for runner in (whole, small)]
            other += [answers] if answers[0] != answers[1] else []
    assert len(other) <= OTHER_ANSWERS[precision], other
