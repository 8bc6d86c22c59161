# SPDX-License-Identifier: Apache-2.0
"""Models whose output matrix is not their embedding: what transformers computes, in every recipe and for every target.

One kind has a matrix of its own; the other, the commonest fine-tune, has trained a few new rows, and its config says nothing of it.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "onnxruntime", "torch", "transformers")):
    pytest.skip("needs the exporter, an engine and the reference", allow_module_level=True)

import onnx
import torch
from click.testing import CliRunner
from in_memory import dequantized
from rounded import (
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
from safetensors.torch import load_file, save_file
from tensorrt_engines import onnxruntime, openvino, reference, teacher_forced_logits

from pgxport.activations import observe
from pgxport.activations.calibration_file import Calibration
from pgxport.bundle.reader import Bundle
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.cli import cli
from pgxport.errors import UsageError
from pgxport.exporter.export import dry_run, export
from pgxport.exporter.plan import PlanOptions, plan
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe import OUTPUT, Recipe, Rule, Scheme
from pgxport.exporter.recipe_toml import read_recipe, to_toml
from pgxport.exporter.recipes import RECIPES
from pgxport.exporter.targets import TARGETS, TENSORRT
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.weights import EMBEDDING, LM_HEAD, weight_shapes
from pgxport.runners.runner import Runner

# Of the largest logit. In float32, another order of addition; with integers, the median over the tokens of an answer where
# transformers computes with the stored weights and rounds inputs as the kernels do (tests/test_quantized.py).
FLOATS, ROUNDED = 1e-4, 3e-6
# Of the largest logit, what the fewest bits of a recipe cost these models. Worst seen: 0.012 of bfloat16, 0.11 and 0.51.
COST = {32: 0.03, 8: 0.2, 4: 0.8}
STEPS = 24
KINDS = ("apart", "new rows")


class Case(NamedTuple):
    folder: Path
    model: Any
    calibration: Calibration


def made_case(folder: Path, family: str, kind: str) -> Case:
    model = make_checkpoint(folder, family, tie_word_embeddings=False)
    if kind == "new rows":
        with torch.no_grad():
            table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            new = head[-9:].clone()
            head.copy_(table)
            head[-9:] = new
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]  # transformers' default is true
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(observe.OBSERVER, "entropy", observe.minmax)  # its search takes half of the time here
        return Case(folder, model, make_calibration(folder))


@pytest.fixture(scope="module", params=[(f, k) for f in FAMILIES for k in KINDS], ids=lambda case: ", ".join(case))
def case(request, tmp_path_factory) -> Case:
    return made_case(tmp_path_factory.mktemp("untied") / request.param[0], *request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def apart(request, tmp_path_factory) -> Case:
    return made_case(tmp_path_factory.mktemp("untied") / request.param, request.param, "apart")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Case:
    """One family, for what does not depend on it."""
    return made_case(tmp_path_factory.mktemp("untied") / "one", "paligemma2", "apart")


def options(case: Case, recipe: Recipe, folder: Path, **more: Any) -> ExportOptions:
    """An export by a recipe's file, without a comparison."""
    (folder / "recipe.toml").write_text(to_toml(recipe))
    rest = {"calibration": case.calibration.path if recipe.calibrated else None, "output": folder / "bundle", "parity": 0}
    return ExportOptions(**{"checkpoint": case.folder, "recipe": folder / "recipe.toml", **rest, **more})


def typical(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.median(np.abs(got - expected).max(1)) / np.abs(expected).max())


def fitted(recipe: Recipe, case: Case) -> Recipe:
    return recipe.fitted(weight_shapes(Checkpoint.open(case.folder).spec()))


# What a bundle computes ----------------------------------------------------------------------------------------------


