# SPDX-License-Identifier: Apache-2.0
"""Spread tasks over a Ray cluster: workers pull from one queue, and a dead worker's task is done again.

The only file that knows Ray, and it knows nothing of what the tasks are. Ray moves arguments and results
between processes that all run this package; nothing from a bundle or a disk is unpickled.
"""

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

from pgxport.cluster.file_server import CHUNK, FileServer, cache, digest_of, fetch, temporary_folder
from pgxport.cluster.tasks import TRIES, Result, Task, TaskResult, Workers
from pgxport.cluster.versions import check_versions, survey
from pgxport.errors import EngineError, PgxError, UsageError
from pgxport.machine.conditions import PACKAGES, versions

ADDRESS = re.compile(r"auto|local|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
CHUNKS_AHEAD = 3  # chunks in transfer to a node at once
CONNECT_SECONDS = 5.0
POLL_SECONDS = 1.0  # between looks at which nodes there are
PATIENCE_SECONDS = 60.0  # to wait for a node, where all have gone
CLOSE_SECONDS = 3.0  # for a worker to close what it opened

Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker runs, in a process of its own on a node."""

    node: str
    file_server: Any
    stack: ExitStack  # closed when the worker ends

    def fetch(self, digest: str, *, keep: bool = True) -> Path:
        """Return the bundle of that digest, verified, on this node's disk.

        Args:
            keep: Leave the bundle there for the next worker; else it is deleted when this one ends.
        """
        folder = cache() if keep else temporary_folder(cache())
        if not keep:
            self.stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return fetch(digest, lambda name, size: self._transfer(digest, name, size), folder)

    def _transfer(self, digest: str, name: str, size: int | None) -> Iterator[bytes]:
        import ray

        in_transfer: deque[Any] = deque()
        count = None if size is None else -(-size // CHUNK)
        asked = 0
        while count is None or asked < count or in_transfer:
            while (count is None or asked < count) and len(in_transfer) < (CHUNKS_AHEAD if count else 1):
                in_transfer.append(self.file_server.chunk.remote(digest, name, asked * CHUNK))
                asked += 1
            content: bytes = ray.get(in_transfer.popleft())
            yield content
            if len(content) < CHUNK:
                return


class WorkerSetup(Protocol[Task_contra, Result_co]):
    """What every worker does. It travels to the nodes, so it holds plain data."""

    def start(self, context: WorkerContext) -> Callable[[Task_contra], Result_co]:
        """Get ready on a node. A PgxError, also of the returned function, ends everything."""


@dataclass(frozen=True)
class Node:
    """A living node."""

    id: str
    name: str
    resources: Mapping[str, float]


class Cluster:
    """A Ray cluster.

    with Cluster("auto") as cluster:
        for done in cluster.spread(setup, tasks, Workers(threads=1)): ...
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
        self.ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            self._connect()
        self._checked: set[str] = set()
        self._file_server: Any = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file_server is not None:
            self.ray.kill(self._file_server)
        if self._ours:
            self.ray.shutdown()

    def offer(self, path: str | Path) -> str:
        """Verify a bundle and let nodes fetch it; returns its digest.

        Raises:
            IntegrityError: the bundle is not what its manifest promises.
        """
        digest = digest_of(path)
        self.ray.get(self.file_server.offer.remote(digest, str(Path(path).resolve())))
        return digest

    def withdraw(self, digest: str) -> None:
        """Let no node fetch a bundle any more."""
        self.ray.get(self.file_server.withdraw.remote(digest))

    @property
    def file_server(self) -> Any:
        """The file server's actor. It runs on the driver's node, for it reads the driver's disk."""
        if self._file_server is None:
            here = self.ray.get_runtime_context().get_node_id()
            self._file_server = self.ray.remote(FileServer).options(num_cpus=0, scheduling_strategy=pinned(here)).remote()
        return self._file_server

    def nodes(self) -> list[Node]:
        """Return the living nodes.

        A node is called as its `ray start --node-name` says, else as its machine.
        """
        alive = []
        for about in self.ray.nodes():
            if about["Alive"]:
                named = about["NodeName"] not in ("", about["NodeManagerAddress"])
                name = about["NodeName"] if named else about["NodeManagerHostname"]
                alive.append(Node(about["NodeID"], name, about["Resources"]))
        return alive

    def spread(
        self, setup: WorkerSetup[Task, Result], tasks: Iterable[Task], workers: Workers
    ) -> Iterator[TaskResult[Task, Result]]:
        """Yield each task's result as it comes.

        A task is taken when a worker is free, so it may depend on earlier results.

        Raises:
            EngineError: no node has room for a worker.
            UsageError: a node has other versions of the packages.
            PgxError: what the setup raised, with the node's name.
        """
        return TaskQueue(self, setup, iter(tasks), workers).run()

    def check(self, node: Node) -> bool:
        """Return whether a node still lives, after checking once that its packages are the driver's.

        Raises:
            UsageError: they are not.
        """
        if node.id in self._checked:
            return True
        ask = self.ray.remote(survey()).options(num_cpus=0, scheduling_strategy=pinned(node.id))
        try:
            theirs = self.ray.get(ask.remote())
        except self.ray.exceptions.RayError:
            return False  # it died meanwhile
        check_versions(node.name, theirs, versions(PACKAGES))
        self._checked.add(node.id)
        return True

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start sends nobody statistics
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; without it Ray warns
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        own = {"include_dashboard": False} if self.address == "local" else {}
        try:
            if ":" in self.address:  # Ray itself would try for two minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            self.ray.init(address=self.address, **own, **quiet)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise EngineError(
                f"no Ray cluster answers at --cluster {self.address} ({first}); begin one with `ray start --head`, or use --cluster local"
            ) from error


