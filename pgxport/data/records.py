# SPDX-License-Identifier: Apache-2.0
"""Read records from JSON, JSON lines, parquet and Arrow files, known by their content; never a pickle.

Knows no data set: a record is a dictionary and the place where it stands.
"""

import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, TypeGuard

from pgxport.errors import DiskError, InputError, UsageError, require
from pgxport.files import read_object, read_text
from pgxport.runners.image import load_image
from pgxport.text import LONE, listed

MAX_JSON = 1 << 30  # bytes of one file; instances_train2014.json has 450 MB
LINE = "every line is one object"
LINES = 20  # the first of a file, by which JSON lines are told from a damaged JSON document
MAX_FILES = 2_000_000  # below a data folder
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ARROW_HEADS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # of a parquet file, an Arrow file, an Arrow stream
# The keys of a user's own record, each under the names that other tools write.
IMAGE_KEYS = ("image", "file_name", "image_path")
PROMPT_KEYS = ("prompt", "prefix", "question")
ANSWER_KEYS = ("answers", "answer", "suffix")
# COCO's name of a picture in its editions of 2014 and 2017.
NUMBERED = re.compile(r"(?:COCO_[a-z]+[0-9]{4}_)?([0-9]{12})\.jpg")


@dataclass(frozen=True)
class Record:
    """One entry of a file, and the place to name when it is wrong.

    Attributes:
        fault: Why the entry has no fields, where it could not be read; the message begins with the place.
    """

    where: str
    fields: Mapping[str, Any]
    fault: str | None = None

    @classmethod
    def read(cls, where: str, fields: Callable[[], Mapping[str, Any]]) -> "Record":
        """Return the record of these fields, or one that says why they cannot be read."""
        try:
            return cls(where, fields())
        except InputError as error:
            return cls(where, {}, str(error))

    @property
    def keys(self) -> str:
        """The first keys, for messages, each list of objects with its own: 'images' (of 'id', 'file_name')."""
        return listed((f"{key!r}{_inner_keys(value)}" for key, value in self.fields.items()), 8)

    def get(self, *names: str) -> Any:
        """Return the first of these fields that exists and is not null, or None."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def text(self, *names: str) -> str:
        """Return the first of these fields, without white space around it.

        Raises:
            InputError: there is none, or it is not text, or empty.
        """
        value = self.get(*names)
        if not _is_text(value) or not value.strip():
            raise self.wrong(names, "text")
        return str(value.strip())

    def texts(self, *names: str) -> tuple[str, ...]:
        """Return the first of these fields, a text or a list of texts or of objects with an `answer` each.

        Raises:
            InputError: there is none, or it is something else.
        """
        value = self.get(*names)
        entries = [v.get("answer") if isinstance(v, Mapping) else v for v in (value if isinstance(value, list) else [value])]
        texts = tuple(entry for entry in entries if _is_text(entry))
        if not texts or len(texts) < len(entries):
            raise self.wrong(names, "text or a list of texts")
        return texts

    def parts(self, name: str) -> Iterator["Record"]:
        """Yield the objects of a list, each a record of this place."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
            raise self.wrong([name], "a list of objects")
        return (Record(f"{self.where}, {name} {entry.get('id', n)}", entry) for n, entry in enumerate(value))

    def one_of(self, name: str, table: Iterable[str], default: str) -> str:
        """Return the field, one of `table`, or the default where it is absent."""
        value = default if self.get(name) is None else self.fields[name]
        if not isinstance(value, str) or value not in table:
            raise self.wrong([name], f"one of {', '.join(table)}")
        return value

    def numbers(self, *names: str, count: int | None = None) -> tuple[float, ...]:
        """Return the first of these fields, a list of finite numbers."""
        value = self.get(*names)
        right = isinstance(value, list) and (count is None or len(value) == count)
        if not right or not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            raise self.wrong(names, f"{count or 'a list of'} finite numbers")
        return tuple(float(v) for v in value)

    def wrong(self, names: Sequence[str], expected: str) -> InputError:
        """Return the error for the first of these fields, which is absent or not what it has to be."""
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            return InputError(
                f"{self.where}: has no {' or '.join(map(repr, names))}, which has to be {expected}; it has {self.keys or 'no key'}"
            )
        return InputError(f"{self.where}: {name!r} is {self.fields[name]!r:.200}, and has to be {expected}")


