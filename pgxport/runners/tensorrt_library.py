# SPDX-License-Identifier: Apache-2.0
"""Load TensorRT or TensorRT for RTX (one interface), CUDA's runtime, and a plan of the engine cache."""

import importlib.util
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, IntegrityError, NumericError, PgxError
from pgxport.interrupts import check_interrupted
from pgxport.runners.cuda import Cuda
from pgxport.runners.engine_cache import EngineKey, cache_folder, entry_folder, not_compiled, open_plan, read_entry

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": 'pip install "pgxport[tensorrt]", or on a Jetson JetPack\'s own TensorRT',
    "tensorrt-rtx": 'pip install "pgxport[tensorrt-rtx]"',
}
# numpy has no bfloat16 and no 8-bit floats: their bytes are held as integers.
DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64, "INT32": np.int32, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": np.bool_, "FP8": np.uint8,
}  # fmt: skip


def load_engine(engine: str) -> ModuleType:
    """The engine's module.

    Raises:
        EngineError: it is not installed; the message says how to install it.
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


def engine_key(engine: str, trt: ModuleType, cuda: Callable[[], Cuda] = load_cuda, *, sm: str | None = None) -> EngineKey:
    """What a plan for this machine depends on.

    Args:
        sm: A compute capability in place of the device's. TensorRT-RTX finishes its plans when it loads them:
            it can write them for a device that this machine does not have, and they depend on neither CUDA
            nor the driver.

    Raises:
        EngineError: there is no device, or it has another compute capability and the engine needs it.
    """
    if engine == "tensorrt-rtx":
        return EngineKey(engine, trt.__version__, sm or capability(cuda()), cuda="any", driver="any")
    device = cuda()
    actual = capability(device)
    if sm not in (None, actual):
        raise EngineError(f"TensorRT compiles for the device it runs on, which has SM {actual} and not {sm}; leave out --sm")
    runtime, driver = (device.call(name) for name in ("cudaRuntimeGetVersion", "cudaDriverGetVersion"))
    build = Path("/sys/module/nvidia/version")
    driver_build = f"{driver} {build.read_text().strip() if build.exists() else ''}".strip()
    return EngineKey(engine, trt.__version__, actual, str(runtime), driver_build)


def capability(cuda: Cuda) -> str:
    """The device's compute capability, as "8.7"."""
    return f"{cuda.attribute('ComputeCapabilityMajor')}.{cuda.attribute('ComputeCapabilityMinor')}"


def compiled(bundle: Bundle, engine: str) -> dict[str, Path]:
    """The plans of a bundle for this machine, by graph.

    Raises:
        EngineError: the bundle is not compiled, or the engine or the device is missing.
        IntegrityError: the bundle's entry in the engine cache is not one that pgx made here.
    """
    here = engine_key(engine, load_engine(engine))
    folder = entry_folder(cache_folder(), bundle.digest(), here)
    if not folder.is_dir():
        raise not_compiled(bundle.path, here)
    plans = {name: f"{name}.plan" for name in bundle.manifest.graphs}
    if lacking := set(plans.values()) - set(read_entry(folder).files):
        raise IntegrityError(f"{folder} has no {min(lacking)}; delete it, and run `pgx compile {bundle.path} --engine {engine}`")
    return {name: folder / plan for name, plan in plans.items()}


def logger(trt: ModuleType) -> Any:
    """TensorRT's logger: it keeps the last errors, which TensorRT only ever logs."""

    class TensorrtLog(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=5)
            self._interrupt: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(" ".join(message.split()))
            except BaseException as error:  # TensorRT would swallow it
                self._interrupt = error

        def check(self) -> None:
            """Raise the interrupt that arrived while TensorRT logged; for after each call that may log."""
            interrupt, self._interrupt = self._interrupt, None
            if interrupt is not None:
                raise interrupt
            check_interrupted()

        def take_errors(self) -> str:
            """The last errors, which are forgotten then."""
            reason = "; ".join(self.errors) or "it gave no reason"
            self.errors.clear()
            return reason

    return TensorrtLog()


class LoadedPlan:
    """A plan in TensorRT's runtime, and the CUDA stream that it runs on.

    Attributes:
        inputs: Types of the inputs that a node reads; TensorRT leaves out the others.
        outputs: Types of the outputs.
        in_place: The engine writes new rows into the KV cache itself.
        runs: How many runs were begun; the results of a run stand until the next.

    Raises:
        IntegrityError: pgx did not compile the plan here.
        EngineError: the engine or the device is missing, or will not load the plan.
        NumericError: the plan does not fit into the device's memory.
    """

    def __init__(self, plan: Path, engine: str):
        self.plan, self.trt = plan, load_engine(engine)
        self.cuda = load_cuda()
        self.log = logger(self.trt)
        self.runs = 0
        self.stream = self.cuda.call("cudaStreamCreate")
        try:
            self._load()
        except BaseException:
            self.free()
            raise

    def _load(self) -> None:
        self._runtime = self.trt.Runtime(self.log)
        with open_plan(self.plan, drop=bool(self.cuda.attribute("Integrated"))) as content:
            self.engine = self._runtime.deserialize_cuda_engine(content)
        self.log.check()
        if self.engine is None:
            raise self.refusal("load it")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = {name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT}
        dtypes = {name: np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name]) for name in names}
        self.inputs = {name: dtypes[name] for name in names if name in inputs}
        self.outputs = {name: dtypes[name] for name in names if name not in inputs}
        self.in_place = "write_indices" in inputs

    def context(self, profile: int, *, records_itself: bool) -> Any:
        """An execution context for a profile, with memory for the shapes of that profile and of no other.

        Args:
            records_itself: The engine records CUDA graphs by itself, as TensorRT-RTX can.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if records_itself:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, int(self.stream)):
            raise self.refusal(f"make a context for profile {profile}")
        self.synchronize()
        return context

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def refusal(self, what: str) -> PgxError:
        """The error for a call that TensorRT refused: it returns nothing then, and logs the reason."""
        reason = self.log.take_errors()
        message = f"{self.trt.__name__} {self.trt.__version__} cannot {what} ({self.plan}): {reason}"
        if "memory" in reason.lower() and ("out of" in reason.lower() or "allocat" in reason.lower()):
            return NumericError(f"{message}; close other programs, or ask for fewer tokens")
        return EngineError(f"{message}; run `pgx compile` again")

    def free(self) -> None:
        """Let go of the engine, and free the stream."""
        stream, self.stream, self.engine, self._runtime = self.stream, None, None, None
        if stream is not None:
            self.cuda.free("cudaStreamDestroy", stream)
