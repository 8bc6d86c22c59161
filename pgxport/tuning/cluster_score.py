# SPDX-License-Identifier: Apache-2.0
"""Score a candidate on a cluster: its samples are spread over the nodes, and their order is put back. Measures no time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgxport.cluster.pool import Cluster, Lanes, Site
from pgxport.errors import EngineError
from pgxport.metrics.sample import Sample
from pgxport.reporting.cluster_pass import travelling
from pgxport.runners.pipeline import Pipeline
from pgxport.tuning.score import Samples, Score, Scored, features_of, prefix_of, score_one, together


@dataclass(frozen=True)
class Item:
    """A sample, and what the reference said. `features` [1, N, H], where a bundle with the same vision encoder had them."""

    place: int
    sample: Sample
    ids: list[int]
    logits: np.ndarray  # [T, V]
    features: np.ndarray | None


@dataclass(frozen=True)
class Scoring:
    """The job of a lane: a candidate, open on a node, which forgets it afterwards."""

    digest: str
    engine: str
    threads: int | None

    def start(self, site: Site) -> Callable[[Item], tuple[Scored, np.ndarray]]:
        path = site.fetch(self.digest, keep=False)
        pipeline = site.stack.enter_context(Pipeline.open(path, engine=self.engine, threads=self.threads))

        def one(item: Item) -> tuple[Scored, np.ndarray]:
            features = features_of(pipeline, item.sample) if item.features is None else item.features
            return score_one(pipeline, prefix_of(pipeline, item.sample, features), item.ids, item.logits), features

        return one


@dataclass(frozen=True)
class Scorer:
    """Samples.score, elsewhere."""

    cluster: Cluster
    engine: str
    threads: int | None

    def score(self, bundle: Path, asked: Samples, places: Sequence[int], vision: str, *, keep: bool) -> Score:
        """As `Samples.score` would, byte for byte where the nodes' processors are this machine's kind.

        Raises:
            NumericError: the candidate's numbers are not finite.
            EngineError: the cluster has no room, or a sample was lost again and again.
        """
        digest = self.cluster.offer(bundle)
        job, found = Scoring(digest, self.engine, self.threads), dict[int, Scored]()
        items = (Item(i, travelling(asked.samples[i]), asked.ids[i], asked.logits(i), asked.features(i, vision)) for i in places)
        for done in self.cluster.spread(job, items, Lanes(self.threads, gpu=self.engine != "cpu")):
            if done.result is None:
                raise EngineError(
                    f"sample {done.item.sample.id} was lost three times with the process or the node that had it ({done.lost}); "
                    f"results are kept, and the same command goes on"
                )
            found[done.item.place], features = done.result
            if keep and done.item.features is None:
                asked.keep_features(done.item.place, vision, features)
        self.cluster.withdraw(digest)
        return together([found[i] for i in places])