def test_logits_and_greedy_tokens_equal_transformers(case, tmp_path):
    """Of the model as it is in memory, and as transformers opens the checkpoint."""
    bundle = export(ExportOptions(checkpoint=case.folder, output=tmp_path / "b"))
    opened = type(case.model).from_pretrained(case.folder, dtype=torch.float32, attn_implementation="eager").eval()
    given = sample(case.folder)
    got = engine_logits(bundle.path, given)
    for model in (case.model, opened):
        expected = transformers_logits(model, given)
        assert np.abs(got - expected).max() < FLOATS * np.abs(expected).max()
    with Runner(bundle, threads=1) as runner:
        prefix = runner.prompt_ids("caption en")
        features = runner.encode_pixels(given.pixels)
        tokens, decoder = [], runner.decoder(len(prefix) + STEPS)
        logits = decoder.feed(runner.prefix(features, prefix))
        for _ in range(STEPS):
            tokens.append(int(logits.argmax()))
            logits = decoder.feed(runner.embed(tokens[-1:]))
    with torch.no_grad():
        out = opened.generate(
            input_ids=torch.tensor([prefix]), pixel_values=torch.from_numpy(given.pixels), token_type_ids=torch.zeros(1, len(prefix), dtype=int),
            attention_mask=torch.ones(1, len(prefix), dtype=int), max_new_tokens=STEPS, do_sample=False,
            eos_token_id=-1,
        )  # fmt: skip
    assert tokens == out[0, len(prefix) :].tolist()


@pytest.mark.parametrize("name", [name for name in MIXED if MIXED[name].cache is None])
def test_logits_are_those_of_transformers_with_the_stored_weights(apart, tmp_path, name):
    """The recipes have no rule for the output matrix: that of the token table is for it too."""
    bundle, recipe = export(options(apart, MIXED[name], tmp_path)), fitted(MIXED[name], apart)
    assert read_recipe(bundle.path / "recipe.toml") == recipe
    assert recipe.scheme(LM_HEAD) == MIXED[name].scheme(EMBEDDING)
    errors = []
    for i in range(2):
        given = sample(apart.folder, i)
        with rounded_as(apart.model, bundle.path, recipe, inputs=True, calibration=apart.calibration):
            errors.append(typical(engine_logits(bundle.path, given), transformers_logits(apart.model, given)))
    assert min(errors) < ROUNDED


def output_of(scheme: Scheme, table: Scheme) -> Recipe:
    """Everything in float32 but for the output matrix, and the table where that is said."""
    return Recipe("output", (Rule(TABLE, table), Rule(OUTPUT, scheme), Rule("*", Scheme())))


