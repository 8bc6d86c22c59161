# SPDX-License-Identifier: Apache-2.0
"""Bundles on the way to a node: named by the sha256 of their manifest, fetched once, verified before use. Knows no Ray."""

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError
from pgxport.files import StagedFolder, disk_errors, file_sha256, locked

CHUNK = 8 << 20  # bytes of a file that are on the way at once
Stream = Callable[[str, int | None], Iterable[bytes]]  # a file's name and size, where it is known, to its chunks


class Depot:
    """The driver's bundles, given out chunk by chunk to whoever names their digest."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}
        self._served: dict[str, int] = {}

    def offer(self, digest: str, folder: str) -> None:
        self._folders[digest] = Path(folder)

    def withdraw(self, digest: str) -> None:
        self._folders.pop(digest, None)

    def chunk(self, digest: str, name: str, offset: int) -> bytes:
        """At most CHUNK bytes of a file; fewer, and it has come to its end."""
        with open(self._folders[digest] / name, "rb") as file:
            content = os.pread(file.fileno(), CHUNK, offset)
        self._served[digest] = self._served.get(digest, 0) + len(content)
        return content

    def served(self) -> dict[str, int]:
        """Bytes given out, by digest."""
        return dict(self._served)


def digest_of(path: str | Path) -> str:
    """What a bundle is called on its way, once every byte of it has been verified.

    Raises:
        IntegrityError: it is not what its manifest promises.
    """
    return file_sha256(Bundle.open(path).path / MANIFEST)


def cache() -> Path:
    """The folder of fetched bundles on this node: $PGX_CACHE, else a user's cache."""
    if given := os.environ.get("PGX_CACHE"):
        return Path(given) / "bundles"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgx" / "bundles"


def passing(folder: Path) -> Path:
    """A folder for what only this process uses; those of dead processes are deleted."""
    for left in folder.glob("passing-*"):
        try:
            os.kill(int(left.name.removeprefix("passing-")), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
    return folder / f"passing-{os.getpid()}"


def fetch(digest: str, stream: Stream, folder: Path) -> Path:
    """The bundle of that digest below `folder`: what is there and sound, else fetched; others who want the same wait.

    Raises:
        IntegrityError: what came is not what the digest promises, or the folder is not this user's alone.
        DiskError: it cannot be written.
    """
    path = folder / digest
    with disk_errors(f"cannot keep a bundle in {folder}", "free some space, or let PGX_CACHE name another folder"):
        _make_private(folder)
        with locked(folder / f"{digest}.lock", None):
            if not path.exists() or not _sound(path, digest):
                with StagedFolder(path, None) as staged:
                    _receive(digest, stream, staged.staging)
                    staged.publish()
    return path


def _receive(digest: str, stream: Stream, staging: Path) -> None:
    _write(staging / MANIFEST, stream(MANIFEST, None))
    if (seen := file_sha256(staging / MANIFEST)) != digest:
        raise IntegrityError(
            f"the manifest that came has sha256 {seen[:12]}…, not {digest[:12]}…; the bundle was changed meanwhile"
        )
    for name, info in Bundle.open(staging, verify=False).manifest.files.items():
        _write(staging / name, stream(name, info.size))
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
