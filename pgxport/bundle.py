# SPDX-License-Identifier: Apache-2.0
"""A bundle: the folder that export writes and runners read, and the only contract between them.

Written whole or not at all: files go to `NAME.partial`, the manifest last, and one rename gives the folder its name.
Verified before an engine sees it: every file is listed, is a plain file inside the folder, and has its size and sha256;
every graph reads and writes what runners rely on, and its weights lie in these files.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from pgxport.errors import DiskError, IntegrityError, UsageError
from pgxport.onnx_check import read_signature

MANIFEST = "manifest.json"
CARD = "README.md"  # the model card, for people and the hub
MAX_MANIFEST_BYTES = 16 << 20
STAGED = ".partial"  # behind a bundle's name: its files, as long as they are being written


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain)]
TokenId = Annotated[int, Field(ge=0)]


Float = Literal["float32", "float16", "bfloat16"]
Stored = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Counted = Literal["float32", "float16", "bfloat16", "int8", "int4", "float8"]
Kept = Literal["float32", "float16", "bfloat16", "int8"]  # in a KV cache
TrtVersion = Literal["10.3", "10.16", "11"]
CacheKind = Literal["shared", "delta", "update"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # numpy alone does not know bfloat16


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
    file: FileName
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class TokenTable(_Model):
    """The embedding [vocab, width], row by row in a file of its own; a looked-up row is multiplied by `scale`.

    Whole numbers have scales, at `scales_offset` of the same file, one for each `group` of a row's numbers, and codes at its
    beginning: with a group bytes around 128 or pairs of 4 bits around 8, the lower half first, the last group filled up; without
    one, int8 and one scale a row.
    """

    file: FileName
    dtype: Stored
    shape: tuple[PositiveInt, PositiveInt]
    scale: float = Field(gt=0, allow_inf_nan=False)
    group: Annotated[int, Field(ge=16, le=65536)] | None = None
    scales_offset: Annotated[int, Field(gt=0)] | None = None
    scales_dtype: Float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        coded = self.dtype in ("int8", "int4")
        if coded != (self.scales_offset is not None) or coded != (self.scales_dtype is not None):
            raise ValueError(f"a token table of {self.dtype} with scales of {self.scales_dtype} at {self.scales_offset}")
        if (self.group is not None and not coded) or (self.group is None and self.dtype == "int4"):
            raise ValueError(f"a token table of {self.dtype} in groups of {self.group}")
        if self.group is not None and self.group & (self.group - 1):
            raise ValueError(f"groups of {self.group}, which is no power of two")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without its scales."""
        if self.group is None:
            return self.shape[1] * ITEM_BYTES[self.dtype]
        return self.groups * self.group * (8 if self.dtype == "int8" else 4) // 8

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.group is None else -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        if self.scales_offset is None:
            return self.shape[0] * self.row_bytes
        return self.scales_offset + self.shape[0] * self.groups * ITEM_BYTES[self.scales_dtype or "float32"]


class Cache(_Model):
    """The KV cache: for each layer a key and a value buffer.

    kind "shared": past and present are one buffer [batch, kv_heads, capacity, head_dim], which a node of ONNX Runtime appends to;
    "update": the same shape, which TensorScatter writes into; "delta": [batch, capacity, kv_heads, head_dim], which the graph only
    reads: it gives the new rows [batch, tokens, kv_heads, head_dim], and the runner copies them in.
    """

    kind: CacheKind = "shared"
    layers: int = Field(gt=0, le=1024)
    kv_heads: int = Field(gt=0, le=1024)
    head_dim: int = Field(gt=0, le=1024)
    dtype: Kept


class TokenIds(_Model):
    """The ids with a meaning of their own. `newline` ends the prefix; `<loc…>` and `<seg…>` are runs of consecutive ids."""

    bos: TokenId
    eos: TokenId
    pad: TokenId
    newline: TokenId
    image: TokenId
    loc_first: TokenId
    loc_count: int = Field(ge=0)
    seg_first: TokenId
    seg_count: int = Field(ge=0)


class Ranges(_Model):
    """The largest |x| of each kind of number, and where it was, in float32 on calibration scenes."""

    largest: dict[str, float]
    where: dict[str, str]
    scenes: int


class Parity(_Model):
    """What rounding to whole numbers cost, against the checkpoint, at every token of answers that both were given."""

    scenes: int
    positions: int
    kl: float  # mean Kullback-Leibler divergence from the checkpoint's next-token distribution, in nats
    kl_worst: float
    agreement: float  # share of positions where both find the same token likeliest
    sqnr: dict[str, float]  # of each rounded matrix, in dB, worst first


class Provenance(_Model):
    """Where a bundle comes from."""

    checkpoint: str  # a name for people, never a path
    revision: str | None  # the hub's commit, where it comes from the hub
    repository: str | None = None  # and its name there
    license: Literal["apache-2.0", "gemma"] | None = None  # of the checkpoint, as the hub calls it; None: not known to pgx
    checkpoint_sha256: str
    calibration_sha256: str | None = None
    versions: dict[str, str]