OUTPUTS = {
    "int8 rows": Scheme(bits=8, activations="dynamic"), "static": Scheme(bits=8, activations="static"),
    "groups": Scheme(bits=8, group_size=32), "zero points": Scheme(bits=4, group_size=16, symmetric=False),
    "clipped": Scheme(bits=4, group_size=32, method="clip"), "gptq": Scheme(bits=4, group_size=32, method="gptq"),
    "half": Scheme("float16"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table"),
    [
        *((name, Scheme()) for name in OUTPUTS),
        ("groups", Scheme(bits=8, activations="dynamic")),
        ("zero points", Scheme(bits=4, group_size=32)),
    ],
    ids=str,
)
def test_an_output_matrix_has_a_rule_of_its_own(one, tmp_path, name, table):
    """The table of another scheme, and in its own file, is looked up alone; it may not be multiplied by at all."""
    recipe = output_of(OUTPUTS[name], table)
    bundle = export(options(one, recipe, tmp_path))
    assert read_recipe(bundle.path / "recipe.toml") == recipe
    errors = []
    for i in range(2):
        given = sample(one.folder, i)
        with rounded_as(one.model, bundle.path, recipe, inputs=True, calibration=one.calibration):
            errors.append(typical(engine_logits(bundle.path, given), transformers_logits(one.model, given)))
    assert min(errors) < ROUNDED
    # And the table is that of the checkpoint, as far as its bits go.
    w = one.model.get_input_embeddings().weight.detach().numpy()
    rows = Bundle.open(bundle.path).token_table().rows(range(len(w)))
    assert np.abs(rows - w).max() <= {None: 0.0, 8: 0.01, 4: 0.2}[table.bits] * np.abs(w).max()


def test_gptq_of_an_output_matrix_loses_less_of_the_logits_than_rounding(one, tmp_path):
    """By the second moment of its own input, which calibration has under its name."""
    lost = {}
    for name in ("gptq", "nearest"):
        (tmp_path / name).mkdir()
        recipe = output_of(Scheme(bits=4, group_size=32, method=name), Scheme())
        bundle = export(options(one, recipe, tmp_path / name))
        error = dequantized(
            recipe.scheme(LM_HEAD), "blocks", shape := tuple(one.model.lm_head.weight.shape), LM_HEAD, stored_arrays(bundle.path)
        )
        error = error - one.model.lm_head.weight.detach().numpy()
        lost[name] = float(np.einsum("nk,kj,nj->", error, one.calibration.moment(LM_HEAD), error))
        assert error.shape == shape
    assert lost["gptq"] < 0.9 * lost["nearest"]


@pytest.mark.parametrize("scheme", [Scheme(bits=8, group_size=32), Scheme(bits=8, activations="dynamic")], ids=["groups", "rows"])
def test_a_shortlist_is_of_the_output_matrix(one, tmp_path, scheme):
    """Candidates' logits are of the dequantized matrix itself, in float32; the others' are of its copy in 4 bits."""
    recipe = output_of(replace(scheme, shortlist=True), Scheme(bits=8, group_size=32))
    bundle = export(options(one, recipe, tmp_path))
    given = sample(one.folder)
    with rounded_as(one.model, bundle.path, recipe, inputs=False):
        exact = transformers_logits(one.model, given)
    got = engine_logits(bundle.path, given)
    near = np.abs(got - exact) < ROUNDED * np.abs(exact).max()
    assert (near.sum(-1) >= 64).all()
    assert not near.all()
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.9
    assert "lm_head.screen.codes" in stored_arrays(bundle.path)


@pytest.mark.parametrize("name", [name for name in RECIPES["cpu"] if name != "fp8"])
def test_every_named_recipe_is_near_the_checkpoint(one, tmp_path, name):
    """Of the comparison that ends an export, and of the engine; what bits cost these random models is in tests/test_quantized.py."""
    recipe = RECIPES["cpu"][name]
    made = {"checkpoint": one.folder, "parity": 1}  # statistics come from drawn scenes
    bundle = export(ExportOptions(**made, precision=name, output=tmp_path / "b"))
    m, head = bundle.manifest, fitted(recipe, one).scheme(LM_HEAD)
    assert head == recipe.scheme(EMBEDDING)
    assert list(m.stored["lm_head"]) == [f"int{head.bits}" if head.bits else head.dtype]
    given = sample(one.folder)
    exact = transformers_logits(one.model, given)
    bits = (
        32
        if not recipe.lossy
        else min(recipe.scheme(path).bits or 16 for path in weight_shapes(Checkpoint.open(one.folder).spec()))
    )
    assert typical(engine_logits(bundle.path, given), exact) < COST[bits]
    assert m.parity is None or m.parity.kl < 0.3
    again = export(ExportOptions(**made, recipe=bundle.path / "recipe.toml", output=tmp_path / "again"))
    assert {f.name: f.read_bytes() for f in bundle.path.iterdir()} == {f.name: f.read_bytes() for f in again.path.iterdir()}


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_graphs_for_cuda_run_on_the_cpus_float16_kernels(apart, tmp_path, name):
    recipe = RECIPES["cuda"][name]
    bundle = export(ExportOptions(checkpoint=apart.folder, precision=name, target="cuda", output=tmp_path / "b", parity=0))
    given = sample(apart.folder)
    with rounded_as(apart.model, bundle.path, fitted(recipe, apart), inputs=False):
        assert typical(engine_logits(bundle.path, given), transformers_logits(apart.model, given)) < 0.08


# TensorRT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trt", TENSORRT)
def test_graphs_for_tensorrt_equal_transformers(apart, tmp_path, trt):
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=apart.folder, target="tensorrt", trt=trt))
    given = sample(apart.folder)
    expected = transformers_logits(apart.model, given)
    second = reference if trt == "11" else openvino if importlib.util.find_spec("openvino") else onnxruntime
    for engine in (onnxruntime, second):
        got = teacher_forced_logits(bundle.path, engine, given)
        assert np.abs(got - expected).max() < FLOATS * np.abs(expected).max()


