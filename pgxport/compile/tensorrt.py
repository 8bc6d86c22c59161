# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `pgx compile`: check the bundle and the memory, build an engine of each graph, seal them into the engine cache."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pgxport.bundle.manifest import Manifest, TrtVersion
from pgxport.bundle.onnx_wire import inner, messages, text_of
from pgxport.bundle.reader import Bundle
from pgxport.compile.lint import VERSIONS, check_file
from pgxport.errors import EngineError, IntegrityError, NumericError, UsageError, choose
from pgxport.files import CHECK_DISK, disk_errors, write_whole
from pgxport.machine.memory import available_memory
from pgxport.runners.cuda import Cuda
from pgxport.runners.engine_cache import (
    Entry,
    EntryWriter,
    Flags,
    Machine,
    cache_folder,
    entry_folder,
    key,
    open_plan,
    read_entry,
)
from pgxport.runners.loop import BLOCK, EMPTY, cache_rows
from pgxport.runners.session import ENGINES
from pgxport.runners.tensorrt import load_cuda, load_engine, logger, machine

Progress = Callable[[str, int, int], None]  # what is being built, steps so far, steps in all
Range = tuple[int, int, int]  # least, best, most

PROMPT = 16  # tokens of a usual prompt, which the prefill is tuned for
ANSWER = 64  # and of a usual answer
# Profiles -> anonymous memory of a build, in times the graph's weights: TensorRT-RTX 1.7 took 2.2 (int4, one profile), 3.0 (int4,
# two) and 4.1 (float32, two). Not measured with TensorRT.
COPIES = {1: 2.25, 2: 4.25}
BUILDER_BYTES = 500_000_000  # the builder itself, which is little, and room to breathe
WORKSPACE_BYTES = 1 << 30  # unless told otherwise


@dataclass(frozen=True)
class CompileOptions:
    """What to compile. Names are those of `pgx compile`'s flags.

    Attributes:
        bundle: A bundle of target tensorrt, or cpu.
        engine: "tensorrt" or "tensorrt-rtx", or "cpu", for which weights are packed (pack.py). None: by the bundle's target.
        sm: The compute capability to build for, as "8.9"; None: the device's. Only TensorRT-RTX builds for another.
        profiles: 2 tunes prefill and step apart; 1 is smaller, for TensorRT-RTX, which tunes when shapes come up, writes the weights
            once a profile. None: 1 there, else 2.
        workspace: MiB of device memory that kernels may use for intermediate results.
        timing_cache: Where TensorRT keeps how long kernels took; None: in the engine cache.
        cache: The engine cache; None: PGX_ENGINE_CACHE, or in the user's cache.
        force: Build though memory seems short.
    """

    bundle: str | Path
    engine: str | None = None
    sm: str | None = None
    profiles: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    cache: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Compiled:
    """An entry of the engine cache.

    Attributes:
        built: False where it was there already, of the same bundle, machine and flags.
    """

    folder: Path
    entry: Entry
    built: bool

    @property
    def nbytes(self) -> int:
        return sum(info.size for info in self.entry.files.values())


def compile_bundle(options: CompileOptions, *, progress: Progress | None = None) -> Compiled:
    """Build the engines of a bundle on this machine, or pack its weights for this CPU, unless that is there.

    Raises:
        UsageError: an option names what does not exist, or the bundle is for another engine.
        EngineError: the engine or the device is missing, or refuses a graph.
        NumericError: memory would not suffice.
    """
    if options.engine is not None:
        choose("engine", options.engine, ENGINES)
    bundle = Bundle.open(options.bundle)
    target = bundle.manifest.target
    engine = options.engine or target
    if ENGINES.get(engine) != target or target == "cuda":
        raise UsageError(
            f"{bundle.path} was written for target {target!r}, which is not compiled"
            + (
                f" for {engine}; export it with --target {ENGINES[engine]}"
                if engine != target
                else f"; run it with --engine {target}"
            )
        )
    if engine == "cpu":
        return _packed(bundle, options, progress)
    options = replace(options, engine=engine)
    trt = load_engine(engine)
    here = machine(engine, trt, load_cuda, sm=options.sm)
    for name in bundle.manifest.graphs:
        installed = trt.__version__ if engine == "tensorrt" else None
        check_file(bundle.graph(name), _generation(engine, trt.__version__), here.sm, installed=installed)
    workspace = WORKSPACE_BYTES if options.workspace is None else options.workspace << 20
    count = options.profiles or (1 if engine == "tensorrt-rtx" else 2)
    flags: Flags = {"profiles": count, "workspace": workspace, "block": BLOCK, "prompt": PROMPT, "answer": ANSWER, "tf32": 0}
    folder = entry_folder(cache_folder(options.cache), bundle.digest(), here)
    if found := _there(folder, key(bundle.digest(), here, flags)):
        return Compiled(folder, found, built=False)
    with (
        _timing_cache(options, here, folder.parent) as timings,
        EntryWriter(folder.parent, bundle.digest(), here, flags) as writer,
    ):
        device, room = load_cuda() if engine == "tensorrt" else None, None
        if not options.force:
            check_memory(bundle, count, workspace, device)
            room = room_for_tactics(device)
        builder = _Builder(trt, here, flags, timings, progress, room)
        for name in bundle.manifest.graphs:
            plan = builder.build(bundle, name)
            writer.write(f"{name}.plan", memoryview(plan))
            del plan  # gigabytes; the next graph's is made before this name is given to it
        return Compiled(folder, writer.commit(), built=True)


