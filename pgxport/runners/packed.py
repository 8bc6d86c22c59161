# SPDX-License-Identifier: Apache-2.0
"""Find the weights that `pgx compile` packed for this CPU, which ONNX Runtime maps instead of packing them.

The graphs compute the same numbers. The weights are pages of a file instead of private memory: all processes
that run the bundle share them, and the kernel drops them where memory is short.
"""

from pathlib import Path

from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError
from pgxport.files import hashed
from pgxport.machine.cpu import instruction_key, overflows_in_16_bits
from pgxport.runners.engine_cache import EngineKey, Entry, Flags, cache_folder, entry_folder, entry_key, read_entry
from pgxport.runners.ort import VERSION

ENGINE = "cpu"


def engine_key() -> EngineKey:
    """This CPU and its ONNX Runtime, the only ones that can use what they packed."""
    return EngineKey(ENGINE, VERSION, instruction_key(), cuda="none", driver="none")


def flags() -> Flags:
    """Returns the flags that decide how weights are packed, beside the machine: int8 matrices become uint8 where products are of uint8."""
    return {"x64quantprecision": int(overflows_in_16_bits())}


def packed(bundle: Bundle) -> dict[str, Path]:
    """The packed graphs of a bundle, verified; its own where it was not compiled here with these flags.

    Raises:
        IntegrityError: the cache holds something that `pgx compile` did not put there.
    """
    folder = entry_folder(cache_folder(), bundle.digest(), engine_key())
    if not folder.is_dir() or not is_current(check(folder), bundle):
        return {name: bundle.graph(name) for name in bundle.manifest.graphs}
    return {name: folder / f"{name}.onnx" for name in bundle.manifest.graphs}


def is_current(entry: Entry, bundle: Bundle) -> bool:
    """Whether an entry is of this bundle and this machine's flags; older entries name no flags."""
    return entry.key == entry_key(bundle.digest(), engine_key(), flags())


def check(folder: Path) -> Entry:
    """Read an entry of the cache and verify every byte of it.

    Raises:
        IntegrityError: the entry is not what `pgx compile` put there.
    """
    entry = read_entry(folder)
    files = entry.files
    for name, digest in zip(files, hashed([folder / name for name in files]), strict=True):
        if digest != files[name].sha256:
            raise IntegrityError(
                f"{folder / name} was changed: its sha256 begins {digest[:12]}, and not {files[name].sha256[:12]}; "
                f"delete {folder}, and run `pgx compile` again"
            )
    return entry
