# SPDX-License-Identifier: Apache-2.0
"""Run a bundle over the samples beside the reference: its answers, its agreement and its times.

A sample costs one prefill: the bundle is fed the reference's answer (reporting/asking.py), and its own answer
is taken from there.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pgxport.benchmarking.worker import turns
from pgxport.cluster.open_bundle import OpenBundle
from pgxport.cluster.pool import Cluster
from pgxport.cluster.tasks import Workers
from pgxport.files import disk_errors
from pgxport.metrics.sample import Sample
from pgxport.reporting.asking import TokenAgreement, compare_and_answer, write_logits
from pgxport.reporting.cluster_pass import travelling
from pgxport.reporting.store import load_array, save_array
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.runner import Runner

ROUNDS = 9  # of timing, in turns
STEPS = 8  # decode steps a round
STAGES = ("vision", "prefill", "step")
Seconds = dict[str, float]


@dataclass(frozen=True)
class CandidateScore:
    """A bundle's answers, and the KL of the next token in nats over all positions of the reference's answers."""

    ids: list[list[int]]  # the answer to each sample
    kl: float
    kl_worst: float
    agreement: float  # share of positions at which the same token is likeliest to both


@dataclass(frozen=True)
class ScoreTask:
    """One sample for a bundle, with the reference's answer.

    Attributes:
        ids: The reference's answer.
        logits: The reference's, [T, V].
        features: [1, N, H], where a bundle with the same vision encoder had them.
        keep: Whether the features are wanted back.
    """

    number: int
    sample: Sample
    ids: list[int]
    logits: np.ndarray
    features: np.ndarray | None
    keep: bool


@dataclass(frozen=True)
class ScoreResult:
    """The bundle's own answer to a sample, its agreement with the reference, and the wanted features."""

    ids: list[int]
    agreement: TokenAgreement
    features: np.ndarray | None


Scorer = Callable[[Iterable[ScoreTask]], Iterator[tuple[ScoreTask, ScoreResult]]]


def score_here(pipeline: Pipeline, tasks: Iterable[ScoreTask]) -> Iterator[tuple[ScoreTask, ScoreResult]]:
    """Score each sample with a bundle that is open in this process."""
    for task in tasks:
        yield task, score(pipeline, task)


def score_on_cluster(
    cluster: Cluster, bundle: Path, engine: str, threads: int | None, tasks: Iterable[ScoreTask]
) -> Iterator[tuple[ScoreTask, ScoreResult]]:
    """Score the samples on a cluster, in any order.

    Results are those of `score_here` on one kind of processor.

    Raises:
        NumericError: the bundle's numbers are not finite.
        EngineError: the cluster has no room, or a sample was lost again and again.
    """
    digest = cluster.offer(bundle)
    setup = OpenBundle(digest, _score_on_node, engine, threads, keep=False)
    prepared = (replace(task, sample=travelling(task.sample)) for task in tasks)
    for done in cluster.spread(setup, prepared, Workers(threads, gpu=engine != "cpu")):
        yield done.task, done.get(f"sample {done.task.sample.id}")
    cluster.withdraw(digest)


def score(pipeline: Pipeline, task: ScoreTask) -> ScoreResult:
    """Score one sample."""
    features = features_of(pipeline, task.sample) if task.features is None else task.features
    agreement, ids = compare_and_answer(pipeline, prefix_of(pipeline, task.sample, features), task.ids, task.logits)
    return ScoreResult(ids, agreement, features if task.keep else None)


def _score_on_node(runner: Runner, task: ScoreTask) -> ScoreResult:
    return score(runner, task)


