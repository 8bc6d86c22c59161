# SPDX-License-Identifier: Apache-2.0
"""Write a bundle whole or not at all: files go to `NAME.partial`, the manifest last, and one rename gives the folder its name."""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pgxport.bundle.manifest import MANIFEST, STAGED, FileInfo, Manifest
from pgxport.bundle.reader import Bundle
from pgxport.errors import DiskError, UsageError


class BundleWriter:
    """Write a bundle's files one by one; `commit` makes it one, and leaving without it leaves nothing.

    with BundleWriter(path) as writer:
        writer.write("tokenizer.json", [content])
        writer.commit(manifest)

    Args:
        overwrite: Replace a bundle that is there.
        resume: Begin with what an earlier writer left, and leave it for a later one without a commit.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False):
        self.path = Path(os.path.abspath(path))
        self.staging = self.path.with_name(self.path.name + STAGED)
        self.files: dict[str, FileInfo] = {}
        self._overwrite, self._resume, self._committed = overwrite, resume, False

    def __enter__(self) -> Self:
        self.check_output()
        with _disk(f"cannot write {self.staging}"):
            if self.staging.is_symlink() or self.staging.is_file():
                self.staging.unlink()
            self.staging.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.staging, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process dies
            except BlockingIOError:
                os.close(self._lock)
                raise UsageError(f"another pgx is writing {self.path}; wait for it, or choose another -o") from None
            for left in () if self._resume else self.staging.iterdir():  # by an export that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._committed or not self._resume:
            shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self._lock)

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileInfo:
        """Write a file from pieces, hashing on the way.

        Raises:
            DiskError: it cannot be written.
        """
        digest, size = hashlib.sha256(), 0
        with _disk(f"cannot write {name} of {self.path}"), open(self.staging / name, "xb", buffering=0) as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        self.files[name] = FileInfo(sha256=digest.hexdigest(), size=size)
        return self.files[name]

    def link(self, file: Path, info: FileInfo) -> None:
        """Take a file of another bundle as it is: by a hard link, where the file system has them, and else by a copy."""
        with _disk(f"cannot write {file.name} of {self.path}"):
            try:
                os.link(file, self.staging / file.name)
            except OSError:
                shutil.copyfile(file, self.staging / file.name)
                with open(self.staging / file.name, "rb") as copied:
                    os.fsync(copied.fileno())
        self.files[file.name] = info

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, then give the folder its name."""
        text = manifest.model_dump_json(indent=1).encode() + b"\n"
        written = Manifest.model_validate_json(text)  # as a reader will see it
        self.write(MANIFEST, [text])
        self.publish()
        return Bundle(self.path, written)

    def publish(self) -> None:
        """Give the folder its name; its manifest is there already."""
        with _disk(f"cannot finish {self.path}"):
            _fsync_folder(self.staging)
            if os.path.lexists(self.path):
                self.check_output()
                _exchange(self.staging, self.path)  # what was there is deleted on leaving
            else:
                self.staging.rename(self.path)
            self._committed = True
            _fsync_folder(self.path.parent)

    def check_output(self) -> None:
        """What is at the bundle's name is replaced only if that was asked for, and it is a bundle or an empty folder."""
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise UsageError(f"{self.path} already exists; pass --overwrite to replace it, or another -o")
        if self.path.is_symlink() or not self.path.is_dir():
            raise UsageError(f"{self.path} is not a folder, and pgx does not replace it; choose another -o")
        with _disk(f"cannot read {self.path}"):
            if strangers := sorted(set(os.listdir(self.path)) - _written(self.path)):
                raise UsageError(
                    f"{self.path} holds {', '.join(map(repr, strangers[:5]))}, which is not part of a bundle; "
                    f"pgx does not delete it: move it, or choose another -o"
                )


def _written(path: Path) -> set[str]:
    """The files that some pgx wrote into a folder: sound or not, and of any version."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return {MANIFEST, *manifest["files"]} if "format_version" in manifest else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


@contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror or error}; free some space or choose another -o") from error


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _exchange(new: Path, old: Path) -> None:
    """Give two folders each other's names, at once where the system can."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None or swap(here, os.fsencode(new), here, os.fsencode(old), exchange) != 0:
        aside = old.with_name(old.name + ".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
