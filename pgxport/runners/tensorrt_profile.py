# SPDX-License-Identifier: Apache-2.0
"""One profile of a TensorRT engine: its context, its buffers on the device, and the CUDA graph of its step.

Inputs lie side by side in pinned memory and go up in one copy. Results stay on the device until they are
asked for, but for small ones. A step of unchanged shapes is recorded once as a CUDA graph and then replayed:
the copy up, the engine, the copy down.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgxport.errors import EngineError
from pgxport.runners.cuda import CudaMemory, aligned
from pgxport.runners.session import Arrays
from pgxport.runners.tensorrt_library import LoadedPlan

SMALL = 4096  # bytes; results up to this size are fetched with every run
RECORDING_VARIABLE = "PGX_CUDA_GRAPH"  # "0": steps are run and not replayed
PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in device memory; pinned memory that belongs to it holds the same bytes at the same offset."""

    memory: CudaMemory
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)

    @property
    def address(self) -> int:
        return self.memory.address + self.offset

    def on(self, host: CudaMemory) -> np.ndarray:
        """The tensor in the pinned memory that belongs to it."""
        return host.bytes[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)

    def download(self, loaded: LoadedPlan) -> np.ndarray:
        """A copy in the host's memory."""
        array = np.empty(self.shape, self.dtype)
        cuda = loaded.cuda
        cuda.call("cudaMemcpyAsync", array.ctypes.data, self.address, self.nbytes, cuda.down, loaded.stream)
        loaded.synchronize()
        return array