class ReferenceAnswers:
    """The samples, the reference's answers and logits, and image features; arrays are on disk.

    They take 4 bytes for each logit of an answer and each number of an image's features: 10 MB and 2.4 MB a
    sample for 3B at 224 px.
    """

    def __init__(self, samples: Sequence[Sample], folder: Path, ids: Sequence[Sequence[int]] = ()):
        self.samples, self.ids, self._folder = list(samples), [list(i) for i in ids], folder
        with disk_errors(f"cannot use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def complete(self) -> bool:
        """Whether there is an answer to every sample, and its logits."""
        return len(self.ids) == len(self.samples) and all(self._logits(i).exists() for i in range(len(self.ids)))

    def answer_all(self, pipeline: Pipeline, progress: Callable[[str], None]) -> None:
        """Let the reference answer every sample, and keep its answers and logits."""
        self.ids = []
        for i, sample in enumerate(self.samples):
            progress(f"the float model, sample {i + 1} of {len(self.samples)}")
            prefix = prefix_of(pipeline, sample, features_of(pipeline, sample))
            ids = list(pipeline.generate(prefix, pipeline.answer_limit(prefix)))
            write_logits(self._logits(i), pipeline.teacher_forced(prefix, ids), len(ids) + 1)
            self.ids.append(ids)

    def score(self, places: Sequence[int], vision: str, scorer: Scorer, *, keep: bool) -> CandidateScore:
        """Run a bundle over the samples at these places.

        Args:
            vision: A digest of all that the bundle's image features depend on.
            scorer: `score_here` or `score_on_cluster`, with the bundle.
            keep: Whether to keep the features, for other bundles with the same vision encoder.
        """
        results: dict[int, ScoreResult] = {}
        for task, result in scorer(self._task(i, vision, keep=keep) for i in places):
            results[task.number] = result
            if result.features is not None:
                save_array(self._features(task.number, vision), result.features)
        ordered = [results[i] for i in places]
        total = TokenAgreement.total([result.agreement for result in ordered])
        ids = [result.ids for result in ordered]
        return CandidateScore(ids, total.kl / total.positions, total.kl_worst, total.agreed / total.positions)

    def _task(self, i: int, vision: str, *, keep: bool) -> ScoreTask:
        file = self._features(i, vision)
        features = load_array(file) if file.exists() else None
        return ScoreTask(i, self.samples[i], self.ids[i], load_array(self._logits(i)), features, keep and features is None)

    def _logits(self, i: int) -> Path:
        return self._folder / f"logits-{i}.npy"

    def _features(self, i: int, vision: str) -> Path:
        return self._folder / f"features-{vision[:16]}-{i}.npy"


def features_of(pipeline: Pipeline, sample: Sample) -> np.ndarray:
    """Return the image features [1, N, H] of a sample's picture."""
    return pipeline.encode([sample.open()])


def prefix_of(pipeline: Pipeline, sample: Sample, features: np.ndarray) -> np.ndarray:
    """Return the embeddings [1, T, H] of image features [1, N, H] and a sample's prompt."""
    return pipeline.prefix(features, pipeline.prompt_ids(sample.prompt))


class ParsedAnswers:
    """Token ids as text, boxes and masks; each different answer to a sample is parsed once.

    Args:
        pipeline: Of the reference, whose mask decoder is used for all, and which stays open.
    """

    def __init__(self, pipeline: Pipeline, samples: Sequence[Sample]):
        self._pipeline, self._samples = pipeline, samples
        self._sizes: dict[int, tuple[int, int]] = {}
        self._known: dict[tuple[int, tuple[int, ...]], Answer] = {}

    def __call__(self, places: Sequence[int], ids: Sequence[Sequence[int]]) -> list[Answer]:
        return [self._one(i, tuple(one)) for i, one in zip(places, ids, strict=True)]

    def _one(self, i: int, ids: tuple[int, ...]) -> Answer:
        if (i, ids) not in self._known:
            if i not in self._sizes:
                self._sizes[i] = self._samples[i].open().size
            self._known[i, ids] = self._pipeline.parse(ids, self._sizes[i])
        return self._known[i, ids]


def ratios(pipeline: Pipeline, reference: Pipeline, prefix: int) -> tuple[Seconds, Seconds]:
    """Return a bundle's times over the reference's, by stage, and the reference's seconds; medians.

    Both run in turns on the same random numbers, so that a machine that slows down affects both alike.

    Args:
        prefix: Tokens of an image and a prompt.
    """
    both = (reference, pipeline)
    for warm_up in both:
        _lap(warm_up, prefix)
    rounds: list[tuple[Seconds, Seconds]] = []
    for turn in turns(2, ROUNDS):
        laps = {i: _lap(both[i], prefix) for i in turn}
        rounds.append((laps[0], laps[1]))
    times = {stage: statistics.median(b[stage] / a[stage] for a, b in rounds) for stage in STAGES}
    return times, {stage: statistics.median(a[stage] for a, _ in rounds) for stage in STAGES}


def _lap(pipeline: Pipeline, prefix: int) -> Seconds:
    m, random = pipeline.manifest, np.random.default_rng(0)
    pixels = random.standard_normal((1, 3, m.resolution, m.resolution), np.float32)
    embeds = random.standard_normal((1, prefix, m.token_table.shape[1]), np.float32)
    decoder = pipeline.decoder(prefix + STEPS)
    start = time.perf_counter()
    pipeline.encode_pixels(pixels)
    encoded = time.perf_counter()
    decoder.feed(embeds)
    filled = time.perf_counter()
    for _ in range(STEPS):
        decoder.feed(embeds[:, :1])
    return {"vision": encoded - start, "prefill": filled - encoded, "step": (time.perf_counter() - filled) / STEPS}
