# SPDX-License-Identifier: Apache-2.0
"""Ask one prompt about many pictures on a cluster: the rows of runners/many.py, each with its node."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pgxport.cluster.open_bundle import OpenBundle
from pgxport.cluster.pool import Cluster
from pgxport.cluster.tasks import Workers
from pgxport.errors import EngineError
from pgxport.runners.many import AskedPicture, PictureAnswer, PictureQuestion, answer, read
from pgxport.runners.runner import Runner


@dataclass(frozen=True)
class PictureTask:
    """A picture's place in the order, its name, and its bytes or the row that says why there are none."""

    number: int
    name: str
    content: bytes | PictureAnswer


def ask_each(bundle: str, pictures: Sequence[AskedPicture], question: PictureQuestion, address: str) -> Iterator[PictureAnswer]:
    """Answer as `many.ask_each` does, spread over a cluster.

    A picture that three processes or nodes lost is a failed row.

    Raises:
        IntegrityError: the bundle is not sound.
        EngineError: the cluster does not answer, or has no room.
        UsageError: a node has other versions of the packages.
    """
    q = question
    tasks = (PictureTask(n, str(picture), read(picture)) for n, picture in enumerate(pictures))
    workers = Workers(q.threads, gpu=q.engine != "cpu", many=True)
    with Cluster(address) as cluster:
        setup = OpenBundle(cluster.offer(bundle), partial(_answer, q), q.engine, q.threads, low_memory=q.low_memory)
        early, following = dict[int, PictureAnswer](), 0
        for done in cluster.spread(setup, tasks, workers):
            if done.result is None:
                row = PictureAnswer(done.task.name, None, done.loss, EngineError.exit_code)
            else:
                row = replace(done.result, node=done.node)
            early[done.task.number] = row
            while following in early:
                yield early.pop(following)
                following += 1


def _answer(question: PictureQuestion, runner: Runner, task: PictureTask) -> PictureAnswer:
    return answer(runner, task.name, task.content, question)
