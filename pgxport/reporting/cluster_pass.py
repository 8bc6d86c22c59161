# SPDX-License-Identifier: Apache-2.0
"""The shared pass on a cluster: a sample is asked of all bundles on one node, whichever is free, and times stay that node's.

So two times that are compared were measured on the same machine, one after the other, as `shared_pass` does it alone.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgxport.benchmarking.worker import Progress, WorkerError
from pgxport.cluster.pool import Cluster, Lanes, Site
from pgxport.errors import DiskError, EngineError, PgxError, UsageError
from pgxport.machine.conditions import describe_machine
from pgxport.machine.energy import find_meters
from pgxport.machine.nvml import find_nvml
from pgxport.metrics.sample import Sample
from pgxport.reporting import schema
from pgxport.reporting.environment import board, environment
from pgxport.reporting.shared_pass import Asker, Run, Subject, Turn, Work, demand, duration, take_turns
from pgxport.reporting.store import Asked, Folder, Followed, Measured, NodeStores, Opened, Place

Line = Opened | Asked | Followed


@dataclass(frozen=True)
class Chapter:
    """What one machine timed. The answers in its runs are those of all machines, and times only its own."""

    name: str
    environment: schema.Environment
    runs: list[Run]


@dataclass(frozen=True)
class Order:
    """A turn, what is known of it, and who has failed; of each subject."""

    turn: Turn
    known: tuple[tuple[Line, ...], ...]
    failed: tuple[bool, ...]


@dataclass(frozen=True)
class Found:
    """What a turn has added, and who failed in it (message, exit code); of each subject."""

    place: Place
    lines: list[list[Line]]
    failures: list[tuple[str, int] | None]


@dataclass(frozen=True)
class Station:
    """The job of a lane: the bundles open on a node, each in a process of its own.

    Attributes:
        digests: Of the bundles that are opened, as nodes fetch them; None: nothing is to be asked of it.
    """

    subjects: tuple[Subject, ...]
    digests: tuple[str | None, ...]
    reference: int
    engine: str
    threads: int | None

    def start(self, site: Site) -> Callable[[Order], Found]:
        meters = find_meters(engine=self.engine)
        for meter in meters:
            site.stack.callback(meter.close)
        if nvml := find_nvml(self.engine):
            site.stack.callback(nvml.close)
        logits = Path(site.stack.enter_context(tempfile.TemporaryDirectory(prefix="pgx-report-"))) / "logits.npy"
        here = describe_machine()
        about = environment(self.engine, self.threads, here).model_dump(mode="json")
        about = {"name": f"{board() or here['processor']}, node {site.node}", "environment": about}
        askers = []
        for subject, digest in zip(self.subjects, self.digests, strict=True):
            path = site.fetch(digest) if digest else None
            asker = Asker(replace(subject, request={**subject.request, "bundle": str(path)}), _Notes(), meters, nvml)
            if path:
                site.stack.enter_context(asker.process())
                asker.open(about)
            askers.append(asker)
        return _Bench(Place(site.node, here["processor"]), askers, askers[self.reference], logits)


@dataclass
class _Bench:
    """What `Station` has set up."""

    place: Place
    askers: list[Asker]
    reference: Asker
    logits: Path

    def __call__(self, order: Order) -> Found:
        for asker, known, failed in zip(self.askers, order.known, order.failed, strict=True):
            assert isinstance(asker.store, _Notes)
            for line in known:
                asker.store.take(line)
            if failed and not asker.failure:
                asker.failed = EngineError("it failed on another node")
        take_turns(self.askers, self.reference, order.turn, self.logits, lambda what: nullcontext())
        found = Found(self.place, [], [])
        for asker in self.askers:
            assert isinstance(asker.store, _Notes)
            found.lines.append(asker.store.new)
            found.failures.append((str(asker.failure), asker.failure.exit_code) if asker.failure and not asker.failed else None)
            asker.store = _Notes()
        return found


class _Notes(Measured):
    """What is measured here, until it is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[Line] = []

    def add(self, line: Line) -> None:
        super().add(line)
        self.new.append(line)


def cluster_pass(
    subjects: Sequence[Subject],
    work: Work,
    folder: Folder,
    address: str,
    *,
    engine: str,
    threads: int | None,
    progress: Progress | None,
) -> list[Chapter]:
    """Measure what no node has measured yet. A subject that fails on a node is a run with its reason in every chapter.

    Raises:
        UsageError: a node has other versions of the packages, or a subject is a checkpoint.
        EngineError: the cluster does not answer, has no room, or a sample was lost again and again.
    """
    if any("checkpoint" in subject.request for subject in subjects):
        raise UsageError("--reference is run on this machine alone; leave it out with --cluster, and give a float32 bundle first")
    cluster = Cluster(address)
    askers = [Asker(s, NodeStores(folder.path, s.conditions) if s.conditions else None) for s in subjects]
    needed = [any(lacking) for lacking in demand(askers, work)]
    if any(needed):
        with cluster:
            _measure(cluster, subjects, askers, work, Lanes(threads, gpu=engine != "cpu"), engine, progress)
    return _chapters(askers, work, environment(engine, threads, describe_machine()))


