# SPDX-License-Identifier: Apache-2.0
"""TensorRT, and TensorRT for RTX, which has the same interface: plans that `pgx compile` made here, on the first CUDA device.

An engine has a profile or two (prefill, step), each with a context and buffers of its own. Inputs lie side by side in pinned memory and
go up in one copy. Results stay on the device until they are asked for, but for small ones. A step of
unchanged shapes is recorded once as a CUDA graph and then replayed: the copy up, the engine, the copy down.
"""

import importlib.util
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, IntegrityError, NumericError, PgxError
from pgxport.runners.cuda import Cuda, Memory, aligned
from pgxport.runners.engine_cache import Machine, cache_folder, entry_folder, missing, open_plan, read_entry
from pgxport.runners.session import Arrays

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": 'pip install "pgxport[tensorrt]", or on a Jetson JetPack\'s own TensorRT',
    "tensorrt-rtx": 'pip install "pgxport[tensorrt-rtx]"',
}
# numpy has no bfloat16 and no 8-bit floats: those are bytes to us.
DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64, "INT32": np.int32, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": np.bool_, "FP8": np.uint8,
}  # fmt: skip
SMALL = 4096  # bytes; results up to there are fetched with every run
RECORDING_VARIABLE = "PGX_CUDA_GRAPH"  # "0": steps are run and not replayed
PAST, PRESENT = "past_key_values.", "present."


def load_engine(engine: str) -> ModuleType:
    """The engine's module.

    Raises:
        EngineError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(MODULES[engine])
    except ImportError as error:
        others = [other for other in MODULES if other != engine and importlib.util.find_spec(MODULES[other])]
        also = f"; {others[0]} is installed: --engine {others[0]}" if others else ""
        raise EngineError(f"engine {engine} needs {MODULES[engine]}: {INSTALL[engine]}{also} ({error})") from error


def load_cuda() -> Cuda:
    """CUDA's runtime, of cuda-python 12 or 13.

    Raises:
        EngineError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        try:
            from cuda import cudart as runtime  # before cuda-python 12.8
        except ImportError as error:
            raise EngineError(f"engine tensorrt needs cuda-python: pip install cuda-python ({error})") from error
    return Cuda(runtime)


def machine(engine: str, trt: ModuleType, cuda: Callable[[], Cuda] = load_cuda, *, sm: str | None = None) -> Machine:
    """What a plan for this machine depends on.

    Args:
        sm: In place of the device's compute capability. TensorRT-RTX finishes its plans when they are loaded, so it can write them for
            a device that is not there; they depend on neither CUDA nor the driver.

    Raises:
        EngineError: there is no device, or it has another compute capability and the engine needs it.
    """
    if engine == "tensorrt-rtx":
        return Machine(engine, trt.__version__, sm or capability(cuda()), cuda="any", driver="any")
    device = cuda()
    found = capability(device)
    if sm not in (None, found):
        raise EngineError(f"TensorRT compiles for the device it runs on, which has SM {found} and not {sm}; leave out --sm")
    runtime, driver = (device.call(name) for name in ("cudaRuntimeGetVersion", "cudaDriverGetVersion"))
    build = Path("/sys/module/nvidia/version")
    return Machine(
        engine, trt.__version__, found, str(runtime), f"{driver} {build.read_text().strip() if build.exists() else ''}".strip()
    )


def capability(cuda: Cuda) -> str:
    return f"{cuda.attribute('ComputeCapabilityMajor')}.{cuda.attribute('ComputeCapabilityMinor')}"


def compiled(bundle: Bundle, engine: str) -> dict[str, Path]:
    """The plans of a bundle for this machine, by graph.

    Raises:
        EngineError: it is not compiled, or the engine or the device is missing.
        IntegrityError: its entry in the engine cache is not one that pgx made here.
    """
    here = machine(engine, load_engine(engine))
    folder = entry_folder(cache_folder(), bundle.digest(), here)
    if not folder.is_dir():
        raise missing(bundle.path, here)
    plans = {name: f"{name}.plan" for name in bundle.manifest.graphs}
    if lacking := set(plans.values()) - set(read_entry(folder).files):
        raise IntegrityError(f"{folder} has no {min(lacking)}; delete it, and run `pgx compile {bundle.path} --engine {engine}`")
    return {name: folder / plan for name, plan in plans.items()}


class Results(Mapping[str, np.ndarray]):
    """Outputs on the device, each fetched when it is first asked for; they stand until the session's next run."""

    def __init__(self, session: "TensorrtSession", stage: "_Stage"):
        self._session, self._stage, self._run = session, stage, session.runs

    def place(self, name: str) -> "_Place":
        """Where an output lies on the device."""
        assert self._session.runs == self._run, f"Bug: {name} is of an earlier run, and its memory is in use again"
        return self._stage.results[name]

    def __getitem__(self, name: str) -> np.ndarray:
        place = self.place(name)
        if place.offset < self._stage.with_run:
            return place.on(self._stage.fetched).copy()
        return self._session.download(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stage.results)

    def __len__(self) -> int:
        return len(self._stage.results)


