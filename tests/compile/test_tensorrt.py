# SPDX-License-Identifier: Apache-2.0
"""`pgx compile`: refusals, entries of the engine cache, and real builds by TensorRT-RTX without a GPU."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from fake_tensorrt import Code, FakeCudart, FakeTensorrt

from pgxport.bundle.reader import Bundle
from pgxport.compile import memory
from pgxport.compile.compile import compile_bundle
from pgxport.compile.options import Compiled, CompileOptions
from pgxport.compile.tensorrt import profiles
from pgxport.errors import EngineError, InputError, IntegrityError, NumericError, PgxError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.runners.engine_cache import EngineKey, entry_folder, entry_key, open_plan, read_entry
from pgxport.runners.tensorrt_library import compiled

GRAPHS = ["decoder_step", "mask_decoder", "projector", "vision_encoder"]
has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def for_10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "b10"
    return export(ExportOptions(output=output, size="tiny", res=112, target="tensorrt", trt="10.3", parity=0)).path


@pytest.fixture(scope="module")
def for_11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "b11"
    return export(ExportOptions(output=output, size="tiny", res=112, target="tensorrt", trt="11", parity=0)).path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PGX_ENGINE_CACHE", str(tmp_path / "engines"))
    return tmp_path / "engines"


def install(patch: pytest.MonkeyPatch) -> FakeTensorrt:
    """A TensorRT to import."""
    fake = FakeTensorrt(FakeCudart())
    patch.setitem(sys.modules, "tensorrt", fake)
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=fake.cudart))
    return fake


@pytest.fixture
def trt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, for_10: Path) -> Compiled:
    """An entry that tests only copy."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return compile_bundle(CompileOptions(for_10, cache=tmp_path_factory.mktemp("made") / "engines"))


@pytest.fixture
def made(made_once: Compiled, cache: Path, trt: FakeTensorrt) -> Compiled:
    """A compiled bundle in the test's own cache."""
    shutil.copytree(made_once.folder.parent, cache)
    return replace(made_once, folder=cache / made_once.folder.name)


def test_the_second_compile_finds_what_the_first_built(trt: FakeTensorrt, for_10: Path):
    made = compile_bundle(CompileOptions(for_10))
    assert sorted(trt.builds) == GRAPHS
    assert (made.built, sorted(made.entry.files)) == (True, [f"{g}.plan" for g in GRAPHS])
    again = compile_bundle(CompileOptions(for_10))
    assert (again.built, again.entry, len(trt.builds)) == (False, made.entry, 4)


def test_other_flags_replace_the_plans(made: Compiled, trt: FakeTensorrt, for_10: Path):
    other = compile_bundle(CompileOptions(for_10, workspace=64))
    assert (other.built, other.folder, len(trt.builds)) == (True, made.folder, 4)
    assert other.entry.flags["workspace"] == 64 << 20
    assert os.listdir(made.folder.parent).count(made.folder.name) == 1


def test_float32_is_not_rounded_to_the_ten_bits_that_tensorrt_would_take(trt: FakeTensorrt, for_10: Path):
    made = compile_bundle(CompileOptions(for_10))
    assert trt.flags == [set()] * len(GRAPHS)
    assert made.entry.flags["tf32"] == 0


def test_whatever_a_plan_depends_on_gives_it_another_key():
    machine, flags = EngineKey("tensorrt", "11.4", "8.7", "13020", "13020 580.1"), {"workspace": 1}
    keys = {
        entry_key("a" * 64, machine, flags),
        entry_key("b" * 64, machine, flags),
        entry_key("a" * 64, machine, {"workspace": 2}),
    }
    for field in ("engine", "version", "sm", "cuda", "driver"):
        keys.add(entry_key("a" * 64, EngineKey(**{**vars(machine), field: "another"}), flags))
    assert len(keys) == 8


@pytest.mark.parametrize("changed", ["__version__", "minor", "driver", "bundle"])
def test_another_version_device_driver_or_bundle_is_not_compiled_yet(
    made: Compiled, trt: FakeTensorrt, for_10: Path, for_11: Path, changed: str, monkeypatch: pytest.MonkeyPatch
):
    if changed == "__version__":
        trt.__version__ = "11.5.0"
    elif changed == "minor":
        trt.cudart.attributes["minor"] = 9
    elif changed == "driver":
        monkeypatch.setattr(FakeCudart, "cudaDriverGetVersion", lambda self: (Code.cudaSuccess, 13030))
    bundle = Bundle.open(for_11 if changed == "bundle" else for_10)
    with pytest.raises(EngineError, match="is not compiled"):
        compiled(bundle, "tensorrt")


