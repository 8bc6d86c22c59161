# SPDX-License-Identifier: Apache-2.0
"""Items come in their order, a few ahead; a failure comes where its item would have come."""

import threading
from collections.abc import Iterator

import pytest

from pgxport.machine.threads import in_order


@pytest.mark.parametrize("threads", [1, 2, 5, None])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_items_come_in_order(threads: int | None, count: int):
    assert list(in_order(lambda i: i * i, range(count), threads)) == [i * i for i in range(count)]


def test_the_first_waits_for_none_of_the_others():
    """The later of two is done first, and comes second."""
    second = threading.Event()

    def make(i: int) -> int:
        if i == 1:
            second.set()
        else:
            assert second.wait(10)
        return i

    assert list(in_order(make, range(2), 2)) == [0, 1]


def test_a_few_items_are_taken_ahead_of_their_use():
    taken = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    made = in_order(lambda i: i, items(), 2)
    assert next(made) == 0
    assert len(taken) == 4  # the one that came, two in the making and one that waits
    made.close()
    assert len(taken) == 4


def test_a_failure_comes_in_its_turn():
    def make(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    came = []
    with pytest.raises(ValueError, match="three"):
        came.extend(in_order(make, range(10), 2))
    assert came == [0, 1, 2]
