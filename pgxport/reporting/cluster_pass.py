# SPDX-License-Identifier: Apache-2.0
"""The shared pass on a cluster: one node asks all bundles a sample, and times stay that node's.

Two times that are compared were then measured on the same machine, one after the other, as `shared_pass` does
it alone.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgxport.benchmarking.worker import Progress, WorkerError
from pgxport.cluster.pool import Cluster, WorkerContext
from pgxport.cluster.tasks import Workers
from pgxport.errors import EngineError, PgxError, UsageError
from pgxport.machine.conditions import describe_machine
from pgxport.metrics.sample import Sample
from pgxport.reporting import schema
from pgxport.reporting.environment import board, environment
from pgxport.reporting.measured import Place, ReportLine, SubjectResults
from pgxport.reporting.shared_pass import (
    Asker,
    ReportSubject,
    ReportWork,
    SubjectRun,
    Turn,
    demand,
    instruments,
    not_compared,
    results_of,
    take_turns,
)
from pgxport.text import duration


@dataclass(frozen=True)
class NodeResults:
    """What one machine timed. The answers in its runs are those of all machines, the times only its own."""

    name: str
    environment: schema.Environment
    runs: list[SubjectRun]


@dataclass(frozen=True)
class SampleTask:
    """A turn, and of each subject what is known about it and whether the subject has failed."""

    turn: Turn
    known: tuple[tuple[ReportLine, ...], ...]
    failed: tuple[bool, ...]


@dataclass(frozen=True)
class SampleResult:
    """What a turn has added, and who failed in it (message, exit code); of each subject."""

    place: Place
    lines: list[list[ReportLine]]
    failures: list[tuple[str, int] | None]


@dataclass(frozen=True)
class OpenSubjects:
    """Opens the bundles on a node, each in a process of its own, and asks them sample by sample.

    Attributes:
        digests: Of each bundle, the digest by which nodes fetch it; None: nothing is to be asked of it.
    """

    subjects: tuple[ReportSubject, ...]
    digests: tuple[str | None, ...]
    reference: int
    engine: str
    threads: int | None

    def start(self, context: WorkerContext) -> Callable[[SampleTask], SampleResult]:
        meters, nvml = instruments(self.engine, context.stack)
        logits = Path(context.stack.enter_context(tempfile.TemporaryDirectory(prefix="pgx-report-"))) / "logits.npy"
        here = describe_machine()
        about: dict[str, Any] = {"name": f"{board() or here['processor']}, node {context.node}"}
        about["environment"] = environment(self.engine, self.threads, here).model_dump(mode="json")
        place, askers = Place(context.node, here["processor"]), list[Asker]()
        for subject, digest in zip(self.subjects, self.digests, strict=True):
            path = context.fetch(digest) if digest else None
            subject = replace(subject, request={**subject.request, "bundle": str(path)})
            asker = Asker(subject, SubjectResults(), meters, nvml, place)
            if path:
                context.stack.enter_context(asker.process())
                asker.open(about)
            askers.append(asker)

        def measure(task: SampleTask) -> SampleResult:
            for asker, known, failed in zip(askers, task.known, task.failed, strict=True):
                assert asker.results is not None
                for line in known:
                    asker.results.take(line)
                if failed and not asker.failure:
                    asker.failed = EngineError("it failed on another node")
            take_turns(askers, askers[self.reference], task.turn, logits, lambda what: nullcontext())
            result = SampleResult(place, [], [])
            for asker in askers:
                assert asker.results is not None
                result.lines.append(asker.results.added)
                failure = asker.failure if not asker.failed else None
                result.failures.append((str(failure), failure.exit_code) if failure else None)
                asker.results = SubjectResults()  # the driver keeps them
            return result

        return measure


def cluster_pass(
    subjects: Sequence[ReportSubject],
    work: ReportWork,
    folder: Path,
    address: str,
    *,
    engine: str,
    threads: int | None,
    progress: Progress | None,
) -> list[NodeResults]:
    """Measure what no node has measured yet.

    A subject that fails on a node is a run with its reason in the results of every node.

    Raises:
        UsageError: a node has other versions of the packages, or a subject is a checkpoint.
        EngineError: the cluster does not answer, has no room, or a sample was lost again and again.
    """
    if any("checkpoint" in subject.request for subject in subjects):
        raise UsageError("--reference is run on this machine alone; leave it out with --cluster, and give a float32 bundle first")
    cluster = Cluster(address)
    askers = [Asker(subject, results_of(subject, folder)) for subject in subjects]
    if any(map(any, demand(askers, work))):
        with cluster:
            digests = _offer(cluster, subjects, askers, work)
            setup = OpenSubjects(tuple(subjects), digests, work.reference, engine, threads)
            _measure(cluster, setup, askers, work, progress)
    return _by_node(askers, work, environment(engine, threads, describe_machine()))


def _offer(
    cluster: Cluster, subjects: Sequence[ReportSubject], askers: Sequence[Asker], work: ReportWork
) -> tuple[str | None, ...]:
    """Let nodes fetch the bundles that have something to do; one that is not sound has failed."""
    digests = list[str | None]()
    for asker, subject, needed in zip(askers, subjects, demand(askers, work), strict=True):
        digests.append(None)
        if any(needed):
            try:
                digests[-1] = cluster.offer(subject.request["bundle"])
            except PgxError as error:
                asker.failed = error
    return tuple(digests)


def _measure(cluster: Cluster, setup: OpenSubjects, askers: Sequence[Asker], work: ReportWork, progress: Progress | None) -> None:
    count = sum(_is_lacking(askers, work, turn) for turn in work.turns())
    if not count:
        return
    say, start = progress or (lambda what: None), time.perf_counter()
    say("waiting for the nodes")
    workers = Workers(setup.threads, gpu=setup.engine != "cpu")
    for n, done in enumerate(cluster.spread(setup, _tasks(askers, work), workers), start=1):
        _keep(askers, done.get(f"sample {done.task.turn.sample.id}"))
        remaining = duration((time.perf_counter() - start) / n * (count - n))
        say(f"sample {n} of {count}, on node {done.node}: {n / count:.0%}, {remaining} left")


def _tasks(askers: Sequence[Asker], work: ReportWork) -> Iterator[SampleTask]:
    """Yield what is lacking, sample by sample, as it is when the task is taken."""
    digest = askers[work.reference].digest
    for turn in work.turns():
        if _is_lacking(askers, work, turn):
            known = tuple(tuple(asker.results.of(turn.key, digest)) if asker.results else () for asker in askers)
            failed = tuple(asker.results is None or asker.failure is not None for asker in askers)
            yield SampleTask(replace(turn, sample=travelling(turn.sample)), known, failed)


def _is_lacking(askers: Sequence[Asker], work: ReportWork, turn: Turn) -> bool:
    return any(asker.lacks(turn.key) for asker in askers) or bool(not_compared(askers, askers[work.reference], turn))


def travelling(sample: Sample) -> Sample:
    """Return a sample for another machine: with its picture, and without what is true of it."""
    image = sample.image
    if isinstance(image, Path):
        image = sample.content()
    return replace(sample, image=image, answers=(), regions=())


def _keep(askers: Sequence[Asker], result: SampleResult) -> None:
    for asker, lines, failure in zip(askers, result.lines, result.failures, strict=True):
        for line in lines:
            assert asker.results is not None
            asker.results.add(line)
        if failure and not asker.failed:
            reason, code = failure
            asker.failed = WorkerError(f"{reason} (on node {result.place.node})", code)


def _by_node(askers: Sequence[Asker], work: ReportWork, here: schema.Environment) -> list[NodeResults]:
    """Return the results of each node that timed a sample; where none did, why, as this machine's."""
    runs = [asker.run(askers[work.reference]) for asker in askers]
    places = {line.place for run in runs for key, line in run.asked.items() if key in work.samples and line.place}
    nodes = []
    for place in sorted(places):
        own, about = list[SubjectRun](), dict[str, Any]()
        for run in runs:
            opened = [line for line in run.opened if line.place == place]
            asked = {key: line if line.place == place else line.untimed() for key, line in run.asked.items()}
            own.append(replace(run, opened=opened, asked=asked))
            about = next((line.environment for line in reversed(opened) if line.environment), about)
        nodes.append(NodeResults(about["name"], schema.Environment.model_validate(about["environment"]), own))
    return nodes or [NodeResults(here.processor, here, runs)]
