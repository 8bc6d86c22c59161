# SPDX-License-Identifier: Apache-2.0
"""Signals that end a command even where foreign code swallows the exception that they raise.

Python raises KeyboardInterrupt in whatever Python code runs next. Where that is a callback of a C++ library,
a finalizer or a C function pointer, the exception ends there: the library goes on, and so would the command.
Here the signal is recorded as well as raised.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_arrived: list[int] = []  # the signals that came since the outermost `signals_recorded` began


def check_interrupted() -> None:
    """Raise what a recorded signal raised once more; to be called after foreign code that calls Python.

    Raises:
        KeyboardInterrupt: SIGINT arrived.
        SystemExit: SIGTERM arrived; the code is 143.
    """
    if _arrived:
        raise KeyboardInterrupt if _arrived[-1] == signal.SIGINT else SystemExit(128 + _arrived[-1])


@contextmanager
def signals_recorded(*numbers: signal.Signals) -> Iterator[None]:
    """Record these signals inside the block; where one arrived, the block ends by its exception and no other.

    A signal that the process ignores or already handles is left as it is, and so are all of them outside of
    the main thread, where Python runs no handlers.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    installed = [number for number in numbers if before[number] in (signal.default_int_handler, signal.SIG_DFL)]
    try:
        for number in installed:
            signal.signal(number, _record)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number in installed:
            signal.signal(number, before[number])
        if installed:
            try:
                check_interrupted()
            finally:
                _arrived.clear()


def _record(number: int, frame: object) -> None:
    _arrived.append(number)
    check_interrupted()
