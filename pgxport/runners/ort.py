# SPDX-License-Identifier: Apache-2.0
"""Sessions of ONNX Runtime, on the CPU or on an NVIDIA GPU; what the asked device cannot do is an error.

ONNX Runtime by itself goes on without a GPU: the wheel lists the CUDA provider wherever it is installed, a
session that asks for it alone opens on the CPU with a warning on stderr, and a failing run is tried again on
the CPU (1.31.1). Here a session opens strictly (`session.disable_cpu_ep_fallback`), the provider of every
node is checked, and nothing is retried.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgxport.errors import EngineError, IntegrityError, NumericError
from pgxport.machine.cpu import overflows_in_16_bits
from pgxport.machine.driver import ask_driver, missing_libraries
from pgxport.runners.allocator import map_blocks
from pgxport.runners.session import Arrays
from pgxport.text import listed

try:
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
except ImportError as error:
    raise EngineError(
        f'this engine needs ONNX Runtime: pip install "pgxport[cpu]", or "pgxport[gpu]" for a GPU ({error})'
    ) from error

VERSION: str = ort.__version__
OLDEST = (1, 30)  # the first release whose GroupQueryAttention can look both ways
CPU = "CPUExecutionProvider"
OUT_OF_MEMORY = ("bad_alloc", "allocate memory", "out of memory", "ALLOC_FAILED")
# Freed blocks from this size on go back to the system: while a session loads, which frees as much as it
# keeps; in runs, where new blocks take time (glibc's own threshold); and in runs with little memory.
LOADING, RUNNING, RUNNING_SMALL = 1 << 16, 1 << 25, 1 << 20
# ONNX Runtime writes the weights to a file beside the graph, both as they were and packed, and maps both.
PACKED = {
    "save_external_prepacked_constant_initializers": "1",
    "optimized_model_external_initializers_file_name": "{}.data",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
}


@dataclass(frozen=True)
class Provider:
    """An execution provider: its name in ONNX Runtime, the device of its tensors, and its options."""

    name: str
    device: str
    options: tuple[tuple[str, str], ...] = ()
    in_little_memory: tuple[tuple[str, str], ...] = ()


CPU_ONLY = Provider(CPU, "cpu")
CUDA = Provider(
    "CUDAExecutionProvider",
    "cuda",
    # float32 weights are multiplied in float32. One convolution does not repay trying every algorithm.
    (("device_id", "0"), ("use_tf32", "0"), ("cudnn_conv_algo_search", "HEURISTIC")),
    # The arena grows by what a run asks for instead of doubling.
    (("arena_extend_strategy", "kSameAsRequested"), ("cudnn_conv_use_max_workspace", "0")),
)
# CUDA version -> what libonnxruntime_providers_cuda.so links to, and cuDNN, which a convolution loads.
CUDA_LIBRARIES = {
    12: ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libcurand.so.10", "libcufft.so.11", "libcudnn.so.9"),
    13: ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9"),
}


class OrtSession:
    """A graph on one provider, and on no other."""

    def __init__(
        self,
        graph: Path,
        *,
        provider: Provider = CPU_ONLY,
        threads: int | None = None,
        low_memory: bool = False,
        save_packed: Path | None = None,  # write the graph with packed weights here
    ):
        if tuple(int(n) for n in ort.__version__.split(".")[:2]) < OLDEST:
            raise EngineError(
                f"onnxruntime {ort.__version__} is too old, pgx needs {OLDEST[0]}.{OLDEST[1]}: pip install -U onnxruntime"
            )
        self._graph, self._provider, self._run_options = graph, provider, None
        options = session_options(threads=threads, low_memory=low_memory)
        if save_packed is not None:
            options.optimized_model_filepath = str(save_packed)
            for entry, value in PACKED.items():
                options.add_session_config_entry(f"session.{entry}", value.format(save_packed.name))
        if provider is CPU_ONLY:
            map_blocks(LOADING)
            try:
                with refusals(f"load {graph}"):
                    self._session = ort.InferenceSession(graph, options, providers=[CPU])
            finally:
                map_blocks(RUNNING_SMALL if low_memory else RUNNING)
        else:
            self._session = _open_strictly(graph, options, provider, low_memory=low_memory)
            if low_memory:
                self._run_options = ort.RunOptions()
                self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray], cache: "OrtCache | None" = None) -> Arrays:
        with refusals(f"run {self._graph}"):
            if cache is None:
                return dict(zip(self._outputs, self._session.run(None, dict(feeds), self._run_options), strict=True))
            for name, array in feeds.items():
                cache.binding.bind_cpu_input(name, array)
            self._session.run_with_iobinding(cache.binding, self._run_options)
            values = cache.binding.get_outputs_as_ortvaluevector()
            return {name: values[i].numpy() for i, name in enumerate(cache.results)}

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> "OrtCache":
        with refusals(f"give {self._graph} a cache"):
            return OrtCache(self._session, shapes, self._outputs, self._provider.device)

    def close(self) -> None:
        del self._session


class OrtCache:
    """KV buffers, each bound once as the graph's past and its present, so that no step copies the cache."""

    def __init__(
        self,
        session: ort.InferenceSession,
        shapes: Mapping[str, tuple[int, ...]],
        outputs: list[str],
        device: str = CPU_ONLY.device,
    ):
        self.binding = session.io_binding()
        present = {name: name.replace("past_key_values.", "present.") for name in shapes}
        # Results are bound before the cache, so that they are the first outputs. Only they leave the device.
        self.results = [name for name in outputs if name not in present.values()]
        for name in self.results:
            self.binding.bind_output(name, "cpu")
        types = {i.name: TYPES[i.type] for i in session.get_inputs() if i.name in shapes}
        self._buffers = {name: _buffer(shape, types[name], device) for name, shape in shapes.items()}
        for name, buffer in self._buffers.items():
            self.binding.bind_ortvalue_input(name, buffer.value)
            self.binding.bind_ortvalue_output(present[name], buffer.value)

    @property
    def arrays(self) -> Arrays:
        return {name: buffer.array() for name, buffer in self._buffers.items()}

    @property
    def nbytes(self) -> int:
        return sum(buffer.value.tensor_size_in_bytes() for buffer in self._buffers.values())


