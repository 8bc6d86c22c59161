# SPDX-License-Identifier: Apache-2.0
"""Every graph for TensorRT, in every precision, is read and built by NVIDIA's own parser and builder: TensorRT-RTX, without a GPU.

The engines are for Ada (SM 8.9), which has all the types; nothing here runs them. TensorRT-RTX shares its parser with TensorRT 10.15
and later, so that it proves little about what 10.3 takes; for that there is the lint, and the documents it is made from.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "tensorrt_rtx")):
    pytest.skip("needs the exporter and tensorrt-rtx-cu13", allow_module_level=True)

import numpy as np
from in_memory import Tensors
from tensorrt_builder import build

from pgxport.compile.lint import check_file
from pgxport.errors import InputError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.graphs import serialized, write_graphs
from pgxport.exporter.inputs.equivalent import equivalent
from pgxport.exporter.prepare import ExportOptions, find_recipe
from pgxport.exporter.recipes import RECIPES
from pgxport.exporter.stream import DataLayout
from pgxport.exporter.targets import TARGETS, TENSORRT, find_target
from pgxport.hub.locate import TINY
from pgxport.machine.board import SETUPS
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec, published
from pgxport.models.weights import weight_shapes

CONTEXT = 64
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "w8a8", "int4", "fp8")


class Ones:
    """A calibration in which every input is between -1 and 1."""

    def __init__(self, spec: ModelSpec):
        self._shapes = weight_shapes(spec)

    def range(self, path: str, observer: str) -> tuple[float, float]:
        return -1.0, 1.0

    def square(self, path: str) -> np.ndarray:
        return np.ones(self._shapes[path][1], np.float32)

    mean = absmax = mean_abs = square

    def moment(self, path: str) -> np.ndarray | None:
        return None


def small(family: str) -> ModelSpec:
    """Of the published model, a layer of each kind, and few channels."""
    whole = published(family, "3b", 224)
    text = {"width": 128, "depth": 2, "mlp": 256, "heads": 4, "head_dim": 32, "vocab": 300}
    text |= {"window": 20, "local_layers": (0,)} if family == "paligemma2" else {}
    vision = {"width": 128, "depth": 1, "mlp": 256, "heads": 4, "resolution": 56}
    return replace(whole, text=replace(whole.text, **text), vision=replace(whole.vision, **vision))


def write(folder: Path, precision: str, trt: str, family: str = "paligemma2") -> dict[str, Path]:
    """The graphs of a small random model, and their weights."""
    spec, target = small(family), TENSORRT[trt]
    random = np.random.default_rng(0)
    source = Tensors({n: random.normal(0, 0.1, shape).astype(np.float32) for n, shape in weight_shapes(spec).items()})
    masks = MaskWeights(TINY / "vae-oid.npz")
    recipe = target.recipe(precision)
    source = equivalent(source, spec, recipe.scheme, Ones(spec))
    graphs, shared = write_graphs(source, spec, masks, recipe, target, CONTEXT, Ones(spec))
    for file, layout in shared.items():
        (folder / file).write_bytes(b"".join(layout.bytes()))
    for name, g in graphs.items():
        layout = DataLayout(g.lazy_tensors.values())
        (folder / f"{name}.data").write_bytes(b"".join(layout.bytes()))
        (folder / f"{name}.onnx").write_bytes(serialized(g, layout, shared))
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.mark.parametrize(
    ("trt", "precision"),
    [
        pytest.param(trt, precision, marks=() if trt == "11" or precision in ("fp16", "int4") else pytest.mark.nightly)
        for trt in TENSORRT
        for precision in PRECISIONS
    ],
)
def test_the_decoder_is_built_in_every_version_and_precision(tmp_path, precision, trt):
    assert build(write(tmp_path, precision, trt)["decoder_step"], prefix=30, capacity=CONTEXT).nbytes > 0


def test_a_decoder_of_one_key_head_and_no_window_is_built(tmp_path):
    assert build(write(tmp_path, "fp16", "11", "paligemma")["decoder_step"], prefix=30, capacity=CONTEXT).nbytes > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_other_graphs_are_built_in_every_precision(tmp_path, precision):
    """They have no cache, and so the same operators in all versions, but for the opset that they say."""
    graphs = write(tmp_path, precision, "10.3" if precision == "fp16" else "11")
    for name in ("vision_encoder", "projector", "mask_decoder"):
        assert build(graphs[name]).nbytes > 0, name


@pytest.mark.parametrize("trt", ["10.16", "11"])
def test_two_profiles_are_built_on_one_network(tmp_path, trt):
    built = build(write(tmp_path, "int4", trt)["decoder_step"], prefix=30, capacity=CONTEXT, profiles=("prefill", "step"))
    assert built.nbytes > 0


def test_a_recipe_that_no_version_runs_is_refused_with_what_to_write():
    for name, says in (("int4-small", "symmetric = false; take that out"), ("int8-kv8", "does not exist")):
        with pytest.raises(UsageError, match=says):
            find_recipe(name, None, TARGETS["tensorrt"])


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_fp8_is_of_tensorrt_alone(target):
    with pytest.raises(UsageError, match=r"has no FP8 products.*target 'tensorrt' has"):
        TARGETS[target].check(RECIPES[target]["fp8"])


def test_a_version_is_of_tensorrt_alone():
    with pytest.raises(UsageError, match="leave --trt away"):
        find_target("cpu", "10.3")
    with pytest.raises(UsageError, match=r"--trt '9' does not exist; choose 10\.3, 10\.16, 11"):
        find_target("tensorrt", "9")


def test_what_a_gpu_cannot_run_is_refused_before_anything_is_written(tmp_path):
    rest = {"size": "tiny", "res": 112, "output": tmp_path / "b"}
    with pytest.raises(
        InputError, match=r"is not for TensorRT 11 on SM 7\.5: .* bfloat16.* SM 8\.0 on; export with --precision fp16"
    ):
        export(ExportOptions(**rest, precision="bf16", target="tensorrt", sm="7.5"))
    with pytest.raises(UsageError, match="leave --sm away"):
        export(ExportOptions(**rest, sm="7.5"))
    assert not list(tmp_path.iterdir())


def recommended() -> list[tuple[str, str, str, str]]:
    """Of the table that pgx doctor and docs/jetson.md have: precision, --trt, compute capability, TensorRT that is installed."""
    capabilities = {
        "JetPack 6.1 and 6.2": "8.7",
        "JetPack 7.2 on Orin": "8.7",
        "JetPack 7.2 on Thor": "11.0",
        "JetPack 7.0 and 7.1": "11.0",
    }
    boards = [row for row in SETUPS if row.jetpacks and row.trt]
    return [(precision, row.trt or "", capabilities[row.name], row.tensorrt) for row in boards for precision in row.precisions]


@pytest.mark.parametrize(("precision", "trt", "sm", "installed"), recommended())
def test_what_a_board_is_recommended_is_what_compile_takes_there(tmp_path, precision, trt, sm, installed):
    for file in write(tmp_path, precision, trt).values():
        check_file(file, trt, sm, installed=installed)