class Rows(Protocol):
    """A table of records, each read when it is asked for."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""

    def __len__(self) -> int: ...

    def at(self, indices: Iterable[int]) -> Iterator[Record]:
        """Yield the records of these rising indices."""


@dataclass(frozen=True)
class ListRows:
    """Records in memory, each with the name of its place."""

    where: str
    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.records)

    def at(self, indices: Iterable[int]) -> Iterator[Record]:
        """Yield the records of these indices."""
        return (self.records[i] for i in indices)


@dataclass(frozen=True)
class ArrowRows:
    """Records of parquet or Arrow files; only those that are asked for become Python objects."""

    where: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return sum(len(batch) for _, batch in self._batches(columns=False))

    def at(self, indices: Iterable[int]) -> Iterator[Record]:
        """Yield the records of these rising indices."""
        arrow = require("pyarrow", "a parquet or Arrow data set")
        wanted, start = sorted(indices), 0
        for file, batch in self._batches(columns=True):
            first, last = bisect_left(wanted, start), bisect_left(wanted, start + len(batch))
            if first < last:
                within = arrow.array([row - start for row in wanted[first:last]])
                for row, fields in zip(wanted[first:last], batch.take(within).to_pylist(), strict=True):
                    yield Record(f"{file}: row {row}", fields)
            start += len(batch)
            if last == len(wanted):
                return

    def _batches(self, *, columns: bool) -> Iterator[tuple[Path, Any]]:
        arrow = require("pyarrow", "a parquet or Arrow data set")
        for file in self.files:
            try:
                if _head(file).startswith(b"PAR1"):
                    parquet = require("pyarrow.parquet", "a parquet data set").ParquetFile(file)
                    if columns:
                        yield from ((file, batch) for batch in parquet.iter_batches(batch_size=64))
                    else:
                        yield file, range(parquet.metadata.num_rows)
                else:
                    opened = arrow.ipc.open_file if _head(file).startswith(b"ARROW1") else arrow.ipc.open_stream
                    with arrow.memory_map(str(file)) as source:
                        yield from ((file, batch) for batch in opened(source).read_all().to_batches())
            except (arrow.ArrowException, OSError) as error:
                raise InputError(f"{file}: not a sound parquet or Arrow file: {str(error)[:200]}; fetch it again") from error


class Pictures:
    """The image files below a folder, found by the names that data sets give them."""

    def __init__(self, root: Path):
        self.root = root
        self._names: dict[str, list[Path]] | None = None
        self._sizes: dict[Path | bytes, tuple[int, int] | str] = {}  # or why the picture cannot be decoded

    def size(self, picture: Path | bytes, where: str) -> tuple[int, int]:
        """Return width and height of a picture in pixels; each picture is decoded once, whoever asks.

        Raises:
            InputError: it cannot be decoded or read.
        """
        key = picture if isinstance(picture, Path) else hashlib.sha256(picture).digest()
        if key not in self._sizes:
            try:
                self._sizes[key] = load_image(picture).size
            except (InputError, DiskError) as error:
                self._sizes[key] = str(error)
        found = self._sizes[key]
        if isinstance(found, str):
            raise InputError(f"{where}: {found}")
        return found

    def find(self, name: str, where: str) -> Path:
        """Return the file that `name` means: a path below the folder, or the end of exactly one.

        A backslash separates folders, as on Windows, where no file has it in its name.

        Raises:
            InputError: it leads out of the folder, there is none, or there are several.
        """
        if self._exists(name, where):
            return self._inside(self.root / name, where)
        if "\\" in name:
            windows = PureWindowsPath(name)
            return self.find(("/" if windows.drive else "") + windows.as_posix(), where)
        parts = Path(name).parts
        return self._one([path for path in self._index().get(parts[-1], []) if path.parts[-len(parts) :] == parts], name, where)

    def numbered(self, number: int, where: str) -> Path:
        """Return COCO's picture of that number, from whichever part of COCO it is.

        Raises:
            InputError: there is none, or there are several.
        """
        name = f"{number:012}.jpg"
        return self._one(self._index().get(name, []), f"COCO_…_{name}", where)

    def _exists(self, name: str, where: str) -> bool:
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or "\0" in name or not parts:
            raise InputError(f"{where}: the image {name[:200]!r} leads out of {self.root}; use paths below that folder")
        try:
            return (self.root / name).is_file()
        except (OSError, ValueError) as error:  # too long for a path, or no text that a path can be
            why = getattr(error, "strerror", None) or error
            raise InputError(f"{where}: the image {name[:200]!r} is no path ({why}); use paths below {self.root}") from error

    def _one(self, paths: list[Path], name: str, where: str) -> Path:
        if not paths:
            raise InputError(
                f"{where}: no image {name[:200]!r} below {self.root}; put the images there, or name their folder with --images"
            )
        if len(paths) > 1:
            several = ", ".join(str(path) for path in paths[:3])
            raise InputError(
                f"{where}: {len(paths)} images are called {name[:200]!r}: {several}; name the one folder with --images"
            )
        return self._inside(paths[0], where)

    def _inside(self, path: Path, where: str) -> Path:
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise InputError(f"{where}: {path} is a link out of {self.root}; copy the file into the folder")
        return path

    def _index(self) -> dict[str, list[Path]]:
        if self._names is None:
            try:
                files = files_below(self.root, IMAGES)
            except InputError as error:  # of the folder, whatever the record
                raise UsageError(str(error)) from error
            self._names = {}
            for path in files:
                self._names.setdefault(path.name, []).append(path)
                if (numbered := NUMBERED.fullmatch(path.name)) and path.name != f"{numbered[1]}.jpg":
                    self._names.setdefault(f"{numbered[1]}.jpg", []).append(path)
        return self._names


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with one of these suffixes, in order; folders that are links are not entered.

    Raises:
        InputError: the folder holds more than MAX_FILES.
    """
    files = []
    for count, path in enumerate(folder.rglob("*")):
        if count > MAX_FILES:
            raise InputError(
                f"{folder}: holds more than {MAX_FILES:,} files; name a smaller folder, or the images' with --images"
            )
        if path.suffix.lower() in suffixes and path.is_file():
            files.append(path)
    return sorted(files)


