# SPDX-License-Identifier: Apache-2.0
"""Results on disk, line by line, so that nothing is measured twice; arrays have files of their own.

A file holds what was measured under the same conditions: the conditions are its first line, and their digest
is its name. A line that a kill cut off is taken away; any other damage is an error, for results must not be
lost in silence.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pgxport.errors import IntegrityError
from pgxport.files import disk_errors, locked, writing


class StoredLine(BaseModel):
    """One result: a line of JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Line = TypeVar("Line", bound=StoredLine)


class ResultFile(Generic[Line]):
    """The results under one set of conditions, in a file of JSON lines.

    Args:
        folder: An existing folder, which no other process writes (`alone`).
        conditions: Plain data that must be the same for the results to hold.
        kinds: The kinds of lines that the file may hold.

    Attributes:
        lines: Every line that was kept, the oldest first.

    Raises:
        IntegrityError: a line is damaged.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any], kinds: TypeAdapter[Line]):
        self._first = json.dumps({"kind": "conditions", **conditions}, sort_keys=True)
        self._kinds = kinds
        self.path = folder / f"{digest(conditions)[:24]}.jsonl"
        self.lines = self._read()

    def find(self, **fields: Any) -> Line | None:
        """Return the newest line whose fields have these values."""
        matching = (line for line in reversed(self.lines) if all(getattr(line, k, None) == v for k, v in fields.items()))
        return next(matching, None)

    def add(self, line: Line) -> None:
        """Append a line; it is on disk when this returns.

        Raises:
            DiskError: it cannot be written.
        """
        self._append(line.model_dump_json())
        self.lines.append(line)

    def _read(self) -> list[Line]:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        first, *rest = whole.splitlines() or [b""]
        if not first:
            self._append(self._first)
        elif first.decode("utf-8", "replace") != self._first:
            raise self._damage(1, "these are not the conditions that the file is named after")
        return [self._parse(line, number) for number, line in enumerate(rest, start=2)]

    def _parse(self, line: bytes, number: int) -> Line:
        try:
            return self._kinds.validate_json(line)
        except ValidationError as error:
            raise self._damage(number, error.errors()[0]["msg"]) from None

    def _damage(self, number: int, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path}, line {number}: {what}; delete the file to measure its results again")

    def _append(self, text: str) -> None:
        with disk_errors(f"cannot write {self.path}"), open(self.path, "ab", buffering=0) as file:
            file.write(text.encode() + b"\n")


def digest(plain: Any) -> str:
    """Return the sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def alone(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder and be the only process that works in it.

    Args:
        flag: The command's flag that names the folder, for messages.

    Raises:
        UsageError: another pgx works in it.
        DiskError: it cannot be made.
    """
    with ExitStack() as stack:
        with disk_errors(f"cannot use {folder}", f"choose another {flag}"):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, f"another pgx works in {folder}; wait for it, or choose another {flag}"))
        yield


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    with disk_errors(f"cannot write {file}"), writing(file) as out:
        np.save(out, array, allow_pickle=False)


def load_array(file: Path) -> np.ndarray:
    """Map an array that was written here.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} cannot be read ({error}); delete its folder and run the command again") from error
