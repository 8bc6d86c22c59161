# SPDX-License-Identifier: Apache-2.0
"""Load a bundle's graphs into the engine that was asked for, and into no other."""

from pathlib import Path

from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, UsageError
from pgxport.runners.session import ENGINES, Session


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