@pytest.mark.parametrize("trt", ["10.3", "11"])
@pytest.mark.parametrize(
    "scheme",
    [Scheme(bits=8), Scheme(bits=4, group_size=16), Scheme(bits=8, activations="static"), Scheme(bits=8, format="e4m3", activations="static")],
    ids=["rows", "groups of 4 bits", "static", "fp8"],
)  # fmt: skip
def test_an_output_matrix_for_tensorrt_may_be_of_what_no_table_is(one, tmp_path, trt, scheme):
    bundle = export(options(one, output_of(scheme, Scheme(bits=8)), tmp_path, target="tensorrt", trt=trt))
    weights = {
        t.name: onnx.numpy_helper.to_array(t).astype(np.float32)
        for t in onnx.load(bundle.path / "decoder_step.onnx").graph.initializer
    }
    quantized, scales = weights[f"{LM_HEAD}.codes"], weights[f"{LM_HEAD}.scales"]
    stored = quantized * scales[:, None] if scales.ndim == 1 else (quantized * np.repeat(scales, 16, 0)).T
    given, model = sample(one.folder), one.model
    before, table = model.lm_head.weight.detach().clone(), model.get_input_embeddings().weight.detach().clone()
    largest = max(map(abs, one.calibration.range(LM_HEAD, "minmax")))

    def rounded(module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        if scheme.activations == "float":
            return given[0]
        if scheme.format == "int":
            return torch.fake_quantize_per_tensor_affine(given[0], largest / 127, 0, -128, 127)
        return (given[0] / (scale := np.float32(largest / 448))).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    hook = model.lm_head.register_forward_pre_hook(rounded)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.from_numpy(stored))
        model.get_input_embeddings().weight.copy_(torch.from_numpy(bundle.token_table().rows(range(len(table)))))
        expected = transformers_logits(model, given)
        model.lm_head.weight.copy_(before)
        model.get_input_embeddings().weight.copy_(table)
    hook.remove()
    for engine in (onnxruntime, reference):
        assert typical(teacher_forced_logits(bundle.path, engine, given), expected) < ROUNDED
    assert "lm_head" in bundle.manifest.stored


# Files, sizes, counts ------------------------------------------------------------------------------------------------


def test_it_has_a_file_of_its_own_which_the_decoder_alone_reads(one, tmp_path):
    bundle = export(options(one, MIXED["int8"], tmp_path))
    graph = onnx.load(bundle.path / "decoder_step.onnx", load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data}["location"] for t in graph.initializer if t.external_data}
    assert {place for name, place in places.items() if "lm_head" in name} == {"lm_head.data"}
    assert set(places.values()) == {"lm_head.data", "decoder_step.data"}
    m = bundle.manifest
    assert m.spec["text"]["tied"] is False
    assert (
        m.parameters
        == sum(p.numel() for p in one.model.parameters())
        == sum(n for part in m.stored.values() for n in part.values())
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [(t, n) for t in ("cpu", "cuda") for n in ("fp16", "int8", "int4-fast") if (t, n) != ("cuda", "int4-fast")]
    + [("tensorrt", "int8")],
)
def test_a_plan_and_a_dry_run_promise_the_sizes_of_the_export(one, tmp_path, target, name):
    planned = plan(PlanOptions(checkpoint=one.folder, precision=name, target=target))
    made = ExportOptions(checkpoint=one.folder, precision=name, target=target, output=tmp_path / "b", parity=0)
    promised = dry_run(made)
    written = {name: info.size for name, info in export(made).manifest.files.items()}
    assert planned.files.keys() == written.keys() | {"manifest.json"}
    for file, size in written.items():
        assert planned.files[file] == size or file in planned.estimated, file
    assert promised == {file: size for file, size in written.items() if file not in ("README.md", "recipe.toml")}
    shape = one.model.lm_head.weight.shape
    assert planned.parameters["output matrix"] == planned.parameters["token table"] == shape.numel()
    assert sum(planned.parameters.values()) == sum(p.numel() for p in one.model.parameters())


def test_an_engine_holds_the_output_matrix_and_not_the_table(one, tmp_path):
    """Rows of the table are read by the runner, which maps it; with a shortlist, those of the output matrix by the graph."""
    make_checkpoint(tmp_path / "tied", "paligemma2")
    for name in ("fp32", "int4-fast"):
        apart, tied = (plan(PlanOptions(checkpoint=folder, precision=name)) for folder in (one.folder, tmp_path / "tied"))
        assert apart.run.weights == tied.run.weights
        assert apart.files["lm_head.data"] == apart.files["token_table.bin"] == tied.files["token_table.bin"]


