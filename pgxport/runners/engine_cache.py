# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled engines: a private folder for each bundle and machine.

A plan is code, so pgx loads only what it put there. It refuses an entry that belongs to another user, that
others may use, that holds a link or a file it does not list, whose plan has another sha256, or that another
cache sealed: the seal is an HMAC whose secret never leaves this cache.
"""

import hashlib
import hmac
import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgxport.bundle.manifest import FileInfo, FileName
from pgxport.errors import EngineError, IntegrityError
from pgxport.files import StagedFolder, disk_errors, write_new

FOLDER_VARIABLE = "PGX_ENGINE_CACHE"
REMEDY = f"free some space, or choose another folder with {FOLDER_VARIABLE}"
ENTRY = "entry.json"
KEY = "seal.key"
KEY_BYTES = 32
MAX_ENTRY_BYTES = 1 << 20
Flags = dict[str, int]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class EngineKey:
    """What a plan depends on besides its graph and its flags.

    `cuda` and `driver` are "any" where the engine finishes its plans when it loads them.
    """

    engine: str
    version: str
    sm: str  # compute capability, as "8.9"
    cuda: str
    driver: str


class Entry(BaseModel):
    """An entry of the cache: its files, the bundle they come from, and the machine and flags they are for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bundle: Digest
    machine: EngineKey
    flags: Flags
    files: dict[FileName, FileInfo]
    seal: Digest

    @property
    def key(self) -> str:
        """The sha256 of everything that the entry's plans depend on."""
        return entry_key(self.bundle, self.machine, self.flags)


def entry_key(bundle: str, machine: EngineKey, flags: Mapping[str, int]) -> str:
    """The sha256 of everything that the plans of an entry depend on; `bundle` is the bundle's digest."""
    return _sha256({"bundle": bundle, "machine": asdict(machine), "flags": dict(flags)})


def cache_folder(folder: Path | None = None) -> Path:
    """The engine cache: `folder`, or PGX_ENGINE_CACHE, or pgxport/engines in the user's cache."""
    if folder is None and (variable := os.environ.get(FOLDER_VARIABLE)):
        folder = Path(variable)
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgxport" / "engines"
    return Path(os.path.abspath(folder))


def entry_folder(cache: Path, bundle: str, machine: EngineKey) -> Path:
    """The folder of a bundle on a machine; other flags replace the plans in it, which take gigabytes."""
    return cache / _sha256({"bundle": bundle, "machine": asdict(machine)})[:32]


def read_entry(folder: Path) -> Entry:
    """Read the list of a complete entry that pgx wrote into this cache on this machine, without its plans.

    Raises:
        IntegrityError: the folder is anything else.
    """
    _check_private(folder.parent, is_folder=True)
    _check_private(folder, is_folder=True)
    with disk_errors(f"cannot read {folder}", REMEDY):
        if (size := _check_private(folder / ENTRY)) > MAX_ENTRY_BYTES:
            raise IntegrityError(_refusal(folder / ENTRY, f"it has {size} bytes"))
        text = (folder / ENTRY).read_bytes()
        try:
            entry = Entry.model_validate_json(text)
        except ValidationError as error:
            raise IntegrityError(_refusal(folder / ENTRY, error.errors()[0]["msg"])) from None
        if not hmac.compare_digest(entry.seal, _seal(_secret(folder.parent), entry)):
            raise IntegrityError(
                _refusal(folder, "its seal is not of this cache, so it was changed or comes from another machine")
            )
        if entry_folder(folder.parent, entry.bundle, entry.machine).name != folder.name:
            raise IntegrityError(_refusal(folder, "it was compiled from another bundle or for another machine"))
        if strangers := sorted(set(os.listdir(folder)) ^ {ENTRY, *entry.files}):
            raise IntegrityError(_refusal(folder, f"{strangers[0]!r} is not listed, or missing"))
        for name, info in entry.files.items():
            if (size := _check_private(folder / name)) != info.size:
                raise IntegrityError(_refusal(folder / name, f"it has {size} bytes and not {info.size}"))
    return entry


