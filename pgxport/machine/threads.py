# SPDX-License-Identifier: Apache-2.0
"""Work that numpy does outside of Python's lock, on all cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from pgxport.machine.cpu import usable_cores

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(make: Callable[[Item], Made], items: Iterable[Item], threads: int | None = None) -> Iterator[Made]:
    """Yields make(item) of each item, in their order.

    Args:
        threads: How many are made at once, while one more waits to be taken; None: as many as there are cores.
    """
    threads = threads or usable_cores() or 1
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque(pool.submit(make, item) for item in islice(left, threads + 1))
        try:
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, item) for item in islice(left, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()
