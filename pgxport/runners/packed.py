# SPDX-License-Identifier: Apache-2.0
"""Weights packed for this CPU once, by `pgx compile`, which ONNX Runtime then maps in place of packing them at every start.

The graphs compute the same numbers. What changes is that the weights are pages of a file, and no private memory: shared by all
processes that run the bundle, and dropped by the kernel where memory is short.
"""

import hashlib
import platform
from pathlib import Path

from pgxport.bundle import Bundle, hashed
from pgxport.errors import IntegrityError
from pgxport.runners.engines import Entry, Machine, cache_folder, entry_folder, read_entry
from pgxport.runners.ort import VERSION

ENGINE = "cpu"


def machine() -> Machine:
    """This CPU and its ONNX Runtime: packed weights are of no use to others."""
    return Machine(ENGINE, VERSION, instructions(), cuda="none", driver="none")


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU can do, which decides how weights are packed: its architecture, and a digest of its instruction sets."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    # Both kinds of core of a board with two may run the engine: all that differs between them counts.
    sets = {line.partition(":")[2].strip() for line in lines if line.lower().startswith(("flags", "features"))}
    digest = hashlib.sha256("\n".join(sorted(sets) or [platform.processor()]).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def packed(bundle: Bundle) -> dict[str, Path]:
    """The packed graphs of a bundle, verified; the bundle's own where it was not compiled on this machine.

    Raises:
        IntegrityError: what is in the cache is not what `pgx compile` put there.
    """
    folder = entry_folder(cache_folder(), bundle.digest(), machine())
    if not folder.is_dir():
        return {name: bundle.graph(name) for name in bundle.manifest.graphs}
    check(folder)
    return {name: folder / f"{name}.onnx" for name in bundle.manifest.graphs}


def check(folder: Path) -> Entry:
    """An entry of the cache, every byte of it verified.

    Raises:
        IntegrityError: it is not what `pgx compile` put there.
    """
    entry = read_entry(folder)
    files = entry.files
    for name, seen in zip(files, hashed([folder / name for name in files]), strict=True):
        if seen != files[name].sha256:
            raise IntegrityError(
                f"{folder / name} was changed: its sha256 begins {seen[:12]}, and not {files[name].sha256[:12]}; "
                f"delete {folder}, and run `pgx compile` again"
            )
    return entry
