# SPDX-License-Identifier: Apache-2.0
"""Engine cuda on a machine without a GPU: ONNX Runtime's CPU stands in for one, and records all calls.

The behaviour and the messages of ONNX Runtime without a GPU are those of onnxruntime-gpu 1.31.1.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from pgxport.benchmarking.measure import Steps, open_bundle, worker
from pgxport.errors import EngineError, NumericError
from pgxport.machine.driver import Driver, Gpu
from pgxport.runners import ort as engine
from pgxport.runners.open_session import open_session
from pgxport.runners.runner import Runner

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
STRICT, RECORD = "session.disable_cpu_ep_fallback", "session.record_ep_graph_assignment_info"
DISABLED = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but fallback to "
    "CPU EP has been explicitly disabled by the user."
)
PROMPTS = ("caption en", "ocr", "detect ring ; cross")


@dataclass
class Gpu0:
    """A made-up GPU, which does on the CPU what ONNX Runtime does with a real one."""

    starts: bool = True
    on_cpu: tuple[tuple[str, str], ...] = ()  # operator and name of nodes that it has no kernel for
    opened: list[dict[str, Any]] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)
    bound: list[tuple[str, str]] = field(default_factory=list)  # what, name
    moved: list[str] = field(default_factory=list)  # arrays that went in at a run
    printed: str = ""
    fails: Exception | None = None

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", CUDA, CPU]

    def preload_dlls(self, *, directory: str) -> None:
        print(self.printed, end="")

    def InferenceSession(self, graph: Path, options: Any, *, providers: list[Any], enable_fallback: int = 1) -> Any:
        config = {key: options.get_session_config_entry(key) for key in (STRICT, RECORD)}
        self.opened.append({"graph": graph.stem, "providers": providers, "fallback": enable_fallback, **config})
        if self.fails:
            raise self.fails
        if config[STRICT] == "1" and (self.on_cpu or not self.starts):
            raise engine.Fail(DISABLED)
        return Session(self, graph)

    def allocate(self, shape: tuple[int, ...], number: int, device: str, device_id: int) -> Any:
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, number)
        if number != 16:
            value.numpy().view(np.uint8)[...] = 255  # whatever was there before: NaN in any float
        self.made.append((device, number, value))
        return value


class Session:
    def __init__(self, gpu: Gpu0, graph: Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.gpu, self.real = gpu, ort.InferenceSession(graph, options, providers=[CPU])

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self.gpu.starts else [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = {CUDA: [("Add", "a")], CPU: list(self.gpu.on_cpu)}
        return [
            SimpleNamespace(ep_name=ep, get_nodes=lambda of=of: [SimpleNamespace(op_type=o, name=n) for o, n in of])
            for ep, of in nodes.items()
        ]

    def io_binding(self) -> Any:
        gpu, binding = self.gpu, self.real.io_binding()

        class Binding:
            def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
                gpu.moved.append(name)
                binding.bind_cpu_input(name, array)

            def bind_output(self, name: str, device: str) -> None:
                gpu.bound.append((f"to {device}", name))
                binding.bind_output(name, device)

            def bind_ortvalue_input(self, name: str, value: Any) -> None:
                gpu.bound.append(("in", name))
                binding.bind_ortvalue_input(name, value)

            def bind_ortvalue_output(self, name: str, value: Any) -> None:
                gpu.bound.append(("out", name))
                binding.bind_ortvalue_output(name, value)

            def __getattr__(self, name: str) -> Any:
                return getattr(binding, name)

        made = Binding()
        made.real = binding  # type: ignore[attr-defined]
        return made

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.real.run_with_iobinding(binding.real)

    def run(self, outputs: Any, feeds: Any, options: Any = None) -> Any:
        return self.real.run(outputs, feeds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu0:
    """`pgxport.runners.ort` believes in a GPU with a driver for CUDA 13."""
    device = Gpu0()
    values = SimpleNamespace(
        ortvalue_from_shape_and_type=device.allocate,
        ortvalue_from_numpy=ort.OrtValue.ortvalue_from_numpy,
        ortvalue_from_numpy_with_onnx_type=ort.OrtValue.ortvalue_from_numpy_with_onnx_type,
    )
    monkeypatch.setattr(
        engine, "ort",
        SimpleNamespace(
            __version__="1.31.1", cuda_version="13.0", SessionOptions=ort.SessionOptions, RunOptions=ort.RunOptions, OrtValue=values,
            InferenceSession=device.InferenceSession, preload_dlls=device.preload_dlls,
            get_available_providers=device.get_available_providers, set_default_logger_severity=lambda level: None,
        ),
    )  # fmt: skip
    monkeypatch.setattr(engine, "ask_driver", lambda: Driver((13, 2), (Gpu("NVIDIA L4", (8, 9), 24 << 30, False),)))
    monkeypatch.setattr(engine, "missing_libraries", lambda names: [])
    return device


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model for a GPU, in the types that are computed there, and for the CPU."""
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions
    from pgxport.hub.locate import TINY

    if not (TINY / "tiny-112").is_dir():
        pytest.skip("not embedded")
    folder = tmp_path_factory.mktemp("cuda")
    rows = {"fp16": ("fp16", "cuda"), "bf16": ("bf16", "cuda"), "cpu": ("fp32", "cpu")}
    return {
        name: export(ExportOptions(output=folder / name, size="tiny", res=112, precision=precision, target=target)).path
        for name, (precision, target) in rows.items()
    }


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Path]) -> list[tuple[int, ...]]:
    with Runner.from_pretrained(bundles["cpu"], threads=1) as runner:
        return [runner.answer(picture(), prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]


def picture() -> Image.Image:
    from pgxport.models.tiny import scenes

    return scenes.draw("test", 3).image


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_answers_are_those_of_the_cpu(gpu: Gpu0, bundles: dict[str, Path], expected: list[tuple[int, ...]], low_memory: bool):
    with Runner.from_pretrained(bundles["fp16"], engine="cuda", low_memory=low_memory) as runner:
        assert [runner.answer(picture(), prompt, max_new_tokens=12).token_ids for prompt in PROMPTS] == expected
    grows = [settings.get("arena_extend_strategy") for opened in gpu.opened for _, settings in opened["providers"]]
    assert set(grows) == {"kSameAsRequested" if low_memory else None}


def test_sessions_are_opened_for_cuda_alone_and_without_a_way_back(gpu: Gpu0, bundles: dict[str, Path]):
    Runner.from_pretrained(bundles["fp16"], engine="cuda").close()
    assert [opened["graph"] for opened in gpu.opened] == ["vision_encoder", "projector", "decoder_step", "mask_decoder"]
    for opened in gpu.opened:
        assert [name for name, _ in opened["providers"]] == [CUDA]
        assert (opened["fallback"], opened[STRICT], opened[RECORD]) == (0, "1", "1")


def test_a_step_moves_its_token_in_and_its_logits_out_and_no_cache(gpu: Gpu0, bundles: dict[str, Path]):
    with Runner.from_pretrained(bundles["fp16"], engine="cuda") as runner:
        m = runner.manifest
        decoder = runner.decoder(30)
        width, buffers = m.token_table.shape[1], 2 * m.cache.layers
        assert [(device, number) for device, number, _ in gpu.made] == [("cuda", 10)] * buffers  # 10: FLOAT16
        assert all(not value.numpy().any() for _, _, value in gpu.made), "a buffer holds what was in the memory before"
        bound = list(gpu.bound)
        assert [name for what, name in bound if what == "to cpu"] == ["logits"]
        for name in decoder.cache.arrays:
            assert bound.count(("in", name)) == bound.count(("out", name.replace("past_key_values", "present"))) == 1
        random = np.random.default_rng(0)
        decoder.feed(random.standard_normal((1, 20, width), np.float32))
        for _ in range(3):
            gpu.moved.clear()
            decoder.feed(random.standard_normal((1, 1, width), np.float32))
            assert set(gpu.moved) <= {"inputs_embeds", "seqlens_k", "total_sequence_length", "local_bias"}
            assert len(gpu.moved) == len(set(gpu.moved))
        assert gpu.bound == bound, "something was bound again"
        assert len(gpu.made) == buffers
        written = decoder.cache.arrays["past_key_values.0.key"]
        assert written.dtype == np.float16
        assert written[0, :, :23].any(axis=-1).all()
        assert not written[0, :, 23:].any()
        assert decoder.cache.nbytes == buffers * 30 * m.cache.kv_heads * m.cache.head_dim * 2


def test_a_bfloat16_cache_is_made_without_a_numpy_that_knows_it(gpu: Gpu0):
    binding = SimpleNamespace(
        bind_output=lambda *a: None, bind_ortvalue_input=lambda *a: None, bind_ortvalue_output=lambda *a: None
    )
    name = "past_key_values.0.key"
    inputs = [SimpleNamespace(name=name, type="tensor(bfloat16)")]
    session = SimpleNamespace(io_binding=lambda: binding, get_inputs=lambda: inputs)
    cache = engine.OrtCache(session, {name: (1, 2, 5, 4)}, ["logits", "present.0.key"], engine.CUDA.device)
    ((device, number, value),) = gpu.made
    assert (device, number, value.data_type()) == ("cuda", 16, "tensor(bfloat16)")
    assert cache.nbytes == 1 * 2 * 5 * 4 * 2
    assert cache.arrays[name].dtype == np.uint16
    assert not cache.arrays[name].any()


def test_the_decoder_can_be_measured_there(gpu: Gpu0, bundles: dict[str, Path]):
    request = worker("x", str(bundles["fp16"]), Steps(pasts=(20,), steps=2), engine="cuda", threads=1).request
    subject = open_bundle(request)
    assert subject.repeat(warm_up=False)["step@20"] > 0
    assert subject.facts["cache_bytes"] > 0


def test_a_build_without_cuda_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(EngineError, match=r'pip uninstall onnxruntime onnxruntime-gpu, then pip install "pgxport\[gpu\]"'):
        open_session("cuda", tmp_path / "g.onnx")


def test_without_a_driver_no_session_is_tried(gpu: Gpu0, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def absent() -> Driver:
        raise EngineError("there is no NVIDIA driver here")

    monkeypatch.setattr(engine, "ask_driver", absent)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")
    assert gpu.opened == []


def test_a_driver_older_than_the_build_is_refused(gpu: Gpu0, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "ask_driver", lambda: Driver((12, 6), ()))
    with pytest.raises(EngineError, match=r"built for CUDA 13, and the NVIDIA driver runs CUDA 12\.6"):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")


def test_missing_libraries_are_named(gpu: Gpu0, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "missing_libraries", lambda names: [f"{name}: cannot open" for name in names if "cudnn" in name])
    with pytest.raises(EngineError, match=r'libcudnn\.so\.9: cannot open; pip install "onnxruntime-gpu\[cuda,cudnn\]"'):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")


def test_nodes_that_went_to_the_cpu_are_named(gpu: Gpu0, bundles: dict[str, Path]):
    gpu.on_cpu = (("ConvTranspose", "decoder.4"), *(("If", f"n{i}") for i in range(6)))
    with pytest.raises(
        EngineError, match=r"no CUDAExecutionProvider kernel for ConvTranspose 'decoder\.4', If 'n0'.* and 2 more of"
    ):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")
    assert [opened[STRICT] for opened in gpu.opened] == ["1", "0"]  # the second names the nodes


def test_a_provider_that_does_not_start_is_no_fault_of_the_graph(gpu: Gpu0, bundles: dict[str, Path]):
    gpu.starts = False
    with pytest.raises(EngineError, match="does not start, though the driver and its libraries do"):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        (
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=orin ; expr=cudaMalloc((void**)&p, size);",
            NumericError,
            "close other",
        ),
        (
            "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1185415168",
            NumericError,
            "fewer",
        ),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", NumericError, "close other"),
        ("CUDA failure 700: an illegal memory access was encountered", EngineError, "700"),
        ("cuDNN is unavailable for CUDA Execution Provider: dlsym failed for cudnnCreate", EngineError, "cudnnCreate"),
    ],
)
def test_what_fails_on_a_gpu_is_not_blamed_on_the_bundle(
    gpu: Gpu0, bundles: dict[str, Path], message: str, kind: type[Exception], says: str
):
    gpu.fails = engine.Fail(message)
    with pytest.raises(kind, match=says):
        Runner.from_pretrained(bundles["fp16"], engine="cuda")


def test_what_the_engine_prints_stays_off_stdout(gpu: Gpu0, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    gpu.printed = "Failed to load libcufft.so.12\n"
    open_session("cuda", bundles["fp16"] / "projector.onnx").close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"precision": "fp32"}, "computes in bfloat16 and float16, not in float32; choose --precision fp16 or bf16"),
        ({"precision": "w8a8"}, "does not multiply dynamic activations by 8-bit weights"),
    ],
)
def test_what_has_no_kernel_on_a_gpu_is_not_exported(tmp_path: Path, flags: dict[str, str], says: str):
    pytest.importorskip("onnx_ir")
    from pgxport.errors import UsageError
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    with pytest.raises(UsageError, match=says):
        export(ExportOptions(output=tmp_path / "b", size="tiny", res=112, target="cuda", **flags))


def test_masks_of_a_bfloat16_bundle_stay_in_float32(bundles: dict[str, Path]):
    """onnxruntime-gpu 1.31.1 has a ConvTranspose in float16, float and double, and none in bfloat16."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundles["bf16"] / "mask_decoder.onnx", load_external_data=False)
    assert {i.data_type for i in model.graph.initializer if len(i.dims) == 4} == {onnx.TensorProto.FLOAT}
