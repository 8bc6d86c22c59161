# SPDX-License-Identifier: Apache-2.0
"""Run a bundle over the samples beside the reference's answers: the answers it gives, how far its logits are, how long it takes.

A sample costs one prefill. The bundle is forced along the reference's answer, which gives logits to compare; as long as it would
have said the same, that is its own answer too, and where it first differs the cache is wound back to there and it goes on alone.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgxport.benchmarking.worker import turns
from pgxport.errors import IntegrityError
from pgxport.files import disk_errors, writing
from pgxport.metrics.fidelity import kl_divergence, top1_agreement
from pgxport.metrics.sample import Sample
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Pipeline

ROUNDS = 9  # of timing, in turns
STEPS = 8  # decode steps a round
STAGES = ("vision", "prefill", "step")
Seconds = dict[str, float]


@dataclass(frozen=True)
class Score:
    """What a bundle did on the samples. KL is of the next token, in nats, over all positions of the reference's answers."""

    ids: list[list[int]]  # the answer to each sample
    kl: float
    kl_worst: float
    agreement: float  # share of positions at which both find the same token likeliest


class Samples:
    """The samples, the reference's answers and logits, and what the float vision encoder makes of them; arrays are on disk.

    They take 4 bytes for each logit of an answer and each number of an image's features: 10 MB and 2.4 MB a sample for 3B at 224 px.
    """

    def __init__(self, samples: Sequence[Sample], folder: Path, ids: Sequence[Sequence[int]] = ()):
        self.samples, self.ids, self._folder = list(samples), [list(i) for i in ids], folder
        with disk_errors(f"cannot use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def complete(self) -> bool:
        """Whether there is an answer to every sample, and its logits."""
        return len(self.ids) == len(self.samples) and all(self._logits(i).exists() for i in range(len(self.ids)))

    def logits(self, i: int) -> np.ndarray:
        """[T, V], of every token of the reference's answer and what follows it"""
        return _load(self._logits(i))

    def _logits(self, i: int) -> Path:
        return self._folder / f"logits-{i}.npy"

    def answer_all(self, pipeline: Pipeline, progress: Callable[[str], None]) -> None:
        """Let the reference answer, and keep what it says."""
        self.ids = []
        for i in range(len(self.samples)):
            progress(f"the float model, sample {i + 1} of {len(self.samples)}")
            prefix = prefix_of(pipeline, self.samples[i], features_of(pipeline, self.samples[i]))
            _, answer = along(pipeline, prefix, ())
            logits, again = along(pipeline, prefix, answer)
            assert answer == again, f"Bug: sample {i} was answered in two ways"
            _save(self._logits(i), logits)
            self.ids.append(answer)

    def score(self, pipeline: Pipeline, places: Sequence[int], vision: str, *, keep: bool) -> Score:
        """Run a bundle over the samples at these places.

        Args:
            vision: A digest of all that its image features depend on.
            keep: Whether to keep those features, for other bundles with the same ones.
        """
        found = []
        for i in places:
            features = self.features(i, vision)
            if features is None:
                features = features_of(pipeline, self.samples[i])
                if keep:
                    self.keep_features(i, vision, features)
            found.append(score_one(pipeline, prefix_of(pipeline, self.samples[i], features), self.ids[i], self.logits(i)))
        return together(found)

    def features(self, i: int, vision: str) -> np.ndarray | None:
        """[1, N, H], where they are kept"""
        kept = self._features(i, vision)
        return _load(kept) if kept.exists() else None

    def keep_features(self, i: int, vision: str, features: np.ndarray) -> None:
        _save(self._features(i, vision), features)

    def _features(self, i: int, vision: str) -> Path:
        return self._folder / f"features-{vision[:16]}-{i}.npy"


@dataclass(frozen=True)
class Scored:
    """One sample: the bundle's answer; and of each position of the reference's the KL, and whether the likeliest token is the same."""

    ids: list[int]
    kl: np.ndarray  # [T]
    agreed: np.ndarray  # [T]


def score_one(pipeline: Pipeline, prefix: np.ndarray, ids: Sequence[int], expected: np.ndarray) -> Scored:
    """Run a bundle along the reference's answer, whose logits [T, V] were expected."""
    logits, answer = along(pipeline, prefix, ids)
    return Scored(answer, kl_divergence(logits, expected), top1_agreement(logits, expected))


def together(found: Sequence[Scored]) -> Score:
    """Of all samples."""
    every = np.concatenate([one.kl for one in found])
    agreed = np.concatenate([one.agreed for one in found])
    return Score([one.ids for one in found], float(every.mean()), float(every.max()), float(agreed.mean()))


def features_of(pipeline: Pipeline, sample: Sample) -> np.ndarray:
    """Image features [1, N, H] of a sample's picture."""
    return pipeline.encode([sample.open()])


def prefix_of(pipeline: Pipeline, sample: Sample, features: np.ndarray) -> np.ndarray:
    """Image features [1, N, H] and a sample's prompt to the prefix's embeddings [1, T, H]."""
    return pipeline.prefix(features, pipeline.prompt_ids(sample.prompt))


def along(pipeline: Pipeline, prefix: np.ndarray, reference: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Logits [T, V] of each token of a given answer and of what follows it; and the answer the bundle gives by itself."""
    limit, eos = pipeline.answer_limit(prefix), pipeline.manifest.token_ids.eos
    decoder = pipeline.decoder(prefix.shape[1] + limit)
    rows = [decoder.feed(prefix).copy()]
    rows += [decoder.feed(pipeline.embed([token])).copy() for token in reference[: limit - 1]]
    logits = np.stack(rows)
    said = logits.argmax(-1).tolist()
    same = next((i for i, (a, b) in enumerate(zip(said, reference, strict=False)) if a != b), min(len(said), len(reference)))
    answer = list(reference[:same])
    if same == len(said):  # the reference was cut off at the limit, and this agreed to the end
        return logits, answer
    decoder.length = prefix.shape[1] + same
    token = said[same]
    while token != eos:
        answer.append(token)
        if len(answer) == limit:
            break
        token = int(decoder.feed(pipeline.embed([token])).argmax())
    return logits, answer


class Answers:
    """Token ids as text, boxes and masks; each different answer to a sample is read once.

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
    """How many times as long as the reference a bundle takes, by stage, and the reference's seconds; medians.

    Both run in turns on the same random numbers, so that a machine that slows down does it to both.

    Args:
        prefix: Tokens of an image and a prompt.
    """
    both = (reference, pipeline)
    for warm_up in both:
        _lap(warm_up, prefix)
    found: list[tuple[Seconds, Seconds]] = []
    for turn in turns(2, ROUNDS):
        laps = {i: _lap(both[i], prefix) for i in turn}
        found.append((laps[0], laps[1]))
    times = {stage: statistics.median(b[stage] / a[stage] for a, b in found) for stage in STAGES}
    return times, {stage: statistics.median(a[stage] for a, _ in found) for stage in STAGES}


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


def _save(file: Path, array: np.ndarray) -> None:
    with disk_errors(f"cannot write {file}"), writing(file) as out:
        np.save(out, array, allow_pickle=False)


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} cannot be read ({error}); delete its folder and tune again") from error
