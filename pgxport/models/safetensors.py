# SPDX-License-Identifier: Apache-2.0
"""The reader of safetensors files: it parses the header strictly and reads tensors in row blocks.

Knows no model. Accepts nothing that the safetensors library
rejects; tests/models/test_safetensors.py compares the two.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from pgxport.errors import CheckpointError, DiskError

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}
# The other types of the format, as numpy's types of their sizes; weights in them are not read.
OTHER_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"),
}  # fmt: skip
# Infinities and NaNs have all bits of the exponent set. Comparing these bits runs
# at 6 GB/s on 16-bit floats, numpy's isfinite at 1.4 (and at 18 on float32).
EXPONENTS = {DTYPES["F16"]: np.uint16(0x7C00), BFLOAT16: np.uint16(0x7F80)}
# The library allows 100 MB. A PaliGemma's header takes 0.2 MB,
# and parsing JSON takes about twenty times its size in memory.
MAX_JSON = 16 << 20


class Tensor(Protocol):
    """A weight on disk, in whatever layout."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows start..stop along axis 0."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor whose rows lie one after the other in a file, from byte `offset` on."""

    file: Path
    name: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        # As bytes, since the buffer protocol does not know bfloat16.
        unread = rows.reshape(-1).view(np.uint8).data
        with opened(self.file) as f:
            f.seek(self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize)
            while unread:
                count = f.readinto(unread)  # type: ignore[attr-defined]  # unbuffered, so that no second copy is made
                if not count:
                    raise CheckpointError(f"{self.file}: ends within {shown(self.name)}; the file shrank after it was opened")
                unread = unread[count:]
        refuse_non_finite(rows, start, self.name, self.file)
        return rows


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading.

    Raises:
        CheckpointError: there is no such regular file.
        DiskError: the file cannot be read.
    """
    try:
        # Opening a FIFO would wait for ever.
        if not file.is_file():
            raise CheckpointError(f"{file}: {'is not a regular file' if file.exists() else 'does not exist'}")
        with open(file, "rb", buffering=0) as f:
            yield f
    except OSError as error:
        raise DiskError(f"{file}: cannot be read: {error.strerror or error}") from error


def shown(name: str) -> str:
    """Returns a name from a file as it may be printed: quoted, escaped, and cut after 200 characters.

    >>> shown("a" * 300)[-6:], shown("\\x1b[2J")
    ("aa'...", "'\\\\x1b[2J'")
    """
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}..."


def listed(names: list[str]) -> str:
    """Returns at most five names, then the count of the others.

    >>> listed(list("abcdefg"))
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


def refuse_non_finite(rows: np.ndarray, start: int, name: str, file: Path) -> None:
    """Raises CheckpointError if a value is infinite or not a number; `start` is the first row's place in the tensor."""
    exponent = EXPONENTS.get(rows.dtype)
    finite = np.isfinite(rows) if exponent is None else (rows.view(np.uint16) & exponent) != exponent
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{file}: {shown(name)} holds {rows[at]} at {[at[0] + start, *at[1:]]}, and weights are finite; "
            f"give another copy of the file, or another checkpoint"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file, parsed strictly (see `parse_json`)."""
    with opened(file) as f:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{file}: {size:,} bytes of JSON; a PaliGemma's take less than {MAX_JSON:,}")
        return parse_json(read_exactly(f, size, file), file)


def parse_json(data: bytes, where: Path) -> dict[str, Any]:
    """Parses a JSON object; duplicate keys, NaN and anything outside UTF-8 raise a CheckpointError that names `where`."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not sound JSON: {error}; give a sound copy of the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_header(file: Path, *, unused: Callable[[str], bool] = lambda name: False) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file by name, in the order of their bytes, without reading one.

    Args:
        unused: Whether a tensor of this name is no weight, so that it may be of any type and shape.

    Raises:
        CheckpointError: the file is not sound, or holds something that is not a float weight.
    """
    with opened(file) as f:
        size = file.stat().st_size
        if size < 8:
            raise CheckpointError(
                f"{file}: {size} bytes are no safetensors file (it ends before its header); give the whole file"
            )
        length = int.from_bytes(read_exactly(f, 8, file), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{file}: the header claims {length:,} bytes of a file of {size:,}; give a whole safetensors file"
            )
        if length > MAX_JSON:
            raise CheckpointError(f"{file}: a header of {length:,} bytes; a PaliGemma's takes less than {MAX_JSON:,}")
        data = read_exactly(f, length, file)
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file}: the header begins with {data[:8]!r}, not with an object; this is not a safetensors file")
    header = parse_json(data, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not a table of strings")
    spans = {name: _span(file, name, entry, weight=not unused(name)) for name, entry in header.items()}
    tensors: dict[str, Stored] = {}
    end = 0
    for name, (dtype, shape, (start, stop)) in sorted(spans.items(), key=lambda item: item[1][2]):
        if start != end:
            fault = (
                f"overlaps the tensor before it by {end - start:,}"
                if start < end
                else f"leaves a hole of {start - end:,} before it,"
            )
            raise CheckpointError(f"{file}: {shown(name)} {fault} bytes; give a sound copy of the file")
        tensors[name] = Stored(file, name, 8 + length + start, dtype, shape)
        end = stop
    if (missing := 8 + length + end - size) != 0:
        last = f", where {shown(next(reversed(tensors)))} ends" if tensors else ""
        fault = f"{missing:,} bytes are missing" if missing > 0 else f"{-missing:,} bytes too many"
        raise CheckpointError(f"{file}: {fault} at its end{last}; give a whole copy of the file")
    return tensors


def read_exactly(f: BinaryIO, count: int, file: Path) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = f.read(count - len(data))
        if not part:
            raise CheckpointError(f"{file}: {count - len(data):,} bytes are missing at its end; give a whole copy of the file")
        data += part
    return bytes(data)


def _span(file: Path, name: str, entry: object, *, weight: bool) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
    where = f"{file}: {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} is not described by dtype, shape and data_offsets, as safetensors asks; give a sound copy of the file"
        )
    readable = DTYPES if weight else {**OTHER_DTYPES, **DTYPES}
    dtype = readable.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where} is stored as {shown(str(entry['dtype']))}; pgx reads weights in {', '.join(DTYPES)}: give the checkpoint "
            f"in one of these"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole(shape) or (weight and (not shape or 0 in shape)):
        raise CheckpointError(f"{where} has the shape {shown(str(shape))}, which is no weight's")
    if not _whole(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the data_offsets {shown(str(offsets))}, which are not two positions")
    start, stop = offsets
    needed = math.prod(shape) * dtype.itemsize
    if stop - start != needed:
        raise CheckpointError(f"{where} is {entry['dtype']} {shape}, which takes {needed:,} bytes, and has {stop - start:,}")
    return dtype, tuple(shape), (start, stop)


def _whole(values: object) -> bool:
    """Returns whether `values` is a list of integers that fit the library's 64 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 64 for value in values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"{shown(key)} stands twice in one object")
        # A lone surrogate can be written as an escape; it is not text, and no other reader accepts it.
        key.encode()
        if isinstance(value, str):
            value.encode()
        keys[key] = value
    return keys


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no integer")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
