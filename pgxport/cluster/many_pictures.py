# SPDX-License-Identifier: Apache-2.0
"""Ask one prompt about many pictures on a cluster: the rows of runners/many.py in the same order, each with its node."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgxport.cluster.pool import Cluster, Lanes, Site
from pgxport.errors import EngineError
from pgxport.runners.many import EmbeddedPicture, Question, Row, answer, read
from pgxport.runners.runner import Runner


@dataclass(frozen=True)
class Item:
    number: int
    name: str
    content: bytes | Row


@dataclass(frozen=True)
class Answering:
    """The job of a lane: the bundle, open on a node."""

    digest: str
    question: Question

    def start(self, site: Site) -> Callable[[Item], Row]:
        q = self.question
        path = site.fetch(self.digest)
        runner = Runner.from_pretrained(path, engine=q.engine, threads=q.threads, low_memory=q.low_memory)
        site.stack.enter_context(runner)

        def one(item: Item) -> Row:
            row = item.content if isinstance(item.content, Row) else answer(runner, item.name, item.content, q)
            return replace(row, node=site.node)

        return one


def ask_each(bundle: str, pictures: Sequence[Path | EmbeddedPicture], question: Question, address: str) -> Iterator[Row]:
    """As `many.ask_each`, spread over a cluster. A picture that was lost with three processes or nodes is a failed row.

    Raises:
        IntegrityError: the bundle is not sound.
        EngineError: the cluster does not answer, or has no room.
        UsageError: a node has other versions of the packages.
    """
    items = (Item(n, str(path), read(path)) for n, path in enumerate(pictures))
    lanes = Lanes(question.threads, gpu=question.engine != "cpu", many=True)
    with Cluster(address) as cluster:
        job, early, following = Answering(cluster.offer(bundle), question), dict[int, Row](), 0
        for done in cluster.spread(job, items, lanes):
            lost = Row(
                done.item.name,
                None,
                f"lost three times with the process or the node that had it ({done.lost})",
                EngineError.exit_code,
            )
            early[done.item.number] = done.result or lost
            while following in early:
                yield early.pop(following)
                following += 1