@dataclass(frozen=True)
class TensorType:
    """A tensor's type: numpy's for it, and its number in ONNX's TensorProto."""

    dtype: type[np.generic]
    number: int


TYPES = {
    "tensor(float)": TensorType(np.float32, 1),
    "tensor(int8)": TensorType(np.int8, 3),
    "tensor(float16)": TensorType(np.float16, 10),
    "tensor(bfloat16)": TensorType(np.uint16, 16),  # numpy has no bfloat16: its bytes are held as integers
}


@dataclass(frozen=True)
class OrtBuffer:
    """Memory of the engine, and numpy's view of it where it is host memory."""

    value: ort.OrtValue
    type: TensorType
    host: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """The buffer itself where it is host memory, else a copy."""
        if self.host is not None:
            return self.host
        copy = np.empty(self.value.shape(), self.type.dtype)
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(copy, self.type.number).update_inplace(self.value)
        return copy


def _buffer(shape: tuple[int, ...], type: TensorType, device: str) -> OrtBuffer:
    if device == "cpu":
        # An OrtValue on the CPU shares the array's memory; pages that are never touched take none.
        host = np.empty(shape, type.dtype)
        return OrtBuffer(ort.OrtValue.ortvalue_from_numpy(host), type, host)
    # Zeros: kernels may read rows that are not written yet, and unwritten memory of a GPU may hold NaN.
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, type.number, device, 0)
    value.update_inplace(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, type.dtype), type.number))
    return OrtBuffer(value, type)


