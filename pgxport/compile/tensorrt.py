# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT engine of each graph of a bundle, and seal the plans into the engine cache."""

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pgxport.bundle.manifest import Manifest, TrtVersion
from pgxport.bundle.reader import Bundle
from pgxport.compile.lint import VERSIONS, check_file
from pgxport.compile.memory import WORKSPACE_BYTES, check_memory, room_for_tactics
from pgxport.compile.options import Compiled, CompileOptions, Progress
from pgxport.errors import EngineError, IntegrityError, UsageError
from pgxport.files import CHECK_DISK, disk_errors, write_whole
from pgxport.runners.engine_cache import (
    EngineKey,
    Entry,
    EntryWriter,
    Flags,
    cache_folder,
    entry_folder,
    entry_key,
    open_plan,
    read_entry,
)
from pgxport.runners.loop import BLOCK, EMPTY, cache_rows
from pgxport.runners.tensorrt_library import engine_key, load_cuda, load_engine, logger

Range = tuple[int, int, int]  # the shortest, the usual and the longest length of an axis

PROMPT = 16  # tokens of a usual prompt, which the prefill is tuned for
ANSWER = 64  # tokens of a usual answer


def build_engines(bundle: Bundle, options: CompileOptions, progress: Progress | None = None) -> Compiled:
    """Build the engines of a bundle of target tensorrt with `options.engine`, unless the cache has them.

    Raises:
        EngineError: the engine or the device is missing, or refuses a graph.
        InputError: a graph is not for the version that is installed, or for the GPU.
        NumericError: memory would not suffice.
    """
    engine = str(options.engine)
    trt = load_engine(engine)
    here = engine_key(engine, trt, load_cuda, sm=options.sm)
    for name in bundle.manifest.graphs:
        installed = trt.__version__ if engine == "tensorrt" else None
        check_file(bundle.graph(name), _generation(engine, trt.__version__), here.sm, installed=installed)
    workspace = WORKSPACE_BYTES if options.workspace is None else options.workspace << 20
    count = options.profiles or (1 if engine == "tensorrt-rtx" else 2)
    flags: Flags = {"profiles": count, "workspace": workspace, "block": BLOCK, "prompt": PROMPT, "answer": ANSWER, "tf32": 0}
    folder = entry_folder(cache_folder(options.cache), bundle.digest(), here)
    if entry := _sound_entry(folder, entry_key(bundle.digest(), here, flags)):
        return Compiled(folder, entry, built=False)
    with (
        _timing_cache(options, here, folder.parent) as timings,
        EntryWriter(folder.parent, bundle.digest(), here, flags) as writer,
    ):
        device, room = load_cuda() if engine == "tensorrt" else None, None
        if not options.force:
            check_memory(bundle, count, workspace, device)
            room = room_for_tactics(device)
        builder = EngineBuilder(trt, here, flags, timings, progress, room)
        for name in bundle.manifest.graphs:
            plan = builder.build(bundle, name)
            writer.write(f"{name}.plan", memoryview(plan))
            del plan  # gigabytes, which would live until the next graph's plan takes the name
        return Compiled(folder, writer.commit(), built=True)


