# SPDX-License-Identifier: Apache-2.0
"""A signal ends the command even where it arrives in a callback whose exceptions the caller swallows."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgxport.files import StagedFolder, write_new
from pgxport.interrupts import check_interrupted, signals_recorded

# The command's work is a C function that calls Python: ctypes prints what a callback raises, and C goes on.
IN_A_CALLBACK = """
import ctypes, signal, sys
from pgxport import cli, inspection
from pgxport.errors import InputError

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(a, b):
    if not arrived:
        arrived.append(True)
        signal.raise_signal(signal.Signals[NAME])
    return 0

def sorted_by_c(path):
    numbers = (ctypes.c_int * 4)(3, 1, 2, 0)
    ctypes.CDLL(None).qsort(numbers, 4, ctypes.sizeof(ctypes.c_int), compare)
    if AFTERWARDS == "refused":
        raise InputError("made up after the signal")
    print("the end of the command", file=sys.stderr)
    return {}

arrived, AFTERWARDS, NAME = [], sys.argv.pop(), sys.argv.pop()
inspection.describe = sorted_by_c
cli.main()
"""


@pytest.mark.parametrize("afterwards", ["done", "refused"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_a_foreign_callback_ends_the_command_with_its_own_code(tmp_path: Path, name: str, code: int, afterwards: str):
    words = [sys.executable, "-c", IN_A_CALLBACK, "inspect", tmp_path, "--json", name, afterwards]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "made up" not in done.stderr


@pytest.fixture
def in_c() -> Iterator[Callable[[], None]]:
    """Call a C function whose Python callback raises SIGINT, and swallow what ctypes reports of it."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def compare(a: int, b: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    unraisable: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    numbers = (ctypes.c_int * 2)(1, 0)
    yield lambda: ctypes.CDLL(None).qsort(numbers, 2, ctypes.sizeof(ctypes.c_int), compare)
    sys.unraisablehook = hook
    assert unraisable, "the callback raised nothing"


def test_the_check_after_a_foreign_call_raises_what_it_swallowed(in_c: Callable[[], None]):
    reached = []
    with pytest.raises(KeyboardInterrupt), signals_recorded(signal.SIGINT):  # noqa: PT012
        in_c()
        reached.append("the line after the call")
        check_interrupted()
        reached.append("the line after the check")
    assert reached == ["the line after the call"]


def test_the_end_of_the_block_raises_what_nobody_checked_for(in_c: Callable[[], None]):
    with pytest.raises(KeyboardInterrupt), signals_recorded(signal.SIGINT):
        in_c()
    check_interrupted()  # forgotten once it was raised


def test_what_was_written_after_an_interrupt_gets_no_name(in_c: Callable[[], None], tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), signals_recorded(signal.SIGINT), StagedFolder(tmp_path / "b", None) as folder:  # noqa: PT012
        in_c()
        write_new(folder.staging / "file", [b"content"])
        folder.publish()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_python_code_sees_is_raised_once():
    with pytest.raises(KeyboardInterrupt), signals_recorded(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
    check_interrupted()


def test_an_inner_block_leaves_the_signal_to_the_outer_one(in_c: Callable[[], None]):
    with pytest.raises(KeyboardInterrupt), signals_recorded(signal.SIGINT), signals_recorded(signal.SIGINT):
        in_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back_and_those_of_others_stay():
    mine = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    try:
        with signals_recorded(signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
        assert mine == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_recorded(signal.SIGINT):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_recorded():
    entered = []

    def block() -> None:
        with signals_recorded(signal.SIGINT):
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]
