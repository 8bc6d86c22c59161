# SPDX-License-Identifier: Apache-2.0
"""The usual worker: one bundle, open on a node, and one function of it and a task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic

from pgxport.cluster.pool import WorkerContext
from pgxport.cluster.tasks import Result, Task
from pgxport.runners.runner import Runner


@dataclass(frozen=True)
class OpenBundle(Generic[Task, Result]):
    """Opens a bundle on each node and calls `do` with every task.

    Attributes:
        digest: The bundle's name, as `Cluster.offer` gave it.
        do: A function of a module, or a `partial` of one, for it travels to the nodes.
        keep: Whether the bundle's files stay on the node after the worker ends.
    """

    digest: str
    do: Callable[[Runner, Task], Result]
    engine: str
    threads: int | None
    low_memory: bool = False
    keep: bool = True

    def start(self, context: WorkerContext) -> Callable[[Task], Result]:
        path = context.fetch(self.digest, keep=self.keep)
        runner = Runner.from_pretrained(path, engine=self.engine, threads=self.threads, low_memory=self.low_memory)
        return partial(self.do, context.stack.enter_context(runner))
