# SPDX-License-Identifier: Apache-2.0
"""TensorRT and a CUDA runtime without a GPU, stricter than the real ones where these leave things undefined.

Memory is numpy's, a stream does its work when it is waited for, and an engine runs the bundle's own graph in
ONNX Runtime on the addresses that were bound.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ORT_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return id(self)

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)


class FakeCudart(ModuleType):
    """The calls that pgx makes. `fail` maps a call to an error code and to the occurrences that return it."""

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor", cudaDevAttrIntegrated="integrated"
    )

    def __init__(self) -> None:
        super().__init__("runtime")
        self.attributes = {"major": 8, "minor": 7, "integrated": 1}
        self.free_bytes = 8 << 30
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: list[Any] = []  # alive, executable ones too
        self.fail: dict[str, tuple[Code, frozenset[int]]] = {}
        self.calls: Counter[str] = Counter()
        self.down = 0  # bytes copied to the host

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value):
            return value

        def call(*args: Any) -> tuple[Any, ...]:
            count = self.calls[name]
            self.calls[name] += 1
            code, when = self.fail.get(name, (Code.cudaSuccess, frozenset()))
            if count in when:
                if name == "cudaStreamEndCapture":  # a failed call ends the capture too
                    args[0].captured = None
                return (code, None) if name in GIVES else (code,)
            return value(*args)

        return call

    def nothing_is_left(self) -> bool:
        return not (self.device or self.pinned or self.streams or self.graphs)

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """Device memory, which must be allocated."""
        for start, memory in self.device.items():
            if start <= address and address + nbytes <= start + memory.nbytes:
                return memory[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not the device's")

    def host(self, address: int, nbytes: int) -> np.ndarray:
        return np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * nbytes).from_address(address))

    def finish(self) -> None:
        for stream in self.streams.values():
            queue, stream.queue = stream.queue, []
            for work in queue:
                work()

    def _allocate(self, table: dict[int, np.ndarray], nbytes: int) -> tuple[Code, int]:
        whole = np.full(nbytes + 256, 0xFF, np.uint8)  # NaN for those who read what was never written
        start = -whole.ctypes.data % 256
        table[whole.ctypes.data + start] = whole[start : start + nbytes]
        return Code.cudaSuccess, whole.ctypes.data + start

    def cudaMalloc(self, nbytes: int) -> Any:
        return self._allocate(self.device, nbytes)

    def cudaMallocHost(self, nbytes: int) -> Any:
        return self._allocate(self.pinned, nbytes)

    def cudaFree(self, address: int) -> Any:
        self.finish()
        del self.device[address]
        return (Code.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> Any:
        self.finish()
        del self.pinned[address]
        return (Code.cudaSuccess,)

    def cudaMemGetInfo(self) -> Any:
        return Code.cudaSuccess, self.free_bytes, 16 << 30

    def cudaRuntimeGetVersion(self) -> Any:
        return Code.cudaSuccess, 13020

    def cudaDriverGetVersion(self) -> Any:
        return Code.cudaSuccess, 13020

    def cudaDeviceGetAttribute(self, attribute: str, device: int) -> Any:
        return Code.cudaSuccess, self.attributes[attribute]

    def cudaStreamCreate(self) -> Any:
        stream = Stream()
        self.streams[int(stream)] = stream
        return Code.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> Any:
        self.finish()
        del self.streams[int(stream)]
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> Any:
        assert stream.captured is None, "a stream that records cannot be waited for"
        self.finish()
        return (Code.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: Stream) -> Any:
        stream.put(lambda: self.at(address, nbytes).fill(value))
        return (Code.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: str, stream: Stream) -> Any:
        def copy() -> None:
            if kind == "up":
                self.at(to, nbytes)[:] = self.host(source, nbytes)
            else:
                self.down += nbytes
                self.host(to, nbytes)[:] = self.at(source, nbytes)

        assert kind in ("up", "down")
        stream.put(copy)
        return (Code.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, kind: str, stream: Stream
    ) -> Any:
        assert kind == "across"
        assert width <= min(to_pitch, pitch)

        def copy() -> None:
            for row in range(height):
                self.at(to + row * to_pitch, width)[:] = self.at(source + row * pitch, width)

        stream.put(copy)
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: str) -> Any:
        stream.captured = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> Any:
        assert stream.captured is not None
        graph, stream.captured = list(stream.captured), None
        self.graphs.append(graph)
        return Code.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: list[Any], flags: int) -> Any:
        executable = tuple(graph)
        self.graphs.append(executable)
        return Code.cudaSuccess, executable

    def cudaGraphLaunch(self, executable: tuple[Any, ...], stream: Stream) -> Any:
        assert any(executable is g for g in self.graphs), "a graph was launched that is gone"
        for work in executable:
            stream.put(work)
        return (Code.cudaSuccess,)

    def _destroy(self, graph: Any) -> Any:
        self.graphs[:] = [g for g in self.graphs if g is not graph]
        return (Code.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return self._destroy(graph)

    def cudaGraphExecDestroy(self, graph: Any) -> Any:
        return self._destroy(graph)


GIVES = {
    "cudaMalloc", "cudaMallocHost", "cudaStreamCreate", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaDeviceGetAttribute",
    "cudaRuntimeGetVersion", "cudaDriverGetVersion",
}  # fmt: skip


class FakeTensorrt(ModuleType):
    """`tensorrt`, as far as pgx uses it. `refuse` maps the calls that fail to what they log."""

    __version__ = "11.4.1.2"

    def __init__(self, cudart: FakeCudart):
        super().__init__("tensorrt")
        self.cudart = cudart
        self.refuse: dict[str, str] = {}
        self.runs: list[dict[str, tuple[int, ...]]] = []  # the shapes of each run, queued or recorded
        self.spoil: Callable[[dict[str, np.ndarray]], None] = lambda outputs: None
        self.builds: list[str] = []
        self.pools: list[dict[str, int]] = []  # the memory limits of each build
        self.flags: list[set[str]] = []  # the flags that each build had on
        self.swallowed: dict[str, Callable[[], None]] = {}  # point -> a call whose exceptions C++ swallows
        self.slowly = 1  # how often a build repeats its first step
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="profile")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace", TACTIC_DRAM="tactics")
        self.BuilderFlag = SimpleNamespace(TF32="tf32")
        self.NetworkDefinitionCreationFlag = IntEnum("Flags", {"STRONGLY_TYPED": 0})
        outer = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING = "internal", "error", "warning"

            def __init__(self) -> None:
                pass

        class IProgressMonitor:
            def __init__(self) -> None:
                pass

        class Runtime:
            def __init__(self, log: Any):
                self.log = log

            def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
                return (
                    None if outer.no(self.log, "deserialize") else Engine(outer, self.log, json.loads(bytes(serialized_engine)))
                )

        self.ILogger, self.IProgressMonitor, self.Runtime = ILogger, IProgressMonitor, Runtime
        self.Builder = lambda log: self.calling("builder", Builder(outer, log))
        self.OnnxParser = lambda network, log: Parser(outer, network, log)

    def calling(self, point: str, result: Any) -> Any:
        """The result of a C++ function that calls Python at this point."""
        with suppress(BaseException):
            self.swallowed.get(point, lambda: None)()
        return result

    def no(self, log: Any, what: str) -> bool:
        if what in self.refuse:
            log.log("warning", "not the reason")
            log.log("error", self.refuse[what])
        return what in self.refuse


class Engine:
    def __init__(self, trt: FakeTensorrt, log: Any, plan: dict[str, Any]):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.trt, self.log, self.profiles = trt, log, plan["profiles"]
        self.session = ort.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.names = [*self.outputs, *self.inputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=ORT_TYPES[(self.inputs | self.outputs)[name].type])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def create_execution_context(self, strategy: str) -> Any:
        assert strategy == "profile"
        return None if self.trt.no(self.log, "context") else Context(self)


class Context:
    def __init__(self, engine: Engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}  # type: ignore[var-annotated]
        self.ready: object = None  # the shapes it has run with; only those may be recorded

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self.engine.trt.cudart.streams
        self.profile = profile_index
        return not self.engine.trt.no(self.engine.log, "profile")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        assert len(shape) == len(low), f"{name} {shape}"
        self.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)) and not self.engine.trt.no(
            self.engine.log, "shape"
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} lies at {memory:#x}"
        self.addresses[name] = memory
        return not self.engine.trt.no(self.engine.log, "address")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = {
            axis: n
            for i in self.engine.inputs.values()
            for axis, n in zip(i.shape, self.shapes[i.name], strict=True)
            if isinstance(axis, str)
        }
        return tuple(lengths[n] if isinstance(n, str) else n for n in self.engine.outputs[name].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt, shapes, addresses = self.engine.trt, dict(self.shapes), dict(self.addresses)
        assert addresses.keys() == set(self.engine.names), "an address is missing"
        stream = trt.cudart.streams[stream_handle]
        if stream.captured is not None and self.ready != shapes:
            self.engine.log.log("error", "recorded before it ran")
            return False
        if trt.no(self.engine.log, "execute"):
            return False
        self.ready = shapes
        trt.runs.append(shapes)
        outputs = {name: self.get_tensor_shape(name) for name in self.engine.outputs}
        if "write_indices" in shapes:
            assert all(addresses[n] == addresses[n.replace("present.", "past_key_values.")] for n in outputs if "present." in n)

        def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])
            return trt.cudart.at(addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

        def work() -> None:
            feeds = {name: view(name, shape).copy() for name, shape in shapes.items()}
            results = dict(zip(outputs, self.engine.session.run(list(outputs), feeds), strict=True))
            trt.spoil(results)
            for name, shape in outputs.items():
                assert results[name].shape == shape, f"{name}: {results[name].shape} where {shape} was foreseen"
                view(name, shape)[...] = results[name]

        stream.put(work)
        return True


class Builder:
    def __init__(self, trt: FakeTensorrt, log: Any):
        self.trt, self.log = trt, log

    def create_network(self, flags: int) -> Any:
        assert flags == 1, "not strongly typed"
        return SimpleNamespace(graph=None)

    def create_builder_config(self) -> Any:
        return Config()

    def create_optimization_profile(self) -> Any:
        return Profile()

    def build_serialized_network(self, network: Any, config: "Config") -> Any:
        if self.trt.no(self.log, "build"):
            return None
        monitor = config.progress_monitor
        self.trt.calling("build", None)
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 5)
        monitor.step_complete("Timing", 0)
        monitor.phase_finish("Timing")
        go_on = all(monitor.step_complete("Building", 0) for _ in range(self.trt.slowly)) and monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
        if not go_on:
            return None
        self.trt.builds.append(Path(network.graph).stem)
        config.timing.content += b"."
        self.trt.pools.append(config.pools)
        self.trt.flags.append(config.on)
        plan = json.dumps({"graph": network.graph, "profiles": [p.shapes for p in config.profiles]}).encode()
        return self.trt.calling("serialize", plan)


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.progress_monitor: Any = None
        self.timing: Any = None
        self.on = {"tf32"}  # as in all versions
        self.pools = {"workspace": 8 << 30, "tactics": 6 << 30}  # a board of 8 GiB

    def clear_flag(self, flag: str) -> None:
        self.on.remove(flag)

    def get_memory_pool_limit(self, pool: str) -> int:
        return self.pools[pool]

    def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
        assert pool_size > 0
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: "Profile") -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        content = serialized_timing_cache
        return None if content.startswith(b"bad") else SimpleNamespace(content=content, serialize=lambda: self.timing.content)

    def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
        self.timing = cache
        return not ignore_mismatch


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert all(0 < a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), (input, min, opt, max)
        self.shapes[input] = [min, opt, max]


class Parser:
    def __init__(self, trt: FakeTensorrt, network: Any, log: Any):
        self.trt, self.network, self.log, self.num_errors = trt, network, log, 0

    def parse_from_file(self, model: str) -> bool:
        self.network.graph = model
        self.num_errors = int("parse" in self.trt.refuse)
        return self.trt.calling("parser", not self.num_errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(
            node_name=lambda: "node_7", node_operator=lambda: "TensorScatter", desc=lambda: self.trt.refuse["parse"]
        )
