# SPDX-License-Identifier: Apache-2.0
"""The TensorRT runner on a fake engine and device: answers, copies, frees, errors that name the call."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from fake_tensorrt import Builder, Code, Config, Context, Engine, FakeCudart, FakeTensorrt, Parser, Profile
from tensorrt_signatures import GOLDEN, signatures

from pgxport.bundle.reader import Bundle
from pgxport.compile.compile import compile_bundle
from pgxport.compile.options import CompileOptions
from pgxport.errors import EngineError, NumericError, PgxError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.models.tiny.scenes import draw
from pgxport.runners.cuda import ALIGNMENT
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.runner import Runner
from pgxport.runners.tensorrt import TensorrtSession
from pgxport.runners.tensorrt_library import DTYPES, load_cuda, logger

PROMPTS = ("caption en", "detect orange cross", "segment green star")
SCENE = draw("test", 3).image
SIGNATURES = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the embedded checkpoint, by the kind of cache."""
    folder = tmp_path_factory.mktemp("bundles")
    versions = {"delta": "10.3", "update": "11"}
    shared = {"size": "tiny", "res": 112, "target": "tensorrt", "parity": 0}
    return {kind: export(ExportOptions(output=folder / kind, trt=version, **shared)).path for kind, version in versions.items()}


@pytest.fixture(scope="module")
def expected(tiny_112: Path) -> dict[str, tuple[int, ...]]:
    """What ONNX Runtime answers from the bundle for the CPU."""
    with Runner.from_pretrained(tiny_112) as runner:
        return {prompt: runner.answer(SCENE, prompt, max_new_tokens=24).token_ids for prompt in PROMPTS}


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


def install(cudart: FakeCudart, patch: pytest.MonkeyPatch, engines: Path) -> FakeTensorrt:
    """A TensorRT to import, and a cache for its engines."""
    fake = FakeTensorrt(cudart)
    patch.setitem(sys.modules, "tensorrt", fake)
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=cudart))
    patch.setenv("PGX_ENGINE_CACHE", str(engines))
    return fake