@dataclass(frozen=True)
class _Place:
    """A tensor in device memory, and the same bytes in the pinned memory that belongs to it."""

    memory: Memory
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)

    @property
    def address(self) -> int:
        return self.memory.address + self.offset

    def on(self, host: Memory) -> np.ndarray:
        return host.bytes[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


class TensorrtCache:
    """KV buffers in one piece of device memory, `pitch` bytes apart, zero at first."""

    def __init__(self, session: "TensorrtSession", memory: Memory, shapes: Mapping[str, tuple[int, ...]]):
        self._session, self.memory = session, memory
        self.names, self.shape = list(shapes), next(iter(shapes.values()))
        self.pitch = aligned(nbytes(self.shape, session.inputs[self.names[0]]))

    @property
    def nbytes(self) -> int:
        return len(self.names) * self.pitch

    @property
    def arrays(self) -> Arrays:
        """Copies; bfloat16 as the uint16 that hold it."""
        return {name: self._session.download(self.place(name, self.shape)) for name in self.names}

    def place(self, name: str, shape: tuple[int, ...]) -> _Place:
        return _Place(self.memory, self.names.index(name) * self.pitch, shape, self._session.inputs[name])


class TensorrtSession:
    """A plan, loaded.

    Args:
        plan: Of the engine cache; any other is refused.
        engine: "tensorrt" or "tensorrt-rtx".

    Raises:
        IntegrityError: pgx did not compile the plan here.
        EngineError: the engine or the device is missing, or will not load it.
        NumericError: it does not fit into the device's memory.
    """

    def __init__(self, plan: Path, engine: str):
        self._plan, self._trt = plan, load_engine(engine)
        self.cuda = load_cuda()
        self._log = logger(self._trt)
        # TensorRT-RTX compiles kernels as shapes come up, and so records graphs by itself, when it has found the last one.
        wanted = os.environ.get(RECORDING_VARIABLE) != "0"
        self._records_itself, self._recorded = wanted and engine == "tensorrt-rtx", wanted and engine == "tensorrt"
        self.stages: list[_Stage] = []
        self._caches: list[Memory] = []  # all of them
        self._spare: list[Memory] = []  # those that no answer holds
        self.runs = 0
        self.stream = self.cuda.call("cudaStreamCreate")
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        self._runtime = self._trt.Runtime(self._log)
        with open_plan(self._plan, drop=bool(self.cuda.attribute("Integrated"))) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        self._log.check()
        if engine is None:
            raise self.refusal("load it")
        self._engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        taken = {name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        dtypes = {name: np.dtype(DTYPES[engine.get_tensor_dtype(name).name]) for name in names}
        self.inputs = {name: dtypes[name] for name in names if name in taken}
        self.outputs = {name: dtypes[name] for name in names if name not in taken}
        self.in_place = "write_indices" in taken  # the engine writes new rows into the cache itself
        self.stages = [_Stage(self, i, self._context(i)) for i in range(engine.num_optimization_profiles)]

    def _context(self, profile: int) -> Any:
        # Memory for the shapes of this profile, and of no other.
        strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._records_itself:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, int(self.stream)):
            raise self.refusal(f"make a context for profile {profile}")
        self.synchronize()
        return context

    def run(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None = None) -> Results:
        self.runs += 1
        if not isinstance(feeds, Results):  # TensorRT leaves out an input that no node reads
            feeds = {name: feeds[name] for name in feeds if name in self.inputs}
        stage = self._stage(feeds, cache)
        try:
            stage.bind(feeds, cache)
            stage.execute(record=self._recorded and cache is not None and len(feeds["positions"]) == 1)
            if cache is not None and not self.in_place:
                self._append(stage, cache, first=int(feeds["positions"][0]), tokens=len(feeds["positions"]))
            self.synchronize()
            self._log.check()
        except BaseException:
            stage.unbind()
            raise
        return Results(self, stage)

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorrtCache:
        size = sum(aligned(nbytes(shape, self.inputs[name])) for name, shape in shapes.items())
        if self._spare:
            memory = self._spare.pop()
        else:
            self._caches.append(memory := Memory(self.cuda))
        try:
            if size > memory.nbytes:
                for stage in self.stages:  # what a graph recorded of the old place must not be replayed
                    stage.unbind()
                memory.grow(size)
            self.cuda.call("cudaMemsetAsync", memory.address, 0, size, self.stream)
            self.synchronize()
        except BaseException:
            self._spare.append(memory)
            raise
        cache = TensorrtCache(self, memory, shapes)
        weakref.finalize(cache, self._spare.append, memory)  # for the next answer
        return cache

    def close(self) -> None:
        """Free everything on the device, this session's caches too."""
        stages, caches, stream = self.stages, self._caches, self.stream
        self.stages, self._caches, self._spare, self.stream, self._engine, self._runtime = [], [], [], None, None, None
        with ExitStack() as last:  # all of it is tried, whatever fails
            if stream is not None:
                last.callback(self.cuda.free, "cudaStreamDestroy", stream)
            for memory in caches:
                last.callback(memory.free)
            for stage in stages:
                last.callback(stage.free)

    def synchronize(self) -> None:
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def download(self, place: _Place) -> np.ndarray:
        array = np.empty(place.shape, place.dtype)
        self.cuda.call("cudaMemcpyAsync", array.ctypes.data, place.address, place.nbytes, self.cuda.down, self.stream)
        self.synchronize()
        return array

    def refusal(self, what: str) -> PgxError:
        """TensorRT says no by returning nothing; what it has to say is in its log."""
        said = "; ".join(self._log.errors) or "it gave no reason"
        self._log.errors.clear()
        message = f"{self._trt.__name__} {self._trt.__version__} cannot {what} ({self._plan}): {said}"
        if "memory" in said.lower() and ("out of" in said.lower() or "allocat" in said.lower()):
            return NumericError(f"{message}; close other programs, or ask for fewer tokens")
        return EngineError(f"{message}; run `pgx compile` again")

    def _stage(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> "_Stage":
        """The narrowest profile that takes these shapes, which is the last of them."""
        for stage in reversed(self.stages):
            if stage.takes(feeds, cache):
                return stage
        shapes = ", ".join(f"{name} {list(shape_of(feeds, name))}" for name in feeds)
        raise EngineError(f"{self._plan} was not compiled for {shapes}; run `pgx compile` on the bundle again")

    def _append(self, stage: "_Stage", cache: TensorrtCache, *, first: int, tokens: int) -> None:
        """Copy the new rows of all layers to their place in the cache, in one go."""
        row = nbytes(cache.shape[2:], self.inputs[cache.names[0]])
        new = stage.results[cache.names[0].replace(PAST, PRESENT)]
        self.cuda.call(
            "cudaMemcpy2DAsync", cache.memory.address + first * row, cache.pitch, new.address, aligned(tokens * row), tokens * row,
            len(cache.names), self.cuda.across, self.stream,
        )  # fmt: skip


class _Stage:
    """A profile of the engine: its context, and the buffers of what goes in and comes out."""

    def __init__(self, session: TensorrtSession, profile: int, context: Any):
        self._session, self._context, self._cuda = session, context, session.cuda
        engine = session._engine
        self._limits = {name: [tuple(s) for s in engine.get_tensor_profile_shape(name, profile)] for name in session.inputs}
        self._sent, self._sending = Memory(self._cuda), Memory(self._cuda, pinned=True)
        self._out, self.fetched = Memory(self._cuda), Memory(self._cuda, pinned=True)
        self._places: dict[str, _Place] = {}  # of what is sent
        self.results: dict[str, _Place] = {}
        self.with_run = 0  # bytes of results that every run fetches
        self._bound: object = None
        self._warm = False  # the engine has run with what is bound
        self._graph: Any = None

    def takes(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> bool:
        shapes = {name: shape_of(feeds, name) for name in feeds}
        if cache is not None:
            shapes[cache.names[0]] = self._past(feeds, cache)
        return all(
            len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            for shape, (low, _, high) in ((shapes[name], self._limits[name]) for name in shapes)
        )

    def bind(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> None:
        """Tell the context where everything is, if that changed, and fill in what is sent."""
        places = {name: feeds.place(name) for name in feeds} if isinstance(feeds, Results) else {}
        shapes = tuple((name, shape_of(feeds, name)) for name in feeds)
        where = tuple(place.address for place in places.values())
        key = shapes, where, None if cache is None else (cache.memory.address, cache.shape)
        if key != self._bound:
            self.unbind()
            self._bind(dict(shapes), places, feeds, cache)
            self._bound = key
        for name, place in self._places.items():
            np.copyto(place.on(self._sending), feeds[name], casting="equiv")

    def _bind(
        self,
        shapes: dict[str, tuple[int, ...]],
        places: dict[str, _Place],
        feeds: Mapping[str, np.ndarray],
        cache: TensorrtCache | None,
    ) -> None:
        session = self._session
        sent = {name: shape for name, shape in shapes.items() if name not in places}
        self._places, size = side_by_side(self._sent, sent, session.inputs)
        self._sent.grow(size)
        self._sending.grow(size)
        inputs = places | self._places
        if cache is not None:
            past = self._past(feeds, cache)
            inputs = inputs | {name: cache.place(name, past) for name in cache.names}
        for name, place in inputs.items():
            self._accept(self._context.set_input_shape(name, place.shape), f"take {name} {list(place.shape)}")
        outputs = self._outputs(cache)
        for name, place in (inputs | outputs).items():
            self._accept(self._context.set_tensor_address(name, place.address), f"use the memory of {name}")

    def _outputs(self, cache: TensorrtCache | None) -> dict[str, _Place]:
        """Small results first, then the large ones, then new rows for the cache, which are as far apart as the copy needs them."""
        session = self._session
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in session.outputs}
        rows = {} if cache is None else {name.replace(PAST, PRESENT): cache.place(name, cache.shape) for name in cache.names}
        by_size = sorted(shapes.keys() - rows.keys(), key=lambda name: (nbytes(shapes[name], session.outputs[name]), name))
        self.results, self.with_run = {}, 0
        size = 0
        for name in by_size:
            self.results[name] = place = _Place(self._out, size, shapes[name], session.outputs[name])
            size += aligned(place.nbytes)
            if place.nbytes <= SMALL:
                self.with_run = size
        if rows and not session.in_place:
            for name in rows:
                self.results[name] = place = _Place(self._out, size, shapes[name], session.outputs[name])
                size += aligned(place.nbytes)
            rows = {}
        self._out.grow(size)
        self.fetched.grow(self.with_run)
        return self.results | rows

    def execute(self, *, record: bool) -> None:
        """Queue one run; the first with what is bound makes the engine ready, the second is recorded, the others are replayed."""
        if not record or not self._warm:
            self._queue()
        elif self._graph is None:
            self._record()
        if record and self._warm:
            self._cuda.call("cudaGraphLaunch", self._graph, self._session.stream)
        self._warm = True

    def _queue(self) -> None:
        stream, call = self._session.stream, self._cuda.call
        if self._places:
            call("cudaMemcpyAsync", self._sent.address, self._sending.address, self._span(self._places), self._cuda.up, stream)
        self._accept(self._context.execute_async_v3(int(stream)), "run it")
        if self.with_run:
            call("cudaMemcpyAsync", self.fetched.address, self._out.address, self.with_run, self._cuda.down, stream)

    def _record(self) -> None:
        try:
            self._graph = self._capture()
        except EngineError as error:
            raise EngineError(f"{error}; with {RECORDING_VARIABLE}=0 in the environment steps are not recorded") from error

    def _capture(self) -> Any:
        stream, call = self._session.stream, self._cuda.call
        call("cudaStreamBeginCapture", stream, self._cuda.capture_mode())
        try:
            self._queue()
        except BaseException:
            self._cuda.abandon_capture(stream)
            raise
        graph = call("cudaStreamEndCapture", stream)
        try:
            return call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def unbind(self) -> None:
        """Forget what is bound and what was recorded with it."""
        self._bound, self._warm = None, False
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.free("cudaGraphExecDestroy", graph)

    def free(self) -> None:
        self._context = None
        with ExitStack() as last:
            for memory in (self._sent, self._sending, self._out, self.fetched):
                last.callback(memory.free)
            self.unbind()

    def _past(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache) -> tuple[int, ...]:
        """The shape that the cache is bound with: all of it, but where new keys stand behind the past, what their columns leave."""
        if self._session.in_place:
            return cache.shape
        *_, tokens, columns = shape_of(feeds, "visible" if "visible" in feeds else "local_visible")
        return (cache.shape[0], columns - tokens, *cache.shape[2:])

    def _span(self, places: Mapping[str, _Place]) -> int:
        return max(place.offset + place.nbytes for place in places.values())

    def _accept(self, done: bool, what: str) -> None:  # noqa: FBT001  TensorRT's own answer
        if not done:
            raise self._session.refusal(what)


def shape_of(feeds: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """Of a feed, without fetching it where it is another session's result."""
    return feeds.place(name).shape if isinstance(feeds, Results) else feeds[name].shape


def nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def side_by_side(
    memory: Memory, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]
) -> tuple[dict[str, _Place], int]:
    """A place for each tensor in memory that has yet to grow, and the bytes of all."""
    places, size = {}, 0
    for name, shape in shapes.items():
        places[name] = _Place(memory, size, shape, dtypes[name])
        size += aligned(nbytes(shape, dtypes[name]))
    return places, size


def logger(trt: ModuleType) -> Any:
    """Keeps the last errors, which TensorRT only ever logs, and an interrupt that came while it did, which it would forget."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=5)
            self.interrupt: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(" ".join(message.split()))
            except BaseException as error:
                self.interrupt = error

        def check(self) -> None:
            interrupt, self.interrupt = self.interrupt, None
            if interrupt is not None:
                raise interrupt

    return Log()
