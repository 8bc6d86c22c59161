# SPDX-License-Identifier: Apache-2.0
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("ml_dtypes")

import ml_dtypes

from pgxport.errors import CheckpointError
from pgxport.models.safetensors import Stored, read_header

BODY = np.arange(24, dtype="<f4").tobytes()
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [48, 64]},
    "c": {"dtype": "F16", "shape": [2, 2, 4], "data_offsets": [64, 96]},
}


def entry(dtype: str = "F32", shape: object = (3, 4), offsets: object = (0, 48)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def whole(header: object = HEADER, body: bytes = BODY, length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def library_accepts(data: bytes) -> bool:
    """Whether the reference implementation reads every tensor of these bytes."""
    safetensors = pytest.importorskip("safetensors")
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def accepted(file: Path, data: bytes) -> list[Stored]:
    """Write the bytes, and return the tensors, or none where they are refused as they should be: by the file's name."""
    file.write_bytes(data)
    fault = None
    try:
        return list(read_header(file).values())
    except CheckpointError as error:
        fault = str(error)
    assert fault.startswith(str(file))
    return []


def refused(file: Path, data: bytes) -> str:
    """Write the bytes, and return why they are not accepted."""
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as info:
        read_header(file)
    assert str(info.value).startswith(str(file)), info.value
    assert len(str(info.value)) < len(str(file)) + 800
    return str(info.value)


def test_a_sound_file_is_read_in_row_blocks(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole())
    tensors = read_header(file)
    assert [(t.name, t.shape, t.dtype) for t in tensors.values()] == [
        ("a", (3, 4), np.float32),
        ("b", (8,), ml_dtypes.bfloat16),
        ("c", (2, 2, 4), np.float16),
    ]
    expected = np.frombuffer(BODY, "<f4", 12).reshape(3, 4)
    assert all(np.array_equal(tensors["a"].rows(i, j), expected[i:j]) for i in range(4) for j in range(i, 4))
    assert np.array_equal(tensors["c"].rows(1, 2), np.frombuffer(BODY, "<f2", 8, 80).reshape(1, 2, 4))


def test_what_the_library_writes_is_accepted(tmp_path: Path):
    numpy = pytest.importorskip("safetensors.numpy")
    values = {"x": np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32), "y": np.ones(3, np.float16)}
    numpy.save_file(values, tmp_path / "f.safetensors", {"made": "here"})
    tensors = read_header(tmp_path / "f.safetensors")
    assert all(np.array_equal(tensors[name].rows(0, len(v)), v) for name, v in values.items())


@pytest.mark.parametrize("length", [*range(12), *range(12, len(whole()), 3), len(whole()) - 1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int):
    message = refused(tmp_path / "f.safetensors", whole()[:length])
    assert message.endswith(("give the whole file", "give a whole copy of the file", "give a whole safetensors file"))


@pytest.mark.parametrize("extra", [1, 7, 96, 5000])
def test_trailing_bytes_are_refused(tmp_path: Path, extra: int):
    assert f"{extra:,} bytes too many" in refused(tmp_path / "f.safetensors", whole() + bytes(extra))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 10**8, len(whole()) - 7, len(whole()), 0, 1, 5])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int):
    refused(tmp_path / "f.safetensors", whole(length=length))


def test_a_giant_header_is_refused_before_it_is_read(tmp_path: Path):
    file = tmp_path / "f.safetensors"
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 90_000_000))
        f.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="a header of 90,000,000 bytes"):
        read_header(file)


