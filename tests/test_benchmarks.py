# SPDX-License-Identifier: Apache-2.0
"""What the scripts in benchmarks/ work out from what they measured, and what they give to the peers."""

import collections
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("the wheel is tested without the repository", allow_module_level=True)
pytest.importorskip("onnx_ir")

from pgxport.benchmarking.worker import Measurement  # noqa: E402
from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.machine.cpu import vectors  # noqa: E402
from pgxport.models.spec import TEXT, published  # noqa: E402
from pgxport.models.weights import weight_shapes  # noqa: E402


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers() -> Any:
    path = list(sys.path)
    yield script("against_peers")
    sys.path[:] = path


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    path = list(sys.path)
    yield script("on_gpu")
    sys.path[:] = path


def measurement(label: str, **seconds: list[float]) -> Measurement:
    return Measurement(label, {}, seconds, None, None)


@pytest.mark.parametrize(("family", "size"), TEXT)
def test_llama_is_given_all_weights_of_the_text_part(peers: Any, family: str, size: str):
    spec = published(family, size, 224)
    given = sum(prod(shape) for _, shape in peers.gguf_shapes(spec))
    own = {n: s for n, s in weight_shapes(spec).items() if not n.startswith(("vision_tower", "multi_modal_projector"))}
    assert given == sum(map(prod, own.values()))


def test_a_peers_prefix_is_an_image_and_the_prompt(peers: Any):
    spec = published("paligemma2", "3b", 448)
    ids = peers.prefix_ids(spec, 16)
    assert len(ids) == 1040
    assert (ids == peers.IMAGE).sum() == 1024
    assert (ids[1024], ids[-1]) == (peers.BOS, peers.NEWLINE)
    assert ids.max() < spec.text.vocab


def test_the_ratios_are_of_the_same_repetition(peers: Any):
    bundle = peers.with_ttft(measurement("b", vision=[1.0, 2.0], projector=[0.5, 0.5], prefill=[2.5, 1.5], step=[0.1, 0.2]))
    blind = measurement("llama", prefill=[5.0, 3.0], step=[0.1, 0.1])
    rows = peers.ratios([bundle], [blind, Measurement("dead", {}, {"step": [1.0]}, None, None, "died", 1)])
    assert bundle.seconds["ttft"] == [4.0, 4.0]
    assert {row["stage"]: row["peer_over_bundle"] for row in rows} == {"prefill": [2.0, 2.0], "step": [1.0, 0.5]}
    assert rows[0]["says"] == "b is faster than llama (×2.00, 2.00–2.00)"


def test_the_cost_of_a_layer_is_the_difference_between_two_depths():
    path = list(sys.path)
    curves = script("curves")
    sys.path[:] = path
    few, many = ({"layers": n, "lengths": [{"length": 256, "prefill": 3.0 + n, "step": 0.5 + 0.1 * n}]} for n in (2, 4))
    (row,) = curves.per_layer(few, many)
    assert row == pytest.approx({"length": 256, "prefill_layer": 1, "prefill_rest": 3, "step_layer": 0.1, "step_rest": 0.5})


# Accuracy of recipes


def test_a_stopped_run_of_accuracies_goes_on_and_gives_the_same(tmp_path: Path):
    recipe, models = "w8a8-plain", ("tiny-112", "tiny-112-outliers")

    def run(output: Path, questions: int = 2) -> dict[str, Any]:
        file = ROOT / "benchmarks" / "recipes" / f"{recipe}.toml"
        given = ["--recipes", str(file), "--models", *models, "--questions", str(questions), "--no-yardstick"]
        given += ["--work", str(tmp_path / "work"), "--json", str(output)]
        command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())

    few = run(tmp_path / "few.json", questions=1)
    whole, answers = run(tmp_path / "whole.json"), sorted((tmp_path / "work" / "answers").iterdir())
    kept = {file: file.read_text().splitlines() for file in answers}
    assert [len(lines) for lines in kept.values()] == [2 * 5] * 4
    for file, lines in kept.items():
        file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # stopped while it wrote the fourth
    again = run(tmp_path / "again.json")
    assert again["results"] == whole["results"] != few["results"]
    assert run(tmp_path / "few-again.json", questions=1)["results"] == few["results"], "answers belong to their questions"
    assert (list(again["results"]), again["questions"], again["machine"]["vectors"]) == (list(models), 2, vectors())

    def ids(lines: list[str]) -> list[list[int]]:
        return [row["ids"] for row in sorted(map(json.loads, lines), key=lambda row: row["id"])]

    for model in models:
        (exact,) = (ids(lines) for file, lines in kept.items() if file.name.startswith(f"{model}-fp32-"))
        (rounded,) = (ids(lines) for file, lines in kept.items() if file.name.startswith(f"{model}-{recipe}-"))
        of = again["results"][model][recipe]
        assert of["identical_answers"] == np.mean([a == b for a, b in zip(exact, rounded, strict=True)])
    fp32 = [ids(lines) for file, lines in kept.items() if "-fp32-" in file.name]
    assert fp32[0] == fp32[1], "outliers change no answer of float32"
    plain, outliers = (again["results"][model][recipe]["kl"] for model in models)
    assert outliers > 5 * plain


