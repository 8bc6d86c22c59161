# SPDX-License-Identifier: Apache-2.0
"""GPU memory by process, as a library like nvidia-ml-py tells it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_report import device, row

from pgxport.benchmarking import bench
from pgxport.benchmarking.measure import Answers
from pgxport.machine.nvml import Vram, find_vram
from pgxport.reporting import asking, files, tables
from pgxport.reporting.asking import BundleSubject
from pgxport.reporting.schema import Report


class NVMLError(Exception):
    pass


class Library:
    """Two GPUs, and who holds how much of each."""

    NVMLError = NVMLError

    def __init__(self, *gpus: Sequence[tuple[int, int | None]] | None, driver: bool = True):
        self.gpus, self.driver, self.open = gpus, driver, 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        found = self.gpus[handle]
        if found is None:
            raise NVMLError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in found]


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
    assert Vram(Library(*gpus)).held_by(7) == held


def test_the_names_are_those_of_the_library():
    pynvml = pytest.importorskip("pynvml")
    asked = [name for name in vars(Library) if name.startswith("nvml")] + ["NVMLError"]
    assert all(hasattr(pynvml, name) for name in asked)
    assert {"pid", "usedGpuMemory"} <= {name for name, _ in pynvml.c_nvmlProcessInfo_t._fields_}


def test_it_is_looked_for_where_the_engine_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", library := Library([]))
    assert find_vram("cpu") is None
    found = find_vram("cuda")
    assert found
    assert library.open == 1
    found.close()
    assert library.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", Library(driver=False))
    assert find_vram("cuda") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_vram("cuda") is None


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

    monkeypatch.setattr(asking, "find_vram", lambda engine: Vram(Library([(os.getpid(), 123)])))
    subject = BundleSubject({"bundle": str(tiny_112), "engine": "cpu", "threads": 1})
    found = subject.ask({"image": {"scene": 0}, "prompt": "caption en", "max_new_tokens": 2})
    assert found["vram"] == 123


def test_pgx_bench_looks_at_the_worker(tiny_112: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    asked = list[int]()

    class Told(Vram):
        def held_by(self, process: int) -> int | None:
            asked.append(process)
            return 42

    monkeypatch.setattr(bench, "find_vram", lambda engine: Told(Library([])))
    done = bench.bench([tiny_112], Answers(4, 2), repetitions=1, threads=1)
    assert done.measurements[0].facts["peak_vram"] == 42
    assert len(asked) == 1
