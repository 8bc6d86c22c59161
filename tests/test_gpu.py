# SPDX-License-Identifier: Apache-2.0
"""On a GPU, with each engine that is installed there: `pytest -m gpu`. The embedded model in every precision that the GPU has, against the
CPU. Nothing here has been run on a GPU yet; the TensorRT half passes on the fake device. benchmarks/on_gpu.py has the published shapes."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from tensorrt_engines import onnxruntime, teacher_forced_logits

from pgxport.bundle.reader import Bundle
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.compile.compile import compile_bundle
from pgxport.compile.options import CompileOptions
from pgxport.errors import InputError
from pgxport.exporter.check.parity import scene
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.hub.locate import TINY
from pgxport.machine.driver import ask_driver
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.eager import TokenizedSample
from pgxport.models.tiny.scenes import draw
from pgxport.runners.runner import Runner
from pgxport.runners.session import ENGINES
from pgxport.runners.tensorrt_library import load_cuda
from pgxport.runners.tensorrt_profile import RECORDING_VARIABLE
from pgxport.runners.tokenizer import PromptTokenizer

pytestmark = pytest.mark.gpu
# Of the largest logit, from float32: twice what other engines have on random models (tests/exporter/test_tensorrt.py).
FLOATS = {"fp16": 2e-2, "bf16": 1e-1}
CODES = ("int8", "int4", "w8a8", "fp8")
CASES = [("cuda", p) for p in (*FLOATS, "int8", "int4")] + [
    (e, p) for e in ("tensorrt", "tensorrt-rtx") for p in (*FLOATS, *CODES)
]
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PROMPTS = ("caption en", "ocr", "detect orange cross", "segment green star")
SCENE = draw("test", 3).image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of bundles and engines; `pytest -m gpu` leaves the user's cache alone."""
    made = tmp_path_factory.mktemp("gpu")
    before = os.environ.get("PGX_ENGINE_CACHE")
    os.environ["PGX_ENGINE_CACHE"] = str(made / "engines")
    calibrate(CalibrateOptions(size="tiny", res=112, samples=4, output=made / "c.safetensors"))
    yield made
    os.environ.pop("PGX_ENGINE_CACHE")
    if before is not None:
        os.environ["PGX_ENGINE_CACHE"] = before


def bundle_for(folder: Path, engine: str, precision: str) -> Path:
    """Written, and compiled where the engine wants that, for the GPU that is here."""
    if engine in MODULES and not importlib.util.find_spec(MODULES[engine]):
        pytest.skip(f"{MODULES[engine]} is not installed")
    if engine == "cuda" and "CUDAExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    target = ENGINES[engine]
    out = folder / f"{target}-{precision}"
    sm = ".".join(map(str, ask_driver().gpus[0].sm)) if target == "tensorrt" else None
    calibration = folder / "c.safetensors" if precision in ("w8a8", "fp8") else None
    if not out.exists():
        try:
            export(ExportOptions(
                size="tiny", res=112, precision=precision, target=target, sm=sm, calibration=calibration, parity=0, output=out,
            ))  # fmt: skip
        except InputError as error:
            pytest.skip(str(error))  # FP8 before Ada, bfloat16 before Ampere
    if target == "tensorrt":
        compile_bundle(CompileOptions(out, engine=engine))
    return out


@pytest.fixture(scope="module")
def given(tiny_112: Path) -> TokenizedSample:
    spec = read_config(Checkpoint.open(TINY / "tiny-112").config)
    return scene(2, spec, PromptTokenizer(tiny_112 / "tokenizer.json", Bundle.open(tiny_112).manifest.token_ids))


def logits(runner: Runner, given: TokenizedSample) -> np.ndarray:
    """[answer tokens + 1, V]"""
    pipeline, m = runner, runner.manifest
    embeds = pipeline.prefix(pipeline.encode_pixels(given.pixels), [m.token_ids.image] * m.image_tokens + given.prompt)
    decoder = pipeline.decoder(embeds.shape[1] + len(given.answer))
    return np.stack([decoder.feed(embeds).copy(), *(decoder.feed(pipeline.embed([t])).copy() for t in given.answer)])


