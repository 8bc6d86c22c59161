# SPDX-License-Identifier: Apache-2.0
"""How many workers a node has, and the result of a task. Knows no Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pgxport.errors import EngineError

TRIES = 3  # of a task, and of a node whose workers only die

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """How many workers a node has, and what each takes.

    Attributes:
        threads: CPUs of a worker; None: all of its node's.
        gpu: Whether a worker needs a GPU.
        many: Start as many as a node's CPUs allow. Where time is measured one runs, undisturbed by others.
    """

    threads: int | None
    gpu: bool = False
    many: bool = False

    def on(self, resources: Mapping[str, float]) -> list[int]:
        """CPUs of each worker on a node.

        >>> one, many = Workers(2), Workers(2, many=True)
        >>> many.on({"CPU": 5.0}), one.on({"CPU": 5.0}), Workers(None).on({"CPU": 5.0}), Workers(8).on({"CPU": 5.0})
        ([2, 2], [2], [5], [])
        """
        cpus = int(resources.get("CPU", 0))
        each = self.threads or cpus
        room = cpus // each if each else 0
        if self.gpu:
            room = min(room, int(resources.get("GPU", 0)))
        return [each] * (room if self.many else min(1, room))


@dataclass(frozen=True)
class TaskResult(Generic[Task, Result]):
    """A task, its result and its node; or, with `lost`, why it was given up after TRIES workers had died."""

    task: Task
    node: str
    result: Result | None
    lost: str | None = None

    def get(self, name: str) -> Result:
        """Return the result.

        Raises:
            EngineError: the task was given up; the message calls it by `name`.
        """
        if self.result is None:
            raise EngineError(f"{name} was {self.loss}; what was measured is kept, and the same command goes on")
        return self.result

    @property
    def loss(self) -> str:
        """What happened to a task that was given up, in words."""
        return f"lost three times with the process or the node that had it ({self.lost})"
