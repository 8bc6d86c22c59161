# SPDX-License-Identifier: Apache-2.0
"""Ask every bundle every sample, in turn, once: the pass that all rows of a report share.

Each bundle has a process; only one works at a time, and the bundle that begins moves on by one with each
sample, so that a machine whose speed drifts affects all alike. What a folder of earlier measurements holds is
not asked again. Knows no metric.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pgxport.benchmarking.worker import Progress, Worker
from pgxport.errors import PgxError
from pgxport.machine.clocks import look
from pgxport.machine.energy import Meter, find_meters
from pgxport.machine.nvml import Nvml, find_nvml
from pgxport.metrics.sample import Sample
from pgxport.reporting.asking import picture_of
from pgxport.reporting.measured import LINES, Asked, Conditions, Opened, Place, SubjectResults, TeacherForced
from pgxport.reporting.schema import Memory
from pgxport.reporting.store import ResultFile
from pgxport.text import duration


@dataclass(frozen=True)
class ReportSubject:
    """A row of the report before it is measured: how its process is started, and what is known of it."""

    label: str
    request: Mapping[str, Any]
    facts: Mapping[str, Any]
    conditions: Conditions | None  # None where it cannot even be opened, for this reason
    reason: str | None = None
    exit_code: int = 0


@dataclass
class SubjectRun:
    """The measurements of a subject. With a reason it ended early."""

    label: str
    facts: Mapping[str, Any]
    opened: list[Opened] = field(default_factory=list)
    asked: Mapping[str, Asked] = field(default_factory=dict)  # by sample
    teacher_forced: Mapping[str, TeacherForced] = field(default_factory=dict)  # by sample
    reason: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class ReportWork:
    """The samples by key, and those along whose reference answer the others are compared."""

    samples: Mapping[str, Sample]
    teacher_forced: frozenset[str]
    reference: int  # the subject's number
    max_new_tokens: int | None

    def turns(self) -> "list[Turn]":
        """Return a turn for each sample."""
        return [
            Turn(n, key, sample, key in self.teacher_forced, self.max_new_tokens)
            for n, (key, sample) in enumerate(self.samples.items())
        ]


@dataclass(frozen=True)
class Turn:
    """One sample for all subjects."""

    number: int
    key: str
    sample: Sample
    teacher_forced: bool
    max_new_tokens: int | None


def shared_pass(
    subjects: Sequence[ReportSubject], work: ReportWork, folder: Path, *, engine: str = "cpu", progress: Progress | None = None
) -> list[SubjectRun]:
    """Measure what a folder lacks. A subject that fails is a run with its reason; the others go on."""
    with ExitStack() as stack:
        meters, nvml = instruments(engine, stack)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgx-report-")))
        askers = [Asker(subject, results_of(subject, folder), meters, nvml) for subject in subjects]
        reference, needed = askers[work.reference], demand(askers, work)
        clock = PassClock(sum(asks for asks, _ in needed) + needed[work.reference][1], progress)
        for asker, missing in zip(askers, needed, strict=True):
            if any(missing):
                clock.say(f"opening {asker.label}")
                stack.enter_context(asker.process())
                asker.open()
        for turn in work.turns():
            where = f"sample {turn.number + 1} of {len(work.samples)}"
            take_turns(askers, reference, turn, scratch / "logits.npy", partial(clock.lap, where))
        return [asker.run(reference) for asker in askers]


def results_of(subject: ReportSubject, folder: Path) -> SubjectResults | None:
    """Read what a folder of measurements holds of a subject; None where it cannot be opened."""
    return SubjectResults(ResultFile(folder, asdict(subject.conditions), LINES)) if subject.conditions else None


def instruments(engine: str, stack: ExitStack) -> tuple[list[Meter], Nvml | None]:
    """Open the meters of energy and NVML, until the stack is closed."""
    meters, nvml = find_meters(engine=engine), find_nvml(engine)
    for meter in meters:
        stack.callback(meter.close)
    if nvml:
        stack.callback(nvml.close)
    return meters, nvml


def demand(askers: "Sequence[Asker]", work: ReportWork) -> list[tuple[int, int]]:
    """Count the samples that each subject has still to answer, and to be fed the reference's answer of."""
    reference = askers[work.reference]
    asks = [sum(asker.lacks(key) for key in work.samples) for asker in askers]
    forced = [sum(asker.lacks(key, reference.digest) for key in work.teacher_forced) for asker in askers]
    # The reference writes its logits once more for every bundle that was not compared with them.
    forced[work.reference] = max((n for asker, n in zip(askers, forced, strict=True) if asker is not reference), default=0)
    return list(zip(asks, forced, strict=True))


def not_compared(askers: "Sequence[Asker]", reference: "Asker", turn: Turn) -> "list[Asker]":
    """Return the subjects, in their order, that were not compared with the reference on the sample."""
    digest = reference.digest
    return [asker for asker in askers if turn.teacher_forced and asker is not reference and asker.lacks(turn.key, digest)]


