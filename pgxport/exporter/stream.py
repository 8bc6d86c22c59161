# SPDX-License-Identifier: Apache-2.0
"""A lazy tensor: its shape and type are known now, its bytes are written later, a few rows at a time."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from pgxport.errors import CheckpointError

Progress = Callable[[str, int, int], None]  # what is being written, bytes so far, bytes in all
INT4, FLOAT8 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float8_e4m3fn)

PAGE = 4096  # weights begin at a page, so that an engine can map them
LINE = 64  # and small tables, which engines copy, at a line of the processor's cache


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is written block by block; the blocks joined are its bytes in row-major order.

    Of `INT4` the blocks are pairs in uint8, the first number of a pair in the lower half.

    Attributes:
        align: The bytes that its place in a file is a multiple of.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    align: int = PAGE

    @property
    def stored(self) -> tuple[np.dtype, tuple[int, ...]]:
        """The type and shape of what is in the file."""
        if self.dtype != INT4:
            return self.dtype, self.shape
        return np.dtype(np.uint8), (-(-prod(self.shape) // 2),)

    @property
    def nbytes(self) -> int:
        dtype, shape = self.stored
        return prod(shape) * dtype.itemsize

    def bytes(self) -> Iterator[memoryview]:
        """The bytes of the tensor, block by block, and exactly `nbytes` of them."""
        remaining = self.nbytes
        for block in self.blocks():
            piece = np.ascontiguousarray(block, self.stored[0])
            remaining -= piece.nbytes
            yield piece.reshape(-1).view(np.uint8).data
        assert remaining == 0, f"Bug: {self.name} was written {remaining} bytes short"


class DataLayout:
    """The places of a graph's lazy tensors in its data file: one after another, each where its alignment lets it begin."""

    def __init__(self, lazy_tensors: Iterable[LazyTensor]):
        self.lazy_tensors = list(lazy_tensors)
        self.places: dict[str, tuple[int, int]] = {}  # offset and length
        self.nbytes = 0
        for tensor in self.lazy_tensors:
            start = -(-self.nbytes // tensor.align) * tensor.align
            self.places[tensor.name] = (start, tensor.nbytes)
            self.nbytes = start + tensor.nbytes

    def bytes(self) -> Iterator[memoryview]:
        """The whole file, zeros between the weights."""
        position = 0
        for tensor in self.lazy_tensors:
            start, length = self.places[tensor.name]
            if start > position:
                yield memoryview(bytes(start - position))
            yield from tensor.bytes()
            position = start + length


class Counter:
    """Passes chunks through and tells how many bytes have gone by."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, label: str, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            yield chunk
            self._done += len(chunk)
            if self._progress:
                self._progress(label, self._done, self._total)


def ahead(chunks: Iterable[memoryview], depth: int = 4) -> Iterator[memoryview]:
    """Yields the chunks, made by a thread up to `depth` ahead of their use, so that reading and writing overlap."""
    made: queue.Queue[memoryview | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()  # by whoever asked

    def put(item: memoryview | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for chunk in chunks:
                if not put(chunk):
                    return
            put(None)
        except BaseException as error:  # raised where the chunks are used
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def narrow(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Round to the stored type.

    Raises:
        CheckpointError: a value lies beyond the type's range, which would store it as infinity.
    """
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        rounded = block.astype(dtype)
    if dtype == np.float16 and not np.isfinite(rounded).all():
        worst = float(np.abs(block).max())
        raise CheckpointError(f"{name} holds {worst:g}, and float16 ends at 65504; use --precision bf16 or fp32")
    return rounded