@contextmanager
def open_plan(file: Path, *, drop: bool = False) -> Iterator[mmap.mmap]:
    """Map a plan of an entry: the bytes whose sha256 was verified are the bytes that are loaded.

    Args:
        drop: Let the page cache forget the plan afterwards. On a board it shares the memory of the device,
            which has the weights by then.

    Raises:
        IntegrityError: the file is not a plan that pgx compiled here.
    """
    if file.suffix != ".plan" or file.parent.parent == file.parent:
        raise IntegrityError(_refusal(file, "it is not part of the engine cache"))
    info = read_entry(file.parent).files.get(file.name)
    if info is None:
        raise IntegrityError(_refusal(file, "its entry does not list it"))
    with disk_errors(f"cannot read {file}", REMEDY), open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if (digest := hashlib.sha256(mapped).hexdigest()) != info.sha256:
                raise IntegrityError(_refusal(file, f"its sha256 begins {digest[:12]} and not {info.sha256[:12]}"))
            yield mapped
        if drop:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class EntryWriter:
    """Write an entry's plans one by one; without `commit` nothing is left of them.

    with EntryWriter(cache, bundle, machine, flags) as writer:
        writer.write("decoder_step.plan", plan)
        writer.commit()
    """

    def __init__(self, cache: Path, bundle: str, machine: EngineKey, flags: Flags):
        self._cache, self._bundle, self._machine, self._flags = cache, bundle, machine, flags
        self.path = entry_folder(cache, bundle, machine)
        held = f"another pgx compiles the same bundle into {cache}; wait for it"
        self._folder = StagedFolder(self.path, held, mode=0o700)
        self.staging = self._folder.staging
        self._files: dict[str, FileInfo] = {}

    def __enter__(self) -> "EntryWriter":
        with disk_errors(f"cannot write {self.staging}", REMEDY):
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self._cache, is_folder=True)
            if self.staging.is_dir() and not self.staging.is_symlink():  # of a process that was killed
                _check_private(self.staging, is_folder=True)
            self._folder.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def write(self, name: str, plan: memoryview | bytes) -> None:
        """Write a plan to the disk.

        Raises:
            DiskError: there is no room, or no permission.
        """
        with disk_errors(f"cannot write {name} of {self.path}", REMEDY):
            sha256, size = write_new(self.staging / name, [plan], 0o600)
        self._files[name] = FileInfo(sha256=sha256, size=size)

    def adopt(self, name: str) -> None:
        """Make a file part of the entry that an engine wrote into `staging` itself.

        Raises:
            DiskError: the file cannot be read.
        """
        file = self.staging / name
        with disk_errors(f"cannot write {name} of {self.path}", REMEDY):
            file.chmod(0o600)
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self._files[name] = FileInfo(sha256=digest, size=file.stat().st_size)

    def commit(self) -> Entry:
        """Seal the entry and give it its name, in place of one that had it.

        Raises:
            KeyboardInterrupt: SIGINT arrived, and the engine swallowed it; what it built since is not kept.
            DiskError: there is no room, or no permission.
        """
        with disk_errors(f"cannot finish {self.path}", REMEDY):
            unsealed = Entry(
                bundle=self._bundle, machine=self._machine, flags=self._flags, files=dict(self._files), seal="0" * 64
            )
            entry = unsealed.model_copy(update={"seal": _seal(_secret(self._cache, make=True), unsealed)})
            write_new(self.staging / ENTRY, [entry.model_dump_json(indent=1).encode() + b"\n"], 0o600)
            self._folder.publish()
        return entry


def _secret(cache: Path, *, make: bool = False) -> bytes:
    """The secret that seals this cache's entries."""
    file = cache / KEY
    if make and not os.path.lexists(file):
        staged = file.with_name(f"{KEY}.{os.getpid()}")
        write_new(staged, [os.urandom(KEY_BYTES)], 0o600)
        # Of two processes at once the later secret counts, and the other's entry is made again.
        staged.replace(file)
    if (size := _check_private(file)) != KEY_BYTES:
        raise IntegrityError(_refusal(file, f"it has {size} bytes"))
    return file.read_bytes()


def _seal(secret: bytes, entry: Entry) -> str:
    return hmac.digest(secret, _canonical(entry.model_dump(exclude={"seal"})), "sha256").hex()


def _check_private(path: Path, *, is_folder: bool = False) -> int:
    """The size of a file or folder, which only this user may use.

    Raises:
        IntegrityError: others may use it, or it is missing, or a link.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise IntegrityError(_refusal(path, "it is missing")) from None
    if not (stat.S_ISDIR(status.st_mode) if is_folder else stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
        raise IntegrityError(_refusal(path, f"it is not a plain {'folder' if is_folder else 'file of its own (a link, a pipe)'}"))
    if status.st_uid != os.geteuid():
        raise IntegrityError(_refusal(path, f"it belongs to user {status.st_uid} and not to {os.geteuid()}"))
    if status.st_mode & 0o077:
        raise IntegrityError(_refusal(path, f"others may use it (mode {stat.S_IMODE(status.st_mode):04o}, and not 0700 or 0600)"))
    return status.st_size


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path}: {why}. A compiled engine is code, and pgx loads only what it compiled itself: delete it, and run `pgx compile`"
    )


def not_compiled(bundle: Path, machine: EngineKey) -> EngineError:
    """The error for a bundle without an entry: compiling takes minutes and gigabytes, never implicitly."""
    return EngineError(
        f"{bundle} is not compiled for {machine.engine} {machine.version}, SM {machine.sm}, CUDA {machine.cuda}, "
        f"driver {machine.driver}: run `pgx compile {bundle} --engine {machine.engine}` on this machine first"
    )


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(value: object) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()
