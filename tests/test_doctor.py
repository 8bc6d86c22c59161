# SPDX-License-Identifier: Apache-2.0
"""The doctor trusts an engine only once it has run a graph, and advises only what this machine lacks."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt import FakeCudart, FakeTensorrt
from machines import MACHINES, tree

from pgxport import doctor
from pgxport.errors import EngineError
from pgxport.runners import open_session as open_session_module
from pgxport.runners.open_session import PROBE, open_session


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, to be changed by the test."""
    packages = dict.fromkeys((*doctor.BASE, *(p for extra, _ in doctor.EXTRAS.values() for p in extra)), "1.0")
    del packages["onnxruntime-gpu"]  # which clashes with onnxruntime

    def version(package: str) -> str:
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return packages


def test_a_complete_installation_needs_no_advice(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(open_session_module, "open_session", lambda engine, graph: Engine([42.0]))
    facts = doctor.examine(tmp_path, load=no_driver)  # whatever the processor here has or lacks
    assert facts["advice"] == []
    assert facts["engines"] == {"cpu": {"works": True, "reason": ""}}
    assert doctor.render(facts).endswith("try: pgx demo")
    json.dumps(facts)


@pytest.mark.parametrize("extra", doctor.WANTED)
def test_what_is_missing_is_named_with_the_command_that_installs_it(installed: dict[str, str], extra: str, tmp_path: Path):
    (missing, *_), _ = doctor.EXTRAS[extra]
    del installed[missing]
    facts = doctor.examine(tmp_path, load=no_driver)
    assert not facts["extras"][extra]["complete"]
    assert [f'pip install "pgxport[{extra}]"' in advice for advice in facts["advice"]] == [True]
    assert f"{missing} MISSING" in doctor.render(facts)


def test_the_gpu_build_serves_the_cpu_too_and_is_not_doubled(installed: dict[str, str], tmp_path: Path):
    installed["onnxruntime-gpu"] = installed.pop("onnxruntime")
    assert doctor.examine(tmp_path, load=no_driver)["advice"] == []


def test_two_builds_of_onnxruntime_are_reported(installed: dict[str, str]):
    installed["onnxruntime-gpu"] = "1.0"
    assert "overwrite each other" in doctor.examine()["advice"][0]


def test_an_engine_that_cannot_open_is_reported_with_its_reason(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    def refuse(engine: str, graph: object) -> None:
        raise EngineError("onnxruntime 1.0 is too old")

    monkeypatch.setattr(open_session_module, "open_session", refuse)
    facts = doctor.examine()
    assert facts["engines"]["cpu"] == {"works": False, "reason": "onnxruntime 1.0 is too old"}
    assert "engine cpu: onnxruntime 1.0 is too old" in doctor.render(facts)
    assert "pgx demo" not in doctor.render(facts).splitlines()[-1]


def test_an_engine_that_computes_something_else_does_not_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_session_module, "open_session", lambda engine, graph: Engine([41.0]))
    facts = doctor.examine()["engines"]["cpu"]
    assert not facts["works"]
    assert "41.0" in facts["reason"]


def test_the_probe_is_a_graph_that_the_engine_really_runs():
    pytest.importorskip("onnxruntime")
    assert doctor.examine()["engines"]["cpu"]["works"]
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(PROBE), full_check=True)


def test_an_onnxruntime_of_another_time_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "__version__", "1.20.1")
    with pytest.raises(EngineError, match=r"1\.20\.1 is too old"):
        open_session("cpu", tmp_path / "graph.onnx")


def on(machine: str, root: Path, gpu: tuple[str, int, tuple[int, int], bool] | None = None) -> dict[str, Any]:
    """What the doctor finds on one of the recorded machines."""
    return doctor.examine(tree(root, MACHINES[machine]), load=no_driver if gpu is None else driver(*gpu))


def no_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def driver(name: str, memory: int, sm: tuple[int, int], integrated: bool, cuda: int = 13000) -> Callable[[str], Any]:
    """A libcuda with one GPU; attributes 75 and 76 of cuda.h: compute capability, 18: integrated."""
    attributes = {75: sm[0], 76: sm[1], 18: int(integrated)}

    def put(value: int) -> Callable[..., int]:
        def call(pointer: Any, *rest: Any) -> int:
            pointer._obj.value = value
            return 0

        return call

    def attribute(pointer: Any, which: int, device: Any) -> int:
        pointer._obj.value = attributes[which]
        return 0

    def called(buffer: Any, length: int, device: Any) -> int:
        buffer.value = name.encode()
        return 0

    library = SimpleNamespace(
        cuInit=lambda flags: 0, cuDriverGetVersion=put(cuda), cuDeviceGetCount=put(1), cuDeviceGet=put(0), cuDeviceGetName=called,
        cuDeviceTotalMem_v2=put(memory), cuDeviceGetAttribute=attribute,
    )  # fmt: skip
    return lambda file: library


ORIN = ("Orin", 7_990_194_176, (8, 7), True)
THOR = ("NVIDIA Thor", 131_881_054_208, (11, 0), True)
ADA = ("NVIDIA GeForce RTX 4090", 25_757_220_864, (8, 9), False)


def without(installed: dict[str, str], *names: str) -> None:
    for name in names:
        installed.pop(name, None)


