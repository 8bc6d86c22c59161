# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pgxport.errors import EngineError, IntegrityError, NumericError
from pgxport.runners.session import Arrays

try:
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
except ImportError as error:
    raise EngineError(f'engine cpu needs ONNX Runtime: pip install "pgxport[cpu]" ({error})') from error

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}  # of a cache
OLDEST = (1, 30)  # the first release whose GroupQueryAttention can look both ways


class OrtSession:
    def __init__(self, graph: Path, *, threads: int | None = None, low_memory: bool = False):
        if tuple(int(n) for n in ort.__version__.split(".")[:2]) < OLDEST:
            raise EngineError(
                f"onnxruntime {ort.__version__} is too old, pgx needs {OLDEST[0]}.{OLDEST[1]}: pip install -U onnxruntime"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        # An arena keeps what loading and a prefill took, 0.6 GB of a 3B model. Without one every prefill asks for its pages anew.
        options.enable_cpu_mem_arena = not low_memory
        if threads:
            options.intra_op_num_threads = threads
        self._graph = graph
        with refusals(f"load {graph}"):
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray], cache: "OrtCache | None" = None) -> Arrays:
        with refusals(f"run {self._graph}"):
            if cache is None:
                return dict(zip(self._outputs, self._session.run(None, dict(feeds)), strict=True))
            for name, array in feeds.items():
                cache.binding.bind_cpu_input(name, array)
            self._session.run_with_iobinding(cache.binding)
            values = cache.binding.get_outputs_as_ortvaluevector()
            return {name: values[i].numpy() for i, name in enumerate(cache.results)}

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> "OrtCache":
        with refusals(f"give {self._graph} a cache"):
            return OrtCache(self._session, shapes, self._outputs)

    def close(self) -> None:
        del self._session


class OrtCache:
    """KV buffers bound once, each as the graph's past and its present: nothing is copied from step to step."""

    def __init__(self, session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]], outputs: list[str]):
        self.binding = session.io_binding()
        present = {name: name.replace("past_key_values.", "present.") for name in shapes}
        # Results are bound first, so that they come first among the outputs.
        self.results = [name for name in outputs if name not in present.values()]
        for name in self.results:
            self.binding.bind_output(name, "cpu")
        # An OrtValue on the CPU is the array's own memory; pages that are never touched take none.
        kinds = {i.name: DTYPES[i.type] for i in session.get_inputs() if i.name in shapes}
        self.arrays = {name: np.empty(shape, kinds[name]) for name, shape in shapes.items()}
        for name, array in self.arrays.items():
            buffer = ort.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(name, buffer)
            self.binding.bind_ortvalue_output(present[name], buffer)


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Say whose fault it is when the engine will not: memory's, the graph's, or its own."""
    try:
        yield
    except Exception as error:  # its exceptions share no base class
        message = f"onnxruntime {ort.__version__} cannot {what}: {error}"
        if isinstance(error, MemoryError) or "bad_alloc" in message or "allocate memory" in message:
            raise NumericError(f"{message}; close other programs, or ask for fewer tokens") from error
        if isinstance(error, Fail | InvalidArgument | InvalidGraph | InvalidProtobuf):
            raise IntegrityError(f"{message}; export the bundle again") from error
        raise EngineError(message) from error