@pytest.fixture
def trt(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorrt:
    """TensorRT with an empty cache."""
    return install(cudart, monkeypatch, tmp_path / "engines")


@pytest.fixture(scope="module")
def engines(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the engines of both bundles, which tests only read."""
    cache = tmp_path_factory.mktemp("compiled") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        install(FakeCudart(), patch, cache)
        for bundle in bundles.values():
            compile_bundle(CompileOptions(bundle))
    return cache


@pytest.fixture(params=["delta", "update"])
def bundle(
    request: pytest.FixtureRequest, bundles: dict[str, Path], engines: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bundle whose engines are in the cache."""
    monkeypatch.setenv("PGX_ENGINE_CACHE", str(engines))
    return bundles[request.param]


@pytest.fixture
def runner(bundle: Path, cudart: FakeCudart) -> Iterator[Runner]:
    with Runner.from_pretrained(bundle, engine="tensorrt") as runner:
        cudart.calls.clear()
        yield runner
    assert cudart.nothing_is_left()


def ask(runner: Runner, prompt: str) -> tuple[int, ...]:
    return runner.answer(SCENE, prompt, max_new_tokens=24).token_ids


def test_answers_are_those_of_the_bundle_for_the_cpu(runner: Runner, expected: dict[str, tuple[int, ...]]):
    assert {prompt: ask(runner, prompt) for prompt in PROMPTS} == expected
    assert all(expected.values())


def test_masks_and_batches_of_images_are_as_on_the_cpu(runner: Runner, tiny_112: Path):
    with Runner.from_pretrained(tiny_112) as cpu:
        whole, theirs = (r.answer([SCENE, SCENE], "segment green star", max_new_tokens=24) for r in (runner, cpu))
    assert whole.text == theirs.text
    for mask, other in zip(whole.masks, theirs.masks, strict=True):
        assert np.array_equal(mask.mask, other.mask)


def test_a_step_is_run_once_recorded_once_and_then_replayed(runner: Runner, trt: FakeTensorrt, cudart: FakeCudart):
    trt.runs.clear()
    tokens = ask(runner, PROMPTS[0])
    decoder = [shapes for shapes in trt.runs if "inputs_embeds" in shapes]
    steps = len(tokens)  # the last finds the end
    assert [shapes["inputs_embeds"][1] == 1 for shapes in decoder] == [False, True, True]
    assert cudart.calls["cudaGraphLaunch"] == steps - 1
    assert cudart.calls["cudaGraphInstantiate"] == 1
    ask(runner, PROMPTS[0])
    assert cudart.calls["cudaGraphInstantiate"] == 1, "the second answer uses what the first recorded"


def test_recording_can_be_turned_off(
    bundle: Path, cudart: FakeCudart, expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    cudart.fail = {"cudaStreamBeginCapture": (Code.cudaErrorInvalidValue, frozenset(range(9)))}
    runner = Runner.from_pretrained(bundle, engine="tensorrt")
    with runner, pytest.raises(EngineError, match="with PGX_CUDA_GRAPH=0 in the environment"):
        ask(runner, PROMPTS[0])
    monkeypatch.setenv("PGX_CUDA_GRAPH", "0")
    with Runner.from_pretrained(bundle, engine="tensorrt") as runner:
        assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]


def test_an_interrupt_while_tensorrt_logs_is_not_forgotten(trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch):
    class Interrupting(str):
        def split(self, *args: object) -> list[str]:  # type: ignore[override]
            raise KeyboardInterrupt

    log = logger(trt)
    log.log("error", Interrupting("x"))
    with pytest.raises(KeyboardInterrupt):
        log.check()
    log.check()


def prefix_of(pipeline: Pipeline, prompt: str = PROMPTS[0]) -> np.ndarray:
    return pipeline.prefix(pipeline.encode([SCENE]), pipeline.prompt_ids(prompt))


def test_a_step_brings_home_a_token_and_not_the_logits(runner: Runner, cudart: FakeCudart):
    decoder, embeds = runner.decoder(90), prefix_of(runner)
    cudart.down = 0
    token = decoder.next_token(embeds)
    for _ in range(3):
        token = decoder.next_token(runner.embed([token]))
    assert cudart.down <= 4 * 2 * ALIGNMENT < runner.manifest.token_table.shape[0] * 4, "next_token and logits_square"


def test_logits_are_there_for_those_who_score(runner: Runner, tiny_112: Path):
    with Runner.from_pretrained(tiny_112) as cpu:
        logits = []
        for r in (runner, cpu):
            decoder, embeds = r.decoder(90), prefix_of(r)
            logits.append(np.stack([decoder.feed(embeds).copy(), *(decoder.feed(r.embed([t])).copy() for t in (5, 9, 30))]))
    np.testing.assert_allclose(*logits, atol=2e-4)


def test_what_the_vision_encoder_gives_stays_on_the_device(runner: Runner, cudart: FakeCudart):
    cudart.down = 0
    embeds = prefix_of(runner)
    m = runner.manifest
    assert cudart.down == m.image_tokens * embeds.shape[2] * 4, "image_features, and no image_hidden"


def test_nothing_is_allocated_for_an_answer_that_fits_where_the_last_was(runner: Runner, cudart: FakeCudart):
    ask(runner, PROMPTS[0])
    before = cudart.calls["cudaMalloc"] + cudart.calls["cudaMallocHost"]
    ask(runner, PROMPTS[0])
    assert cudart.calls["cudaMalloc"] + cudart.calls["cudaMallocHost"] == before


def test_a_longer_answer_grows_the_cache_and_a_shorter_one_is_still_right(
    runner: Runner, expected: dict[str, tuple[int, ...]], tiny_112: Path
):
    long = "caption en " + "ring and " * 40
    with Runner.from_pretrained(tiny_112) as cpu:
        theirs = ask(cpu, long)
    assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]
    assert ask(runner, long) == theirs
    assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]