def test_empty_and_malformed_answers_are_counted(tiny_112: Path, tmp_path: Path):
    path = list(sys.path)
    accuracy = script("accuracy")
    sys.path[:] = path
    samples = accuracy.scene_samples(1)
    ids = Bundle.open(tiny_112).manifest.token_ids
    box = [ids.loc_first + at for at in (10, 20, 300, 400)]
    exact = [{"ids": box if sample.task in ("detect", "segment") else [5, 6]} for sample in samples]
    broken = {"detect": box[:3], "ocr": []}  # three numbers are no box
    rows = [
        {"ids": broken.get(sample.task, row["ids"]), "agreed": 1, "positions": 2, "kl": 0.5}
        for sample, row in zip(samples, exact, strict=True)
    ]
    one, reference = accuracy.Exported(tiny_112, tmp_path / "a"), accuracy.Exported(tiny_112, tmp_path / "b")
    of, float32 = (
        accuracy.compared(samples, one, rows, reference, exact),
        accuracy.compared(samples, reference, exact, reference, exact),
    )
    assert [(x["empty"], x["malformed"]) for x in (of, float32)] == [(1, 1), (0, 0)]
    assert (of["identical_answers"], of["top1_agreement"], of["kl"]) == (3 / 5, 1 / 2, 1 / 4)