def pinned(node_id: str) -> Any:
    """Return Ray's strategy to schedule on that node or nowhere."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


class _WorkerActor:
    """The process of a worker, on its node."""

    def start(self, setup: WorkerSetup[Any, Any], node: str, file_server: Any) -> None:
        self._stack = ExitStack()
        self._do = setup.start(WorkerContext(node, file_server, self._stack))

    def do(self, task: Any) -> Any:
        return self._do(task)

    def close(self) -> None:
        self._stack.close()


@dataclass
class _QueuedTask(Generic[Task]):
    task: Task
    losses: int = 0


@dataclass
class _NodeWorker:
    """A worker, as the driver knows it."""

    node: Node
    number: int
    actor: Any


@dataclass
class RunningCall:
    """A call of a worker that has not returned."""

    worker: _NodeWorker
    queued: _QueuedTask[Any] | None  # None: the worker is getting ready


@dataclass
class TaskQueue(Generic[Task, Result]):
    """One queue of tasks, from the first to the last."""

    cluster: Cluster
    setup: WorkerSetup[Task, Result]
    tasks: Iterator[Task]
    size: Workers
    workers: dict[tuple[str, int], _NodeWorker] = field(default_factory=dict)
    free: deque[_NodeWorker] = field(default_factory=deque)
    running: dict[Any, RunningCall] = field(default_factory=dict)
    again: deque[_QueuedTask[Task]] = field(default_factory=deque)  # tasks of dead workers
    deaths: Counter[str] = field(default_factory=Counter)  # of a node's workers since one last did a task
    looked: float = -POLL_SECONDS
    last_worker: float = 0.0  # the time at which there last was a worker
    ended: bool = False  # no task is left in `tasks`

    def run(self) -> Iterator[TaskResult[Task, Result]]:
        """Yield each task's result as it comes."""
        ray = self.cluster.ray
        try:
            while True:
                self._start_workers()
                self.assign()
                if self.ended and not self.again and not any(call.queued for call in self.running.values()):
                    return
                if not self.running:  # no worker lives
                    time.sleep(POLL_SECONDS)
                    continue
                for call in ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)[0]:
                    yield from self._settle(call)
        finally:
            self._close()

    def assign(self) -> None:
        """Give each free worker a task."""
        while self.free and (queued := self._next()):
            worker = self.free.popleft()
            self.running[worker.actor.do.remote(queued.task)] = RunningCall(worker, queued)

    def lose(self, call: RunningCall, reason: str) -> Iterator[TaskResult[Task, Result]]:
        """Forget a dead worker, and queue its task again or give it up."""
        node, queued = call.worker.node, call.queued
        del self.workers[node.id, call.worker.number]
        self.cluster.ray.kill(call.worker.actor)
        self.deaths[node.id] += 1
        if queued is None:
            return
        queued.losses += 1
        if queued.losses == TRIES:
            yield TaskResult(queued.task, node.name, None, lost=reason)
        else:
            self.again.append(queued)

    def _start_workers(self) -> None:
        """Start workers on nodes that have room for them, also on those that join later."""
        now = time.monotonic()
        if now - self.looked < POLL_SECONDS:
            return
        first, self.looked = self.looked < 0, now
        nodes = self.cluster.nodes()
        for node in nodes:
            cpus = self.size.on(node.resources) if self.deaths[node.id] < TRIES else []
            vacant = [n for n in range(len(cpus)) if (node.id, n) not in self.workers]
            if vacant and self.cluster.check(node):
                for n in vacant:
                    self._start(node, n, cpus[n])
        if self.workers:
            self.last_worker = now
        elif first or now - self.last_worker > PATIENCE_SECONDS:
            nodes_text = ", ".join(f"{n.name} with {n.resources.get('CPU', 0):g} CPUs" for n in nodes) or "none"
            wants = f"{self.size.threads or 'one or more'} CPUs" + (" and a GPU" if self.size.gpu else "")
            raise EngineError(
                f"no node of the cluster has room for {wants}; there are: {nodes_text}. Add a node, or change --threads"
            )

    def _start(self, node: Node, number: int, cpus: int) -> None:
        options = {"num_cpus": cpus, "num_gpus": int(self.size.gpu), "max_restarts": 0}
        actor = self.cluster.ray.remote(_WorkerActor).options(**options, scheduling_strategy=pinned(node.id)).remote()
        self.workers[node.id, number] = worker = _NodeWorker(node, number, actor)
        self.running[actor.start.remote(self.setup, node.name, self.cluster.file_server)] = RunningCall(worker, None)

    def _next(self) -> _QueuedTask[Task] | None:
        if self.again:
            return self.again.popleft()
        for task in self.tasks:
            return _QueuedTask(task)
        self.ended = True
        return None

    def _settle(self, ref: Any) -> Iterator[TaskResult[Task, Result]]:
        ray, call = self.cluster.ray, self.running.pop(ref)
        node, queued = call.worker.node, call.queued
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise _error_of(error.cause, node) from error
        except ray.exceptions.RayError as error:  # its process or its node is gone
            yield from self.lose(call, " ".join(str(error).split())[:200])
            return
        self.free.append(call.worker)
        if queued is not None:
            self.deaths[node.id] = 0
            yield TaskResult(queued.task, node.name, result)

    def _close(self) -> None:
        ray, workers = self.cluster.ray, list(self.workers.values())
        if not ray.is_initialized():
            return
        starting = [call.worker for call in self.running.values() if call.queued is None]
        with suppress(ray.exceptions.RayError):
            closing = [worker.actor.close.remote() for worker in workers if worker not in starting]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for worker in workers:
            ray.kill(worker.actor)


def _error_of(cause: Any, node: Node) -> PgxError:
    if isinstance(cause, PgxError):
        return type(cause)(f"on node {node.name}: {cause}")
    return PgxError(f"on node {node.name}: {type(cause).__name__}: {cause}")