def _packed(bundle: Bundle, options: CompileOptions, progress: Progress | None) -> Compiled:
    for flag in ("sm", "profiles", "workspace", "timing_cache"):
        if getattr(options, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} is of TensorRT, and {bundle.path} is for the CPU; leave it out")
    try:
        from pgxport.compile.cpu import pack
        from pgxport.runners import packed
    except ImportError as error:
        raise UsageError(
            f'packing weights needs the extras cpu and export: pip install "pgxport[cpu,export]" ({error})'
        ) from error
    here = packed.machine()
    folder = entry_folder(cache_folder(options.cache), bundle.digest(), here)
    if folder.is_dir():
        try:
            entry = packed.check(folder)
        except IntegrityError:  # replaced, and never loaded
            pass
        else:
            if packed.is_current(entry, bundle):
                return Compiled(folder, entry, built=False)
    return Compiled(folder, pack(bundle, options.cache, progress=progress), built=True)


def profiles(manifest: Manifest, graph: str, count: int = 2) -> list[dict[str, Range]]:
    """For each profile of a graph's engine, the lengths that a free axis may have; of the decoder's, so many."""
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
    found: list[dict[str, Range]] = []
    for tokens, past in together if count == 1 else apart:
        keys = (past[0] + tokens[0], past[1] + tokens[1], past[2] + tokens[2])
        found.append({"batch": one, "tokens": tokens} | ({"past": past, "keys": keys} if manifest.cache.kind == "delta" else {}))
    return found


def build_memory(weights: int, count: int, workspace: int) -> tuple[int, int]:
    """Bytes that a build of a graph may take of the host and of the device it times kernels on; a board has one memory for both.

    Args:
        weights: Bytes of the graph's.
        count: Profiles.
    """
    return int(COPIES[count] * weights) + BUILDER_BYTES, weights + workspace


def check_memory(bundle: Bundle, count: int, workspace: int, cuda: Cuda | None) -> None:
    """Refuse what would not fit: on a board, running out of memory ends more than this process.

    Args:
        count: Profiles of the decoder.
        cuda: The device that kernels are timed on; None where they are not.

    Raises:
        NumericError: the estimate is more than what is free.
    """
    weights = max(weight_bytes(bundle, name) for name in bundle.manifest.graphs)  # they are built one after the other
    host, device = build_memory(weights, count, workspace)
    device = device if cuda else 0
    sums = f"{COPIES[count]} times the largest graph's {weights / 1e9:.1f} GB and {BUILDER_BYTES / 1e9:.1f} GB for the builder"
    if cuda is not None and cuda.attribute("Integrated"):  # the device's memory is the host's
        host, device, sums = host + device, 0, f"{sums}, and the graph once more with {workspace / 1e9:.1f} GB of workspace"
    shortages = []
    if (free := available_memory()) is not None and host > free:
        shortages.append(f"{host / 1e9:.1f} GB of memory ({sums}), and {free / 1e9:.1f} GB are free")
    if cuda is not None and device > (left := int(cuda.call("cudaMemGetInfo")[0])):
        shortages.append(
            f"{device / 1e9:.1f} GB on the device (the graph and {workspace / 1e9:.1f} GB of workspace), and {left / 1e9:.1f} GB are free"
        )
    if shortages:
        raise NumericError(
            f"compiling {bundle.path} may take {' and '.join(shortages)}; close other programs, add swap, build with --profiles 1, "
            f"give --workspace fewer MiB, export with a smaller --precision, or pass --force"
        )


def room_for_tactics(cuda: Cuda | None) -> int | None:
    """What a board has for the kernels that are tried: by itself TensorRT takes three quarters of its memory, whatever else is in use."""
    free = available_memory()
    if cuda is None or free is None or not cuda.attribute("Integrated"):
        return None
    return free - BUILDER_BYTES


def weight_bytes(bundle: Bundle, name: str) -> int:
    """Of the files that a graph's weights are in."""
    read = messages("model", memoryview(bundle.graph(name).read_bytes()))
    entries = (entry for kind, fields in read if kind == "tensor" for entry in inner(fields, 13))
    files = {text_of(entry, 2) for entry in entries if text_of(entry, 1) == "location"}
    return sum(bundle.manifest.files[file].size for file in files)