def apart(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(got - expected).max(1) / np.abs(expected).max()


@pytest.mark.parametrize(("engine", "precision"), CASES)
def test_logits_are_those_of_the_cpu(folder: Path, tiny_112: Path, given: TokenizedSample, engine: str, precision: str):
    path = bundle_for(folder, engine, precision)
    with Runner.from_pretrained(path, engine=engine) as runner:
        got = logits(runner, given)
    if precision in FLOATS:
        with Runner.from_pretrained(tiny_112) as cpu:
            error, allowed = apart(got, logits(cpu, given)).max(), FLOATS[precision]
    elif engine == "cuda":  # its operators have no half precision on the CPU; a bundle for the CPU has the same codes
        other = folder / f"cpu-{precision}"
        if not other.exists():
            export(ExportOptions(size="tiny", res=112, precision=precision, parity=0, output=other))
        with Runner.from_pretrained(other) as cpu:
            error, allowed = float(np.median(apart(got, logits(cpu, given)))), 5e-2
    else:  # the same graph, node by node; a number between two codes may go to either, so that the median is judged
        error, allowed = float(np.median(apart(got, teacher_forced_logits(path, onnxruntime, given)))), 2e-2
    print(engine, precision, error)
    assert error < allowed


@pytest.mark.parametrize("engine", ["cuda", *MODULES])
def test_answers_boxes_and_masks_are_those_of_the_cpu(folder: Path, tiny_112: Path, engine: str):
    path = bundle_for(folder, engine, "fp16")
    with Runner.from_pretrained(tiny_112) as cpu, Runner.from_pretrained(path, engine=engine) as runner:
        for prompt in (*PROMPTS, *PROMPTS):  # the second time over what the first has recorded
            ours, theirs = (r.answer(SCENE, prompt, max_new_tokens=24) for r in (runner, cpu))
            assert (ours.text, ours.boxes) == (theirs.text, theirs.boxes)
            for mask, other in zip(ours.masks, theirs.masks, strict=True):
                assert (mask.mask == other.mask).mean() > 0.99


@pytest.mark.parametrize("trt", ["10.3", "10.16", "11"])
@pytest.mark.parametrize("engine", MODULES)
def test_a_replayed_step_gives_the_logits_of_one_that_is_run(
    folder: Path, given: TokenizedSample, engine: str, trt: str, monkeypatch: pytest.MonkeyPatch
):
    """With the cache of each version; a graph that was recorded for another place or length would give others."""
    bundle_for(folder, engine, "fp16")
    path = folder / f"fp16-{trt}"
    if not path.exists():
        export(ExportOptions(size="tiny", res=112, precision="fp16", target="tensorrt", trt=trt, parity=0, output=path))
    compile_bundle(CompileOptions(path, engine=engine))
    found = []
    for recorded in ("1", "0"):
        monkeypatch.setenv(RECORDING_VARIABLE, recorded)
        with Runner.from_pretrained(path, engine=engine) as runner:
            found.append(np.stack([logits(runner, given), logits(runner, given)]))
    assert np.array_equal(found[0][0], found[0][1]), "the second answer, over what the first recorded"
    assert np.array_equal(*found)


@pytest.mark.parametrize("engine", MODULES)
def test_a_closed_runner_leaves_its_memory(folder: Path, engine: str):
    path, cuda, free = bundle_for(folder, engine, "fp16"), load_cuda(), []
    for _ in range(3):
        with Runner.from_pretrained(path, engine=engine) as runner:
            runner.answer(SCENE, PROMPTS[0], max_new_tokens=8)
        free.append(int(cuda.call("cudaMemGetInfo")[0]))
    assert free[2] >= free[0] - (8 << 20), free
