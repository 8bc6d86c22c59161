# SPDX-License-Identifier: Apache-2.0
"""Ask every bundle every sample, in turn, once: the pass that all rows of a report share.

A process for each bundle; only one works at a time, and who begins moves on by one with each sample, so that a machine that
drifts does it to all. What a folder of earlier measurements holds is not asked again. Knows no metric.
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
from pgxport.machine.memory import ProcessMemory
from pgxport.machine.nvml import Nvml, find_nvml
from pgxport.metrics.sample import Sample
from pgxport.reporting.asking import picture_of
from pgxport.reporting.store import Asked, Conditions, Folder, Followed, Held, Measured, Opened, Store


@dataclass(frozen=True)
class Subject:
    """A row of the report: how its process is started, and what is known of it before."""

    label: str
    request: Mapping[str, Any]
    facts: Mapping[str, Any]
    conditions: Conditions | None  # None where it cannot even be looked at, for this reason
    reason: str | None = None
    exit_code: int = 0


@dataclass
class Run:
    """What came of a subject. With a reason it ended early."""

    label: str
    facts: Mapping[str, Any]
    opened: list[Opened] = field(default_factory=list)
    asked: Mapping[str, Asked] = field(default_factory=dict)  # by key
    followed: Mapping[str, Followed] = field(default_factory=dict)
    reason: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class Work:
    """What is asked: samples by key, and along which of the reference's answers the others are followed."""

    samples: Mapping[str, Sample]
    followed: frozenset[str]
    reference: int  # the subject's number
    max_new_tokens: int | None


def shared_pass(
    subjects: Sequence[Subject], work: Work, folder: Folder, *, engine: str = "cpu", progress: Progress | None = None
) -> list[Run]:
    """Measure what is missing. A subject that fails is a run with its reason, and the others go on."""
    with ExitStack() as stack:
        meters = find_meters(engine=engine)
        for meter in meters:
            stack.callback(meter.close)
        if nvml := find_nvml(engine):
            stack.callback(nvml.close)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgx-report-")))
        stores = [Store(folder.path, subject.conditions) if subject.conditions else None for subject in subjects]
        askers = [Asker(subject, store, meters, nvml) for subject, store in zip(subjects, stores, strict=True)]
        reference, needed = askers[work.reference], demand(askers, work)
        clock = Clock(sum(asks for asks, _ in needed) + needed[work.reference][1], progress)
        for asker, lacking in zip(askers, needed, strict=True):
            if any(lacking):
                clock.say(f"opening {asker.label}")
                stack.enter_context(asker.process())
                asker.open()
        for n, (key, sample) in enumerate(work.samples.items()):
            turn = Turn(n, key, sample, key in work.followed, work.max_new_tokens)
            take_turns(
                askers, reference, turn, scratch / "logits.npy", partial(clock.lap, f"sample {n + 1} of {len(work.samples)}")
            )
        return [asker.run(reference) for asker in askers]


@dataclass(frozen=True)
class Turn:
    """One sample for all."""

    number: int
    key: str
    sample: Sample
    followed: bool
    max_new_tokens: int | None


def demand(askers: "Sequence[Asker]", work: Work) -> list[tuple[int, int]]:
    """How many samples each subject has still to answer, and how many to think along."""
    reference = askers[work.reference]
    asks = [sum(asker.lacks(key) for key in work.samples) for asker in askers]
    along = [sum(asker.lacks(key, reference.digest) for key in work.followed) for asker in askers]
    # The reference writes its logits down once more for every bundle that has not seen them.
    along[work.reference] = max((n for asker, n in zip(askers, along, strict=True) if asker is not reference), default=0)
    return list(zip(asks, along, strict=True))


def take_turns(
    askers: "Sequence[Asker]", reference: "Asker", turn: Turn, logits: Path, lap: Callable[[str], AbstractContextManager[None]]
) -> None:
    """Ask each subject one sample, and let them think along the reference's answer."""
    key = turn.key
    order = [askers[(turn.number + i) % len(askers)] for i in range(len(askers))]
    for asker in order:
        if asker.lacks(key):
            with lap(asker.label):
                asker.ask(key, turn.sample, turn.max_new_tokens)
    if any(asker.lacks(key, reference.digest) for asker in order if turn.followed and asker is not reference):
        with lap("along the reference's answer"):
            follow(order, reference, key, turn.sample, logits)


