# SPDX-License-Identifier: Apache-2.0
"""The interface of every engine: arrays in, arrays out, and a KV cache that the engine writes in place."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]
# Engine -> the target whose bundles it runs.
ENGINES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}


class KVCache(Protocol):
    """Key and value buffers, named `past_key_values.*`; each holds what the last run gave as `present.*`."""

    @property
    def arrays(self) -> Arrays:
        """The buffers themselves where they are in host memory, else copies."""

    @property
    def nbytes(self) -> int:
        """Size of all buffers, on whatever device they are."""


class Session(Protocol):
    """One graph, loaded."""

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> Mapping[str, np.ndarray]:
        """Run the graph; keys and values go into `cache`, which `new_cache` of the same session made.

        Results stand until the next run. An engine may leave them on its device until they are read by name,
        and takes its own results as feeds from there.
        """

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> KVCache:
        """A KV cache of these shapes, by the name of the input."""

    def close(self) -> None:
        """Free the engine's memory; the session cannot run afterwards."""