def test_a_real_gemmas_rows_are_those_of_every_recipe_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = script("../tools/figures")
    rows = {"w8a8, mixed, its prefixes": {"kl": 0.03, "same": 0.88}, "int4-fast, mixed": {"kl": 0.46, "same": 0.68}}
    (tmp_path / "real-gemma.json").write_text(json.dumps({"results": rows}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    real = figures._real_gemma()
    assert figures._real_cells(real, "w8a8") == ["0.03", "88.0%"]
    assert figures._real_cells(real, "mixed") == ["0.03 and 0.46", "88.0% and 68.0%"]
    assert figures._real_cells(real, "fp16") == ["–", "–"]


# On a GPU: what is worked out from what would be measured there


def test_a_step_reads_all_weights_and_the_cache_and_a_prefill_multiplies_all_matrices(on_gpu: Any):
    spec = published("paligemma2", "3b", 448)
    of = on_gpu.cost(spec, 1000, 7, prefix=100, steps=20)
    assert of.step_bytes == 1000 + 7 * 110
    # By hand: q, k, v and o of 2304 x (2048, 1024, 1024, 2048), gate, up and down of 2304 x 9216, 26 layers; then the output matrix.
    matrices = 26 * 2304 * (2048 + 1024 + 1024 + 2048 + 3 * 9216)
    assert of.prefill_operations == 2 * matrices * 100 + 2 * 257_216 * 2304 + 26 * 4 * 8 * 256 * 100 * 100


def test_shares_are_of_the_rates_that_the_same_run_reached(on_gpu: Any):
    limits = Measurement("limits", {"copied": 100, "operations": 1000}, {"copy": [1.0, 2.0, 9.0], "float16": [4.0]}, None, None)
    m, of = measurement("b", step=[2.0, 8.0, 4.0], prefill=[8.0]), on_gpu.Cost(step_bytes=50, prefill_operations=500)
    # 50 bytes in 4 s, of 100 in 2 s; 500 operations in 8 s, of 1000 in 4 s.
    assert on_gpu.shares(m, limits, of, "float16") == {"step_of_bandwidth": 0.25, "prefill_of_products": 0.25}
    assert on_gpu.shares(m, limits, of, "float8") == {"step_of_bandwidth": 0.25}, (
        "a GPU without such products has no share of them"
    )


def test_memory_of_the_gpu_is_what_went_while_a_worker_worked(on_gpu: Any):
    class Taking:
        label = "b"

        def open(self) -> None:
            free[0] -= 30

        def repeat(self) -> None:
            free[0] -= 5

        def measurement(self) -> Measurement:
            return measurement("b", step=[1.0])

    free = [1000]
    held = on_gpu.Held(Taking(), lambda: free[0])
    held.open()
    free[0] -= 200  # another worker's
    held.repeat()
    assert held.measurement().facts["gpu_bytes"] == 35


def test_the_parity_of_a_bundle_is_that_of_its_logits(on_gpu: Any, tiny_112: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    from pgxport.runners.pipeline import Pipeline

    (ids, pixels), tokens = on_gpu.inputs(tiny_112), [5, 9]
    with Pipeline.open(tiny_112) as pipeline:
        prefix = pipeline.prefix(pipeline.encode_pixels(pixels), ids)
        logits = np.stack([row.copy() for row in pipeline.teacher_forced(prefix, tokens)])
    chosen = np.array([*tokens, 4])
    np.savez(tmp_path / "reference.npz", tokens=chosen, logits=logits)
    found = on_gpu.parity(on_gpu.Made("cpu", "fp32", tiny_112), tmp_path / "reference.npz")
    assert (found["steps"], found["tokens_equal"]) == (3, (logits.argmax(1) == chosen).sum())
    assert found["largest_error_of_logits_scale"] < 1e-6
    np.savez(tmp_path / "reference.npz", tokens=chosen, logits=logits + 0.5 * np.abs(logits).max())
    assert on_gpu.parity(on_gpu.Made("cpu", "fp32", tiny_112), tmp_path / "reference.npz")["median_error_of_logits_scale"] > 0.3


def test_what_cannot_run_is_a_row_with_its_reason(on_gpu: Any, tiny_112: Path, tmp_path: Path):
    np.savez(tmp_path / "reference.npz", tokens=np.zeros(1, np.int64), logits=np.zeros((1, 4)))
    found = on_gpu.parity(on_gpu.Made("tensorrt", "fp16", tiny_112), tmp_path / "reference.npz")
    assert "--target tensorrt" in found["reason"]
    assert on_gpu.ready(on_gpu.Made("tensorrt", "fp16", tiny_112)).reason


@pytest.fixture(scope="module")
def few() -> Any:
    spec = published("paligemma2", "3b", 224)
    text = {"width": 64, "depth": 1, "mlp": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    return replace(spec, text=replace(spec.text, **text), vision=replace(spec.vision, width=64, depth=1, mlp=96, heads=4))


def test_every_peer_computes_the_same_and_the_compiled_one_is_compiled_once(on_gpu: Any, few: Any):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    request = {"device": "cpu", "compile": {"backend": "eager"}, "prompt_tokens": 16, "new_tokens": 4}
    logits = {}
    for name in on_gpu.PEERS:
        peer, steps = on_gpu.Transformers(few, request | {"peer": name}), []
        for _ in peer._generate(4):
            steps.append(peer.logits.float().flatten())
        logits[name] = torch.stack(steps)
    first, *others = logits.values()
    for other in others:
        assert (other - first).abs().max() < 0.05 * first.abs().max(), "bfloat16, in another order"
    assert (first[0] - first[-1]).abs().max() > 0.05 * first.abs().max(), "or a step that sees nothing would pass"
    torch._dynamo.utils.counters.clear()
    assert peer.repeat(warm_up=False).keys() == {"vision", "projector", "prefill", "step"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "the second answer compiled again"


def test_the_limits_are_timed_for_a_copy_and_for_products(on_gpu: Any):
    pytest.importorskip("torch")
    limits = on_gpu.Limits({"device": "cpu", "bytes": 1 << 16, "side": 16})
    assert limits.repeat(warm_up=False).keys() == {"copy", "float16", "bfloat16"}
    assert limits.facts["copied"] == 2 << 16
    assert limits.facts["operations"] == 2 * 16**3


# Engines that were built for TensorRT


@pytest.fixture(scope="module")
def builds() -> Any:
    pytest.importorskip("tensorrt_rtx")
    path = list(sys.path)
    yield script("tensorrt_builds")
    sys.path[:] = path


def test_graphs_are_to_be_built_in_every_precision_size_and_version(builds: Any):
    precisions = {"fp16", "bf16", "int8", "w8a8", "int4", "fp8"}
    for size in ("3b", "10b", "28b"):
        assert {case.precision for case in builds.cases() if case.size == size} >= precisions
    assert {case.precision for case in builds.cases() if case.layers is None} == precisions, "3B is built whole"
    assert {case.trt for case in builds.cases()} == {"10.3", "10.16", "11"}


def test_what_was_not_built_is_said(builds: Any):
    """And there is no size, family, version or precision of which nothing was built."""
    there, said = builds.present(), json.loads(builds.RESULTS.read_text())["not_built"]
    lacking = [case for case in builds.cases() if not all(map(there, case.rows()))]
    assert said == [asdict(case) for case in lacking]
    built = [case for case in builds.cases() if case not in lacking]
    for part in ("size", "family", "trt", "precision", "res", "layers"):
        assert {getattr(case, part) for case in built} == {getattr(case, part) for case in builds.cases()}, part


def test_the_price_of_rotations_is_that_of_every_rotation(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    import onnx

    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    bundle = Bundle.open(export(ExportOptions(size="tiny", res=112, precision="int4", output=tmp_path / "b", answer=False)).path)
    path = list(sys.path)
    rotation = script("rotation")
    sys.path[:] = path
    graph = bundle.graph("decoder_step")
    plain, blocks = rotation.without_rotations(graph, tmp_path)
    # The inputs of q, k and v, of gate and up, and of down; v's rows take the rotation of o's input.
    assert blocks == [32] * 3 * bundle.manifest.cache.layers
    before, after = (
        collections.Counter(node.op_type for node in onnx.load(g, load_external_data=False).graph.node) for g in (graph, plain)
    )
    assert before - after == {"Reshape": 2 * len(blocks), "MatMul": len(blocks)}
    assert not after - before
    found = rotation.measured(bundle, tmp_path, 1)
    assert found.keys() == {"vision encoder", "prefill", "decode step"}
    assert all(of["ms"]["with"] > 0 < of["ms"]["without"] for of in found.values())