LIES = {
    "overlap": ({"a": entry(), "b": entry(offsets=[44, 92])}, "'b' overlaps the tensor before it by 4 bytes"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "'b' overlaps"),
    "hole at the start": ({"a": entry(offsets=[48, 96])}, "'a' leaves a hole of 48"),
    "hole between": ({"a": entry(), "b": entry(shape=[11], offsets=[52, 96])}, "'b' leaves a hole of 4"),
    "hole at the end": ({"a": entry()}, "48 bytes too many at its end, where 'a' ends"),
    "beyond the end": ({"a": entry(), "b": entry(shape=[16], offsets=[48, 112])}, "16 bytes are missing"),
    "far beyond": ({"a": entry(shape=[1 << 60], offsets=[0, 1 << 62])}, "are missing"),
    "backwards": ({"a": entry(shape=[12], offsets=[48, 0])}, "has -48"),
    "negative": ({"a": entry(offsets=[-48, 0])}, "which are not two positions"),
    "one offset": ({"a": entry(offsets=[0])}, "which are not two positions"),
    "three offsets": ({"a": entry(offsets=[0, 48, 96])}, "which are not two positions"),
    "float offsets": ({"a": entry(offsets=[0.0, 48.0])}, "which are not two positions"),
    "true offsets": ({"a": entry(offsets=[False, 48])}, "which are not two positions"),
    "text offsets": ({"a": entry(offsets=["0", "48"])}, "which are not two positions"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [3, 4]}}, "'a' is not described by"),
    "offsets of 65 bits": ({"a": entry(offsets=[1 << 64, (1 << 64) + 48])}, "which are not two positions"),
    "shape too small": ({"a": entry(shape=[3, 3])}, "takes 36 bytes, and has 48"),
    "shape too large": ({"a": entry(shape=[4, 4])}, "takes 64 bytes, and has 48"),
    "shape overflows": ({"a": entry(shape=[1 << 32, 1 << 32])}, "and has 48"),
    "shape overflows to the right size": ({"a": entry(shape=[(1 << 62) + 12])}, "and has 48"),
    "no axis": ({"a": entry(shape=[], offsets=[0, 4])}, "no weight's"),
    "empty": ({"a": entry(shape=[0, 4], offsets=[0, 0])}, "no weight's"),
    "empty and huge": ({"a": entry(shape=[0, 1 << 63, 1 << 63], offsets=[0, 0])}, "no weight's"),
    "negative dims": ({"a": entry(shape=[-3, -4])}, "no weight's"),
    "float dims": ({"a": entry(shape=[3.0, 4])}, "no weight's"),
    "true dims": ({"a": entry(shape=[True, 12])}, "no weight's"),
    "dims as text": ({"a": entry(shape="34")}, "no weight's"),
    "dims are null": ({"a": entry(shape=None)}, "no weight's"),
    "wrong dtype": ({"a": entry("BF16")}, "takes 24 bytes, and has 48"),
    **{f"dtype {d}": ({"a": entry(d)}, f"'a' is stored as '{d}'") for d in ("F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "f32", "")},
    "dtype is a number": ({"a": entry(3)}, "'a' is stored as '3'"),
    "dtype is a list": ({"a": entry(["F32"])}, "'a' is stored as"),
    "another field": ({"a": {**entry(), "x": 1}}, "'a' is not described by"),
    "an entry is a list": ({"a": [0, 48]}, "'a' is not described by"),
    "an entry is null": ({"a": None}, "'a' is not described by"),
    "metadata is a list": ({"__metadata__": [], "a": entry()}, "__metadata__"),
    "metadata is null": ({"__metadata__": None, "a": entry()}, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"x": 1}, "a": entry()}, "__metadata__"),
    "a list": ([1, 2], "begins with"),
    "a number": (7, "begins with"),
    "nothing": (b"", "begins with"),
    "spaces before": (b"  " + json.dumps(HEADER).encode(), "begins with"),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(HEADER).encode(), "begins with"),
    "UTF-16": (json.dumps(HEADER).encode("utf-16-le"), "not sound JSON"),
    "not UTF-8": (json.dumps(HEADER).encode().replace(b'"a"', b'"\xff"'), "not sound JSON"),
    "cut JSON": (json.dumps(HEADER).encode()[:-1], "not sound JSON"),
    "two objects": (json.dumps(HEADER).encode() * 2, "not sound JSON"),
    "zeros after": (json.dumps(HEADER).encode() + b"\0\0\0", "not sound JSON"),
    "single quotes": (str(HEADER).encode(), "not sound JSON"),
    "a trailing comma": (json.dumps(HEADER).encode()[:-1] + b",}", "not sound JSON"),
    "a comment": (json.dumps(HEADER).encode()[:-1] + b"/**/}", "not sound JSON"),
    "a tensor twice": (b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[0,96]},"a":{}}', "'a' stands twice in one object"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[24],"data_offsets":[0,96]}}', "'dtype' stands twice in one object"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[NaN,96]}}', "NaN"),
    "Infinity": (b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[0,Infinity]}}', "Infinity"),
    "minus nothing": (b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[-0,96]}}', "-0"),
    "an exponent": (b'{"a":{"dtype":"F32","shape":[24],"data_offsets":[0,96e0]}}', "not two positions"),
    "leading zero": (b'{"a":{"dtype":"F32","shape":[024],"data_offsets":[0,96]}}', "not sound JSON"),
    "half a surrogate in a name": (b'{"\\ud800":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}', "not sound JSON"),
    "half a surrogate in metadata": (b'{"__metadata__":{"x":"\\udfff"}}', "not sound JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "not sound JSON"),
    "a number of 5,000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,96]}}', "not sound JSON"),
    "a control character": (b'{"a\x01":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}', "not sound JSON"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str):
    header, expected = LIES[lie]
    assert expected in refused(tmp_path / "f.safetensors", whole(header))


def test_a_name_cannot_write_to_the_terminal_or_fill_it(tmp_path: Path):
    message = refused(tmp_path / "f.safetensors", whole({"\x1b[2J" + "x" * 100_000: entry("U8")}))
    assert "\x1b" not in message


@pytest.mark.parametrize("bit", range(0, 8 * (len(whole()) - len(BODY)), 7))
def test_one_flipped_bit_of_the_header_is_refused_or_still_sound(tmp_path: Path, bit: int):
    data = bytearray(whole())
    data[bit // 8] ^= 1 << bit % 8
    if tensors := accepted(tmp_path / "f.safetensors", bytes(data)):
        # A letter of a name, or of the metadata.
        assert library_accepts(bytes(data))
        assert [t.shape for t in tensors] == [(3, 4), (8,), (2, 2, 4)]


numbers = st.one_of(
    st.integers(0, 100), st.sampled_from([-1, 0, 4, 48, 96, 1 << 31, 1 << 32, 1 << 62, 1 << 64, 1.5, None, "4", True])
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "U8", "x", 3]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(header=st.dictionaries(st.text(max_size=3), entries, max_size=3), body=st.integers(0, 96))
def test_nothing_is_accepted_that_the_library_rejects(tmp_path: Path, header: dict[str, object], body: int):
    data = whole(header, BODY[:body])
    if accepted(tmp_path / "f.safetensors", data):
        assert library_accepts(data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(edits=st.lists(st.tuples(st.integers(0, len(whole()) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_never_accepted_unless_the_library_does(tmp_path: Path, edits: list[tuple[int, int]]):
    data = bytearray(whole())
    for at, value in edits:
        data[at] = value
    for tensor in accepted(tmp_path / "f.safetensors", bytes(data)):
        assert library_accepts(bytes(data))
        try:
            tensor.rows(0, tensor.shape[0])
        except CheckpointError as error:
            fault = str(error)
        else:
            continue
        assert f"{tensor.name!r} holds" in fault


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("row", [0, 5])
def test_a_value_that_is_not_finite_is_refused_by_file_tensor_and_place(tmp_path: Path, dtype: str, value: float, row: int):
    x = np.full((6, 3), -1.5, {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype])
    x[row, 2] = value
    file = tmp_path / "f.safetensors"
    file.write_bytes(whole({"deep.w": entry(dtype, x.shape, [0, x.nbytes])}, x.tobytes()))
    tensor = read_header(file)["deep.w"]
    assert np.array_equal(tensor.rows(1, 5), x[1:5])
    with pytest.raises(CheckpointError, match=rf"f\.safetensors: 'deep\.w' holds -?(nan|inf) at \[{row}, 2\]"):
        tensor.rows(row, row + 1)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_largest_and_smallest_finite_values_are_weights(tmp_path: Path, dtype: str):
    kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    x = np.array([ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min, ml_dtypes.finfo(kind).smallest_subnormal, -0.0], kind)
    file = tmp_path / "f.safetensors"
    file.write_bytes(whole({"w": entry(dtype, x.shape, [0, x.nbytes])}, x.tobytes()))
    assert read_header(file)["w"].rows(0, 4).tobytes() == x.tobytes()


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_crash(tmp_path: Path):
    file = tmp_path / "f.safetensors"
    file.write_bytes(whole())
    tensors = read_header(file)
    file.write_bytes(whole()[:-40])
    with pytest.raises(CheckpointError, match=r"ends within 'c'"):
        tensors["c"].rows(0, 2)
    file.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        tensors["a"].rows(0, 1)