def test_an_orin_nano_is_told_what_it_is_and_what_to_install(installed: dict[str, str], tmp_path: Path):
    without(installed, "tensorrt", "cuda-python")
    facts = on("orin-nano", tmp_path, ORIN)
    text = doctor.render(facts)
    assert (
        "Orin Nano Engineering Reference Developer Kit Super, JetPack 6.2 (Jetson Linux 36.4.3); pgx plan --board orin-nano"
        in text
    )
    assert "power mode: 25W (1), clocks moving with the load" in text
    assert "GPU: Orin, compute capability 8.7, shares the system's memory" in text
    assert "memory: 5.74 GB available, largest free block 4.19 MB, swap 0 B, zram 1.33 GB" in text
    assert "libraries: cuda 12.6.11, cudnn 9.3.0, tensorrt 10.3.0" in text
    assert "pgx export … --target tensorrt --trt 10.3 --precision fp16, w8a8-static, int4" in text
    advice = "\n".join(facts["advice"])
    for part in (
        '"cuda-python~=12.6"',
        "docker/Dockerfile.jetpack6",
        "sudo jetson_clocks",
        "25W (1) is not the fastest",
        "no swap on a disk",
    ):
        assert part in advice
    json.dumps(facts)


def test_a_thor_with_its_memory_in_pieces_is_warned(installed: dict[str, str], tmp_path: Path):
    facts = on("thor", tmp_path, THOR)
    advice = "\n".join(facts["advice"])
    assert "largest free block of memory has 32 KiB" in advice
    assert "being throttled: gpu-throttle-alert" in advice
    assert "jetson_clocks" not in advice, "its clocks are held"
    assert "not the fastest" not in advice, "it is MAXN"
    assert "no swap" not in advice
    assert "--trt 10.3 --precision bf16, fp8, int4" in doctor.render(facts)


def test_a_desktop_gpu_is_offered_both_engines(installed: dict[str, str], tmp_path: Path):
    without(installed, "tensorrt", "cuda-python")
    facts = on("desktop", tmp_path, ADA)
    text = doctor.render(facts)
    assert "GPU: NVIDIA GeForce RTX 4090, compute capability 8.9, 25.8 GB" in text
    assert "NVIDIA driver 580.65.06, for CUDA up to 13.0" in text
    assert 'pip install "pgxport[gpu]" "onnxruntime-gpu[cuda,cudnn]"' in text
    assert "no VNNI" in text
    assert "jetson" not in text.lower()
    assert set(facts["engines"]) == {"cpu", "cuda"}


def test_a_server_without_a_gpu_misses_no_gpu(installed: dict[str, str], tmp_path: Path):
    without(installed, "tensorrt", "cuda-python", "ray")
    facts = on("server", tmp_path)
    assert facts["advice"] == []
    assert "no NVIDIA driver here" in facts["driver"]["reason"]
    assert "--target cpu --precision w8a8" in doctor.render(facts)


def test_tensorrt_of_either_name_counts(installed: dict[str, str], tmp_path: Path):
    without(installed, "tensorrt", "cuda-python")
    installed |= {"tensorrt-cu13-bindings": "10.16.1.11", "cuda-bindings": "13.2.0", "tensorrt-rtx-cu13": "1.7.1.116"}
    facts = on("server", tmp_path)
    assert facts["extras"]["tensorrt"]["complete"]
    assert (facts["libraries"]["tensorrt"], facts["libraries"]["tensorrt_rtx"]) == ("10.16.1.11", "1.7.1.116")


def test_looking_writes_nothing(installed: dict[str, str], tmp_path: Path):
    root = tree(tmp_path, MACHINES["orin-nano"])
    before = sorted((file, file.stat().st_mtime_ns) for file in root.rglob("*"))
    doctor.examine(root, load=no_driver)
    assert sorted((file, file.stat().st_mtime_ns) for file in root.rglob("*")) == before


def test_nothing_is_started(installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("the doctor started a program")

    for name in ("system", "popen", "posix_spawn", "fork", "execv"):
        monkeypatch.setattr(os, name, forbidden)
    doctor.examine(tree(tmp_path, MACHINES["thor"]), load=driver(*THOR))


class Engine:
    def __init__(self, gives: list[float]):
        self.gives = gives

    def run(self, feeds: Any) -> Any:
        import numpy as np

        return {"y": np.array(self.gives, np.float32)}

    def close(self) -> None:
        pass


# TensorRT


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    fake = FakeTensorrt(FakeCudart())
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=fake.cudart))
    return fake


def test_tensorrt_is_believed_once_a_runtime_of_it_starts(trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = on("orin-nano", tmp_path, ORIN)
    assert facts["engines"]["tensorrt"] == {"works": True, "reason": ""}
    assert "engine tensorrt: starts on the GPU" in doctor.render(facts)

    def refuse(log: Any) -> None:
        log.log("error", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", refuse)
    assert doctor.examine(tmp_path, load=driver(*ORIN))["engines"]["tensorrt"] == {
        "works": False, "reason": "tensorrt 11.4.1.2 does not start: CUDA initialization failure with error: 35",
    }  # fmt: skip


def test_a_board_whose_libraries_have_no_bindings_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "on a Jetson JetPack's own TensorRT" in on("orin-nano", tmp_path, ORIN)["engines"]["tensorrt"]["reason"]
