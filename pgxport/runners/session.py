# SPDX-License-Identifier: Apache-2.0
"""What every engine offers the runner: arrays in, arrays out, and a KV cache that it writes in place."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


# Engine -> the target whose bundles it runs.
ENGINES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}


class KVCache(Protocol):
    """Key and value buffers, `past_key_values.*` by name: what `present.*` of one run hold is there in the next."""

    @property
    def arrays(self) -> Arrays:
        """The buffers themselves where they are in the host's memory, else copies."""

    @property
    def nbytes(self) -> int:
        """Of all buffers, wherever they are."""


class Session(Protocol):
    """One graph, loaded."""

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> Mapping[str, np.ndarray]:
        """Run the graph; keys and values go into `cache`, which `new_cache` of the same session made.

        Results stand until the next run. An engine may leave them on its device until they are asked for by name, and takes its own
        results as feeds from there.
        """

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> KVCache: ...

    def close(self) -> None: ...
