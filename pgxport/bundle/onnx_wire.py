# SPDX-License-Identifier: Apache-2.0
"""Read a graph's protobuf before an engine does, and refuse whatever reaches outside its bundle or pgx does not write.

Stricter than an engine on purpose: what is refused here need not be understood.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgxport.errors import IntegrityError

DOMAINS = {"", "com.microsoft"}
MAX_GRAPH_BYTES = 256 << 20  # weights are in files of their own
# Field numbers of onnx.proto3: which hold the messages that are read, and which no bundle has.
READ = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "branch", 10: "tensor"},
    "branch": {1: "node", 5: "tensor"},
}
REFUSED = {
    "model": {20: "training_info", 25: "functions"},
    "graph": {15: "sparse_initializer"},
    "branch": {15: "sparse_initializer"},
    "attribute": {11: "subgraphs", 22: "a sparse tensor", 23: "sparse tensors"},
}

Shape = tuple[int | str, ...]
Fields = Mapping[int, list[int | memoryview]]


def read_signature(file: Path, sizes: Mapping[str, int]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Check a graph, and return the shapes of its inputs and outputs by name.

    Args:
        sizes: The files of the bundle; weights may lie in these only, and inside them.

    Raises:
        IntegrityError: the graph is not sound, or not one that pgx writes.
    """
    signature: tuple[dict[str, Shape], dict[str, Shape]] = ({}, {})
    try:
        if (size := file.stat().st_size) > MAX_GRAPH_BYTES:
            raise ValueError(f"{size} bytes are more than the {MAX_GRAPH_BYTES} of any graph")
        for kind, fields in messages("model", memoryview(file.read_bytes())):
            if kind == "graph":
                for number, values in zip((11, 12), signature, strict=True):
                    values.update(map(_value, inner(fields, number)))
            elif kind == "node":
                domain, op = text_of(fields, 7), text_of(fields, 4)
                if domain not in DOMAINS or op == "EPContext":  # a context is a compiled engine, which is code
                    raise ValueError(f"the operator {domain}::{op} is not one that pgx writes")
            elif kind == "tensor":
                _check_place(fields, sizes)
    except ValueError as error:
        raise IntegrityError(f"{file}: {error}; export the bundle again, or ask where it comes from") from error
    return signature


def _check_place(tensor: Fields, sizes: Mapping[str, int]) -> None:
    """An external tensor lies in a file of the bundle, and wholly inside it."""
    entries = [(text_of(e, 1), text_of(e, 2)) for e in inner(tensor, 13)]
    if not entries and not any(tensor[14]):
        return
    place = {"offset": "0", **dict(entries)}
    name, where = text_of(tensor, 8), place.get("location", "")
    if where not in sizes:
        raise ValueError(f"tensor {name!r} lies in {where!r}, which the manifest does not list")
    if len(dict(entries)) < len(entries) or place.keys() != {"location", "offset", "length"}:
        raise ValueError(f"tensor {name!r} says where it lies with {sorted(k for k, _ in entries)}")
    if not all(re.fullmatch("[0-9]{1,18}", place[key]) for key in ("offset", "length")):
        raise ValueError(f"tensor {name!r} has offset {place['offset'][:20]!r} and length {place['length'][:20]!r}")
    if int(place["offset"]) + int(place["length"]) > sizes[where]:
        raise ValueError(f"tensor {name!r} ends at {place['offset']} + {place['length']} of the {sizes[where]} bytes of {where}")


def messages(kind: str, message: memoryview) -> Iterator[tuple[str, Fields]]:
    """Every message that `READ` leads to, outer ones first."""
    fields = fields_of(message)
    for number, name in REFUSED.get(kind, {}).items():
        if number in fields:
            raise ValueError(f"it has {name}, which pgx does not write")
    yield kind, fields
    for number, below in READ.get(kind, {}).items():
        for value in fields.get(number, ()):
            yield from messages(below, _bytes(value))


def _value(info: Fields) -> tuple[str, Shape]:
    """ValueInfoProto -> its name, and the shape of its tensor type."""
    dims = [d for t in inner(info, 2) for tensor in inner(t, 1) for s in inner(tensor, 2) for d in inner(s, 1)]
    return text_of(info, 1), tuple(text_of(d, 2) or next((v for v in d[1] if isinstance(v, int)), 0) for d in dims)


def inner(fields: Fields, number: int) -> list[Fields]:
    return [fields_of(_bytes(value)) for value in fields[number]]


def text_of(fields: Fields, number: int) -> str:
    """Returns a string field that occurs at most once: readers might disagree about which of two counts."""
    values = fields[number]
    if len(values) > 1:
        raise ValueError(f"a string is there {len(values)} times")
    return str(_bytes(values[0]), "utf-8") if values else ""


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message or a string belongs")
    return value


def fields_of(message: memoryview) -> Fields:
    """Field number -> its values: numbers as they are, anything longer as bytes (protobuf's wire format)."""
    fields: Fields = defaultdict(list)
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, size = 0, {1: 8, 5: 4}.get(key & 7, 0)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
            case 2:
                size, at = _varint(message, at)
            case 3 | 4 | 6 | 7:
                raise ValueError("it is not an ONNX graph")
        if at + size > len(message):
            raise ValueError("it is cut off, or not an ONNX graph")
        fields[key >> 3].append(value if key & 7 == 0 else message[at : at + size])
        at += size
    return fields


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, at + count + 1
    raise ValueError("it is cut off, or not an ONNX graph")