def _measure(
    cluster: Cluster,
    subjects: Sequence[Subject],
    askers: Sequence[Asker],
    work: Work,
    lanes: Lanes,
    engine: str,
    progress: Progress | None,
) -> None:
    digests = list[str | None]()
    for asker, subject, lacking in zip(askers, subjects, demand(askers, work), strict=True):
        digests.append(None)
        if any(lacking):
            try:
                digests[-1] = cluster.offer(subject.request["bundle"])
            except PgxError as error:
                asker.failed = error
    reference = askers[work.reference]
    left = sum(_lacks(askers, reference, key, followed=key in work.followed) for key in work.samples)
    if not left:
        return
    say, start = progress or (lambda what: None), time.perf_counter()
    say("waiting for the nodes")
    job = Station(tuple(subjects), tuple(digests), work.reference, engine, lanes.threads)
    for n, done in enumerate(cluster.spread(job, _orders(askers, work), lanes), start=1):
        if done.result is None:
            raise EngineError(
                f"sample {done.item.turn.sample.id} was lost three times with the process or the node that had it ({done.lost}); "
                f"what was measured is kept, and the same command goes on"
            )
        _keep(askers, done.result)
        say(
            f"sample {n} of {left}, on node {done.node}: {n / left:.0%}, {duration((time.perf_counter() - start) / n * (left - n))} left"
        )


def _orders(askers: Sequence[Asker], work: Work) -> Iterator[Order]:
    """What is lacking, sample by sample, as it is when the order is taken."""
    reference = askers[work.reference]
    for n, (key, sample) in enumerate(work.samples.items()):
        followed = key in work.followed
        if not _lacks(askers, reference, key, followed=followed):
            continue
        known = tuple(tuple(_known(asker.store, key, reference.digest)) for asker in askers)
        failed = tuple(asker.store is None or asker.failure is not None for asker in askers)
        yield Order(Turn(n, key, travelling(sample), followed, work.max_new_tokens), known, failed)


def _lacks(askers: Sequence[Asker], reference: Asker, key: str, *, followed: bool) -> bool:
    return any(asker.lacks(key) for asker in askers) or (
        followed and any(asker.lacks(key, reference.digest) for asker in askers if asker is not reference)
    )


def _known(store: Measured | None, key: str, reference: str) -> Iterator[Line]:
    if store and key in store.asked:
        yield store.asked[key]
    if store and (key, reference) in store.followed:
        yield store.followed[key, reference]


def travelling(sample: Sample) -> Sample:
    """A sample with its picture, and without what is true of it."""
    image = sample.image
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise DiskError(f"sample {sample.id}: cannot read {sample.image!s}: {error.strerror}") from error
    return replace(sample, image=image, answers=(), regions=())


def _keep(askers: Sequence[Asker], found: Found) -> None:
    for asker, lines, failure in zip(askers, found.lines, found.failures, strict=True):
        for line in lines:
            assert isinstance(asker.store, NodeStores)
            asker.store.add_at(found.place, line)
        if failure and not asker.failed:
            reason, code = failure
            asker.failed = WorkerError(f"{reason} (on node {found.place.node})", code)


def _chapters(askers: Sequence[Asker], work: Work, here: schema.Environment) -> list[Chapter]:
    """One for each node that timed a sample; where none did, one for this machine, which says what failed."""
    stores, reference = [asker.store for asker in askers if isinstance(asker.store, NodeStores)], askers[work.reference]
    found = []
    for place in sorted({p for store in stores for p, own in store.places.items() if own.asked.keys() & work.samples.keys()}):
        runs, abouts = [], list[Mapping[str, Any]]()
        for asker in askers:
            run = asker.run(reference)
            if isinstance(asker.store, NodeStores):
                own = asker.store.at(place) if place in asker.store.places else Measured()
                abouts += [opened.environment for opened in own.opened if opened.environment]
                asked = {key: line if key in own.asked else untimed(line) for key, line in run.asked.items()}
                run = replace(run, opened=own.opened, asked=asked)
            runs.append(run)
        found.append(Chapter(abouts[-1]["name"], schema.Environment.model_validate(abouts[-1]["environment"]), runs))
    return found or [Chapter(here.processor, here, [asker.run(reference) for asker in askers])]


def untimed(line: Asked) -> Asked:
    """An answer alone, without what depends on the machine that gave it."""
    return Asked(sample=line.sample, answer=line.answer, refused=line.refused)
