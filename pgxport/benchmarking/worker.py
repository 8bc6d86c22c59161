# SPDX-License-Identifier: Apache-2.0
"""Measure pieces of work in turn, each in a process of its own, and watch the memory of those processes.

Parent and process exchange JSON, a line each way, and only one process works at a time. This file knows no
bundles: a piece of work is whatever can be repeated.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from pgxport.errors import PgxError
from pgxport.machine.memory import ProcessMemory, process_memory

SAMPLE_SECONDS = 0.02  # a look costs 30 µs of another core
Progress = Callable[[str], None]


class Repeatable(Protocol):
    """A piece of work. `facts` describe it; `opening` is the seconds that getting ready took, by stage."""

    facts: dict[str, Any]
    opening: dict[str, float]

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        """Do the work once: seconds by stage. A warm-up may be shorter, and is not counted."""


@runtime_checkable
class Askable(Repeatable, Protocol):
    """A piece of work that also answers requests of its own."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Plain data in answer to plain data."""


@dataclass(frozen=True)
class Measurement:
    """The seconds and memory of a piece of work; `reason` says why it ended early, with an exit code."""

    label: str
    facts: dict[str, Any]
    seconds: dict[str, list[float]]  # by stage, one a repetition, and one of each stage of opening
    loaded: ProcessMemory | None  # at rest after opening; None where the system does not tell
    peak: ProcessMemory | None
    reason: str | None = None
    exit_code: int = 0


class WorkerError(PgxError):
    """A worker failed: with the message it replied, or by its death."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def serve(open_subject: Callable[[dict[str, Any]], Repeatable]) -> None:
    """Carry out the requests on stdin until it ends. An error of any kind is a reply, and no end."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what an engine prints must not be read as a reply
    subject: Repeatable | None = None
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            match request.pop("do"):
                case "open":
                    subject = open_subject(request)
                    reply = {"facts": subject.facts, "seconds": subject.opening}
                case "repeat":
                    assert subject is not None, "Bug: nothing was opened"
                    reply = {"seconds": subject.repeat(warm_up=request["warm_up"])}
                case "ask":
                    assert isinstance(subject, Askable), "Bug: what was opened cannot be asked"
                    reply = {"answer": subject.ask(request)}
        except PgxError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        except MemoryError as error:
            reply = {"error": f"not enough memory ({error})", "exit_code": 6}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


@dataclass
class Worker:
    """The parent's end of one worker.

    with Worker("a", [sys.executable, "-m", "pgxport.benchmarking.measure"], {"bundle": "a"}) as worker:
        worker.open()
        worker.repeat()
    """

    label: str
    command: list[str]
    request: dict[str, Any]  # of opening
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    loaded: ProcessMemory | None = None
    peak: ProcessMemory | None = None
    failure: WorkerError | None = None

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")
        pipe, log = subprocess.PIPE, self._stderr
        self._process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def open(self) -> None:
        """Get ready, then warm up."""
        reply = self._ask({"do": "open", **self.request})
        if not self.failure:
            self.facts = reply["facts"]
            self.seconds = {stage: [seconds] for stage, seconds in reply["seconds"].items()}
            self.loaded = process_memory(self._process.pid)
            self._ask({"do": "repeat", "warm_up": True})

    def repeat(self) -> None:
        """Do the work once more, unless something failed before."""
        if self.failure:
            return
        reply = self._ask({"do": "repeat", "warm_up": False})
        for stage, seconds in reply.get("seconds", {}).items():
            self.seconds.setdefault(stage, []).append(seconds)

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer of the work to a request, or None where something failed, now or before."""
        if self.failure:
            return None
        answer: dict[str, Any] | None = self._ask({"do": "ask", **request}).get("answer")
        return answer

    def measurement(self) -> Measurement:
        reason, code = (str(self.failure), self.failure.exit_code) if self.failure else (None, 0)
        return Measurement(self.label, self.facts, self.seconds, self.loaded, self.peak, reason, code)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._watched():
            with contextlib.suppress(BrokenPipeError):  # it is dead, which the empty line says as well
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self.failure = self._death()
            return {}
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            self.failure = WorkerError(reply["error"], reply["exit_code"])
        return reply

    def _death(self) -> WorkerError:
        code = self._process.wait()
        self._stderr.seek(0)
        last = ([line.strip() for line in self._stderr if line.strip()] or ["it said nothing"])[-1]
        killed = code == -9  # by the kernel, where memory ran out
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        return WorkerError(f"its process {how}{', perhaps for want of memory' if killed else ''}: {last}", 6 if killed else 1)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Read the worker's memory now and then from here: a thread in there would take time it measures."""
        stop = threading.Event()

        def watch() -> None:
            while True:
                self._look()
                if stop.wait(SAMPLE_SECONDS):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            self._look()

    def _look(self) -> None:
        now = process_memory(self._process.pid, peak=True)
        if now and self.peak:
            before = self.peak
            now = ProcessMemory(*(max(getattr(m, kind) for m in (now, before)) for kind in ("private", "mapped", "resident")))
        self.peak = now or self.peak


def interleave(workers: Sequence[Worker], repetitions: int, progress: Progress | None = None) -> list[Measurement]:
    """Open all, then repeat in turn, so that a drifting machine drifts for all; a failure ends its own."""
    for worker in workers:
        if progress:
            progress(f"opening {worker.label}")
        worker.open()
    for count, turn in enumerate(turns(len(workers), repetitions), start=1):
        for i in turn:
            if progress:
                progress(f"repetition {count} of {repetitions}: {workers[i].label}")
            workers[i].repeat()
    return [worker.measurement() for worker in workers]


def turns(subjects: int, repetitions: int) -> list[tuple[int, ...]]:
    """The order of each repetition: every other one backwards, as in A B, B A, A B.

    >>> turns(2, 3)
    [(0, 1), (1, 0), (0, 1)]
    """
    forth = tuple(range(subjects))
    return [forth if i % 2 == 0 else forth[::-1] for i in range(repetitions)]


def environment() -> dict[str, str]:
    """The environment of a process that imports what this one would, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
