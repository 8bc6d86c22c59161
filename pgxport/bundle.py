# SPDX-License-Identifier: Apache-2.0
"""A bundle: the folder that export writes and runners read, and the only contract between them.

Written whole or not at all: files go to `NAME.partial`, the manifest last, and one rename gives the folder its name.
Verified before an engine sees it: every file is listed, is a plain file inside the folder, and has its size and sha256.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgxport.errors import DiskError, IntegrityError, UsageError

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
_CHUNK = 1 << 20


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInfo(_Model):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class TensorInfo(_Model):
    """An input or output of a graph; a string in the shape is an axis of free length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphInfo(_Model):
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class TokenTable(_Model):
    """The embedding [vocab, width], row by row in a file of its own; a looked-up row is multiplied by `scale`."""

    file: str
    dtype: Literal["float32"]
    shape: tuple[int, int]
    scale: float


class Cache(_Model):
    """The KV cache: for each layer a key and a value buffer [batch, kv_heads, capacity, head_dim]."""

    layers: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dtype: Literal["float32"]


class TokenIds(_Model):
    """The ids with a meaning of their own. `newline` ends the prefix; `<loc…>` and `<seg…>` are runs of consecutive ids."""

    bos: int
    eos: int
    pad: int
    newline: int
    image: int
    loc_first: int
    loc_count: int
    seg_first: int
    seg_count: int


class Provenance(_Model):
    """Where a bundle comes from."""

    checkpoint: str  # a name for people, never a path
    checkpoint_sha256: str
    versions: dict[str, str]


class Manifest(_Model):
    format_version: Literal[1] = 1
    name: str
    family: str
    resolution: int = Field(gt=0)
    image_tokens: int = Field(gt=0)
    context_length: int = Field(gt=0)  # the longest prefix and answer together
    max_new_tokens: int = Field(gt=0)  # unless the caller says otherwise
    local_window: int | None  # tokens that a generated token sees in local layers; None where no layer needs telling
    recipe: str
    target: str
    parameters: int
    spec: dict[str, Any]  # the ModelSpec, for people and reports
    token_ids: TokenIds
    token_table: TokenTable
    cache: Cache
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    provenance: Provenance


@dataclass(frozen=True)
class Bundle:
    """A complete bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "Bundle":
        """Open a bundle and verify every byte of it.

        Raises:
            IntegrityError: it is not a bundle, is not complete, or is not what its manifest promises.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if verify:
            _verify(path, manifest)
        return cls(path, manifest)

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.manifest.files.values())

    def graph(self, name: str) -> Path:
        return self.path / self.manifest.graphs[name].file

    def token_table(self) -> np.ndarray:
        """The embedding [vocab, width], mapped: only the rows that are looked up are read."""
        table = self.manifest.token_table
        return np.memmap(self.path / table.file, np.dtype(table.dtype), "r", shape=table.shape)


class BundleWriter:
    """Write a bundle's files one by one; `commit` makes it one, and leaving without it leaves nothing.

    with BundleWriter(path) as writer:
        writer.write("tokenizer.json", [content])
        writer.commit(manifest)
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path = Path(os.path.abspath(path))
        self.staging = self.path.with_name(self.path.name + ".partial")
        self.files: dict[str, FileInfo] = {}
        self._overwrite = overwrite

    def __enter__(self) -> Self:
        if os.path.lexists(self.path) and not self._overwrite:
            raise UsageError(f"{self.path} already exists; pass --overwrite to replace it, or another -o")
        if os.path.lexists(self.path) and not (self.path / MANIFEST).is_file() and any(self._entries()):
            raise UsageError(f"{self.path} exists and is not a bundle; pgx does not replace it. Choose another -o")
        with _disk(f"cannot write {self.staging}"):
            if self.staging.exists():  # of an export that was killed
                shutil.rmtree(self.staging)
            self.staging.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

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

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, then give the folder its name."""
        text = manifest.model_dump_json(indent=1).encode() + b"\n"
        self.write(MANIFEST, [text])
        with _disk(f"cannot finish {self.path}"):
            _fsync_folder(self.staging)
            old = self.path.with_name(self.path.name + ".replaced")
            if self.path.exists():
                self.path.rename(old)
            self.staging.rename(self.path)
            _fsync_folder(self.path.parent)
            shutil.rmtree(old, ignore_errors=True)
        return Bundle(self.path, manifest)

    def _entries(self) -> Iterator[Path]:
        return self.path.iterdir() if self.path.is_dir() else iter([self.path])


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise IntegrityError(f"{path}: no such folder; `pgx export -o {path}` writes one")
    file = path / MANIFEST
    try:
        if not file.is_file() or file.is_symlink():
            raise IntegrityError(f"{path} is not a bundle: it has no {MANIFEST}, which is written last; export it again")
        if (size := file.stat().st_size) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{file} has {size} bytes; no manifest is longer than {MAX_MANIFEST_BYTES}")
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise IntegrityError(
            f"{file}: {where}: {first['msg']}. This pgx reads bundles of format 1; export again or update pgx"
        ) from None
    except OSError as error:
        raise DiskError(f"cannot read {file}: {error.strerror}") from error


def _verify(path: Path, manifest: Manifest) -> None:
    promised = {MANIFEST, *manifest.files}
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise IntegrityError(f"{path}: the manifest names {name!r}, which is not a plain file name")
    named = {g.file for g in manifest.graphs.values()} | {manifest.token_table.file, "tokenizer.json"}
    if missing := named - set(manifest.files):
        raise IntegrityError(f"{path}: the manifest uses {', '.join(sorted(missing))} without listing it under files")
    if strangers := sorted(p.name for p in path.iterdir() if p.name not in promised):
        raise IntegrityError(f"{path} holds {', '.join(strangers[:5])}, which its manifest does not list")
    for name, info in manifest.files.items():
        file = path / name
        try:
            stat = file.lstat()
        except FileNotFoundError:
            raise IntegrityError(f"{file} is missing; export the bundle again") from None
        if not os.path.isfile(file) or file.is_symlink() or stat.st_nlink != 1:
            raise IntegrityError(f"{file} is not a plain file of its own (a link, a pipe or a folder)")
        if stat.st_size != info.size:
            raise IntegrityError(f"{file} has {stat.st_size} bytes where the manifest promises {info.size}")
    table = manifest.token_table
    if manifest.files[table.file].size != table.shape[0] * table.shape[1] * np.dtype(table.dtype).itemsize:
        raise IntegrityError(
            f"{path / table.file} has {manifest.files[table.file].size} bytes, which is not {table.shape} {table.dtype}"
        )
    for name, info in manifest.files.items():
        if (seen := file_sha256(path / name)) != info.sha256:
            raise IntegrityError(
                f"{path / name} was changed: its sha256 begins {seen[:12]}, the manifest says {info.sha256[:12]}; copy or export the bundle again"
            )


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
