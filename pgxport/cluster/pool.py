# SPDX-License-Identifier: Apache-2.0
"""Spread items over the nodes of a Ray cluster: lanes pull them from one queue, and what a dead lane held is done again.

The only file that knows Ray, and it knows nothing of what the items are. Ray moves arguments and results between processes
that all run this package; nothing from a bundle or a disk is unpickled.
"""

import importlib.metadata
import os
import re
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from pgxport.cluster.file_server import CHUNK, Depot, cache, digest_of, fetch, passing
from pgxport.errors import EngineError, PgxError, UsageError

ADDRESS = re.compile(r"auto|local|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
# What may change an answer, and must be the same everywhere.
PACKAGES = ("pgxport", "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "tokenizers")
AHEAD = 3  # chunks on their way to a node at once
KNOCK_SECONDS = 5.0
LOOK_SECONDS = 1.0  # between looks at which nodes there are
PATIENCE_SECONDS = 60.0  # for a node, where all have gone
LEAVE_SECONDS = 3.0  # for a lane to clear its table
TRIES = 3  # of an item, and of a node that does nothing but die

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Site:
    """Where a lane works, in a process of its own on a node."""

    node: str
    depot: Any
    stack: ExitStack  # closed when the lane leaves

    def fetch(self, digest: str, *, keep: bool = True) -> Path:
        """The bundle of that digest, verified, on this node's disk.

        Args:
            keep: For the next time; else it is gone with the lane.
        """
        folder = cache() if keep else passing(cache())
        if not keep:
            self.stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return fetch(digest, lambda name, size: self._stream(digest, name, size), folder)

    def _stream(self, digest: str, name: str, size: int | None) -> Iterator[bytes]:
        import ray

        on_the_way: deque[Any] = deque()
        count = None if size is None else -(-size // CHUNK)
        asked = 0
        while count is None or asked < count or on_the_way:
            while (count is None or asked < count) and len(on_the_way) < (AHEAD if count else 1):
                on_the_way.append(self.depot.chunk.remote(digest, name, asked * CHUNK))
                asked += 1
            content: bytes = ray.get(on_the_way.popleft())
            yield content
            if len(content) < CHUNK:
                return


class Job(Protocol[Item_contra, Result_co]):
    """What every lane does. It travels to the nodes, so it holds plain data."""

    def start(self, site: Site) -> Callable[[Item_contra], Result_co]:
        """Get ready on a node. A PgxError from here or from what it returns ends everything."""


@dataclass(frozen=True)
class Lanes:
    """How many lanes a node has, and what each takes.

    Attributes:
        threads: CPUs of a lane; None: all of its node's.
        gpu: Whether a lane needs one.
        many: As many lanes as a node's CPUs allow. Where time is measured there is one, which nothing else of ours disturbs.
    """

    threads: int | None
    gpu: bool = False
    many: bool = False

    def on(self, resources: Mapping[str, float]) -> list[int]:
        """CPUs of each lane on a node.

        >>> Lanes(2, many=True).on({"CPU": 5.0}), Lanes(2).on({"CPU": 5.0}), Lanes(None).on({"CPU": 5.0}), Lanes(8).on({"CPU": 5.0})
        ([2, 2], [2], [5], [])
        """
        cpus = int(resources.get("CPU", 0))
        each = self.threads or cpus
        room = cpus // each if each else 0
        if self.gpu:
            room = min(room, int(resources.get("GPU", 0)))
        return [each] * (room if self.many else min(1, room))


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """An item, and what came of it on which node; or why it was given up, after its lanes had died TRIES times."""

    item: Item
    node: str
    result: Result | None
    lost: str | None = None


@dataclass(frozen=True)
class Node:
    """A living node."""

    id: str
    name: str
    resources: Mapping[str, float]


class Cluster:
    """A Ray cluster.

    with Cluster("auto") as cluster:
        for done in cluster.spread(job, items, Lanes(threads=1)): ...
    """

    def __init__(self, address: str):
        if not ADDRESS.fullmatch(address):
            raise UsageError(f"--cluster {address!r} is no address; give auto, local or HOST:PORT of the head node")
        self.address = address

    def __enter__(self) -> Self:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UsageError('--cluster needs ray: pip install "pgxport[cluster]", here and on every node') from error
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            self._connect()
        self._surveyed: set[str] = set()
        self._depot: Any = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._depot is not None:
            self._ray.kill(self._depot)
        if self._ours:
            self._ray.shutdown()

    def offer(self, path: str | Path) -> str:
        """Let nodes fetch a bundle, which is verified first: its digest.

        Raises:
            IntegrityError: it is not what its manifest promises.
        """
        digest = digest_of(path)
        self._ray.get(self.depot.offer.remote(digest, str(Path(path).resolve())))
        return digest

    def withdraw(self, digest: str) -> None:
        self._ray.get(self.depot.withdraw.remote(digest))

    @property
    def depot(self) -> Any:
        """Beside the driver, for it reads the driver's disk."""
        if self._depot is None:
            here = self._ray.get_runtime_context().get_node_id()
            self._depot = self._ray.remote(Depot).options(num_cpus=0, scheduling_strategy=pinned(here)).remote()
        return self._depot

    def nodes(self) -> list[Node]:
        """Those alive. One is called as its `ray start --node-name` says, else as its machine."""
        found = []
        for about in self._ray.nodes():
            if about["Alive"]:
                named = about["NodeName"] not in ("", about["NodeManagerAddress"])
                name = about["NodeName"] if named else about["NodeManagerHostname"]
                found.append(Node(about["NodeID"], name, about["Resources"]))
        return found

    def spread(self, job: Job[Item, Result], items: Iterable[Item], lanes: Lanes) -> Iterator[Done[Item, Result]]:
        """What came of each item, as it comes. Items are taken when a lane is free, so they may depend on what came before.

        Raises:
            EngineError: no node has room for a lane.
            UsageError: a node has other versions of the packages.
            PgxError: what the job raised, with the node's name.
        """
        return _Shift(self, job, iter(items), lanes).run()

    def check(self, node: Node) -> bool:
        """Whether a node is still there; its packages are those of the driver.

        Raises:
            UsageError: they are not.
        """
        if node.id in self._surveyed:
            return True
        ask = self._ray.remote(_survey(PACKAGES)).options(num_cpus=0, scheduling_strategy=pinned(node.id))
        try:
            theirs = self._ray.get(ask.remote())
        except self._ray.exceptions.RayError:
            return False  # it died meanwhile
        same_versions(node.name, theirs, _survey(PACKAGES)())
        self._surveyed.add(node.id)
        return True

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start sends nobody statistics
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; it warns until that is said
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        own = {"include_dashboard": False} if self.address == "local" else {}
        try:
            if ":" in self.address:  # Ray itself would knock for two minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
            self._ray.init(address=self.address, **own, **quiet)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise EngineError(
                f"no Ray cluster answers at --cluster {self.address} ({first}); begin one with `ray start --head`, or use --cluster local"
            ) from error


def pinned(node_id: str) -> Any:
    """On that node or nowhere."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def same_versions(node: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """
    Raises:
        UsageError: a package is not the same.
    """
    other = [
        f"{name} {theirs.get(name, 'missing')} (here {ours.get(name, 'missing')})"
        for name in PACKAGES
        if theirs.get(name) != ours.get(name)
    ]
    if other:
        raise UsageError(f"node {node} has {', '.join(other)}; answers would not be comparable: install the same there")


def _survey(packages: tuple[str, ...]) -> Callable[[], dict[str, str]]:
    # Inside a function it travels whole, and works where pgxport is not installed.
    def survey() -> dict[str, str]:
        found = {}
        for package in packages:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
        return found

    return survey


class _Lane:
    """A process on a node."""

    def start(self, job: Job[Any, Any], node: str, depot: Any) -> None:
        self._stack = ExitStack()
        self._do = job.start(Site(node, depot, self._stack))

    def do(self, item: Any) -> Any:
        return self._do(item)

    def close(self) -> None:
        self._stack.close()


@dataclass
class _Order(Generic[Item]):
    item: Item
    lost: int = 0


@dataclass
class _Seat:
    """A lane, as the driver knows it."""

    node: Node
    number: int
    actor: Any


@dataclass
class _Call:
    seat: _Seat
    order: _Order[Any] | None  # None: it is getting ready


@dataclass
class _Shift(Generic[Item, Result]):
    """One run of a queue."""

    cluster: Cluster
    job: Job[Item, Result]
    items: Iterator[Item]
    lanes: Lanes
    seats: dict[tuple[str, int], _Seat] = field(default_factory=dict)
    free: deque[_Seat] = field(default_factory=deque)
    calls: dict[Any, _Call] = field(default_factory=dict)
    again: deque[_Order[Item]] = field(default_factory=deque)  # what dead lanes held
    deaths: Counter[str] = field(default_factory=Counter)  # of a node, since it last did something
    looked: float = -LOOK_SECONDS
    manned: float = 0.0  # when there last was a lane
    ended: bool = False  # the items

    def run(self) -> Iterator[Done[Item, Result]]:
        ray = self.cluster._ray
        try:
            while True:
                self._man()
                self._hand_out()
                if self.ended and not self.again and not any(call.order for call in self.calls.values()):
                    return
                if not self.calls:  # nobody is there to do what is left
                    time.sleep(LOOK_SECONDS)
                    continue
                for call in ray.wait(list(self.calls), num_returns=1, timeout=LOOK_SECONDS)[0]:
                    yield from self._settle(call)
        finally:
            self._dismiss()

    def _man(self) -> None:
        """Put lanes on nodes that have room for them, also on those that join later."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        first, self.looked = self.looked < 0, now
        nodes = self.cluster.nodes()
        for node in nodes:
            cpus = self.lanes.on(node.resources) if self.deaths[node.id] < TRIES else []
            vacant = [n for n in range(len(cpus)) if (node.id, n) not in self.seats]
            if vacant and self.cluster.check(node):
                for n in vacant:
                    self._seat(node, n, cpus[n])
        if self.seats:
            self.manned = now
        elif first or now - self.manned > PATIENCE_SECONDS:
            there = ", ".join(f"{n.name} with {n.resources.get('CPU', 0):g} CPUs" for n in nodes) or "none"
            wants = f"{self.lanes.threads or 'one or more'} CPUs" + (" and a GPU" if self.lanes.gpu else "")
            raise EngineError(f"no node of the cluster has room for {wants}; there are: {there}. Add a node, or change --threads")

    def _seat(self, node: Node, number: int, cpus: int) -> None:
        options = {"num_cpus": cpus, "num_gpus": int(self.lanes.gpu), "max_restarts": 0}
        actor = self.cluster._ray.remote(_Lane).options(**options, scheduling_strategy=pinned(node.id)).remote()
        self.seats[node.id, number] = seat = _Seat(node, number, actor)
        self.calls[actor.start.remote(self.job, node.name, self.cluster.depot)] = _Call(seat, None)

    def _hand_out(self) -> None:
        while self.free and (order := self._take()):
            seat = self.free.popleft()
            self.calls[seat.actor.do.remote(order.item)] = _Call(seat, order)

    def _take(self) -> _Order[Item] | None:
        if self.again:
            return self.again.popleft()
        for item in self.items:
            return _Order(item)
        self.ended = True
        return None

    def _settle(self, ref: Any) -> Iterator[Done[Item, Result]]:
        ray, call = self.cluster._ray, self.calls.pop(ref)
        node, order = call.seat.node, call.order
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise _raised(error, node) from error
        except ray.exceptions.RayError as error:  # its process or its node is gone
            yield from self._lose(call, " ".join(str(error).split())[:200])
            return
        self.free.append(call.seat)
        if order is not None:
            self.deaths[node.id] = 0
            yield Done(order.item, node.name, result)

    def _lose(self, call: _Call, reason: str) -> Iterator[Done[Item, Result]]:
        node, order = call.seat.node, call.order
        del self.seats[node.id, call.seat.number]
        self.cluster._ray.kill(call.seat.actor)
        self.deaths[node.id] += 1
        if order is None:
            return
        order.lost += 1
        if order.lost == TRIES:
            yield Done(order.item, node.name, None, lost=reason)
        else:
            self.again.append(order)

    def _dismiss(self) -> None:
        ray, seats = self.cluster._ray, list(self.seats.values())
        if not ray.is_initialized():
            return
        starting = [call.seat for call in self.calls.values() if call.order is None]
        with suppress(ray.exceptions.RayError):
            ray.wait(
                [seat.actor.close.remote() for seat in seats if seat not in starting] or [ray.put(None)],
                num_returns=max(1, len(seats) - len(starting)), timeout=LEAVE_SECONDS,
            )  # fmt: skip
        for seat in seats:
            ray.kill(seat.actor)


def _raised(error: Any, node: Node) -> PgxError:
    cause = error.cause
    if isinstance(cause, PgxError):
        return type(cause)(f"on node {node.name}: {cause}")
    return PgxError(f"on node {node.name}: {type(cause).__name__}: {cause}")