class _Builder:
    """TensorRT's builder, and all that the graphs of a bundle share."""

    def __init__(
        self,
        trt: ModuleType,
        here: Machine,
        flags: Flags,
        timings: "_Timings | None",
        progress: Progress | None,
        room: int | None,
    ):
        self._trt, self._machine, self._flags, self._timings, self._progress = trt, here, flags, timings, progress
        self._room = room
        self._log = logger(trt)

    def build(self, bundle: Bundle, name: str) -> Any:
        """A graph's plan, as a buffer.

        Raises:
            EngineError: TensorRT refuses the graph.
        """
        trt = self._trt
        builder = trt.Builder(self._log)
        # TensorRT 10 has to be told, 11 knows no other way: types are those of the graph.
        typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(os.fspath(bundle.graph(name))):
            raise self._unread(bundle, name, parser)
        config = builder.create_builder_config()
        # What is float32 in the graph is computed in float32: by itself TensorRT rounds its products to ten bits from Ampere on.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._flags["workspace"])
        if self._room is not None:
            tactics = trt.MemoryPoolType.TACTIC_DRAM
            config.set_memory_pool_limit(tactics, min(self._room, config.get_memory_pool_limit(tactics)))
        self._aim(config)
        for lengths in profiles(bundle.manifest, name, self._flags["profiles"]):
            config.add_optimization_profile(_profile(builder, bundle, name, lengths))
        monitor = _monitor(trt, name, self._progress)
        config.progress_monitor = monitor
        timings = self._timings.attach(config) if self._timings else None
        with ThreadPoolExecutor(1) as beside:  # signals come to this thread, which is free to take them
            building = beside.submit(builder.build_serialized_network, network, config)
            try:
                plan = building.result()
            except BaseException:
                monitor.stop()
                raise
        if plan is None:
            raise EngineError(f"{self._named} cannot build {bundle.graph(name)}: {self._said()}; see docs/compile.md")
        if self._timings and timings is not None:
            self._timings.keep(timings)
        return plan

    @property
    def _named(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    def _aim(self, config: Any) -> None:
        """TensorRT-RTX builds for devices that need not be there."""
        if self._machine.engine != "tensorrt-rtx":
            return
        known = self._trt.ComputeCapability.__members__
        aim = known.get("SM" + self._machine.sm.replace(".", ""))
        if aim is None:
            can = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name.startswith("SM"))
            raise EngineError(f"{self._named} does not build for SM {self._machine.sm}; it does for {can}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(aim, 0)

    def _unread(self, bundle: Bundle, name: str, parser: Any) -> EngineError:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0] if errors else None
        where = f"node {first.node_name()!r} ({first.node_operator()}): {first.desc()}" if first else self._said()
        version = bundle.manifest.tensorrt
        return EngineError(
            f"{self._named} does not read {bundle.graph(name)}, which was written for TensorRT {version}: {where}; "
            f"export the bundle with --trt of the version that is installed"
        )

    def _said(self) -> str:
        said = "; ".join(self._log.errors) or "it gave no reason"
        self._log.errors.clear()
        return said


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


def _monitor(trt: ModuleType, graph: str, progress: Progress | None) -> Any:
    """TensorRT's phases as steps of the outermost one; the build ends at the next step once it is told to stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._stopped = threading.Event()
            self._phases: dict[str, int] = {}
            self._lock = threading.Lock()  # it is called from several threads

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

    return Monitor()


@dataclass(frozen=True)
class _Timings:
    """A file of TensorRT's timings, which a later build of similar layers need not take again."""

    file: Path
    flag: Any = None

    def attach(self, config: Any) -> Any:
        cache = config.create_timing_cache(self.file.read_bytes() if self.file.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineError(
                f"{self.file} is no timing cache of this TensorRT and device; delete it, or name another --timing-cache"
            )
        return cache

    def keep(self, cache: Any) -> None:
        write_whole(self.file, bytes(memoryview(cache.serialize())))


@contextmanager
def _timing_cache(options: CompileOptions, here: Machine, cache: Path) -> Iterator[_Timings | None]:
    if options.engine == "tensorrt-rtx":
        if options.timing_cache:
            raise UsageError("TensorRT-RTX takes no timings when it builds; leave out --timing-cache")
        yield None
        return
    named = "-".join((here.version, f"sm{here.sm}", f"cuda{here.cuda}"))
    with disk_errors("cannot use", CHECK_DISK, path=cache):
        yield _Timings(options.timing_cache or cache / f"timings-{named}.cache")


def _there(folder: Path, wanted: str) -> Entry | None:
    """The entry, if it is sound and of the same bundle, machine and flags; whatever else is there is replaced, and never loaded."""
    if not folder.is_dir():
        return None
    try:
        entry = read_entry(folder)
        for name in entry.files:
            with open_plan(folder / name):
                pass
    except IntegrityError:
        return None
    return entry if entry.key == wanted else None


def _generation(engine: str, installed: str) -> TrtVersion:
    """The newest version whose rules are known and that the installed one is not older than; RTX has the parser of 11.

    Raises:
        EngineError: it is older than all of them.
    """
    if engine == "tensorrt-rtx":
        return VERSIONS[-1]
    known = [version for version in VERSIONS if _numbers(version) <= _numbers(installed)]
    if not known:
        raise EngineError(f"TensorRT {installed} is older than {VERSIONS[0]}, which pgx needs at least")
    return known[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:2])
