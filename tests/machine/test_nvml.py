# SPDX-License-Identifier: Apache-2.0
"""NVML's calls, and GPU memory by process, on a library made up for it."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import FakeGpu, FakeNvml
from made_up_report import device, row

from pgxport.benchmarking import bench
from pgxport.benchmarking.measure import WholeAnswers
from pgxport.machine.nvml import INSUFFICIENT_SIZE, LIBRARY, NOT_AVAILABLE, REASONS, SM_CLOCK, Nvml, ProcessInfo, find_nvml
from pgxport.reporting import asking, files, tables
from pgxport.reporting.asking import BundleSubject
from pgxport.reporting.schema import Report


def holding(*gpus: Any) -> FakeNvml:
    """A library whose GPUs tell their processes; None for a GPU that does not."""
    return FakeNvml(*(FakeGpu(processes=processes) for processes in gpus))


@pytest.mark.parametrize(
    ("gpus", "held"),
    [
        ([[(7, 100), (8, 5)]], 100),
        ([[(7, 100)], [(9, 1), (7, 20)]], 120),
        ([None, [(7, 20)]], 20),  # one that does not tell
        ([[(8, 5)]], None),  # a container, where the numbers are others
        ([[(7, None)]], None),
        ([[(7, None)], [(7, 3)]], None),  # half of it is not all of it
        ([None], None),
        ([], None),
    ],
)
def test_a_process_holds_what_all_gpus_say(gpus: list[Any], held: int | None):
    assert Nvml(holding(*gpus)).held_by(7) == held


def test_processes_that_start_between_the_two_calls_have_room():
    library = holding([(7, 100)])
    plain = library.nvmlDeviceGetComputeRunningProcesses_v3

    def more_each_time(device: Any, count: Any, infos: Any) -> int:
        library.gpus[0].processes = [*(library.gpus[0].processes or ()), (8, 5)]
        return plain(device, count, infos)

    library.nvmlDeviceGetComputeRunningProcesses_v3 = more_each_time  # type: ignore[method-assign]
    assert Nvml(library).held_by(7) == 100


def test_a_library_that_lacks_calls_tells_nothing():
    """As a Jetson's."""
    whole = holding([(7, 100)])
    names = ("nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2")
    nvml = Nvml(SimpleNamespace(**{name: getattr(whole, name) for name in names}))
    assert (nvml.clock_mhz(), nvml.slowed_by(), nvml.millijoules(), nvml.held_by(7)) == (None, (), [], None)


def test_a_process_is_laid_out_as_in_nvml_h():
    """nvmlProcessInfo_t: unsigned int, unsigned long long, two unsigned int."""
    assert ctypes.sizeof(ProcessInfo) == 24
    fields = (ProcessInfo.pid, ProcessInfo.used_gpu_memory, ProcessInfo.gpu_instance_id, ProcessInfo.compute_instance_id)
    assert [(field.offset, field.size) for field in fields] == [(0, 4), (8, 8), (16, 4), (20, 4)]


def test_the_constants_and_the_calls_are_those_of_the_library():
    pynvml = pytest.importorskip("pynvml")
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    assert set(REASONS) == {getattr(pynvml, f"nvmlClocksEventReason{name}") for name in names}
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_ERROR_INSUFFICIENT_SIZE) == (SM_CLOCK, INSUFFICIENT_SIZE)
    assert pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value == NOT_AVAILABLE


def test_the_driver_of_this_machine_has_every_call():
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        pytest.skip("no NVIDIA driver")
    assert all(hasattr(library, name) for name in vars(FakeNvml) if name.startswith("nvml"))


def test_it_is_looked_for_where_the_engine_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    library = holding([])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert find_nvml("cpu") is None
    nvml = find_nvml("cuda")
    assert nvml
    assert library.open == 1
    nvml.close()
    assert library.open == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(init=9))  # NVML_ERROR_DRIVER_NOT_LOADED
    assert find_nvml("cuda") is None

    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert find_nvml("cuda") is None


def test_a_report_shows_the_most_or_says_not_measured():
    made = device(row("none"), row("some", target="cuda", peak_vram=5_600_000_000))
    table = tables.bundles(made)
    at = table.head.index("peak VRAM, MB")
    assert [line[at] for line in table.rows] == ["not measured", "5600"]
    lines = files.results_csv(Report(pgxport="0", created="now", devices=(made,))).splitlines()
    at = lines[0].split(",").index("peak_vram_bytes")
    assert [line.split(",")[at] for line in lines[1:]] == ["", "5600000000"]


def test_what_an_answer_left_held_is_told_with_it(tiny_112: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    import os

    monkeypatch.setattr(asking, "find_nvml", lambda engine: Nvml(holding([(os.getpid(), 123)])))
    subject = BundleSubject({"bundle": str(tiny_112), "engine": "cpu", "threads": 1})
    found = subject.ask({"image": {"scene": 0}, "prompt": "caption en", "max_new_tokens": 2})
    assert found["vram"] == 123


def test_pgx_bench_looks_at_the_worker(tiny_112: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    asked = list[int]()

    class Told(Nvml):
        def held_by(self, process: int) -> int | None:
            asked.append(process)
            return 42

    monkeypatch.setattr(bench, "find_nvml", lambda engine: Told(holding([])))
    done = bench.bench([tiny_112], WholeAnswers(4, 2), repetitions=1, threads=1)
    assert done.measurements[0].facts["peak_vram"] == 42
    assert len(asked) == 1
