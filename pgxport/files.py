# SPDX-License-Identifier: Apache-2.0
"""Files: read strictly, written whole or not at all, by one process at a time; disk errors with a remedy."""

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from pgxport.errors import DiskError, InputError, UsageError
from pgxport.interrupts import check_interrupted

STAGED = ".partial"  # behind the name of a file or a folder, as long as it is being written
CHOOSE_OUTPUT = "free some space or choose another -o"
CHECK_DISK = "check the permissions and the disk"


@contextmanager
def disk_errors(what: str, remedy: str = CHOOSE_OUTPUT, *, path: Path | None = None) -> Iterator[None]:
    """Turn an OSError into an error of one line.

    Args:
        what: What could not be done, as "cannot write b".
        path: Is named behind `what`, unless the error itself names a file.

    Raises:
        DiskError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        where = f" {error.filename or path}" if path is not None else ""
        raise DiskError(f"{what}{where}: {error.strerror or error}; {remedy}") from error


def read_text(file: Path, most: int) -> str:
    """A text file in UTF-8, with or without a byte order mark, of at most `most` bytes.

    Raises:
        InputError: it is larger, not UTF-8, or no file.
        DiskError: it cannot be read.
    """
    try:
        with disk_errors(f"{file}: cannot be read", CHECK_DISK):
            if not file.is_file():
                raise InputError(f"{file}: is a folder or a device, not a file")
            if (size := file.stat().st_size) > most:
                raise InputError(f"{file}: {size / 1e6:.0f} MB, more than the {most / 1e6:.0f} MB of text pgx reads; cut it")
            return file.read_bytes().decode("utf-8-sig")  # not read_text, to which a carriage return ends a line
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def read_object(text: str, where: str, expected: str) -> dict[str, Any]:
    """A JSON object; `expected` says in messages what it has to be. Control characters inside strings stay.

    Raises:
        InputError: it is something else.
    """
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {text[:80]!r}; {expected}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}, {text[:80]!r}; {expected}")
    return value


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed(files: Sequence[Path]) -> Iterator[str]:
    """The sha256 of each file, several at a time: hashing is most of the time of opening a bundle."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(file_sha256, files)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse to write a file where it cannot be, or over one that was not to be replaced.

    Raises:
        UsageError: there is a folder, or a file and no `overwrite`, or no folder to write into.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write with -o")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} already exists; pass --overwrite to replace it, or another -o")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such folder to write {path.name} into; make it, or choose another -o")


@contextmanager
def locked(path: Path, held: str | None) -> Iterator[None]:
    """Hold a folder alone until the end of the block; the lock of a process that dies is free.

    Args:
        path: A folder, or a file for the lock alone, which is made if there is none.
        held: What to say where another process has the lock; None: wait for it.

    Raises:
        UsageError: another process has it.
        OSError: the folder cannot be opened.
    """
    import fcntl  # Linux and macOS have it; what only reads files runs without

    lock = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if held is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UsageError(str(held)) from None
        yield
    finally:
        os.close(lock)


def write_new(file: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o666) -> tuple[str, int]:
    """Write a file that does not exist yet onto the disk: its sha256 and its size in bytes.

    Raises:
        OSError: it exists, or cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb", buffering=0) as out:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            size += rest.nbytes
            while rest:
                rest = rest[out.write(rest) :]
        os.fsync(out.fileno())
    return digest.hexdigest(), size


@contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name at the end of the block, once all of it is on the disk.

    Raises:
        OSError: it cannot be written; what had the name stays.
    """
    staged = file.with_name(file.name + STAGED)
    try:
        with open(staged, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        staged.replace(file)
        fsync_folder(file.parent)
    finally:
        staged.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text in UTF-8."""
    with writing(file) as out:
        out.write(content.encode() if isinstance(content, str) else content)


class StagedFolder:
    """A folder that gets its name once it is complete; until then it is NAME.partial, and one process has it.

    with StagedFolder(path, f"another pgx is writing {path}; wait for it") as staged:
        write_new(staged.staging / "file", [content])
        staged.publish()

    Args:
        held: What to say where another process has it; None: wait for that.
        resume: Begin with what an earlier process left, and leave it for a later one unless it is published.
        mode: The permissions of the folder.
    """

    def __init__(self, path: Path, held: str | None, *, resume: bool = False, mode: int = 0o777):
        self.path, self.staging = path, path.with_name(path.name + STAGED)
        self._held, self._resume, self._mode, self._published, self._lock = held, resume, mode, False, ExitStack()

    def open(self) -> None:
        """Make the folder, or take what is left of one.

        Raises:
            UsageError: another process has it.
            OSError: it cannot be made.
        """
        if self.staging.is_symlink() or self.staging.is_file():
            self.staging.unlink()
        self.staging.mkdir(mode=self._mode, parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.staging, self._held))
        for left in () if self._resume else self.staging.iterdir():  # by a process that was killed
            delete(left)

    def close(self) -> None:
        """Delete what was not published, unless it is for a later process, and let others have the name."""
        if (self._published or not self._resume) and os.path.lexists(self.staging):
            delete(self.staging, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self) -> None:
        """Give the folder its name; what had it is deleted by `close`.

        Raises:
            KeyboardInterrupt: SIGINT arrived, and foreign code swallowed it; what was written since gets no name.
        """
        check_interrupted()
        fsync_folder(self.staging)
        if os.path.lexists(self.path):
            exchange(self.staging, self.path)
        else:
            self.staging.rename(self.path)
        self._published = True
        fsync_folder(self.path.parent)


def delete(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file, a link (not what it leads to), or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=ignore_errors)


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def exchange(new: Path, old: Path) -> None:
    """Give two folders each other's names, at once where the system can."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None or swap(here, os.fsencode(new), here, os.fsencode(old), both) != 0:
        aside = old.with_name(old.name + ".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
