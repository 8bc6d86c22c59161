# SPDX-License-Identifier: Apache-2.0
"""What `pgx compile` is asked for, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pgxport.runners.engine_cache import Entry

Progress = Callable[[str, int, int], None]  # the step's name, steps done, steps in all


@dataclass(frozen=True)
class CompileOptions:
    """What to compile. Names are those of `pgx compile`'s flags.

    Attributes:
        bundle: A bundle of target tensorrt, or cpu.
        engine: "tensorrt" or "tensorrt-rtx", or "cpu", for which weights are packed (cpu.py). None: by the
            bundle's target.
        sm: The compute capability to build for, as "8.9"; None: the device's. Only TensorRT-RTX builds for
            another.
        profiles: 2 tunes prefill and step apart; 1 is smaller, for TensorRT-RTX, which tunes when shapes come
            up, writes the weights once a profile. None: 1 there, else 2.
        workspace: MiB of device memory that kernels may use for intermediate results.
        timing_cache: Where TensorRT keeps how long kernels took; None: in the engine cache.
        cache: The engine cache; None: PGX_ENGINE_CACHE, or in the user's cache.
        force: Build though memory seems short.
    """

    bundle: str | Path
    engine: str | None = None
    sm: str | None = None
    profiles: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    cache: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Compiled:
    """An entry of the engine cache.

    Attributes:
        built: False where an entry of the same bundle, machine and flags existed already.
    """

    folder: Path
    entry: Entry
    built: bool

    @property
    def nbytes(self) -> int:
        """Size of the entry's files together."""
        return sum(info.size for info in self.entry.files.values())