def is_arrow(file: Path) -> bool:
    """Whether the file's first bytes are those of a parquet file, an Arrow file or an Arrow stream."""
    return _head(file).startswith(ARROW_HEADS)


def holds_records(file: Path) -> bool:
    """Whether the file begins as JSON, parquet or Arrow does, and no picture; False if unreadable."""
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError:
        return False
    return head.startswith(ARROW_HEADS) or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def read_json(file: Path) -> Any:
    """Read a JSON file, or JSON lines, which are returned as a list of `Record`s with line numbers.

    A line ends at a line feed and nowhere else: U+2028, U+0085 or a vertical tab may stand inside a string. A
    line that is no JSON object is a record with a fault.

    Raises:
        InputError: it is neither, too large, or a pickle, which would run its author's code.
        DiskError: it cannot be read.
    """
    if _head(file).startswith(b"\x80") or file.suffix in (".p", ".pkl", ".pickle"):
        raise InputError(
            f"{file}: is a pickle, which pgx never opens: reading one runs its author's code; take the JSON or parquet "
            f"edition of the data set (RefCOCO: refs as a JSON list beside instances.json, MDETR's JSON, or the hub's parquet)"
        )
    text = read_text(file, MAX_JSON)
    if not text.strip():
        return []
    try:
        value = json.loads(text, strict=False)
    except RecursionError as error:
        raise InputError(f"{file}: is nested too deeply to be a data set") from error
    except ValueError as error:  # JSONDecodeError, or a number of more digits than Python converts
        lines = [(f"{file}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if 2 * sum(_is_object(line) for _, line in lines[:LINES]) < len(lines[:LINES]):
            place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{file}{place}: not JSON: {getattr(error, 'msg', error)}") from error
        return [Record.read(where, partial(read_object, line, where, LINE)) for where, line in lines]
    return value


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text that UTF-8 can encode: JSON can spell half of a character."""
    return isinstance(value, str) and not re.search(LONE, value)


def _inner_keys(value: Any) -> str:
    first = next((entry for entry in value if isinstance(entry, Mapping)), None) if isinstance(value, list) else None
    return f" (of {listed(map(repr, first), 8)})" if first else ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line, strict=False), dict)
    except (ValueError, RecursionError):
        return False


def _head(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise UsageError(f"{file}: is not a file; give a data file or a folder of them")
        with file.open("rb") as opened:
            return opened.read(8)
    except OSError as error:
        raise DiskError(f"{file}: cannot be read: {error.strerror or error}; check the permissions and the disk") from error
