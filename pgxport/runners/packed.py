# SPDX-License-Identifier: Apache-2.0
"""Weights packed for this CPU once, by `pgx compile`, which ONNX Runtime then maps in place of packing them at every start.

The graphs compute the same numbers. What changes is that the weights are pages of a file, and no private memory: shared by all
processes that run the bundle, and dropped by the kernel where memory is short.
"""

from pathlib import Path

from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError
from pgxport.files import hashed
from pgxport.machine.cpu import instruction_key, overflows_in_16_bits
from pgxport.runners.engine_cache import Entry, Flags, Machine, cache_folder, entry_folder, key, read_entry
from pgxport.runners.ort import VERSION

ENGINE = "cpu"


def machine() -> Machine:
    """This CPU and its ONNX Runtime: packed weights are of no use to others."""
    return Machine(ENGINE, VERSION, instruction_key(), cuda="none", driver="none")


def flags() -> Flags:
    """What decides how weights are packed besides the machine: int8 matrices are packed as uint8 ones where products are."""
    return {"x64quantprecision": int(overflows_in_16_bits())}


def packed(bundle: Bundle) -> dict[str, Path]:
    """The packed graphs of a bundle, verified; the bundle's own where it was not compiled on this machine with these flags.

    Raises:
        IntegrityError: what is in the cache is not what `pgx compile` put there.
    """
    folder = entry_folder(cache_folder(), bundle.digest(), machine())
    if not folder.is_dir() or not is_current(check(folder), bundle):
        return {name: bundle.graph(name) for name in bundle.manifest.graphs}
    return {name: folder / f"{name}.onnx" for name in bundle.manifest.graphs}


def is_current(entry: Entry, bundle: Bundle) -> bool:
    """Whether an entry was packed from this bundle with the flags of today; those of earlier versions of pgx name none."""
    return entry.key == key(bundle.digest(), machine(), flags())


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