def follow(turn: "Sequence[Asker]", reference: "Asker", key: str, sample: Sample, file: Path) -> None:
    """Let each of the others think along the reference's answer, which writes down what it thought."""
    theirs = reference.store.asked.get(key) if reference.store else None
    if theirs is None or theirs.answer is None:
        return
    digest = reference.digest
    lacking = [asker for asker in turn if asker is not reference and asker.lacks(key, digest)]
    request = {"image": picture_of(sample), "prompt": sample.prompt, "follow": theirs.answer["token_ids"]}
    if lacking and reference.tell(request | {"write": str(file)}) == {}:  # neither refused nor failed
        for asker in lacking:
            found = asker.tell(request | {"read": str(file)})
            if found is not None and asker.store:
                asker.store.add(Followed(sample=key, reference=digest, **found))
        file.unlink(missing_ok=True)


class Asker:
    """A subject, its process if it has one here, and what is kept of it. What failed is not asked again."""

    def __init__(self, subject: Subject, store: Measured | None, meters: Sequence[Meter] = (), nvml: Nvml | None = None):
        self.label, self._subject, self._meters, self._nvml, self.store = subject.label, subject, meters, nvml, store
        self.failed: PgxError | None = None  # elsewhere
        self._worker: Worker | None = None

    @property
    def failure(self) -> PgxError | None:
        return (self._worker.failure if self._worker else None) or self.failed

    @property
    def digest(self) -> str:
        return self._subject.conditions.digest if self._subject.conditions else ""

    def lacks(self, key: str, reference: str | None = None) -> bool:
        if self.store is None or self.failure:
            return False
        return key not in self.store.asked if reference is None else (key, reference) not in self.store.followed

    def process(self) -> Worker:
        command = [sys.executable, "-m", "pgxport.reporting.asking"]
        self._worker = Worker(self.label, command, dict(self._subject.request))
        return self._worker

    def open(self, environment: dict[str, Any] | None = None) -> None:
        assert self._worker is not None
        assert self.store is not None
        self._worker.open()
        if not self._worker.failure:
            seconds = {stage: values[0] for stage, values in self._worker.seconds.items()}
            loaded = _held(self._worker.loaded)
            self.store.add(Opened(facts=self._worker.facts, seconds=seconds, loaded=loaded, environment=environment))

    def ask(self, key: str, sample: Sample, max_new_tokens: int | None) -> None:
        if not self.lacks(key):
            return
        assert self._worker is not None
        assert self.store is not None
        before, clocks = [meter.joules() for meter in self._meters], look(nvml=self._nvml)
        found = self.tell({"image": picture_of(sample), "prompt": sample.prompt, "max_new_tokens": max_new_tokens})
        if found is None:
            return
        joules = {meter.source: meter.joules() - start for meter, start in zip(self._meters, before, strict=True)}
        now = look(nvml=self._nvml)
        throttled = None if now.throttled is None or clocks.throttled is None else now.throttled - clocks.throttled
        line = Asked(
            sample=key, joules=joules, mhz=now.mhz, celsius=now.celsius, throttled=throttled, gpu_mhz=now.gpu_mhz, slowed=now.hot,
            peak=_held(self._worker.peak),
        )  # fmt: skip
        self.store.add(line.model_copy(update=found))

    def tell(self, request: dict[str, Any]) -> dict[str, Any] | None:
        return self._worker.ask(request) if self._worker else None

    def run(self, reference: "Asker") -> Run:
        run = Run(self.label, self._subject.facts, reason=self._subject.reason, exit_code=self._subject.exit_code)
        if self.store:
            followed = {key: f for (key, digest), f in self.store.followed.items() if digest == reference.digest}
            run.opened, run.asked, run.followed = self.store.opened, self.store.asked, followed
        if failure := self.failure:
            run.reason, run.exit_code = str(failure), failure.exit_code
        return run


class Clock:
    """Says what is being done, how much of it is, and how long the rest will take."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done, self._spent = total, progress, 0, 0.0

    def say(self, what: str) -> None:
        if self._progress:
            self._progress(what)

    @contextmanager
    def lap(self, where: str, what: str) -> Iterator[None]:
        left = f", {duration(self._spent / self._done * max(0, self._total - self._done))} left" if self._done else ""
        self.say(f"{where}: {what}: {min(1, self._done / max(1, self._total)):.0%}{left}")
        start = time.perf_counter()
        yield
        self._spent += time.perf_counter() - start
        self._done += 1


def duration(seconds: float) -> str:
    """Of what is left, for people.

    >>> duration(59), duration(150), duration(9000)
    ('59 s', '2 min', '2 h 30 min')
    """
    minutes = int(seconds // 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _held(memory: ProcessMemory | None) -> Held | None:
    return Held(**asdict(memory)) if memory else None