class TensorrtCache:
    """KV buffers in one piece of device memory, `pitch` bytes apart, zero at first."""

    def __init__(self, loaded: LoadedPlan, memory: CudaMemory, shapes: Mapping[str, tuple[int, ...]]):
        self._loaded, self.memory = loaded, memory
        self.names, self.shape = list(shapes), next(iter(shapes.values()))
        self.pitch = aligned(nbytes(self.shape, loaded.inputs[self.names[0]]))

    @property
    def nbytes(self) -> int:
        """Size of all buffers on the device."""
        return len(self.names) * self.pitch

    @property
    def arrays(self) -> Arrays:
        """Copies of the buffers; bfloat16 as the uint16 that hold it."""
        return {name: self.tensor(name, self.shape).download(self._loaded) for name in self.names}

    def tensor(self, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        """A buffer, or the first rows of it, as the tensor that the engine binds."""
        return DeviceTensor(self.memory, self.names.index(name) * self.pitch, shape, self._loaded.inputs[name])


class Results(Mapping[str, np.ndarray]):
    """Outputs on the device, each fetched when it is read; they stand until the session's next run."""

    def __init__(self, loaded: LoadedPlan, profile: "ProfileContext"):
        self._loaded, self._profile, self._run = loaded, profile, loaded.runs

    def tensor(self, name: str) -> DeviceTensor:
        """An output on the device."""
        assert self._loaded.runs == self._run, f"Bug: {name} is of an earlier run, and its memory is in use again"
        return self._profile.results[name]

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.tensor(name)
        if tensor.offset < self._profile.with_run:
            return tensor.on(self._profile.fetched).copy()
        return tensor.download(self._loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._profile.results)

    def __len__(self) -> int:
        return len(self._profile.results)


class ProfileContext:
    """A profile of the engine: its context, and the buffers of its inputs and outputs.

    Attributes:
        results: The outputs of the last run.
        fetched: Pinned memory with the small results.
        with_run: Bytes of results that every run fetches.
    """

    def __init__(self, loaded: LoadedPlan, profile: int, context: Any):
        self._loaded, self._context, self._cuda = loaded, context, loaded.cuda
        engine = loaded.engine
        self._limits = {name: [tuple(s) for s in engine.get_tensor_profile_shape(name, profile)] for name in loaded.inputs}
        self._sent, self._sending = CudaMemory(self._cuda), CudaMemory(self._cuda, pinned=True)
        self._out, self.fetched = CudaMemory(self._cuda), CudaMemory(self._cuda, pinned=True)
        self._uploads: dict[str, DeviceTensor] = {}
        self.results: dict[str, DeviceTensor] = {}
        self.with_run = 0
        self._bound: object = None
        self._warm = False  # the engine has run with what is bound
        self._graph: Any = None

    def takes(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> bool:
        """Whether the profile was compiled for these shapes."""
        shapes = {name: shape_of(feeds, name) for name in feeds}
        if cache is not None:
            shapes[cache.names[0]] = self._past(feeds, cache)
        return all(
            len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            for shape, (low, _, high) in ((shapes[name], self._limits[name]) for name in shapes)
        )

    def bind(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> None:
        """Tell the context all addresses if one changed, and write the inputs to the pinned memory."""
        on_device = {name: feeds.tensor(name) for name in feeds} if isinstance(feeds, Results) else {}
        shapes = tuple((name, shape_of(feeds, name)) for name in feeds)
        addresses = tuple(tensor.address for tensor in on_device.values())
        key = shapes, addresses, None if cache is None else (cache.memory.address, cache.shape)
        if key != self._bound:
            self.unbind()
            self._bind(dict(shapes), on_device, feeds, cache)
            self._bound = key
        for name, tensor in self._uploads.items():
            np.copyto(tensor.on(self._sending), feeds[name], casting="equiv")

    def _bind(
        self,
        shapes: dict[str, tuple[int, ...]],
        on_device: dict[str, DeviceTensor],
        feeds: Mapping[str, np.ndarray],
        cache: TensorrtCache | None,
    ) -> None:
        uploads = {name: shape for name, shape in shapes.items() if name not in on_device}
        self._uploads, size = side_by_side(self._sent, uploads, self._loaded.inputs)
        self._sent.grow(size)
        self._sending.grow(size)
        inputs = on_device | self._uploads
        if cache is not None:
            past = self._past(feeds, cache)
            inputs = inputs | {name: cache.tensor(name, past) for name in cache.names}
        for name, tensor in inputs.items():
            self._accept(self._context.set_input_shape(name, tensor.shape), f"take {name} {list(tensor.shape)}")
        outputs = self._outputs(cache)
        for name, tensor in (inputs | outputs).items():
            self._accept(self._context.set_tensor_address(name, tensor.address), f"use the memory of {name}")

    def _outputs(self, cache: TensorrtCache | None) -> dict[str, DeviceTensor]:
        """Place small results, then large ones, then the cache's new rows as far apart as the copy needs."""
        dtypes = self._loaded.outputs
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in dtypes}
        rows = {} if cache is None else {name.replace(PAST, PRESENT): cache.tensor(name, cache.shape) for name in cache.names}
        by_size = sorted(shapes.keys() - rows.keys(), key=lambda name: (nbytes(shapes[name], dtypes[name]), name))
        self.results, self.with_run = {}, 0
        size = 0
        for name in by_size:
            self.results[name] = tensor = DeviceTensor(self._out, size, shapes[name], dtypes[name])
            size += aligned(tensor.nbytes)
            if tensor.nbytes <= SMALL:
                self.with_run = size
        if rows and not self._loaded.in_place:
            for name in rows:
                self.results[name] = tensor = DeviceTensor(self._out, size, shapes[name], dtypes[name])
                size += aligned(tensor.nbytes)
            rows = {}
        self._out.grow(size)
        self.fetched.grow(self.with_run)
        return self.results | rows

    def execute(self, *, record: bool) -> None:
        """Queue one run.

        With `record`, the first run with what is bound warms the engine up, the second is recorded, later
        ones replay it.
        """
        if not record or not self._warm:
            self._queue()
        elif self._graph is None:
            self._record()
        if record and self._warm:
            self._cuda.call("cudaGraphLaunch", self._graph, self._loaded.stream)
        self._warm = True

    def _queue(self) -> None:
        stream, call = self._loaded.stream, self._cuda.call
        if self._uploads:
            size = max(tensor.offset + tensor.nbytes for tensor in self._uploads.values())
            call("cudaMemcpyAsync", self._sent.address, self._sending.address, size, self._cuda.up, stream)
        self._accept(self._context.execute_async_v3(int(stream)), "run it")
        if self.with_run:
            call("cudaMemcpyAsync", self.fetched.address, self._out.address, self.with_run, self._cuda.down, stream)

    def _record(self) -> None:
        try:
            self._graph = self._capture()
        except EngineError as error:
            raise EngineError(f"{error}; with {RECORDING_VARIABLE}=0 in the environment steps are not recorded") from error

    def _capture(self) -> Any:
        stream, call = self._loaded.stream, self._cuda.call
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

    def append_rows(self, cache: TensorrtCache, *, first: int, tokens: int) -> None:
        """Copy the new rows of all layers to their place in the cache, in one go."""
        row = nbytes(cache.shape[2:], self._loaded.inputs[cache.names[0]])
        new = self.results[cache.names[0].replace(PAST, PRESENT)]
        self._cuda.call(
            "cudaMemcpy2DAsync",
            cache.memory.address + first * row,
            cache.pitch,
            new.address,
            aligned(tokens * row),
            tokens * row,
            len(cache.names),
            self._cuda.across,
            self._loaded.stream,
        )

    def unbind(self) -> None:
        """Forget what is bound and what was recorded with it."""
        self._bound, self._warm = None, False
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.free("cudaGraphExecDestroy", graph)

    def free(self) -> None:
        """Free the context and all buffers."""
        self._context = None
        with ExitStack() as last:
            for memory in (self._sent, self._sending, self._out, self.fetched):
                last.callback(memory.free)
            self.unbind()

    def _past(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache) -> tuple[int, ...]:
        """The cache's shape as bound: all rows, or where new keys follow the past, the other mask columns."""
        if self._loaded.in_place:
            return cache.shape
        *_, tokens, columns = shape_of(feeds, "visible" if "visible" in feeds else "local_visible")
        return (cache.shape[0], columns - tokens, *cache.shape[2:])

    def _accept(self, done: bool, what: str) -> None:  # noqa: FBT001  TensorRT's own answer
        if not done:
            raise self._loaded.refusal(what)


def shape_of(feeds: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """The shape of a feed, which is not fetched where it is another session's result."""
    return feeds.tensor(name).shape if isinstance(feeds, Results) else feeds[name].shape


def nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Size of an array in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def side_by_side(
    memory: CudaMemory, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]
) -> tuple[dict[str, DeviceTensor], int]:
    """A place for each tensor in memory that has yet to grow, and the bytes of all."""
    tensors, size = {}, 0
    for name, shape in shapes.items():
        tensors[name] = DeviceTensor(memory, size, shape, dtypes[name])
        size += aligned(nbytes(shape, dtypes[name]))
    return tensors, size