def test_the_cache_is_nobody_elses(made: Compiled):
    for path in (made.folder.parent, made.folder):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (*made.folder.iterdir(), made.folder.parent / "seal.key"):
        assert path.stat().st_mode & 0o777 == 0o600


# What may have happened to an entry, and a word of the refusal.


def _flip(entry: Path) -> None:
    file = entry / "decoder_step.plan"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _foreign(entry: Path) -> None:
    (entry / "decoder_step.plan").write_bytes(b"{}")
    content = json.loads((entry / "entry.json").read_text())
    content["files"]["decoder_step.plan"] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "size": 2}
    (entry / "entry.json").write_text(json.dumps(content))


def _linked(entry: Path) -> None:
    (entry / "decoder_step.plan").rename(entry.parent / "elsewhere")
    (entry / "decoder_step.plan").symlink_to(entry.parent / "elsewhere")


def _moved_in(entry: Path) -> None:
    entry.rename(entry.parent / "real")
    entry.symlink_to(entry.parent / "real")


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (_flip, "sha256"),
    "a foreign plan, listed": (_foreign, "seal"),
    "a truncated plan": (lambda e: os.truncate(e / "projector.plan", 5), "5 bytes"),
    "a missing plan": (lambda e: (e / "projector.plan").unlink(), "projector.plan"),
    "one more file": (lambda e: (e / "more.plan").write_bytes(b""), "not listed"),
    "a symbolic link": (_linked, "link"),
    "a hard link": (lambda e: os.link(e / "projector.plan", e.parent / "other"), "link"),
    "a pipe": (lambda e: ((e / "projector.plan").unlink(), os.mkfifo(e / "projector.plan")), "plain"),  # type: ignore[func-returns-value]
    "a link for a folder": (_moved_in, "plain folder"),
    "others may write the entry": (lambda e: e.chmod(0o777), "others may use it"),
    "others may write a plan": (lambda e: (e / "projector.plan").chmod(0o666), "others may use it"),
    "others may write the cache": (lambda e: e.parent.chmod(0o777), "others may use it"),
    "another cache's seal": (lambda e: (e.parent / "seal.key").write_bytes(bytes(32)), "another machine"),
    "no seal": (lambda e: (e.parent / "seal.key").unlink(), "missing"),
    "no list": (lambda e: (e / "entry.json").unlink(), "missing"),
    "not a list": (lambda e: (e / "entry.json").write_bytes(b"[]"), "entry.json"),
    "an endless list": (lambda e: (e / "entry.json").write_bytes(b" " * (2 << 20)), "bytes"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_entry_is_refused_before_tensorrt_sees_it(made: Compiled, trt: FakeTensorrt, for_10: Path, what: str):
    tamper, says = TAMPERED[what]
    tamper(made.folder)
    trt.Runtime = None  # type: ignore[assignment]  so that nothing can be deserialized
    with pytest.raises(IntegrityError, match=says) as raised:  # noqa: PT012
        plans = compiled(Bundle.open(for_10), "tensorrt")
        with open_plan(plans["decoder_step"]):
            pass
    assert "pgx loads only what it compiled itself" in str(raised.value)
    assert raised.value.exit_code == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_entry_of_another_user_is_refused(made: Compiled):
    os.chown(made.folder / "projector.plan", 12345, -1)
    with pytest.raises(IntegrityError, match="belongs to user 12345"):
        read_entry(made.folder)


@pytest.mark.parametrize("what", [w for w in TAMPERED if w not in ("others may write the cache", "another cache's seal")])
def test_compiling_again_replaces_a_tampered_entry(made: Compiled, for_10: Path, what: str):
    TAMPERED[what][0](made.folder)
    again = compile_bundle(CompileOptions(for_10))
    assert again.built
    assert read_entry(again.folder).files == made.entry.files


def test_an_entry_renamed_to_another_bundles_is_refused(made: Compiled, for_11: Path, trt: FakeTensorrt):
    target = entry_folder(made.folder.parent, Bundle.open(for_11).digest(), made.entry.machine)
    made.folder.rename(target)
    with pytest.raises(IntegrityError, match="another bundle"):
        compiled(Bundle.open(for_11), "tensorrt")


def test_a_cache_that_others_may_write_is_not_written_to(cache: Path, trt: FakeTensorrt, for_10: Path):
    cache.mkdir(mode=0o755)
    with pytest.raises(IntegrityError, match="mode 0755"):
        compile_bundle(CompileOptions(for_10))


@pytest.mark.parametrize("fails", ["build", "parse"])
def test_a_build_that_fails_leaves_nothing_and_says_why(trt: FakeTensorrt, cache: Path, for_10: Path, fails: str):
    trt.refuse = {fails: "the reason"}
    with pytest.raises(EngineError, match=r"tensorrt 11.4.1.2 .*the reason"):
        compile_bundle(CompileOptions(for_10))
    assert [f for f in cache.iterdir() if f.name != "seal.key"] == []


def test_what_the_parser_does_not_read_is_named(trt: FakeTensorrt, for_10: Path):
    trt.refuse = {"parse": "no importer"}
    with pytest.raises(EngineError, match=r"written for TensorRT 10.3: node 'node_7' \(TensorScatter\): no importer; export"):
        compile_bundle(CompileOptions(for_10))


def test_progress_is_that_of_the_outermost_phase(trt: FakeTensorrt, for_10: Path):
    seen: list[tuple[str, int, int]] = []
    compile_bundle(CompileOptions(for_10), progress=lambda *step: seen.append(step))
    assert seen[:2] == [("vision_encoder: Building", 1, 2), ("vision_encoder: Building", 2, 2)]
    assert {label for label, _, _ in seen} == {f"{graph}: Building" for graph in GRAPHS}


def test_an_interrupt_ends_the_build_at_its_next_step_and_leaves_nothing(trt: FakeTensorrt, cache: Path, for_10: Path):
    seen: list[int] = []

    def interrupt(label: str, done: int, total: int) -> None:
        if not seen:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as a terminal would
        seen.append(done)
        time.sleep(0.01)

    trt.slowly = 2000
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(CompileOptions(for_10), progress=interrupt)
    assert len(seen) < trt.slowly
    assert trt.builds == []
    assert [f for f in cache.iterdir() if f.is_dir()] == []


@pytest.mark.parametrize("point", ["builder", "parser", "build", "serialize"])
def test_an_interrupt_that_tensorrt_swallows_ends_the_compile_and_leaves_nothing(
    trt: FakeTensorrt, cache: Path, for_10: Path, point: str
):
    trt.swallowed = {point: lambda: signal.raise_signal(signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(CompileOptions(for_10))
    assert len(trt.builds) <= 1
    assert [f for f in cache.iterdir() if f.is_dir()] == []


def test_timings_are_kept_for_the_next_build(trt: FakeTensorrt, for_10: Path, tmp_path: Path):
    compile_bundle(CompileOptions(for_10, timing_cache=tmp_path / "timings"))
    assert (tmp_path / "timings").read_bytes() == b"...."
    compile_bundle(CompileOptions(for_10, timing_cache=tmp_path / "timings", workspace=5))
    assert (tmp_path / "timings").read_bytes() == b"........"
    (tmp_path / "timings").write_bytes(b"bad")
    with pytest.raises(EngineError, match="is no timing cache"):
        compile_bundle(CompileOptions(for_10, timing_cache=tmp_path / "timings", workspace=6))


def test_a_disk_that_is_full_is_a_disk_error(trt: FakeTensorrt, cache: Path, for_10: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PgxError, match="No space left") as raised:
        compile_bundle(CompileOptions(for_10))
    assert raised.value.exit_code == 5
    assert [f for f in cache.iterdir() if f.is_dir()] == []


def test_two_compiles_of_one_bundle_do_not_mix(made: Compiled, for_10: Path, trt: FakeTensorrt):
    tried = []

    def meanwhile(*step: object) -> None:
        if tried:
            return
        tried.append(step)
        with pytest.raises(UsageError, match="another pgx compiles"):
            compile_bundle(CompileOptions(for_10, workspace=77))

    assert compile_bundle(CompileOptions(for_10, workspace=77), progress=meanwhile).built
    assert tried


# Memory


def test_a_board_without_the_memory_is_told_so_before_the_build(trt: FakeTensorrt, for_10: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)  # and 1 GiB of workspace is not all
    with pytest.raises(NumericError, match=r"4.25 times the largest graph's .* once more .* 1.07 GB are free; .*--force"):
        compile_bundle(CompileOptions(for_10))
    assert trt.builds == []
    assert compile_bundle(CompileOptions(for_10, force=True)).built


@pytest.mark.parametrize(("free", "limit"), [(4 << 30, (4 << 30) - 500_000_000), (8 << 30, 6 << 30)])
def test_on_a_board_kernels_are_tried_in_what_is_free_and_no_more_than_tensorrt_would_take(
    trt: FakeTensorrt, for_10: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int
):
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    compile_bundle(CompileOptions(for_10, workspace=256))
    assert trt.pools == [{"workspace": 256 << 20, "tactics": limit}] * len(GRAPHS)


def test_a_graphics_card_and_a_forced_build_keep_tensorrts_own_limit(
    trt: FakeTensorrt, for_10: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_memory", lambda: 4 << 30)
    compile_bundle(CompileOptions(for_10, force=True))
    trt.cudart.attributes["integrated"] = 0
    compile_bundle(CompileOptions(for_10, workspace=256))
    assert {pools["tactics"] for pools in trt.pools} == {6 << 30}
    assert len(trt.pools) == 2 * len(GRAPHS)


def test_the_weights_of_a_graph_are_the_files_it_names(for_10: Path):
    bundle = Bundle.open(for_10)
    expected = {name: (for_10 / f"{name}.data").stat().st_size for name in GRAPHS}
    expected["decoder_step"] += (for_10 / "token_table.bin").stat().st_size  # its output matrix
    assert {name: memory.weight_bytes(bundle, name) for name in bundle.manifest.graphs} == expected


def test_a_graphics_card_has_memory_of_its_own(trt: FakeTensorrt, for_10: Path):
    trt.cudart.attributes["integrated"], trt.cudart.free_bytes = 0, 1 << 30
    with pytest.raises(NumericError, match=r"1.08 GB on the device \(.*1.07 GB of workspace\), and 1.07 GB are free"):
        compile_bundle(CompileOptions(for_10))
    assert compile_bundle(CompileOptions(for_10, workspace=256)).built


# What is asked for


def test_a_bundle_for_10_3_is_compiled_on_thor_by_the_10_13_of_its_first_jetpacks(trt: FakeTensorrt, for_10: Path):
    trt.__version__ = "10.13.3.9"
    trt.cudart.attributes |= {"major": 11, "minor": 0}
    assert compile_bundle(CompileOptions(for_10)).built
    trt.__version__ = "10.3.0"
    with pytest.raises(InputError, match=r"the GPU '11.0' is younger than TensorRT 10.3.0"):
        compile_bundle(CompileOptions(for_10))


def test_what_cannot_be_compiled_is_refused(tiny_112: Path, for_11: Path, for_10: Path, trt: FakeTensorrt):
    with pytest.raises(UsageError, match="target 'cpu', which is not compiled for tensorrt; export it with --target tensorrt"):
        compile_bundle(CompileOptions(tiny_112, engine="tensorrt"))
    with pytest.raises(UsageError, match=r"--engine 'tpu' does not exist; choose cpu, cuda, tensorrt, tensorrt-rtx"):
        compile_bundle(CompileOptions(for_10, engine="tpu"))
    with pytest.raises(EngineError, match=r"SM 8.7 and not 8.9; leave out --sm"):
        compile_bundle(CompileOptions(for_10, sm="8.9"))
    trt.__version__ = "10.3.0"
    with pytest.raises(InputError, match=r"TensorRT 10.3"):
        compile_bundle(CompileOptions(for_11))
    trt.__version__ = "8.6.1"
    with pytest.raises(EngineError, match=r"TensorRT 8.6.1 is older than 10.3"):
        compile_bundle(CompileOptions(for_10))


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_without_the_engine_the_message_says_what_to_install(
    for_10: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, engine: str
):
    monkeypatch.setitem(sys.modules, engine.replace("-", "_"), None)
    with pytest.raises(EngineError, match=f"engine {engine} needs .*pip install") as raised:
        compile_bundle(CompileOptions(for_10, engine=engine, sm="8.9"))
    assert raised.value.exit_code == 7


@pytest.mark.parametrize("fixture", ["for_10", "for_11"])
def test_profiles_hold_what_the_runner_feeds(fixture: str, request: pytest.FixtureRequest):
    manifest = Bundle.open(request.getfixturevalue(fixture)).manifest
    prefill, step = profiles(manifest, "decoder_step")
    assert prefill["tokens"] == (1, manifest.image_tokens + 16, manifest.context_length)
    assert step["tokens"] == (1, 1, 1)
    if fixture == "for_10":
        assert prefill["past"] == (1, 1, 1)
        assert step["past"] == (128, 256, manifest.context_length)
        assert step["keys"] == (129, 257, manifest.context_length + 1)
    [both] = profiles(manifest, "decoder_step", 1)
    for axis, (least, _, most) in both.items():
        assert least <= min(prefill[axis][0], step[axis][0])
        assert most >= max(prefill[axis][2], step[axis][2])
    assert profiles(manifest, "vision_encoder") == [{"batch": (1, 1, manifest.context_length // manifest.image_tokens)}]


# TensorRT-RTX: NVIDIA's parser and builder, without a GPU


# `pgx` sends a signal to itself: in a function that TensorRT calls, or in our own code between two graphs.
SIGNALLED = """
import signal, sys
from dataclasses import replace
import tensorrt_rtx as trt
from pgxport import cli
from pgxport.bundle.reader import Bundle
from pgxport.compile import tensorrt as compiling
from pgxport.runners.engine_cache import EntryWriter

number, point = signal.Signals[sys.argv.pop()], sys.argv.pop()
arrived, parsing = [], []

def arrive(place):
    if place == point and not arrived:
        arrived.append(place)
        signal.raise_signal(number)

def logger(trt, real=compiling.logger):
    class Signalled(type(real(trt))):
        def log(self, severity, message):
            arrive("parser" if parsing else "logger")
            super().log(severity, message)
    return Signalled()

class Parser(trt.OnnxParser):
    def parse_from_file(self, path):
        parsing.append(path)
        try:
            return super().parse_from_file(path)
        finally:
            parsing.clear()

def write(self, name, plan, real=EntryWriter.write):
    real(self, name, plan)
    arrive("between graphs")

def small_graphs_first(cls, path, real=Bundle.open):
    bundle = real(path)
    graphs = dict(sorted(bundle.manifest.graphs.items(), key=lambda item: bundle.manifest.files[f"{item[0]}.data"].size))
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": graphs}))

Bundle.open = classmethod(small_graphs_first)
monitor = compiling.build_monitor
compiling.logger, trt.OnnxParser, EntryWriter.write = logger, Parser, write
compiling.build_monitor = lambda trt, graph, progress: monitor(trt, graph, lambda *step: arrive("monitor"))
cli.main()
"""


def signalled(bundle: Path, point: str, number: str) -> subprocess.CompletedProcess[str]:
    words = ["compile", str(bundle), "--engine", "tensorrt-rtx", "--sm", "8.9", point, number]
    return subprocess.run([sys.executable, "-c", SIGNALLED, *words], stderr=subprocess.PIPE, text=True, timeout=300)


@pytest.fixture(scope="module")
def after_a_kill(tmp_path_factory: pytest.TempPathFactory, for_11: Path) -> tuple[Path, int]:
    """A cache that a compile left which was killed after its first plan, and how that process ended."""
    cache = tmp_path_factory.mktemp("killed") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGX_ENGINE_CACHE", str(cache))
        return cache, signalled(for_11, "between graphs", "SIGKILL").returncode


@has_rtx
def test_a_killed_compile_leaves_no_entry_and_the_next_one_builds_every_graph(
    after_a_kill: tuple[Path, int], for_11: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, code = after_a_kill
    monkeypatch.setenv("PGX_ENGINE_CACHE", str(cache))
    assert code == -signal.SIGKILL
    assert [f.suffix for f in cache.iterdir() if f.is_dir()] == [".partial"]
    assert list(cache.glob("*.partial/*.plan"))
    seen: set[str] = set()
    options = CompileOptions(for_11, engine="tensorrt-rtx", sm="8.9")
    made = compile_bundle(options, progress=lambda label, done, total: seen.add(label.split(":")[0]))
    assert (made.built, made.entry.machine.sm, sorted(made.entry.files)) == (True, "8.9", [f"{g}.plan" for g in GRAPHS])
    assert sorted(seen) == GRAPHS
    assert list(cache.glob("*.partial")) == []
    assert not compile_bundle(options).built


@has_rtx
def test_tensorrt_rtx_reads_the_graphs_for_jetpack_6_too(cache: Path, for_10: Path):
    assert compile_bundle(CompileOptions(for_10, engine="tensorrt-rtx", sm="12.0")).built


@has_rtx
def test_a_device_that_tensorrt_rtx_does_not_build_for_lists_those_that_it_does(cache: Path, for_10: Path):
    with pytest.raises(EngineError, match=r"does not build for SM 9.0; it does for 7.5, 8.0, .*12.1"):
        compile_bundle(CompileOptions(for_10, engine="tensorrt-rtx", sm="9.0"))


@has_rtx
@pytest.mark.parametrize("point", ["logger", "parser", "monitor", "between graphs"])
def test_ctrl_c_ends_a_real_build_wherever_it_arrives(cache: Path, for_11: Path, point: str):
    done = signalled(for_11, point, "SIGINT")
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "pgx: interrupted"
    assert [f for f in cache.iterdir() if f.is_dir()] == []