def test_two_answers_in_turns_do_not_mix(runner: Runner, expected: dict[str, tuple[int, ...]]):
    streams = [runner.generate(prefix_of(runner, prompt), 24) for prompt in PROMPTS[:2]]
    answers: list[list[int]] = [[], []]
    for _ in range(24):
        for stream, tokens in zip(streams, answers, strict=True):
            tokens += [token for token in [next(stream, None)] if token is not None]
    assert [tuple(tokens) for tokens in answers] == [expected[prompt] for prompt in PROMPTS[:2]]


def test_an_abandoned_answer_leaves_its_memory_to_the_next(runner: Runner, cudart: FakeCudart):
    next(runner.stream(SCENE, PROMPTS[0]))
    held = len(cudart.device)
    next(runner.stream(SCENE, PROMPTS[0]))
    assert len(cudart.device) == held


def test_an_engine_of_one_profile_answers_the_same(
    bundle: Path, cudart: FakeCudart, expected: dict[str, tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PGX_ENGINE_CACHE", str(tmp_path / "engines"))
    compile_bundle(CompileOptions(bundle, profiles=1))
    with Runner.from_pretrained(bundle, engine="tensorrt") as runner:
        assert {prompt: ask(runner, prompt) for prompt in PROMPTS} == expected
        assert cudart.calls["cudaGraphLaunch"] > 0
    assert cudart.nothing_is_left()


@pytest.mark.parametrize("integrated", [0, 1])
def test_a_board_does_not_keep_the_plans_in_its_page_cache(
    bundle: Path, cudart: FakeCudart, integrated: int, monkeypatch: pytest.MonkeyPatch
):
    dropped = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, start, length, advice: dropped.append(advice))
    cudart.attributes["integrated"] = integrated
    Runner.from_pretrained(bundle, engine="tensorrt").close()
    assert dropped == [os.POSIX_FADV_DONTNEED] * 4 * integrated


def test_low_memory_holds_one_half_at_a_time(bundle: Path, cudart: FakeCudart, expected: dict[str, tuple[int, ...]]):
    with Runner.from_pretrained(bundle, engine="tensorrt", low_memory=True) as runner:
        assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]
        assert len(cudart.streams) == 1
    assert cudart.nothing_is_left()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_and_the_next_answer_is_right(
    runner: Runner, trt: FakeTensorrt, expected: dict[str, tuple[int, ...]], wrong: float
):
    def spoil(outputs: dict[str, np.ndarray]) -> None:
        for name in outputs:
            if name == "logits_square" or name.startswith("present."):
                outputs[name] = np.full_like(outputs[name], wrong)

    trt.spoil = spoil
    with pytest.raises(NumericError, match=r"decoder_step.*prefill"):
        ask(runner, PROMPTS[0])
    trt.spoil = lambda outputs: None
    assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]], "stale rows of the cache are hidden"


# Each call of an answer, and of opening a runner, fails once at its first and once at a later occurrence.


ANSWERING = {
    "cudaMalloc": 2, "cudaMallocHost": 2, "cudaMemsetAsync": 1, "cudaMemcpyAsync": 8, "cudaStreamSynchronize": 9,
    "cudaStreamBeginCapture": 1, "cudaStreamEndCapture": 1, "cudaGraphInstantiate": 1, "cudaGraphLaunch": 3,
}  # fmt: skip


@pytest.mark.parametrize("code", [Code.cudaErrorInvalidValue, Code.cudaErrorMemoryAllocation])
@pytest.mark.parametrize(("call", "at"), [(call, at) for call, most in ANSWERING.items() for at in {0, most - 1}])
def test_a_failing_call_is_named_and_the_next_answer_is_right(
    runner: Runner, cudart: FakeCudart, expected: dict[str, tuple[int, ...]], call: str, at: int, code: Code
):
    cudart.fail = {call: (code, frozenset([at]))}
    kind = NumericError if code is Code.cudaErrorMemoryAllocation else EngineError
    with pytest.raises(kind, match=f"{call} failed with {code.name}") as raised:
        ask(runner, PROMPTS[0])
    assert raised.value.exit_code == {NumericError: 6, EngineError: 7}[kind]
    assert cudart.calls[call] > at
    cudart.fail = {}
    assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]