class Manifest(_Model):
    format_version: Literal[1] = 1
    name: str
    family: str
    # The limits are far beyond any PaliGemma: what a stranger's manifest can make a runner allocate ends there.
    resolution: int = Field(gt=0, le=4096)
    image_tokens: int = Field(gt=0, le=1 << 16)
    context_length: int = Field(gt=0, le=1 << 20)  # the longest prefix and answer together
    max_new_tokens: int = Field(gt=0, le=1 << 20)  # unless the caller says otherwise
    local_window: PositiveInt | None  # tokens that a generated token sees in local layers; None where no layer needs telling
    residual_divisor: float = Field(ge=1)  # what the residual stream is divided by, to stay inside float16
    ranges: Ranges | None  # what that was chosen by; None where activations are not float16
    parity: Parity | None  # None where nothing is rounded to whole numbers, or the comparison was not asked for
    recipe: str  # its rules are in recipe.toml
    target: str
    tensorrt: TrtVersion | None = None  # the version that the graphs were written for; of target tensorrt alone
    parameters: int
    stored: dict[str, dict[Counted, PositiveInt]]  # how many weights of each dtype, by graph, and for the token table
    spec: dict[str, Any]  # the ModelSpec, for people and reports
    token_ids: TokenIds
    token_table: TokenTable
    cache: Cache
    graphs: dict[str, GraphInfo]
    files: dict[FileName, FileInfo]
    provenance: Provenance

    @model_validator(mode="after")
    def _of_one_target(self) -> Self:
        kind = "shared" if self.tensorrt is None else "update" if self.tensorrt == "11" else "delta"
        if (self.target == "tensorrt") != (self.tensorrt is not None) or self.cache.kind != kind:
            raise ValueError(f"target {self.target} for TensorRT {self.tensorrt} with a cache of kind {self.cache.kind}")
        return self

    def signatures(self) -> dict[str, tuple[set[str], set[str]]]:
        """What runners feed to each graph, and what they take from it."""
        cache = [f"{i}.{part}" for i in range(self.cache.layers) for part in ("key", "value")]
        feeds, takes = {"inputs_embeds"}, {"logits"}
        if self.cache.kind == "shared":
            feeds |= {"seqlens_k", "total_sequence_length"} | ({"local_bias"} if self.local_window is not None else set())
        else:
            feeds |= {"positions", "visible"} | ({"local_visible"} if self.local_window is not None else set())
            feeds |= {"write_indices"} if self.cache.kind == "update" else set()
            takes |= {"next_token", "logits_square"}
        feeds |= {f"past_key_values.{c}" for c in cache}
        known = {
            "vision_encoder": ({"pixel_values"}, {"image_hidden"}),
            "projector": ({"image_hidden"}, {"image_features"}),
            "decoder_step": (feeds, takes | {f"present.{c}" for c in cache}),
        }
        return known | ({"mask_decoder": ({"codes"}, {"mask"})} if "mask_decoder" in self.graphs else {})


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

    def digest(self) -> str:
        """The sha256 of what this bundle computes: of the manifest without the model card, which may be written again."""
        with _reading(self.path):
            found = json.loads((self.path / MANIFEST).read_bytes())
        found["files"].pop(CARD, None)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def graph(self, name: str) -> Path:
        return self.path / self.manifest.graphs[name].file

    def token_table(self) -> "Embedding":
        return Embedding(self.path / self.manifest.token_table.file, self.manifest.token_table)


class Embedding:
    """The token table, mapped: only the rows that are looked up are read."""

    def __init__(self, file: Path, table: TokenTable):
        self._table = table
        self._bytes = np.memmap(file, np.uint8, "r", shape=(table.nbytes,))
        self._rows = self._bytes[: table.shape[0] * table.row_bytes].reshape(table.shape[0], table.row_bytes)
        if table.scales_offset is not None:
            self._scales = self._bytes[table.scales_offset :].reshape(table.shape[0], -1)

    def __len__(self) -> int:
        return self._table.shape[0]

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, H], not yet scaled."""
        rows, t = self._rows[list(ids)], self._table
        if t.scales_offset is None:
            return _float32(rows, t.dtype)
        if t.group is None:
            codes = rows.view(np.int8).astype(np.float32)
        elif t.dtype == "int8":
            codes = rows.astype(np.float32) - np.float32(128)
        else:
            codes = np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1).astype(np.float32) - np.float32(8)
        assert t.scales_dtype is not None
        scales = np.repeat(_float32(self._scales[list(ids)], t.scales_dtype), t.group or t.shape[1], 1)
        return (codes * scales)[:, : t.shape[1]]


def _float32(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes [T, n] as numbers."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.view(dtype).astype(np.float32)


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


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed(files: Sequence[Path]) -> Iterator[str]:
    """The sha256 of each file, several at a time: hashing is what opening a bundle takes."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(file_sha256, files)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot read {error.filename or path}: {error.strerror}; check the permissions and the disk") from error


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise IntegrityError(f"{path}: no such folder; `pgx export -o {path}` writes one")
    file = path / MANIFEST
    try:
        if not os.path.lexists(file):
            raise IntegrityError(f"{path} is not a bundle: it has no {MANIFEST}, which is written last; export it again")
        if (size := _plain_size(file)) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{file} has {size} bytes; no manifest is longer than {MAX_MANIFEST_BYTES}")
        return parse_manifest(file.read_bytes(), str(file))
    except OSError as error:
        raise DiskError(f"cannot read {file}: {error.strerror}") from error