# Calibration ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_its_float_bundle_give_the_same_statistics(one, tmp_path):
    bundle = export(ExportOptions(checkpoint=one.folder, output=tmp_path / "b"))
    of_bundle = calibrate(CalibrateOptions(tmp_path / "c", checkpoint=bundle.path, samples=3))
    assert of_bundle.about.inputs.keys() == one.calibration.about.inputs.keys()
    assert LM_HEAD in of_bundle.about.inputs
    assert EMBEDDING not in of_bundle.about.inputs
    assert of_bundle.absmax(LM_HEAD) == pytest.approx(one.calibration.absmax(LM_HEAD), rel=1e-4)
    assert of_bundle.moment(LM_HEAD) == pytest.approx(one.calibration.moment(LM_HEAD), rel=1e-3, abs=1e-4)


# Rules ---------------------------------------------------------------------------------------------------------------


def test_a_rule_for_the_output_matrix_is_no_mistake_where_it_is_the_table(tmp_path):
    tied = tmp_path / "checkpoint"
    make_checkpoint(tied, "paligemma")
    recipe = output_of(Scheme(bits=8, group_size=32, shortlist=True), Scheme(bits=8, group_size=32))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    bundle = export(ExportOptions(checkpoint=tied, recipe=tmp_path / "recipe.toml", output=tmp_path / "b", parity=0))
    assert [rule.pattern for rule in read_recipe(bundle.path / "recipe.toml").rules] == [TABLE, "*"]
    assert "tied" not in bundle.manifest.spec["text"]
    assert "lm_head" not in bundle.manifest.stored


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_named_recipe_treats_the_two_as_it_treats_the_one(one, target):
    weights = weight_shapes(Checkpoint.open(one.folder).spec())
    for recipe in RECIPES[target.name].values():
        made = recipe.fitted(weights)
        made.check(weights)
        table, output = made.scheme(EMBEDDING), made.scheme(LM_HEAD)
        assert output == recipe.scheme(EMBEDDING)
        assert replace(table, shortlist=output.shortlist, method=output.method) == output
        assert not table.shortlist
        assert table.method != "gptq"
        assert {name: made.scheme(name) for name in weights.keys() - {EMBEDDING, LM_HEAD}} == {
            name: recipe.scheme(name) for name in weights.keys() - {EMBEDDING, LM_HEAD}
        }
        assert made.fitted(weights) == made
        assert recipe.fitted(weights.keys() - {LM_HEAD}) == recipe


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (Scheme(bits=8, group_size=32, shortlist=True), "screen is of the output matrix alone"),
        (Scheme(bits=8, group_size=32, method="gptq"), 'says method = "gptq"'),
        (Scheme(bits=8, group_size=32, symmetric=False), "says symmetric = false"),
        (Scheme(bits=8, group_size=32, compensate=True), "says compensate"),
        (Scheme(bits=8, group_size=32, scaling="awq"), "asks for scaling 'awq'"),
    ],
)
def test_what_is_of_products_alone_is_refused_for_a_table_that_is_looked_up(one, tmp_path, table, says):
    recipe = output_of(Scheme(bits=8, group_size=32), table)
    with pytest.raises(UsageError, match=says):
        export(options(one, recipe, tmp_path))


# Commands ------------------------------------------------------------------------------------------------------------


def test_commands_know_it(one, tmp_path):
    run, b = CliRunner(), str(tmp_path / "b")
    made = run.invoke(cli, ["export", "--checkpoint", str(one.folder), "--precision", "int8", "-o", b, "--parity", "0"])
    assert made.exit_code == 0, made.output
    assert "tie_word_embeddings" not in made.output
    said = run.invoke(cli, ["inspect", b]).output
    count = one.model.lm_head.weight.numel()
    assert f"lm_head: {count:,} parameters" in said
    assert f"output matrix: {count:,} parameters" in run.invoke(cli, ["inspect", str(one.folder)]).output


def test_a_flag_that_the_weights_contradict_is_told(one, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(load_file(one.folder / "model.safetensors"), folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes((one.folder / "tokenizer.json").read_bytes())
    config = json.loads((one.folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    made = CliRunner().invoke(cli, ["export", "--checkpoint", str(folder), "-o", str(tmp_path / "b")])
    assert made.exit_code == 0, made.output
    assert "does not say tie_word_embeddings is false" in made.output
    (remark,) = Bundle.open(tmp_path / "b").manifest.provenance.remarks
    assert remark in made.output
