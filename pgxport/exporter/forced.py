# SPDX-License-Identifier: Apache-2.0
"""Run a whole model in numpy over an image, a prompt and an answer that is given: what would it have said at each token?

A few row blocks of weights in memory, whatever the model's size; the activations of one sample at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgxport.bundle import TokenIds
from pgxport.exporter.eager import Eager, Observe, Rounding
from pgxport.exporter.stream import to_float32
from pgxport.models.checkpoint import TensorSource
from pgxport.models.gemma import TOKEN_TABLE, decoder_step
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec
from pgxport.models.tiny.scenes import Question, ask, draw, locations
from pgxport.runners.image import pixel_values
from pgxport.runners.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Forced:
    """One sample: pixels [1, 3, R, R], the ids of the prompt after the image's, and those of the answer."""

    pixels: np.ndarray
    prompt: list[int]
    answer: list[int]


def scene(index: int, spec: ModelSpec, tokenizer: Path, ids: TokenIds) -> Forced:
    """A scene of the calibration split with one of its questions, captions and boxes by turns."""
    drawn, words = draw("calibration", index), PromptTokenizer(tokenizer, ids)
    kinds = {q.task: q for q in ask(drawn, index)}
    question = kinds["detect"] if index % 2 and "detect" in kinds else kinds["caption"]
    prompt = words.prompt_ids(question.prompt, 0)
    answer = words.prompt_ids(_answer(question), 0)[1:-1]  # without bos and newline
    return Forced(pixel_values(drawn.image, spec.resolution)[None], prompt, answer)


def forced_logits(
    source: TensorSource,
    spec: ModelSpec,
    sample: Forced,
    *,
    observe: Observe | None = None,
    rounding: Rounding | None = None,
    writer: type[Eager] = Eager,
) -> np.ndarray:
    """Logits [answer tokens + 1, V]: of the first token of the answer, of each next one, and of what follows the last."""

    def run(model: Callable[[Eager, ModelSpec], None], output: str, feed: str, values: np.ndarray) -> np.ndarray:
        eager = writer(
            source, {feed: values}, prefix=spec.image_tokens + len(sample.prompt), observe=observe, rounding=rounding,
            last=len(sample.answer) + 1,
        )  # fmt: skip
        model(eager, spec)
        return eager.outputs[output]

    hidden = run(vision_encoder, "image_hidden", "pixel_values", sample.pixels)
    features = run(projector, "image_features", "image_hidden", hidden)
    text = np.concatenate([to_float32(source.rows(TOKEN_TABLE, t, t + 1)) for t in (*sample.prompt, *sample.answer)])
    embeds = np.concatenate([features, (text * np.float32(spec.text.embed_scale))[None]], 1)
    if observe:
        observe("residual", "inputs_embeds", embeds)
    return run(decoder_step, "logits", "inputs_embeds", embeds)[0]


def _answer(question: Question) -> str:
    if question.answer is not None:
        return question.answer
    return " ; ".join(f"{locations(thing.box)} {label}" for label, thing in question.things)
