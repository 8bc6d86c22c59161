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
from typing import Any

import numpy as np

from pgxport.benchmarking.worker import turns
from pgxport.errors import IntegrityError
from pgxport.exporter.calibration_file import disk
from pgxport.metrics.fidelity import kl_divergence, top1_agreement
from pgxport.metrics.sample import Sample
from pgxport.runners.image import pixel_values
from pgxport.runners.loop import Decoder
from pgxport.runners.outputs import Answer, parse
from pgxport.runners.runner import Runner

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
        with disk(f"cannot use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def complete(self) -> bool:
        """Whether there is an answer to every sample, and its logits."""
        return len(self.ids) == len(self.samples) and all(self._logits(i).exists() for i in range(len(self.ids)))

    def logits(self, i: int) -> np.ndarray:
        """[T, V], of every token of the reference's answer and what follows it"""
        return _load(self._logits(i))

    def _logits(self, i: int) -> Path:
        return self._folder / f"logits-{i}.npy"

    def answer_all(self, runner: Runner, progress: Callable[[str], None]) -> None:
        """Let the reference answer, and keep what it says."""
        self.ids = []
        for i in range(len(self.samples)):
            progress(f"the float model, sample {i + 1} of {len(self.samples)}")
            prefix = prefix_of(runner, self.samples[i], features_of(runner, self.samples[i]))
            _, answer = along(runner, prefix, ())
            logits, again = along(runner, prefix, answer)
            assert answer == again, f"Bug: sample {i} was answered in two ways"
            _save(self._logits(i), logits)
            self.ids.append(answer)

    def score(self, runner: Runner, places: Sequence[int], vision: str, *, keep: bool) -> Score:
        """Run a bundle over the samples at these places.

        Args:
            vision: A digest of all that its image features depend on.
            keep: Whether to keep those features, for other bundles with the same ones.
        """
        found = []
        for i in places:
            features = self.features(i, vision)
            if features is None:
                features = features_of(runner, self.samples[i])
                if keep:
                    self.keep_features(i, vision, features)
            found.append(score_one(runner, prefix_of(runner, self.samples[i], features), self.ids[i], self.logits(i)))
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


def score_one(runner: Runner, prefix: np.ndarray, ids: Sequence[int], expected: np.ndarray) -> Scored:
    """Run a bundle along the reference's answer, whose logits [T, V] were expected."""
    logits, answer = along(runner, prefix, ids)
    return Scored(answer, kl_divergence(logits, expected), top1_agreement(logits, expected))


def together(found: Sequence[Scored]) -> Score:
    """Of all samples."""
    every = np.concatenate([one.kl for one in found])
    agreed = np.concatenate([one.agreed for one in found])
    return Score([one.ids for one in found], float(every.mean()), float(every.max()), float(agreed.mean()))


def features_of(runner: Runner, sample: Sample) -> np.ndarray:
    """[1, N, H]"""
    return encode(runner, pixel_values(sample.open(), runner.manifest.resolution)[None])


def prefix_of(runner: Runner, sample: Sample, features: np.ndarray) -> np.ndarray:
    """[1, N, H] -> [1, T, H]"""
    m = runner.manifest
    ids = runner._tokenizer.prompt_ids(sample.prompt, m.image_tokens, limit=m.context_length)
    return np.concatenate([features, runner._embed(ids[m.image_tokens :])], axis=1)


def encode(runner: Runner, pixels: np.ndarray) -> np.ndarray:
    """[1, 3, R, R] -> [1, N, H]"""
    hidden = runner._sessions["vision_encoder"].run({"pixel_values": pixels})["image_hidden"]
    return runner._sessions["projector"].run({"image_hidden": hidden})["image_features"]


def along(runner: Runner, prefix: np.ndarray, reference: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Logits [T, V] of each token of a given answer and of what follows it; and the answer the bundle gives by itself."""
    m = runner.manifest
    limit, eos = max(1, min(m.max_new_tokens, m.context_length - prefix.shape[1])), m.token_ids.eos
    decoder = Decoder(runner._sessions["decoder_step"], m, prefix.shape[1] + limit)
    rows = [decoder.feed(prefix).copy()]
    rows += [decoder.feed(runner._embed([token])).copy() for token in reference[: limit - 1]]
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
        token = int(decoder.feed(runner._embed([token])).argmax())
    return logits, answer


class Answers:
    """Token ids as text, boxes and masks; each different answer to a sample is read once.

    Args:
        runner: Of the reference, whose mask decoder is used for all, and which stays open.
    """

    def __init__(self, runner: Runner, samples: Sequence[Sample]):
        self._runner, self._samples = runner, samples
        self._sizes: dict[int, tuple[int, int]] = {}
        self._known: dict[tuple[int, tuple[int, ...]], Answer] = {}

    def __call__(self, places: Sequence[int], ids: Sequence[Sequence[int]]) -> list[Answer]:
        return [self._one(i, tuple(one)) for i, one in zip(places, ids, strict=True)]

    def _one(self, i: int, ids: tuple[int, ...]) -> Answer:
        if (i, ids) not in self._known:
            if i not in self._sizes:
                self._sizes[i] = self._samples[i].open().size
            text = self._runner._tokenizer.decode(ids)
            decode_mask = self._runner._decode_mask if "mask_decoder" in self._runner.manifest.graphs else None
            boxes, masks, warnings = parse(text, *self._sizes[i], decode_mask)
            self._known[i, ids] = Answer(text, ids, boxes, masks, warnings, truncated=False, timings={})
        return self._known[i, ids]


def ratios(runner: Runner, reference: Runner, prefix: int) -> tuple[Seconds, Seconds]:
    """How many times as long as the reference a bundle takes, by stage, and the reference's seconds; medians.

    Both run in turns on the same random numbers, so that a machine that slows down does it to both.

    Args:
        prefix: Tokens of an image and a prompt.
    """
    both = (reference, runner)
    for warm_up in both:
        _lap(warm_up, prefix)
    found: list[tuple[Seconds, Seconds]] = []
    for turn in turns(2, ROUNDS):
        laps = {i: _lap(both[i], prefix) for i in turn}
        found.append((laps[0], laps[1]))
    times = {stage: statistics.median(b[stage] / a[stage] for a, b in found) for stage in STAGES}
    return times, {stage: statistics.median(a[stage] for a, _ in found) for stage in STAGES}


def _lap(runner: Runner, prefix: int) -> Seconds:
    m, random = runner.manifest, np.random.default_rng(0)
    pixels = random.standard_normal((1, 3, m.resolution, m.resolution), np.float32)
    embeds = random.standard_normal((1, prefix, m.token_table.shape[1]), np.float32)
    decoder = Decoder(runner._sessions["decoder_step"], m, prefix + STEPS)
    start = time.perf_counter()
    encode(runner, pixels)
    encoded = time.perf_counter()
    decoder.feed(embeds)
    filled = time.perf_counter()
    for _ in range(STEPS):
        decoder.feed(embeds[:, :1])
    return {"vision": encoded - start, "prefill": filled - encoded, "step": (time.perf_counter() - filled) / STEPS}


def _save(file: Path, array: np.ndarray) -> None:
    partial: Any = file.with_suffix(".partial")
    with disk(f"cannot write {file}"):
        with partial.open("wb") as out:
            np.save(out, array, allow_pickle=False)
        partial.replace(file)


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} cannot be read ({error}); delete its folder and tune again") from error
