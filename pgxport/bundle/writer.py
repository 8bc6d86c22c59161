# SPDX-License-Identifier: Apache-2.0
"""Write a bundle whole or not at all: files go to `NAME.partial`, the manifest last, and one rename gives the folder its name."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from pgxport.bundle.manifest import MANIFEST, FileInfo, Manifest
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.files import StagedFolder, disk_errors, write_new
from pgxport.text import listed


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
        held = f"another pgx is writing {self.path}; wait for it, or choose another -o"
        self._folder, self._overwrite = StagedFolder(self.path, held, resume=resume), overwrite
        self.staging = self._folder.staging
        self.files: dict[str, FileInfo] = {}

    def __enter__(self) -> Self:
        self.check_output()
        with disk_errors(f"cannot write {self.staging}"):
            self._folder.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.close()

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileInfo:
        """Write a file from pieces, hashing on the way.

        Raises:
            DiskError: it cannot be written.
        """
        with disk_errors(f"cannot write {name} of {self.path}"):
            sha256, size = write_new(self.staging / name, chunks)
        self.files[name] = FileInfo(sha256=sha256, size=size)
        return self.files[name]

    def link(self, file: Path, info: FileInfo) -> None:
        """Take a file of another bundle as it is: by a hard link, where the file system has them, and else by a copy."""
        with disk_errors(f"cannot write {file.name} of {self.path}"):
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

    def complete(self, manifest: Manifest) -> Bundle:
        """Write the manifest, and open the folder as a reader does; it has no name until `publish`.

        Raises:
            IntegrityError: a reader would refuse the bundle.
        """
        self.write(MANIFEST, [manifest.model_dump_json(indent=1).encode() + b"\n"])
        return Bundle.open(self.staging)

    def publish(self) -> None:
        """Give the folder its name; its manifest is there already."""
        self.check_output()
        with disk_errors(f"cannot finish {self.path}"):
            self._folder.publish()

    def check_output(self) -> None:
        """Raises UsageError unless the bundle's name is free, or holds a bundle or an empty folder that may be replaced."""
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise UsageError(f"{self.path} already exists; pass --overwrite to replace it, or another -o")
        if self.path.is_symlink() or not self.path.is_dir():
            raise UsageError(f"{self.path} is not a folder, and pgx does not replace it; choose another -o")
        with disk_errors(f"cannot read {self.path}"):
            if strangers := sorted(set(os.listdir(self.path)) - _written(self.path)):
                raise UsageError(
                    f"{self.path} holds {listed(map(repr, strangers))}, which is not part of a bundle; "
                    f"pgx does not delete it: move it, or choose another -o"
                )


def _written(path: Path) -> set[str]:
    """The files that some pgx wrote into a folder: sound or not, and of any version."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return {MANIFEST, *manifest["files"]} if "format_version" in manifest else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()