def take_turns(
    askers: "Sequence[Asker]",
    reference: "Asker",
    turn: Turn,
    logits: Path,
    lap: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Ask each subject one sample, and compare each with the reference along the reference's answer.

    Args:
        logits: A file for the reference's logits, which is deleted at the end.
        lap: Given what is done, a context that it is done in.
    """
    order = [askers[(turn.number + i) % len(askers)] for i in range(len(askers))]
    for asker in order:
        if asker.lacks(turn.key):
            with lap(asker.label):
                asker.ask(turn.key, turn.sample, turn.max_new_tokens)
    if not not_compared(order, reference, turn):
        return
    with lap("along the reference's answer"):
        theirs = reference.results.asked.get(turn.key) if reference.results else None
        if theirs is None or theirs.answer is None:
            return
        ids = theirs.answer["token_ids"]
        request = {"image": picture_of(turn.sample), "prompt": turn.sample.prompt, "teacher_force": ids}
        if reference.request(request | {"write": str(logits)}) == {}:  # neither refused nor failed
            for asker in not_compared(order, reference, turn):
                asker.compare(turn.key, reference.digest, request | {"read": str(logits)})
        logits.unlink(missing_ok=True)


class Asker:
    """A subject, its process if it has one here, and its results.

    A subject that failed is not asked again.
    """

    def __init__(
        self,
        subject: ReportSubject,
        results: SubjectResults | None,
        meters: Sequence[Meter] = (),
        nvml: Nvml | None = None,
        place: Place | None = None,
    ):
        self.label, self.results, self.place = subject.label, results, place
        self._subject, self._meters, self._nvml = subject, meters, nvml
        self.failed: PgxError | None = None  # elsewhere
        self._worker: Worker | None = None

    @property
    def failure(self) -> PgxError | None:
        """Why the subject is not asked any more, whether it failed here or elsewhere."""
        return (self._worker.failure if self._worker else None) or self.failed

    @property
    def digest(self) -> str:
        """The digest of the subject's files."""
        return self._subject.conditions.digest if self._subject.conditions else ""

    def lacks(self, key: str, reference: str | None = None) -> bool:
        """Whether the answer to a sample is missing; or, given a reference, the comparison with it."""
        if self.results is None or self.failure:
            return False
        return key not in self.results.asked if reference is None else (key, reference) not in self.results.teacher_forced

    def process(self) -> Worker:
        """Return the process to enter and then `open`."""
        command = [sys.executable, "-m", "pgxport.reporting.asking"]
        self._worker = Worker(self.label, command, dict(self._subject.request))
        return self._worker

    def open(self, environment: dict[str, Any] | None = None) -> None:
        """Get the process ready, and keep what that took."""
        assert self._worker is not None
        assert self.results is not None
        self._worker.open()
        if not self._worker.failure:
            seconds = {stage: values[0] for stage, values in self._worker.seconds.items()}
            loaded = _memory(self._worker.loaded)
            self.results.add(
                Opened(facts=self._worker.facts, seconds=seconds, loaded=loaded, place=self.place, environment=environment)
            )

    def ask(self, key: str, sample: Sample, max_new_tokens: int | None) -> None:
        """Ask one sample, and keep the answer with what it cost."""
        assert self._worker is not None
        assert self.results is not None
        before, clocks = [meter.joules() for meter in self._meters], look(nvml=self._nvml)
        reply = self.request({"image": picture_of(sample), "prompt": sample.prompt, "max_new_tokens": max_new_tokens})
        if reply is None:
            return
        joules = {meter.source: meter.joules() - start for meter, start in zip(self._meters, before, strict=True)}
        now = look(nvml=self._nvml)
        throttled = None if now.throttled is None or clocks.throttled is None else now.throttled - clocks.throttled
        line = Asked(
            sample=key,
            joules=joules,
            mhz=now.mhz,
            celsius=now.celsius,
            throttled=throttled,
            gpu_mhz=now.gpu_mhz,
            slowed=now.hot,
            peak=_memory(self._worker.peak),
            place=self.place,
            **reply,
        )
        self.results.add(line)

    def compare(self, key: str, reference: str, request: Mapping[str, Any]) -> None:
        """Compare the subject with the reference along the reference's answer, and keep the agreement."""
        reply = self.request(request)
        if reply is not None and self.results:
            self.results.add(TeacherForced(sample=key, reference=reference, **reply))

    def request(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send the process a request; None where something failed, now or before."""
        return self._worker.ask(dict(request)) if self._worker else None

    def run(self, reference: "Asker") -> SubjectRun:
        """Return all measurements of the subject, and why they ended early."""
        run = SubjectRun(self.label, self._subject.facts, reason=self._subject.reason, exit_code=self._subject.exit_code)
        if self.results:
            lines = self.results.teacher_forced.items()
            run.teacher_forced = {key: line for (key, digest), line in lines if digest == reference.digest}
            run.opened, run.asked = self.results.opened, self.results.asked
        if failure := self.failure:
            run.reason, run.exit_code = str(failure), failure.exit_code
        return run


class PassClock:
    """Tells what is being done, which share of the work that is, and how long the rest will take."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done, self._spent = total, progress, 0, 0.0

    def say(self, what: str) -> None:
        """Tell what is being done."""
        if self._progress:
            self._progress(what)

    @contextmanager
    def lap(self, where: str, what: str) -> Iterator[None]:
        """Tell what is being done, and count it and its time as done at the end of the block."""
        remaining = f", {duration(self._spent / self._done * max(0, self._total - self._done))} left" if self._done else ""
        self.say(f"{where}: {what}: {min(1, self._done / max(1, self._total)):.0%}{remaining}")
        start = time.perf_counter()
        yield
        self._spent += time.perf_counter() - start
        self._done += 1


def _memory(memory: Any) -> Memory | None:
    return Memory(**asdict(memory)) if memory else None