def profiles(manifest: Manifest, graph: str, count: int = 2) -> list[dict[str, Range]]:
    """For each profile of a graph's engine, the lengths that each free axis may have.

    Args:
        count: Profiles of the decoder; the other graphs have one.
    """
    if graph != "decoder_step":
        most = max(1, manifest.context_length // manifest.image_tokens) if graph in ("vision_encoder", "projector") else 1
        return [{"batch": (1, 1, most)}]
    context = manifest.context_length
    prefix = min(manifest.image_tokens + PROMPT, context)
    usual = min(prefix + ANSWER, context)
    rows: Range = (cache_rows(manifest, min(BLOCK, context)), cache_rows(manifest, usual), context)
    prefill, step, one = (1, prefix, context), (1, 1, 1), (1, 1, 1)
    empty = (EMPTY, EMPTY, EMPTY)
    apart = [(prefill, empty), (step, rows)]
    together: list[tuple[Range, Range]] = [((1, 1, context), (EMPTY, *rows[1:]))]  # tuned for the step
    lengths: list[dict[str, Range]] = []
    for tokens, past in together if count == 1 else apart:
        keys = (past[0] + tokens[0], past[1] + tokens[1], past[2] + tokens[2])
        cached = {"past": past, "keys": keys} if manifest.cache.kind == "delta" else {}
        lengths.append({"batch": one, "tokens": tokens} | cached)
    return lengths


class EngineBuilder:
    """TensorRT's builder, and what the graphs of a bundle share.

    Args:
        key: The machine to build for.
        timings: None where the engine takes no timings.
        room: Bytes for the kernels that are tried; None: TensorRT's own limit.
    """

    def __init__(
        self,
        trt: ModuleType,
        key: EngineKey,
        flags: Flags,
        timings: "TimingCache | None",
        progress: Progress | None,
        room: int | None,
    ):
        self._trt, self._key, self._flags, self._timings, self._progress = trt, key, flags, timings, progress
        self._room = room
        self._log = logger(trt)

    def build(self, bundle: Bundle, name: str) -> Any:
        """A graph's plan, as a buffer.

        Raises:
            EngineError: TensorRT refuses the graph.
        """
        builder = self._trt.Builder(self._log)
        self._log.check()
        network = self._parse(builder, bundle, name)
        config = self._configure(builder, bundle, name)
        monitor = build_monitor(self._trt, name, self._progress)
        config.progress_monitor = monitor
        timings = self._timings.attach(config) if self._timings else None
        with ThreadPoolExecutor(1) as beside:  # signals come to this thread, which is free to take them
            building = beside.submit(builder.build_serialized_network, network, config)
            try:
                plan = building.result()
            except BaseException:
                monitor.stop()
                raise
        self._log.check()
        if plan is None:
            raise EngineError(
                f"{self._version} cannot build {bundle.graph(name)}: {self._log.take_errors()}; see docs/compile.md"
            )
        if self._timings and timings is not None:
            self._timings.keep(timings)
        return plan

    def _parse(self, builder: Any, bundle: Bundle, name: str) -> Any:
        # TensorRT 10 has to be told, 11 knows no other way: types are those of the graph.
        typed = self._trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self._trt.OnnxParser(network, self._log)
        parsed = parser.parse_from_file(os.fspath(bundle.graph(name)))
        self._log.check()
        if not parsed:
            raise self._refused_by(parser, bundle, name)
        return network

    def _configure(self, builder: Any, bundle: Bundle, name: str) -> Any:
        trt = self._trt
        config = builder.create_builder_config()
        # float32 is multiplied in float32: by itself TensorRT rounds to ten bits from Ampere on.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._flags["workspace"])
        if self._room is not None:
            tactics = trt.MemoryPoolType.TACTIC_DRAM
            config.set_memory_pool_limit(tactics, min(self._room, config.get_memory_pool_limit(tactics)))
        if self._key.engine == "tensorrt-rtx":
            self._set_capability(config)
        for lengths in profiles(bundle.manifest, name, self._flags["profiles"]):
            config.add_optimization_profile(_profile(builder, bundle, name, lengths))
        return config

    def _set_capability(self, config: Any) -> None:
        """Aim at the asked GPU: TensorRT-RTX builds for devices that this machine need not have."""
        known = self._trt.ComputeCapability.__members__
        capability = known.get("SM" + self._key.sm.replace(".", ""))
        if capability is None:
            others = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name.startswith("SM"))
            raise EngineError(f"{self._version} does not build for SM {self._key.sm}; it does for {others}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)

    @property
    def _version(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    def _refused_by(self, parser: Any, bundle: Bundle, name: str) -> EngineError:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0] if errors else None
        reason = self._log.take_errors()
        where = f"node {first.node_name()!r} ({first.node_operator()}): {first.desc()}" if first else reason
        version = bundle.manifest.tensorrt
        return EngineError(
            f"{self._version} does not read {bundle.graph(name)}, which was written for TensorRT {version}: {where}; "
            f"export the bundle with --trt of the version that is installed"
        )


def _profile(builder: Any, bundle: Bundle, name: str, lengths: Mapping[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in bundle.manifest.graphs[name].inputs:
        if unknown := [n for n in tensor.shape if isinstance(n, str) and n not in lengths]:
            raise IntegrityError(
                f"{bundle.graph(name)}: the axis {unknown[0]!r} of {tensor.name} is free, and pgx leaves none so free"
            )
        shapes = (tuple(n if isinstance(n, int) else lengths[n][i] for n in tensor.shape) for i in range(3))
        profile.set_shape(tensor.name, *shapes)
    return profile


def build_monitor(trt: ModuleType, graph: str, progress: Progress | None) -> Any:
    """A monitor that reports the outermost phase's steps, and ends the build at the step after `stop()`."""

    class BuildMonitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._stopped = threading.Event()
            self._phases: dict[str, int] = {}
            self._lock = threading.Lock()  # TensorRT calls from several threads

        def stop(self) -> None:
            self._stopped.set()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                if parent is None:
                    self._phases[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                if progress and phase in self._phases:
                    progress(f"{graph}: {phase}", step + 1, self._phases[phase])
            return not self._stopped.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._phases.pop(phase, None)

    return BuildMonitor()


@dataclass(frozen=True)
class TimingCache:
    """A file of TensorRT's timings, which a later build of similar layers need not take again."""

    file: Path

    def attach(self, config: Any) -> Any:
        """TensorRT's cache with the file's timings, which the build reads and adds to.

        Raises:
            EngineError: the timings are not of this TensorRT and device.
        """
        cache = config.create_timing_cache(self.file.read_bytes() if self.file.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineError(
                f"{self.file} is no timing cache of this TensorRT and device; delete it, or name another --timing-cache"
            )
        return cache

    def keep(self, cache: Any) -> None:
        """Write the timings of a build, whole or not at all."""
        write_whole(self.file, bytes(memoryview(cache.serialize())))


@contextmanager
def _timing_cache(options: CompileOptions, key: EngineKey, cache: Path) -> Iterator[TimingCache | None]:
    if options.engine == "tensorrt-rtx":
        if options.timing_cache:
            raise UsageError("TensorRT-RTX takes no timings when it builds; leave out --timing-cache")
        yield None
        return
    device = "-".join((key.version, f"sm{key.sm}", f"cuda{key.cuda}"))
    with disk_errors("cannot use", CHECK_DISK, path=cache):
        yield TimingCache(options.timing_cache or cache / f"timings-{device}.cache")


def _sound_entry(folder: Path, key: str) -> Entry | None:
    """The folder's entry if it is sound and has this key. Any other is replaced, and never loaded."""
    if not folder.is_dir():
        return None
    try:
        entry = read_entry(folder)
        for name in entry.files:
            with open_plan(folder / name):
                pass
    except IntegrityError:
        return None
    return entry if entry.key == key else None


def _generation(engine: str, installed: str) -> TrtVersion:
    """The newest version with known rules that is no newer than the installed one; RTX has the parser of 11.

    Raises:
        EngineError: the installed version is older than all of them.
    """
    if engine == "tensorrt-rtx":
        return VERSIONS[-1]
    known = [version for version in VERSIONS if _numbers(version) <= _numbers(installed)]
    if not known:
        raise EngineError(f"TensorRT {installed} is older than {VERSIONS[0]}, which pgx needs at least")
    return known[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:2])
