# SPDX-License-Identifier: Apache-2.0
"""A sample as calibration feeds it: token ids of prompt and answer, weights of tokens, and a digest.

Knows no file format: samples come from data/.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pgxport.activations.steps import StepSample
from pgxport.bundle.manifest import Pixels
from pgxport.errors import InputError
from pgxport.metrics.sample import BoxEdges, Sample
from pgxport.models.spec import ModelSpec
from pgxport.models.tiny.scenes import locations
from pgxport.runners.image import pixel_values
from pgxport.runners.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class EncodedSample:
    """A sample and its token ids."""

    sample: Sample
    prompt: tuple[int, ...]  # bos, the prompt's text, newline; the image's tokens come before them
    answer: tuple[int, ...]  # without the token that ends it, which is never fed


def encode(sample: Sample, tokenizer: PromptTokenizer) -> EncodedSample:
    """Tokenize prompt and answer.

    Raises:
        InputError: one of them is not text that the tokenizer takes, or a picture cannot be opened.
    """
    answer = answer_text(sample)
    try:
        prompt_ids = tokenizer.prompt_ids(sample.prompt, 0)
        # The tokenizer treats the answer as a prompt, whose bos and newline are cut off; a fine-tune's answers have its own tokens.
        answer_ids = tokenizer.prompt_ids(answer, 0, special_tokens=True)[1:-1] if answer else []
    except InputError as error:
        raise InputError(f"sample {sample.id}: {error}") from error
    return EncodedSample(sample, tuple(prompt_ids), tuple(answer_ids))


def step_sample(encoded: EncodedSample, spec: ModelSpec, pixels: Pixels, every: int = 1) -> StepSample:
    """A sample as the steps of a model take it; its picture is opened when the first step wants it."""

    def opened() -> np.ndarray:
        return pixel_values(encoded.sample.open(), spec.resolution, pixels)[None]

    return StepSample(opened, encoded.prompt, encoded.answer, every)


def answer_text(sample: Sample) -> str | None:
    """The true answer as PaliGemma writes it: the first text, or the boxes; None where no answer is known.

    Raises:
        InputError: the picture, whose size a box is relative to, cannot be opened.
    """
    if sample.answers:
        return sample.answers[0].strip() or None
    objects = [region for region in sample.regions if not region.crowd]
    if not objects:
        return None
    width, height = sample.open().size
    if objects[0].segmentation is not None:
        # Codes of a mask follow, and are not known without the encoder that made them: the box is.
        return _location(objects[0].box, width, height)
    return " ; ".join(f"{_location(region.box, width, height)} {region.label}" for region in objects)


class TokenizedText(Protocol):
    """A prompt's token ids, the image's before them, and its answer's."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...


def token_weights(samples: Sequence[TokenizedText], image_tokens: Sequence[int]) -> list[np.ndarray]:
    """The weight of each token of each sample, float32 [T]; those that an answer is read from sum to half.

    An image has hundreds of tokens and an answer a few, so that without weights a method that minimises the
    mean error of a layer gives up the answer for the image. Measured in docs/decisions/0012.
    """
    reading = sum(len(s.answer) + 1 for s in samples)  # the last token of the prefix predicts the first of the answer
    others = sum(n + len(s.prompt) - 1 for s, n in zip(samples, image_tokens, strict=True))
    weights = []
    for sample, n in zip(samples, image_tokens, strict=True):
        w = np.ones(n + len(sample.prompt) + len(sample.answer), np.float32)
        w[n + len(sample.prompt) - 1 :] = others / reading
        weights.append(w)
    return weights


def digest(samples: Iterable[Sample]) -> str:
    """The sha256 of all images, prompts and answers, in order."""
    whole = hashlib.sha256()
    for sample in samples:
        texts = json.dumps([sample.prompt, answer_text(sample)])
        whole.update(f"{hashlib.sha256(sample.content()).hexdigest()} {texts}\n".encode())
    return whole.hexdigest()


def _location(box: BoxEdges, width: int, height: int) -> str:
    y1, x1, y2, x2 = (min(max(edge, 0.0), side) / side for edge, side in zip(box, (height, width) * 2, strict=True))
    return locations((y1, x1, y2, x2), size=1.0)
