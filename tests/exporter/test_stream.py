# SPDX-License-Identifier: Apache-2.0
"""Promises: bytes in blocks, at their places, made ahead; rounding as ml_dtypes and numpy round."""

import threading
import time

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

from pgxport.errors import CheckpointError  # noqa: E402
from pgxport.exporter.stream import PAGE, Counter, DataLayout, LazyTensor, ahead, narrow  # noqa: E402
from pgxport.models.checkpoint import row_blocks, to_float32  # noqa: E402


def lazy(name: str, array: np.ndarray, step: int = 2) -> LazyTensor:
    return LazyTensor(name, array.dtype, array.shape, lambda: (array[i : i + step] for i in range(0, len(array), step)))


def test_a_data_file_holds_every_promise_at_its_place_and_zeros_between():
    arrays = {"a": np.arange(7, dtype=np.float32), "b": np.ones((5, 3000), np.float16), "c": np.arange(3, dtype=np.int64)}
    layout = DataLayout([lazy(n, a) for n, a in arrays.items()])
    whole = b"".join(layout.bytes())
    assert len(whole) == layout.nbytes
    covered = bytearray(whole)
    for name, array in arrays.items():
        start, length = layout.places[name]
        assert start % PAGE == 0
        assert whole[start : start + length] == array.tobytes()
        covered[start : start + length] = bytes(length)
    assert not any(covered)


def test_blocks_that_are_too_few_are_a_bug_and_not_a_short_file():
    short = LazyTensor("w", np.dtype(np.float32), (4, 2), lambda: iter([np.zeros((3, 2), np.float32)]))
    with pytest.raises(AssertionError, match="8 bytes short"):
        list(short.bytes())


@pytest.mark.parametrize(("rows", "row_bytes"), [(0, 10), (1, 1 << 30), (1000, 4 << 20), (257216, 4 * 2304), (5, 0)])
def test_row_blocks_cover_every_row_once_and_are_small(rows, row_bytes):
    blocks = list(row_blocks(rows, row_bytes))
    assert [r for start, stop in blocks for r in range(start, stop)] == list(range(rows))
    assert all((stop - start) * row_bytes <= 4 << 20 or stop - start == 1 for start, stop in blocks)


def test_bfloat16_widens_exactly_as_ml_dtypes_does():
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert np.array_equal(to_float32(every).view(np.uint32), every.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrowing_rounds_to_nearest(dtype):
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert np.array_equal(narrow(values, np.dtype(dtype), "w"), values.astype(dtype))


def test_a_value_beyond_float16_is_named_with_its_size():
    with pytest.raises(CheckpointError, match=r"layer\.w holds 70000"):
        narrow(np.array([1.0, -70000.0], np.float32), np.dtype(np.float16), "layer.w")


def test_ahead_gives_the_same_chunks_in_order_and_makes_them_before_they_are_asked_for():
    made = []

    def chunks():
        for i in range(20):
            made.append(i)
            yield memoryview(bytes([i]))

    stream = ahead(chunks(), depth=3)
    first = next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 4
    assert [first[0], *(c[0] for c in stream)] == list(range(20))


def test_an_error_ahead_is_raised_where_the_chunks_are_used():
    def chunks():
        yield memoryview(b"x")
        raise CheckpointError("rotten")

    stream = ahead(chunks())
    assert next(stream) == b"x"
    with pytest.raises(CheckpointError, match="rotten"):
        next(stream)


def test_leaving_early_ends_the_thread():
    def chunks():
        while True:
            yield memoryview(b"x" * 1000)

    before = threading.active_count()
    stream = ahead(chunks())
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_the_counter_tells_of_every_byte():
    told = []
    count = Counter(lambda *what: told.append(what), 10)
    assert b"".join(count("a", [memoryview(b"1234"), memoryview(b"56")])) == b"123456"
    list(count("b", [memoryview(b"7890")]))
    assert told == [("a", 4, 10), ("a", 6, 10), ("b", 10, 10)]
