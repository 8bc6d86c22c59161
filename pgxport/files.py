# SPDX-License-Identifier: Apache-2.0
"""Text files of any origin: of a limited size, in UTF-8, and JSON objects a line."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pgxport.errors import DiskError, InputError


def read_text(file: Path, most: int) -> str:
    """A text file in UTF-8, with or without a byte order mark, of at most `most` bytes.

    Raises:
        InputError: it is larger, not UTF-8, or no file.
        DiskError: it cannot be read.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file}: is a folder or a device, not a file")
        if (size := file.stat().st_size) > most:
            raise InputError(f"{file}: {size / 1e6:.0f} MB, more than the {most / 1e6:.0f} MB of text pgx reads; cut it")
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise DiskError(f"{file}: cannot be read: {error.strerror or error}; check the permissions and the disk") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def read_object(text: str, where: str, expected: str) -> dict[str, Any]:
    """A JSON object; `expected` says in messages what it has to be.

    Raises:
        InputError: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {text[:80]!r}; {expected}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}, {text[:80]!r}; {expected}")
    return value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed(files: Sequence[Path]) -> Iterator[str]:
    """The sha256 of each file, several at a time: hashing is what opening a bundle takes."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(file_sha256, files)
