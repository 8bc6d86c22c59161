# SPDX-License-Identifier: Apache-2.0
"""What was measured, kept as a JSON file each, under the digest of all that it depends on: nothing is measured twice."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pgxport.files import disk_errors, locked, write_whole

Result = dict[str, Any]


class Store:
    """Results in a folder.

    Args:
        common: What all of them depend on: checkpoint, calibration, samples, versions.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any]):
        self.folder, self._common = folder, dict(common)
        with disk_errors(f"cannot use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, **what: Any) -> Result | None:
        """The result for that, if there is one; a file that cannot be read is none."""
        try:
            kept = json.loads(self._file(what).read_text())
        except (OSError, ValueError):
            return None
        return kept["result"] if kept.get("of") == self._of(what) else None

    def keep(self, result: Result, **what: Any) -> None:
        """Write a result, whole or not at all."""
        file = self._file(what)
        with disk_errors(f"cannot write {file}"):
            write_whole(file, json.dumps({"of": self._of(what), "result": result}, indent=1) + "\n")

    def _of(self, what: Mapping[str, Any]) -> Result:
        return {**self._common, **what}

    def _file(self, what: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(self._of(what))[:24]}.json"


def digest(plain: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process works in.

    Raises:
        UsageError: one does.
    """
    with ExitStack() as stack:
        with disk_errors(f"cannot use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, f"another pgx works in {folder}; wait for it, or choose another --work"))
        yield
