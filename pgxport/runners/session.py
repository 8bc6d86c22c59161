# SPDX-License-Identifier: Apache-2.0
"""What every engine offers the runner: arrays in, arrays out, and a KV cache that it writes in place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pgxport.errors import EngineError

Arrays = dict[str, np.ndarray]


class KVCache(Protocol):
    """Key and value buffers, `past_key_values.*` by name; a graph's `present.*` are the same memory."""

    arrays: Arrays


class Session(Protocol):
    """One graph, loaded."""

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> Arrays:
        """Run the graph; keys and values go into `cache`, which `new_cache` of the same session made."""

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> KVCache: ...

    def close(self) -> None: ...


def open_session(engine: str, graph: Path, *, threads: int | None = None, low_memory: bool = False) -> Session:
    """Load a graph into the engine that was asked for, and no other.

    Args:
        low_memory: Give working memory back after each run, though the next one has to ask for it again.

    Raises:
        EngineError: the engine is unknown, not installed, or refuses the graph.
    """
    if engine == "cpu":
        from pgxport.runners.ort import OrtSession

        return OrtSession(graph, threads=threads, low_memory=low_memory)
    raise EngineError(f"engine {engine!r} is not one this pgx runs; use --engine cpu")
