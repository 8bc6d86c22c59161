# SPDX-License-Identifier: Apache-2.0
"""What a plan promises is what an export writes, to the byte, and it is had without reading a weight."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

from pgxport.errors import UsageError
from pgxport.exporter.plan import PlanOptions, plan, render, runs_on
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.targets import TARGETS
from pgxport.machine.board import BOARDS, GIB
from pgxport.models.spec import RESOLUTIONS, TEXT
from pgxport.models.tiny import __file__ as tiny

MASKS = Path(tiny).with_name("vae-oid.npz")
MODELS = [(family, size, res) for family, size in TEXT for res in RESOLUTIONS]
# Those that need no calibration; a recipe that needs one has the size of its twin (tests/test_quantized.py).
COMPUTED = [
    (t.name, name)
    for t in TARGETS.values()
    for name in RECIPE_NAMES
    if runs_on(t.recipe(name), t)
    and not t.recipe(name).calibrated
    # Of which the odd shapes here have no whole groups.
    and (t.name, name) != ("tensorrt", "int4")
]

# Counted by others: the presets of keras-hub, whose token tables end at the vocabulary's 257,152 rows.
PARAMETERS = {
    ("paligemma", "3b", 224): 2_923_335_408, ("paligemma", "3b", 448): 2_924_220_144, ("paligemma", "3b", 896): 2_927_759_088,
    ("paligemma2", "3b", 224): 3_032_094_960, ("paligemma2", "3b", 448): 3_032_979_696, ("paligemma2", "3b", 896): 3_036_518_640,
    ("paligemma2", "10b", 224): 9_662_409_456, ("paligemma2", "10b", 448): 9_663_294_192, ("paligemma2", "10b", 896): 9_666_833_136,
    ("paligemma2", "28b", 224): 27_650_192_112,
}  # fmt: skip


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@pytest.mark.parametrize(("target", "precision"), COMPUTED)
def test_the_sizes_are_those_of_the_export(tmp_path: Path, family: str, target: str, precision: str):
    pytest.importorskip("torch")
    from gemma_tokenizer import build_tokenizer
    from reference import random_paligemma

    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    build_tokenizer(tmp_path / "ck")
    random_paligemma(tmp_path / "ck", family=family, text={"vocab_size": 2432}, image_token_index=image_token(tmp_path / "ck"))
    options: dict[str, Any] = {"checkpoint": tmp_path / "ck", "precision": precision, "target": target, "masks": MASKS}
    planned = plan(PlanOptions(**options))
    bundle = export(ExportOptions(**options, output=tmp_path / "b"))
    written = {name: info.size for name, info in bundle.manifest.files.items()}
    exact = {name: size for name, size in planned.files.items() if name not in planned.estimated}
    assert planned.files.keys() == written.keys() | {"manifest.json"}
    assert exact == {name: written[name] for name in exact}
    assert set(planned.estimated) == {"README.md", "manifest.json"}
    assert planned.files["manifest.json"] == pytest.approx((tmp_path / "b" / "manifest.json").stat().st_size, rel=0.5)
    assert sum(planned.parameters.values()) == bundle.manifest.parameters


def image_token(folder: Path) -> int:
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<image>")
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "size", "res"), MODELS)
def test_every_published_model_is_planned(family: str, size: str, res: int):
    planned = plan(PlanOptions(size=size, res=res, family=family))
    count = sum(planned.parameters.values())
    padding = 64 * TEXT[family, size].width
    assert count - padding == PARAMETERS.get((family, size, res), count - padding)
    # Weights in float32, and little else.
    assert 1.0 <= planned.nbytes / (4 * count) < 1.01
    assert render(planned).endswith("--precision fp32 --target cpu -o bundle")


@pytest.mark.parametrize(
    ("family", "size", "elements"),
    [("paligemma", "3b", 9216), ("paligemma2", "3b", 53248), ("paligemma2", "10b", 172032), ("paligemma2", "28b", 188416)],
)
def test_the_cache_has_the_size_that_the_architecture_gives(family: str, size: str, elements: int):
    assert plan(PlanOptions(size=size, res=224, family=family, context=1000)).run.kv == 1000 * elements * 4


@pytest.mark.parametrize("res", [112, 224])
def test_the_embedded_model_is_planned(res: int):
    if not (MASKS.parent / f"tiny-{res}" / "config.json").exists():
        pytest.skip("not embedded yet")
    planned = plan(PlanOptions(size="tiny", res=res))
    assert "mask_decoder.data" in planned.files
    assert "tokenizer.json" not in planned.estimated
    assert all(planned.fitting(board) for board in planned.boards())


def test_half_precision_saves_disk_on_a_cpu_and_memory_on_a_gpu():
    cpu32, cpu16, gpu16 = (
        plan(PlanOptions(size="3b", res=448, precision=p, target=t))
        for p, t in (("fp32", "cpu"), ("fp16", "cpu"), ("fp16", "cuda"))
    )
    assert cpu16.nbytes == pytest.approx(cpu32.nbytes / 2, rel=0.01)
    # ONNX Runtime widens what it multiplies by, one weight at a time twice.
    assert cpu16.run.weights == pytest.approx(cpu32.run.weights, rel=0.01)
    assert cpu16.run.loading == 257_216 * 2304 * 4
    assert gpu16.run.weights == pytest.approx(cpu32.run.weights / 2, rel=0.01)


def test_a_longer_context_takes_more_memory_and_no_more_disk_than_its_angles():
    short, long = (plan(PlanOptions(size="3b", res=224, context=n)) for n in (300, 3000))
    assert long.run.kv == 10 * short.run.kv
    assert long.run.peak > short.run.peak
    assert 0 < long.nbytes - short.nbytes <= 2 * 2700 * 128 * 4 + 2 * 4096


def test_a_board_names_the_precisions_that_fit_and_the_one_to_try():
    planned = plan(PlanOptions(size="10b", res=448, precision="fp16", target="cuda", board="gpu-16gb"))
    board = BOARDS["gpu-16gb"]
    assert planned.boards() == [board]
    fitting = planned.fitting(board)
    assert "fp16" not in fitting
    assert "int8" in fitting
    assert planned.next_command() == f"pgx export --size 10b --res 448 --precision {fitting[0]} --target cuda -o bundle"


def test_a_board_that_nothing_fits_is_said_so():
    text = render(plan(PlanOptions(size="28b", res=896, board="orin-nano-8gb")))
    assert "nothing fits orin-nano-8gb" in text
    assert "pgx export" not in text


def test_a_board_never_offers_more_than_it_has():
    for board in BOARDS.values():
        assert 0 < board.usable < board.memory
        assert board.memory == int(board.name.rpartition("-")[2].removesuffix("gb")) * GIB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no model was named"),
        ({"size": "3b"}, "no model was named"),
        ({"size": "5b", "res": 448}, "size '5b' does not exist"),
        ({"size": "10b", "res": 448, "family": "paligemma"}, "no paligemma of size '10b' was published"),
        ({"size": "3b", "res": 100}, "at 100 px was published"),
        ({"size": "tiny", "res": 448}, "no 448 px"),
        ({"size": "3b", "res": 448, "precision": "fp12"}, "choose fp32"),
        ({"size": "3b", "res": 448, "target": "tpu"}, "choose cpu"),
        ({"size": "3b", "res": 448, "precision": "fp8"}, "has no FP8 products"),
        ({"size": "3b", "res": 448, "board": "nano"}, "choose orin-nano-8gb"),
        ({"size": "3b", "res": 448, "board": "gpu-8gb"}, "choose --target cuda"),
        ({"size": "3b", "res": 448, "context": 1024}, "no room for an image of 1024 tokens"),
        ({"size": "3b", "res": 448, "local_window": "no"}, "choose 'hf' or 'none'"),
        ({"checkpoint": "google/paligemma2-3b-pt-448"}, "a plan downloads nothing"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plan(PlanOptions(**options))


def test_the_command_prints_json_that_says_the_same():
    command = [sys.executable, "-m", "pgxport", "plan", "--size", "3b", "--res", "224", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(plan(PlanOptions(size="3b", res=224)).to_json()))
    assert done.stderr == ""


def test_the_command_ends_with_the_exit_code_of_usage():
    command = [sys.executable, "-m", "pgxport", "plan", "--size", "3b", "--res", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "choose --res 224, 448, 896" in done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_board_needs_to_compile_is_what_compile_refuses_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    pytest.importorskip("onnxruntime")
    from fake_tensorrt import FakeCudart

    from pgxport.bundle.reader import Bundle
    from pgxport.compile import memory as compiling
    from pgxport.errors import NumericError
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions
    from pgxport.runners.cuda import Cuda

    asked = {"size": "tiny", "res": 112, "target": "tensorrt", "trt": "10.3"}
    planned = plan(PlanOptions(**asked))  # type: ignore[arg-type]
    needs = planned.compile_memory()[count]
    assert planned.to_json()["compile_peak_by_profiles"][count] == needs
    assert "with --profiles 1" in render(planned)
    bundle = Bundle.open(export(ExportOptions(output=tmp_path / "b", parity=0, **asked)).path)  # type: ignore[arg-type]
    board = Cuda(FakeCudart())
    monkeypatch.setattr(compiling, "available_memory", lambda: needs)
    compiling.check_memory(bundle, count, compiling.WORKSPACE_BYTES, board)
    monkeypatch.setattr(compiling, "available_memory", lambda: needs - 1)
    with pytest.raises(NumericError):
        compiling.check_memory(bundle, count, compiling.WORKSPACE_BYTES, board)


def test_only_tensorrt_is_compiled_on_a_board():
    assert plan(PlanOptions(size="tiny", res=112)).compile_memory() == {}


def test_of_a_screened_table_rows_are_read_and_nothing_is_held():
    for precision, held in (("int4-fast", 0), ("int4", 1)):
        planned = plan(PlanOptions(size="3b", res=448, precision=precision))
        graphs = sum(size for name, size in planned.files.items() if name.endswith(".data"))
        table = planned.files["token_table.bin"]
        # Beside the files' bytes: scales of 4 bits, widened.
        assert held * table <= planned.run.weights - graphs < (held + 0.5) * table, precision