def parse_manifest(text: bytes, name: str) -> Manifest:
    """A manifest; `name` is what to call it in messages.

    Raises:
        IntegrityError: it is none of this format.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise IntegrityError(
            f"{name}: {where}: {first['msg']}. This pgx reads bundles of format 1; export again or update pgx"
        ) from None


def _verify(path: Path, manifest: Manifest) -> None:
    with _reading(path):
        _check_files(path, manifest)
        for (name, info), seen in zip(manifest.files.items(), hashed([path / name for name in manifest.files]), strict=True):
            if seen != info.sha256:
                raise IntegrityError(
                    f"{path / name} was changed: its sha256 begins {seen[:12]}, the manifest says {info.sha256[:12]}; copy or export the bundle again"
                )
        _check_table(path, manifest)
        _check_graphs(path, manifest)


def _check_files(path: Path, manifest: Manifest) -> None:
    """The folder holds the files that the manifest lists, of their sizes, and nothing else."""
    named = {g.file for g in manifest.graphs.values()} | {manifest.token_table.file, "tokenizer.json"}
    if missing := named - set(manifest.files):
        raise IntegrityError(f"{path}: the manifest uses {', '.join(sorted(missing))} without listing it under files")
    if strangers := sorted(set(os.listdir(path)) - {MANIFEST, *manifest.files}):
        raise IntegrityError(f"{path} holds {', '.join(map(repr, strangers[:5]))}, which its manifest does not list")
    for name, info in manifest.files.items():
        if (size := _plain_size(path / name)) != info.size:
            raise IntegrityError(f"{path / name} has {size} bytes where the manifest promises {info.size}")


def _plain_size(file: Path) -> int:
    for _ in range(2):  # between the two looks of one round a writer may take its link away
        try:
            found = file.lstat()
        except FileNotFoundError:
            raise IntegrityError(f"{file} is missing; export the bundle again") from None
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 + _staged(file, found):
            return found.st_size
    raise IntegrityError(f"{file} is not a plain file of its own (a link, a pipe or a folder)")


def _staged(file: Path, found: os.stat_result) -> bool:
    """Whether the same file is also where a writer puts it that replaces this bundle, or that was killed while it did."""
    folder = file.parent.resolve()
    try:
        other = folder.with_name(folder.name + STAGED).joinpath(file.name).lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the root has no name
        return False
    return os.path.samestat(found, other)


def _check_table(path: Path, manifest: Manifest) -> None:
    table, size = manifest.token_table, manifest.files[manifest.token_table.file].size
    if table.scales_offset is not None and table.scales_offset < table.shape[0] * table.row_bytes:
        raise IntegrityError(f"{path / table.file}: the scales at {table.scales_offset} lie among the rows")
    if size != table.nbytes:
        raise IntegrityError(f"{path / table.file} has {size} bytes, which is not {table.shape} {table.dtype}")
    ids = manifest.token_ids
    if (top := max(ids.bos, ids.eos, ids.pad, ids.newline, ids.image)) >= table.shape[0]:
        raise IntegrityError(f"{path}: the manifest has a token {top}, and its token table {table.shape[0]} rows")


def _check_graphs(path: Path, manifest: Manifest) -> None:
    """The graphs are those that runners know, as the manifest describes them, and they keep to the bundle's files."""
    expected, sizes = manifest.signatures(), {name: info.size for name, info in manifest.files.items()}
    if expected.keys() != manifest.graphs.keys():
        raise IntegrityError(f"{path} has the graphs {', '.join(manifest.graphs)}; a bundle has {', '.join(expected)}")
    for name, graph in manifest.graphs.items():
        file = path / graph.file
        if file.suffix != ".onnx":  # what an engine does with a file depends on its name
            raise IntegrityError(f"{path}: the graph {name} is called {graph.file!r}, which does not end in .onnx")
        found = read_signature(file, sizes)
        promised = tuple({t.name: t.shape for t in tensors} for tensors in (graph.inputs, graph.outputs))
        if found != promised or tuple(map(set, found)) != expected[name]:
            raise IntegrityError(f"{file} has other inputs or outputs than the manifest and the runners know; export it again")
    width = manifest.token_table.shape[1]
    embeds = {t.name: t.shape for t in manifest.graphs["decoder_step"].inputs}["inputs_embeds"]
    features = manifest.graphs["projector"].outputs[0].shape
    if (embeds[-1:], features[1:]) != ((width,), (manifest.image_tokens, width)):
        raise IntegrityError(
            f"{path}: rows of the token table are {width} wide and an image has {manifest.image_tokens} tokens, "
            f"but the graphs have inputs_embeds {list(embeds)} and image_features {list(features)}"
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