def session_options(*, threads: int | None = None, low_memory: bool = False) -> ort.SessionOptions:
    """The options of every session here, whatever its provider.

    x86-64 without VNNI adds pairs of uint8 by int8 products in 16 bits, which 2 * 255 * 127 overflows: sums
    saturate, without a word. `session.x64quantprecision` lets ONNX Runtime multiply uint8 by uint8, which is
    exact, but halves the speed of all integer products where there is VNNI: it is set only where there is
    none. AMX counts as VNNI, which every processor with AMX has; its own kernels were not measured.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only; they are raised as well
    # An arena keeps what loading and a prefill took (3B: 0.6 GB). Without one, prefills ask for pages anew.
    options.enable_cpu_mem_arena = not low_memory
    # One block for all buffers of a shape, planned in its first run, saves no measurable time and is kept.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.x64quantprecision", str(int(overflows_in_16_bits())))
    if threads:
        options.intra_op_num_threads = threads
    return options


def _open_strictly(graph: Path, options: ort.SessionOptions, provider: Provider, *, low_memory: bool) -> ort.InferenceSession:
    """A session all of whose nodes run on the provider.

    Raises:
        EngineError: the provider is missing, does not start, or lacks a kernel; the message names the nodes.
    """
    if provider.name not in ort.get_available_providers():
        raise EngineError(
            f"this build of ONNX Runtime has no {provider.name}: pip uninstall onnxruntime onnxruntime-gpu, "
            f'then pip install "pgxport[gpu]"; the two overwrite each other\'s files'
        )
    ort.set_default_logger_severity(4)  # what it would print on stderr is raised here
    with redirect_stdout(io.StringIO()):  # it prints what is missing, and stdout is for answers
        ort.preload_dlls(directory="")  # from NVIDIA's packages, else where the system has them
    _require_cuda()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Weights go from the mapped file straight to the device: the arena would take as much again.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    settings = dict(provider.options + (provider.in_little_memory if low_memory else ()))
    with refusals(f"load {graph}"):
        try:
            session = _open(graph, options, provider, settings)
        except Fail as error:
            if "explicitly disabled" not in str(error):
                raise
            # The error does not name the nodes. A session without the option does, and is thrown away.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
            session = _open(graph, options, provider, settings)
    if provider.name not in session.get_providers():
        raise EngineError(
            f"{provider.name} of onnxruntime {ort.__version__} does not start, though the driver and its libraries do; "
            f"pgx doctor shows their versions"
        )
    if nodes := _on_other_providers(session, provider):
        raise EngineError(
            f"onnxruntime {ort.__version__} has no {provider.name} kernel for {listed(nodes)} of {graph}, and pgx runs "
            f"nothing on the CPU that was meant for the GPU; update onnxruntime-gpu, or export in another --precision"
        )
    return session


def _open(graph: Path, options: ort.SessionOptions, provider: Provider, settings: dict[str, str]) -> ort.InferenceSession:
    return ort.InferenceSession(graph, options, providers=[(provider.name, settings)], enable_fallback=0)


def _on_other_providers(session: ort.InferenceSession, provider: Provider) -> list[str]:
    """The nodes that another provider runs, the CPU's above all."""
    return [
        f"{node.op_type} {node.name!r}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name != provider.name
    ]


def _require_cuda() -> None:
    """Check the driver, and the libraries that this build of ONNX Runtime loads.

    Raises:
        EngineError: there is no driver or GPU, or one of them is too old or missing.
    """
    driver = ask_driver()
    built = int((ort.cuda_version or "0").partition(".")[0])  # "13.0"; builds of others may not say
    if driver.cuda[0] < built:
        raise EngineError(
            f"onnxruntime {ort.__version__} is built for CUDA {built}, and the NVIDIA driver runs CUDA {driver.cuda[0]}.{driver.cuda[1]} "
            f"at most; update the driver, or install a build of ONNX Runtime for CUDA {driver.cuda[0]}"
        )
    if missing := missing_libraries(CUDA_LIBRARIES.get(built, ())):
        raise EngineError(
            f"onnxruntime {ort.__version__} needs libraries of CUDA {built} that are not there: {'; '.join(missing)}; "
            f'pip install "onnxruntime-gpu[cuda,cudnn]", or install CUDA {built} and cuDNN 9'
        )


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises into an error about memory (6), the graph (4) or the engine (7)."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        message = f"onnxruntime {ort.__version__} cannot {what}: {error}"
        if isinstance(error, MemoryError) or any(sign in message for sign in OUT_OF_MEMORY):
            raise NumericError(f"{message}; close other programs, or ask for fewer tokens") from error
        of_the_gpu = any(library in str(error) for library in ("CUDA", "CUDNN", "CUBLAS"))
        if isinstance(error, Fail | InvalidArgument | InvalidGraph | InvalidProtobuf) and not of_the_gpu:
            raise IntegrityError(f"{message}; export the bundle again") from error
        raise EngineError(message) from error
