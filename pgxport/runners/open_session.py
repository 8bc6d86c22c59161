# SPDX-License-Identifier: Apache-2.0
"""Load a bundle's graphs into the engine that was asked for, and into no other."""

import tempfile
from pathlib import Path

import numpy as np

from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, PgxError, UsageError
from pgxport.runners.session import ENGINES, Session

# A graph that computes y = x + x on float32 [1]: the smallest that shows that an engine runs.
PROBE = b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r'


def open_session(engine: str, graph: Path, *, threads: int | None = None, low_memory: bool = False) -> Session:
    """Load a graph into the engine that was asked for, and into no other.

    Args:
        graph: One of `graph_files`.
        low_memory: Give working memory back after each run, though the next run has to ask for it again.

    Raises:
        EngineError: the engine is unknown, not installed, or refuses the graph.
    """
    if engine == "cpu":
        from pgxport.runners.ort import OrtSession

        return OrtSession(graph, threads=threads, low_memory=low_memory)
    if engine == "cuda":
        from pgxport.runners.ort import CUDA, OrtSession

        return OrtSession(graph, provider=CUDA, threads=threads, low_memory=low_memory)
    if ENGINES.get(engine) == "tensorrt":
        from pgxport.runners.tensorrt import TensorrtSession

        if threads is not None:
            raise UsageError(f"--threads is for engine cpu; {engine} computes on the device: leave it out")
        return TensorrtSession(graph, engine)
    raise EngineError(f"engine {engine!r} is not one this pgx runs; use --engine {', '.join(ENGINES)}")


def why_not_here(engine: str) -> str | None:
    """The reason why this machine cannot run an engine on graphs that it was given; None: it computed one.

    TensorRT runs what `pgx compile` built, and is not tried.
    """
    if ENGINES.get(engine) == "tensorrt":
        return f"engine {engine} runs what `pgx compile` builds"
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "probe.onnx"
        graph.write_bytes(PROBE)
        try:
            session = open_session(engine, graph)
            result = session.run({"x": np.array([21.0], np.float32)})["y"]
            session.close()
        except PgxError as error:
            return str(error)
    return None if result.tolist() == [42.0] else f"21 + 21 came out as {result.tolist()}"


def graph_files(engine: str, bundle: Bundle) -> dict[str, Path]:
    """The files that `open_session` loads, by graph: the bundle's own, or those that `pgx compile` made here.

    Raises:
        EngineError: the bundle was written for another engine, or is not compiled.
    """
    target = bundle.manifest.target
    if ENGINES.get(engine) != target:
        raise EngineError(
            f"{bundle.path} was written for target {target!r}, and engine {engine!r} was asked for; "
            f"export it with --target {ENGINES.get(engine, engine)}, or run it with --engine {target}"
        )
    if target == "tensorrt":
        from pgxport.runners.tensorrt_library import compiled

        return compiled(bundle, engine)
    if engine == "cpu":
        from pgxport.runners.packed import packed

        return packed(bundle)
    return {name: bundle.graph(name) for name in bundle.manifest.graphs}
