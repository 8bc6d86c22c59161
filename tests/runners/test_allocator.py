# SPDX-License-Identifier: Apache-2.0
"""Blocks that are freed go back to the system, and sessions ask for that while they load."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from pgxport.errors import IntegrityError
from pgxport.runners import allocator, ort
from pgxport.runners.runner import Runner

# Once a block of 24 MB is freed, glibc takes the next ones of 8 MB from its heap, with others between them.
FREED = """
import ctypes, sys
from pathlib import Path
from pgxport.runners.allocator import map_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if len(sys.argv) > 1:
    map_blocks(int(sys.argv[1]))
libc.free(libc.malloc(24 << 20))
large = []
for _ in range(16):
    large.append(libc.malloc(8 << 20))
    ctypes.memset(large[-1], 1, 8 << 20)
    libc.malloc(100 << 10)
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
full = held()
for block in large:
    libc.free(block)
print(full - held())
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def given_back(*threshold: int, **settings: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS} | settings
    command = [sys.executable, "-c", FREED, *map(str, threshold)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@GLIBC
def test_freed_blocks_go_back_to_the_system():
    assert given_back() < 16 << 20  # what pgx changes
    assert given_back(1 << 16) > 120 << 20
    assert given_back(1 << 25) < 16 << 20  # as it was


@GLIBC
def test_a_process_that_was_started_with_settings_of_its_own_keeps_them():
    assert given_back(1 << 16, MALLOC_MMAP_THRESHOLD_="33554432") < 16 << 20


@pytest.mark.parametrize("low_memory", [False, True])
def test_sessions_give_back_while_they_load(a_bundle: Path, monkeypatch, low_memory):
    asked: list[int] = []
    monkeypatch.setattr(ort, "map_blocks", asked.append)
    with Runner.from_pretrained(a_bundle, low_memory=low_memory) as runner:
        runner.session("projector")
    loaded = 1 if low_memory else len(runner.manifest.graphs)
    assert asked == [ort.LOADING, ort.RUNNING_SMALL if low_memory else ort.RUNNING] * loaded


def test_a_session_that_does_not_load_leaves_no_setting_behind(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(ort, "map_blocks", asked.append)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(IntegrityError):
        ort.OrtSession(tmp_path / "broken.onnx")
    assert asked == [ort.LOADING, ort.RUNNING]
