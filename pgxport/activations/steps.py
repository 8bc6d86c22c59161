# SPDX-License-Identifier: Apache-2.0
"""The model cut into steps, between which each sample carries one array."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pgxport.activations.encoding import EncodedSample
from pgxport.models import gemma, siglip
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import Eager, inputs_embeds
from pgxport.models.layers import layer_norm
from pgxport.models.projector import projector
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import output_matrix

VISION, TEXT = "vision_tower.vision_model", "language_model.model"
PIXELS = "image patches"  # the first step

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A part of the model that all samples go through before the next begins.

    Attributes:
        name: For progress; the first step's is PIXELS.
        shape: The shape of the array that a sample brings into the step.
        run: Computes the array that the sample takes to the next step; None after the last.
        layer: The decoder's layer, if the step is one.
    """

    name: str
    shape: Callable[[EncodedSample], Shape]
    run: Callable[[Eager, EncodedSample, np.ndarray], np.ndarray | None]
    layer: int | None = None


@dataclass(frozen=True)
class ModelSteps:
    """What the steps of a model compute, B = 1 sample at a time. N: image tokens, T: all tokens, H: width."""

    source: TensorSource
    spec: ModelSpec

    def all(self) -> list[Step]:
        """Return the steps, in order."""
        vision, text = self.spec.vision.depth, self.spec.text.depth
        return [
            Step(PIXELS, self._pixels_shape, self._patches),
            *(
                Step(f"vision layer {i + 1} of {vision}", self._image_shape, partial(self._vision_layer, i))
                for i in range(vision)
            ),
            Step("projector", self._image_shape, self._prefix_and_answer),
            *(Step(f"text layer {i + 1} of {text}", self._text_shape, partial(self._text_layer, i), i) for i in range(text)),
            Step("final norm", self._text_shape, self._final_norm),
        ]

    def _pixels_shape(self, sample: EncodedSample) -> Shape:
        return 1, 3, self.spec.vision.resolution, self.spec.vision.resolution

    def _image_shape(self, sample: EncodedSample) -> Shape:
        return 1, self.spec.vision.image_tokens, self.spec.vision.width

    def _text_shape(self, sample: EncodedSample) -> Shape:
        return 1, self.spec.image_tokens + len(sample.prompt) + len(sample.answer), self.spec.text.width

    def _patches(self, g: Eager, sample: EncodedSample, x: np.ndarray) -> np.ndarray:
        """[1, 3, R, R] -> [1, N, H]"""
        with g.scope(VISION):
            return siglip.embeddings(g, x, self.spec.vision)

    def _vision_layer(self, i: int, g: Eager, sample: EncodedSample, x: np.ndarray) -> np.ndarray:
        """[1, N, H] -> [1, N, H]"""
        with g.scope(VISION), g.scope(f"encoder.layers.{i}"):
            return siglip.block(g, x, self.spec.vision)

    def _prefix_and_answer(self, g: Eager, sample: EncodedSample, x: np.ndarray) -> np.ndarray:
        """[1, N, H of the vision tower] -> [1, T, H]: image features, then embedded prompt and answer."""
        with g.scope(VISION):
            g.feeds["image_hidden"] = layer_norm(g, x, "post_layernorm", self.spec.vision.eps)
        projector(g, self.spec)
        embeds = inputs_embeds(self.source, self.spec, g.outputs["image_features"], (*sample.prompt, *sample.answer))
        g.observe("residual", "inputs_embeds", embeds)
        return embeds

    def _text_layer(self, i: int, g: Eager, sample: EncodedSample, x: np.ndarray) -> np.ndarray:
        """[1, T, H] -> [1, T, H]"""
        with g.scope(TEXT), g.scope(f"layers.{i}"):
            return gemma.block(g, x, i, self.spec.text)

    def _final_norm(self, g: Eager, sample: EncodedSample, x: np.ndarray) -> None:
        """Observe the positions that an answer is read from. Logits would cost more than a layer."""
        with g.scope(TEXT):
            h = gemma.stream_norm(g, x[:, g.prefix - 1 :], "norm", self.spec.text)
        g.observe("linear input", output_matrix(self.spec.text), h)
