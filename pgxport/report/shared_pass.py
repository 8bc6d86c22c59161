# SPDX-License-Identifier: Apache-2.0
"""Ask every bundle every sample, in turn, once: the pass that all rows of a report share.

A process for each bundle; only one works at a time, and who begins moves on by one with each sample, so that a machine that
drifts does it to all. What a folder of earlier measurements holds is not asked again. Knows no metric.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pgxport.report.asking import picture_of
from pgxport.report.clocks import look
from pgxport.report.energy import Meter, find_meters
from pgxport.report.samples import Sample
from pgxport.report.store import Asked, Conditions, Folder, Followed, Held, Opened, Store
from pgxport.report.worker import Memory, Progress, Worker


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
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgx-report-")))
        askers = [_Asker(subject, folder, meters) for subject in subjects]
        reference = askers[work.reference]
        asks = [sum(asker.lacks(key) for key in work.samples) for asker in askers]
        along = [sum(asker.lacks(key, reference.digest) for key in work.followed) for asker in askers]
        # The reference writes its logits down once more for every bundle that has not seen them.
        along[work.reference] = max((n for asker, n in zip(askers, along, strict=True) if asker is not reference), default=0)
        clock = _Clock(sum(asks) + along[work.reference], progress)
        for asker, *needed in zip(askers, asks, along, strict=True):
            if any(needed):
                clock.say(f"opening {asker.label}")
                stack.enter_context(asker.process())
                asker.open()
        for n, (key, sample) in enumerate(work.samples.items()):
            where = f"sample {n + 1} of {len(work.samples)}"
            turn = [askers[(n + i) % len(askers)] for i in range(len(askers))]
            for asker in turn:
                if asker.lacks(key):
                    with clock.lap(f"{where}: {asker.label}"):
                        asker.ask(key, sample, work.max_new_tokens)
            if any(asker.lacks(key, reference.digest) for asker in turn if key in work.followed and asker is not reference):
                with clock.lap(f"{where}: along the reference's answer"):
                    follow(turn, reference, key, sample, scratch / "logits.npy")
        return [asker.run(reference) for asker in askers]


def follow(turn: "Sequence[_Asker]", reference: "_Asker", key: str, sample: Sample, file: Path) -> None:
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


class _Asker:
    """A subject, its process and what is kept of it."""

    def __init__(self, subject: Subject, folder: Folder, meters: Sequence[Meter]):
        self.label, self._subject, self._meters = subject.label, subject, meters
        self.store = Store(folder.path, subject.conditions) if subject.conditions else None
        self._worker: Worker | None = None

    @property
    def digest(self) -> str:
        return self._subject.conditions.digest if self._subject.conditions else ""

    def lacks(self, key: str, reference: str | None = None) -> bool:
        if self.store is None or (self._worker and self._worker.failure):
            return False
        return key not in self.store.asked if reference is None else (key, reference) not in self.store.followed

    def process(self) -> Worker:
        command = [sys.executable, "-m", "pgxport.report.asking"]
        self._worker = Worker(self.label, command, dict(self._subject.request))
        return self._worker

    def open(self) -> None:
        assert self._worker is not None
        assert self.store is not None
        self._worker.open()
        if not self._worker.failure:
            seconds = {stage: values[0] for stage, values in self._worker.seconds.items()}
            self.store.add(Opened(facts=self._worker.facts, seconds=seconds, loaded=_held(self._worker.loaded)))

    def ask(self, key: str, sample: Sample, max_new_tokens: int | None) -> None:
        if not self.lacks(key):
            return
        assert self._worker is not None
        assert self.store is not None
        before, clocks = [meter.joules() for meter in self._meters], look()
        found = self.tell({"image": picture_of(sample), "prompt": sample.prompt, "max_new_tokens": max_new_tokens})
        if found is None:
            return
        joules = {meter.source: meter.joules() - start for meter, start in zip(self._meters, before, strict=True)}
        now = look()
        throttled = None if now.throttled is None or clocks.throttled is None else now.throttled - clocks.throttled
        line = Asked(
            sample=key, joules=joules, mhz=now.mhz, celsius=now.celsius, throttled=throttled, peak=_held(self._worker.peak)
        )
        self.store.add(line.model_copy(update=found))

    def tell(self, request: dict[str, Any]) -> dict[str, Any] | None:
        return self._worker.ask(request) if self._worker else None

    def run(self, reference: "_Asker") -> Run:
        run = Run(self.label, self._subject.facts, reason=self._subject.reason, exit_code=self._subject.exit_code)
        if self.store:
            followed = {key: f for (key, digest), f in self.store.followed.items() if digest == reference.digest}
            run.opened, run.asked, run.followed = self.store.opened, self.store.asked, followed
        if self._worker and (failure := self._worker.failure):
            run.reason, run.exit_code = str(failure), failure.exit_code
        return run


class _Clock:
    """Says what is being done, how much of it is, and how long the rest will take."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done, self._spent = total, progress, 0, 0.0

    def say(self, what: str) -> None:
        if self._progress:
            self._progress(what)

    @contextmanager
    def lap(self, what: str) -> Iterator[None]:
        left = f", {_duration(self._spent / self._done * max(0, self._total - self._done))} left" if self._done else ""
        self.say(f"{what}: {min(1, self._done / max(1, self._total)):.0%}{left}")
        start = time.perf_counter()
        yield
        self._spent += time.perf_counter() - start
        self._done += 1


def _duration(seconds: float) -> str:
    """
    >>> _duration(59), _duration(150), _duration(9000)
    ('59 s', '2 min', '2 h 30 min')
    """
    minutes = int(seconds // 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _held(memory: Memory | None) -> Held | None:
    return Held(**asdict(memory)) if memory else None