def test_new_rows_that_cannot_be_copied_are_an_error(bundles: dict[str, Path], trt: FakeTensorrt, cudart: FakeCudart):
    compile_bundle(CompileOptions(bundles["delta"]))
    cudart.fail = {"cudaMemcpy2DAsync": (Code.cudaErrorInvalidValue, frozenset([1]))}
    runner = Runner.from_pretrained(bundles["delta"], engine="tensorrt")
    with runner, pytest.raises(EngineError, match="cudaMemcpy2DAsync"):
        ask(runner, PROMPTS[0])
    assert cudart.nothing_is_left()


@pytest.mark.parametrize("call", ["cudaStreamCreate", "cudaStreamSynchronize", "cudaDeviceGetAttribute", "cudaDriverGetVersion"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_runner_that_cannot_be_opened_leaves_nothing(bundle: Path, cudart: FakeCudart, call: str, at: int):
    cudart.calls.clear()
    cudart.fail = {call: (Code.cudaErrorNoDevice, frozenset([at]))}
    if call == "cudaDriverGetVersion" and at:
        return  # it is asked once
    with pytest.raises(EngineError, match=f"{call} failed with cudaErrorNoDevice \\(100\\); this process sees no GPU"):
        Runner.from_pretrained(bundle, engine="tensorrt")
    assert cudart.nothing_is_left()


def test_a_driver_that_is_not_there_is_an_error_of_ours_with_cuda_python_12_too(bundle: Path, cudart: FakeCudart):
    def missing(*args: object) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")  # what 12.6.2 does; 13 gives a code

    cudart.cudaDeviceGetAttribute = missing  # type: ignore[method-assign]
    with pytest.raises(
        EngineError, match=r"Failed to dlopen libcuda\.so\.1; is there an NVIDIA driver\? this process sees no GPU"
    ) as raised:
        Runner.from_pretrained(bundle, engine="tensorrt")
    assert raised.value.exit_code == 7


@pytest.mark.parametrize("refused", ["deserialize", "context", "profile"])
def test_an_engine_that_does_not_load_says_what_tensorrt_said(bundle: Path, trt: FakeTensorrt, cudart: FakeCudart, refused: str):
    trt.refuse = {refused: "the reason"}
    with pytest.raises(EngineError, match=r"tensorrt 11.4.1.2 cannot .*vision_encoder.plan.*: the reason; run `pgx compile`"):
        Runner.from_pretrained(bundle, engine="tensorrt")
    trt.refuse = {refused: "Requested amount of GPU memory (5 bytes) could not be allocated"}
    with pytest.raises(NumericError):
        Runner.from_pretrained(bundle, engine="tensorrt")
    assert cudart.nothing_is_left()


@pytest.mark.parametrize("refused", ["shape", "address", "execute"])
def test_a_run_that_tensorrt_refuses_is_an_error_and_the_next_answer_is_right(
    runner: Runner, trt: FakeTensorrt, expected: dict[str, tuple[int, ...]], refused: str
):
    trt.refuse = {refused: "the reason"}
    with pytest.raises(EngineError, match=r"cannot .*: the reason"):
        ask(runner, PROMPTS[0])
    trt.refuse = {}
    assert ask(runner, PROMPTS[0]) == expected[PROMPTS[0]]


def test_of_a_lost_device_nothing_is_freed(bundle: Path, cudart: FakeCudart):
    with Runner.from_pretrained(bundle, engine="tensorrt") as runner:
        cudart.calls.clear()
        cudart.fail = {"cudaStreamSynchronize": (Code.cudaErrorIllegalAddress, frozenset([4]))}
        with pytest.raises(EngineError, match="lost to this process"):
            ask(runner, PROMPTS[0])
        cudart.fail |= {name: (Code.cudaErrorIllegalAddress, frozenset(range(99))) for name in ("cudaFree", "cudaFreeHost")}
        frees = cudart.calls["cudaFree"]
        sessions = [runner.session(name) for name in runner.loaded]
        lost = next(s for s in sessions if isinstance(s, TensorrtSession) and s.cuda.lost)
        lost.close()
        assert cudart.calls["cudaFree"] == frees
        cudart.fail = {}


def test_without_a_compiled_entry_the_message_says_how_to_make_one(bundles: dict[str, Path], trt: FakeTensorrt):
    with pytest.raises(
        EngineError, match=r"not compiled for tensorrt 11.4.1.2, SM 8.7, .*run `pgx compile .* --engine tensorrt`"
    ):
        Runner.from_pretrained(bundles["delta"], engine="tensorrt")


@pytest.mark.parametrize(
    ("module", "install"), [("tensorrt", r"pgxport\[tensorrt\]"), ("cuda.bindings", "pip install cuda-python")]
)
def test_a_missing_package_is_named(
    bundles: dict[str, Path], trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch, module: str, install: str
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=install):
        Runner.from_pretrained(bundles["delta"], engine="tensorrt")


def test_threads_are_not_taken_and_forgotten(bundle: Path):
    with pytest.raises(UsageError, match="--threads is for engine cpu"):
        Runner.from_pretrained(bundle, engine="tensorrt", threads=2)


def test_a_bundle_for_the_cpu_is_not_run_by_tensorrt(tiny_112: Path, trt: FakeTensorrt):
    with pytest.raises(EngineError, match="--target tensorrt"):
        Runner.from_pretrained(tiny_112, engine="tensorrt")


def test_a_plan_from_elsewhere_is_refused(bundle: Path, tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    (foreign / "decoder_step.plan").write_bytes(b"{}")
    with pytest.raises(PgxError, match="pgx loads only what it compiled itself") as raised:
        TensorrtSession(foreign / "decoder_step.plan", "tensorrt")
    assert raised.value.exit_code == 4


def test_the_embedded_model_has_local_layers_whose_mask_is_tried_here(bundle: Path):
    assert Bundle.open(bundle).manifest.local_window is not None


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """Answers of ONNX Runtime in float16."""
    path = tmp_path_factory.mktemp("half") / "cpu"
    export(ExportOptions(output=path, size="tiny", res=112, precision="fp16", parity=0))
    with Runner.from_pretrained(path) as cpu:
        return {prompt: ask(cpu, prompt) for prompt in PROMPTS}


@pytest.mark.parametrize("kind", ["delta", "update"])
def test_half_precision_caches_work_the_same(
    kind: str, tmp_path: Path, trt: FakeTensorrt, half_precision: dict[str, tuple[int, ...]]
):
    """Compared with float32 activations on the CPU: a trained model's answers do not depend on a rounding."""
    version, path = {"delta": "10.3", "update": "11"}[kind], tmp_path / "b"
    export(ExportOptions(output=path, size="tiny", res=112, precision="fp16", parity=0, target="tensorrt", trt=version))
    compile_bundle(CompileOptions(path))
    with Runner.from_pretrained(path, engine="tensorrt") as runner:
        assert runner.manifest.cache.dtype == "float16"
        assert {prompt: ask(runner, prompt) for prompt in PROMPTS} == half_precision


# The fakes, against the real modules


def test_cuda_has_the_calls_that_the_fake_has_with_as_many_arguments():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name, fake in vars(FakeCudart).items():
        if name.startswith("cuda") and callable(fake):
            first = getattr(runtime, name).__doc__.splitlines()[0]
            inside = first[first.index("(") + 1 : first.rindex(")")]
            parameters = [part for part in inside.split(",") if part.strip()]
            assert len(parameters) == fake.__code__.co_argcount - 1, first
    assert all(hasattr(runtime.cudaDeviceAttr, name) for name in vars(FakeCudart.cudaDeviceAttr))
    assert all(hasattr(runtime.cudaMemcpyKind, name) for name in vars(FakeCudart.cudaMemcpyKind))
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    assert all(int(getattr(runtime.cudaError_t, code.name)) == code for code in Code)


FAKES = {
    "Builder": Builder, "IBuilderConfig": Config, "ICudaEngine": Engine, "IExecutionContext": Context, "IOptimizationProfile": Profile,
    "OnnxParser": Parser,
}  # fmt: skip
# What the runner and the compiler read or call that is no method of a class of the fake.
ALSO = {
    "Builder": ["__init__(logger)"], "IBuilderConfig": ["progress_monitor"], "ICudaEngine": ["num_io_tensors", "num_optimization_profiles"],
    "ILogger": ["log(severity, msg)", "ERROR", "INTERNAL_ERROR"], "ITimingCache": ["serialize()"],
    "IProgressMonitor": ["phase_start(phase_name, parent_phase, num_steps)", "phase_finish(phase_name)", "step_complete(phase_name, step)"],
    "OnnxParser": ["__init__(network, logger)", "num_errors"], "ParserError": ["desc()", "node_name()", "node_operator()"],
    "Runtime": ["__init__(logger)", "deserialize_cuda_engine(serialized_engine)"], "DataType": sorted(DTYPES),
    "BuilderFlag": ["TF32"], "ExecutionContextAllocationStrategy": ["ON_PROFILE_CHANGE"], "MemoryPoolType": ["TACTIC_DRAM", "WORKSPACE"], "TensorIOMode": ["INPUT"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
}  # fmt: skip
OF_RTX = {
    "ICudaEngine": ["create_execution_context(runtime_config=)", "create_runtime_config()"], "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
    "IRuntimeConfig": ["cuda_graph_strategy", "set_execution_context_allocation_strategy(strategy=)"],
}  # fmt: skip


def lacking(real: dict[str, list[str]], wanted: dict[str, list[str]]) -> list[str]:
    return [f"{kind}.{member}" for kind, members in wanted.items() for member in members if member not in real[kind]]


def of_the_fake(kind: type) -> list[str]:
    """Its methods, as the bindings' signatures are written."""
    methods = {n: m for n, m in vars(kind).items() if callable(m) and n != "__init__"}
    return [
        f"{name}({', '.join(m.__code__.co_varnames[1 : m.__code__.co_argcount + m.__code__.co_kwonlyargcount])})"
        for name, m in methods.items()
    ]


@pytest.mark.parametrize("version", SIGNATURES)
def test_the_bindings_of_each_version_have_all_that_is_called_with_these_parameters(version: str):
    """Read from NVIDIA's own bindings of 10.3, 10.16 and 11.4 by tensorrt_signatures.py."""
    real = SIGNATURES[version]
    assert lacking(real, ALSO) == []
    plain = {kind: [line.replace("=", "") for line in lines] for kind, lines in real.items()}
    assert lacking(plain, {kind: of_the_fake(fake) for kind, fake in FAKES.items()}) == []


def test_tensorrt_rtx_has_all_that_is_called_with_these_parameters():
    trt = pytest.importorskip("tensorrt_rtx")
    real = signatures(trt)
    timings = ("create_timing_cache", "set_timing_cache")  # of kernels, which it does not time
    also = ALSO | {kind: ALSO.get(kind, []) + more for kind, more in OF_RTX.items()}
    del also["ITimingCache"]
    assert lacking(real, also) == []
    plain = {kind: [line.replace("=", "") for line in lines] for kind, lines in real.items()}
    fakes = {kind: [line for line in of_the_fake(fake) if not line.startswith(timings)] for kind, fake in FAKES.items()}
    assert lacking(plain, fakes) == []


def test_without_a_gpu_the_real_runtime_says_so():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="cudaStreamCreate failed with cudaError"):
        load_cuda().call("cudaStreamCreate")


def test_the_older_layout_of_cuda_python_will_do(monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(cudart=cudart))
    assert load_cuda().call("cudaDriverGetVersion") == 13020
