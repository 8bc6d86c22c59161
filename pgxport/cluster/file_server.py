# SPDX-License-Identifier: Apache-2.0
"""Transfer bundles to nodes, each named by its manifest's sha256 and verified before use. Knows no Ray."""

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError
from pgxport.files import StagedFolder, disk_errors, file_sha256, locked

CHUNK = 8 << 20  # bytes of a file in one message
Transfer = Callable[[str, int | None], Iterable[bytes]]  # a file's name, and its size where that is known, to its chunks


class FileServer:
    """Serves the driver's bundles, chunk by chunk, to whoever names their digest."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}
        self._served: dict[str, int] = {}

    def offer(self, digest: str, folder: str) -> None:
        """Serve a bundle's folder."""
        self._folders[digest] = Path(folder)

    def withdraw(self, digest: str) -> None:
        """Serve it no more."""
        self._folders.pop(digest, None)

    def chunk(self, digest: str, name: str, offset: int) -> bytes:
        """Return CHUNK bytes of a file; fewer at its end."""
        with open(self._folders[digest] / name, "rb") as file:
            content = os.pread(file.fileno(), CHUNK, offset)
        self._served[digest] = self._served.get(digest, 0) + len(content)
        return content

    def served(self) -> dict[str, int]:
        """Return the bytes that were served, by digest."""
        return dict(self._served)


def digest_of(path: str | Path) -> str:
    """Verify every byte of a bundle, and return the name of its transfer: the sha256 of its manifest.

    Raises:
        IntegrityError: the bundle is not what its manifest promises.
    """
    return file_sha256(Bundle.open(path).path / MANIFEST)


def cache() -> Path:
    """Return the folder of fetched bundles on this node: $PGX_CACHE, else the user's cache."""
    if given := os.environ.get("PGX_CACHE"):
        return Path(given) / "bundles"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgx" / "bundles"


def temporary_folder(folder: Path) -> Path:
    """Return a folder for bundles that only this process uses, and delete those of dead processes."""
    for other in folder.glob("passing-*"):
        try:
            os.kill(int(other.name.removeprefix("passing-")), 0)
        except ProcessLookupError:
            shutil.rmtree(other, ignore_errors=True)
    return folder / f"passing-{os.getpid()}"


def fetch(digest: str, transfer: Transfer, folder: Path) -> Path:
    """Return the bundle of that digest below `folder`; one process at a time fetches it, unless it is there.

    Raises:
        IntegrityError: the bundle is not the one of that digest, or the folder is not this user's alone.
        DiskError: the bundle cannot be written.
    """
    path = folder / digest
    with disk_errors(f"cannot keep a bundle in {folder}", "free some space, or let PGX_CACHE name another folder"):
        _make_private(folder)
        with locked(folder / f"{digest}.lock", None):
            if not path.exists() or not _sound(path, digest):
                with StagedFolder(path, None) as staged:
                    _receive(digest, transfer, staged.staging)
                    staged.publish()
    return path


def _receive(digest: str, transfer: Transfer, staging: Path) -> None:
    _write(staging / MANIFEST, transfer(MANIFEST, None))
    if (received := file_sha256(staging / MANIFEST)) != digest:
        raise IntegrityError(
            f"the received manifest has sha256 {received[:12]}…, not {digest[:12]}…; the bundle was changed meanwhile"
        )
    for name, info in Bundle.open(staging, verify=False).manifest.files.items():
        _write(staging / name, transfer(name, info.size))
    Bundle.open(staging)


def _write(file: Path, chunks: Iterable[bytes]) -> None:
    with open(file, "xb") as out:
        out.writelines(chunks)


def _sound(path: Path, digest: str) -> bool:
    try:
        return file_sha256(Bundle.open(path).path / MANIFEST) == digest
    except IntegrityError:
        return False


def _make_private(folder: Path) -> None:
    """Make a folder that only this user writes, unless there is one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise IntegrityError(f"{folder} is not a folder that this user alone writes; let PGX_CACHE name another")
