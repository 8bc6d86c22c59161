# SPDX-License-Identifier: Apache-2.0
"""The model cut into steps, between which each pack of samples carries one array.

A pack is samples whose tokens lie one after another: they share every product, so that a weight is
read once for all of them, and see nothing of each other. Of a picture, a sample may take an even subset of its patches: SigLIP is
as sound without the others (patch dropout: FLIP, Li et al., 2023), and so is Gemma's prefix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np

from pgxport.models import gemma, siglip
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import Eager, Segment, inputs_embeds
from pgxport.models.layers import layer_norm, softcap
from pgxport.models.projector import projector
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import EMBEDDING, output_matrix, weight_shapes

VISION, TEXT = "vision_tower.vision_model", "language_model.model"
PIXELS = "image patches"  # the first step
# Numbers of an MLP's activations in a pack: 64 MiB of them in float32, of which numpy holds some at a time.
PACK = 1 << 24

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StepSample:
    """A sample as the steps take it.

    Attributes:
        pixels: Gives the picture [1, 3, R, R].
        prompt: Token ids after the image's.
        answer: Token ids after those, without the one that ends it, which is never fed.
        every: Takes every so-many-th patch, both ways; 1: all.
        scored: Whether its logits are wanted.
    """

    pixels: Callable[[], np.ndarray]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    every: int = 1
    scored: bool = False


Pack = Sequence[StepSample]


@dataclass(frozen=True)
class Step:
    """A part of the model that all samples go through before the next begins.

    Attributes:
        name: For progress; the first step's is PIXELS.
        segment: The tokens that a sample brings into the step.
        shape: The shape of the array that a pack brings into the step.
        run: Computes the array that the pack takes to the next step; after the last, logits [1, P, V] or None.
        layer: The decoder's layer, if the step is one.
        last: Whether it is the last one, whose inputs of linears are at the positions that answers are read from.
    """

    name: str
    segment: Callable[[StepSample], Segment]
    shape: Callable[[Pack], Shape]
    run: Callable[[Eager, Pack, np.ndarray], np.ndarray | None]
    layer: int | None = None
    last: bool = False

    def segments(self, pack: Pack) -> list[Segment]:
        """The tokens that each sample of the pack brings into the step."""
        return [self.segment(sample) for sample in pack]


@dataclass(frozen=True)
class ModelSteps:
    """What the steps of a model compute, B = 1 pack at a time. N: image tokens, T: all tokens, of all samples; H: width."""

    source: TensorSource
    spec: ModelSpec

    def all(self) -> list[Step]:
        """Return the steps, in order."""
        vision, text, image, tokens = self.spec.vision, self.spec.text, self.image_segment, self.text_segment
        images, stream = self._shape(image, vision.width), self._shape(tokens, text.width)
        return [
            Step(PIXELS, image, lambda pack: (len(pack), 3, vision.resolution, vision.resolution), self._patches),
            *(
                Step(f"vision layer {i + 1} of {vision.depth}", image, images, partial(self._vision_layer, i))
                for i in range(vision.depth)
            ),
            Step("projector", image, images, self._prefix_and_answer),
            *(
                Step(f"text layer {i + 1} of {text.depth}", tokens, stream, partial(self._text_layer, i), i)
                for i in range(text.depth)
            ),
            Step("final norm", tokens, stream, self._logits, last=True),
        ]

    def image_segment(self, sample: StepSample) -> Segment:
        return Segment(len(kept_patches(self.spec.image_tokens, sample.every)))

    def text_segment(self, sample: StepSample) -> Segment:
        return text_segment(self.spec, sample)

    def packs(self, samples: Iterable[StepSample]) -> list[list[StepSample]]:
        """The samples in packs of at most PACK activations of the wider MLP, in order; a larger sample is a pack of its own."""
        packs: list[list[StepSample]] = []
        most, tokens = PACK // max(self.spec.vision.mlp, self.spec.text.mlp), 0
        for sample in samples:
            tokens += self.text_segment(sample).tokens
            if not packs or tokens > most:
                packs.append([])
                tokens = self.text_segment(sample).tokens
            packs[-1].append(sample)
        return packs

    def _shape(self, segment: Callable[[StepSample], Segment], width: int) -> Callable[[Pack], Shape]:
        return lambda pack: (1, sum(segment(sample).tokens for sample in pack), width)

    def _patches(self, g: Eager, pack: Pack, x: np.ndarray) -> np.ndarray:
        """[samples, 3, R, R] -> [1, N, H]"""
        with g.scope(VISION):
            patches = siglip.embeddings(g, x, self.spec.vision)
        kept = [kept_patches(self.spec.image_tokens, sample.every) for sample in pack]
        return np.concatenate([of_one[at] for of_one, at in zip(patches, kept, strict=True)])[None]

    def _vision_layer(self, i: int, g: Eager, pack: Pack, x: np.ndarray) -> np.ndarray:
        """[1, N, H] -> [1, N, H]"""
        with g.scope(VISION), g.scope(f"encoder.layers.{i}"):
            return siglip.block(g, x, self.spec.vision)

    def _prefix_and_answer(self, g: Eager, pack: Pack, x: np.ndarray) -> np.ndarray:
        """[1, N, H of the vision tower] -> [1, T, H]: of each sample image features, then embedded prompt and answer."""
        with g.scope(VISION):
            g.feeds["image_hidden"] = layer_norm(g, x, "post_layernorm", self.spec.vision.eps)
        projector(g, self.spec)
        embeds = [
            inputs_embeds(self.source, self.spec, features, (*sample.prompt, *sample.answer))
            for sample, features in zip(pack, split(g.outputs["image_features"], map(self.image_segment, pack)), strict=True)
        ]
        x = np.concatenate(embeds, 1)
        g.observe("residual", "inputs_embeds", x)
        return x

    def _text_layer(self, i: int, g: Eager, pack: Pack, x: np.ndarray) -> np.ndarray:
        """[1, T, H] -> [1, T, H]"""
        with g.scope(TEXT), g.scope(f"layers.{i}"):
            return gemma.block(g, x, i, self.spec.text)

    def _logits(self, g: Eager, pack: Pack, x: np.ndarray) -> np.ndarray | None:
        """[1, T, H] -> [1, P, V], at the P positions that answers are read from; None where no sample's logits are wanted."""
        text, segments = self.spec.text, [self.text_segment(sample) for sample in pack]
        read = [part[:, s.prefix - 1 :] for part, s in zip(split(x, segments), segments, strict=True)]
        with g.scope(TEXT):
            h = gemma.stream_norm(g, np.concatenate(read, 1), "norm", text)
        if not any(sample.scored for sample in pack):
            g.observe("linear input", output_matrix(text), h)  # the product would cost more than a layer
            return None
        return np.asarray(softcap(g, g.lm_head(h, output_matrix(text)), text.logit_softcap))


def text_segment(spec: ModelSpec, sample: StepSample) -> Segment:
    """The tokens of a sample in the decoder."""
    prefix = len(kept_patches(spec.image_tokens, sample.every)) + len(sample.prompt)
    return Segment(prefix + len(sample.answer), prefix)


def linears(spec: ModelSpec) -> dict[str, Shape]:
    """The matrices [out, in] that inputs are multiplied by, by name: all but what only is looked up or added."""
    looked_up = {EMBEDDING} - {output_matrix(spec.text)}
    return {
        name: shape
        for name, shape in weight_shapes(spec).items()
        if len(shape) == 2 and name not in looked_up and "position_embedding" not in name
    }


def kept_patches(patches: int, every: int) -> np.ndarray:
    """The places of every so-many-th patch of a square picture, both ways.

    >>> kept_patches(16, 2).tolist()
    [0, 2, 8, 10]
    """
    side = isqrt(patches)
    kept = np.arange((every - 1) // 2, side, every)
    return (kept[:, None] * side + kept).reshape(-1)


def every_for(patches: int, most: int | None) -> int:
    """The step between patches of a square picture that leaves at most so many of them; None: all stay.

    >>> [every_for(side**2, 256) for side in (8, 16, 32, 64)]
    [1, 1, 2, 4]
    """
    return 1 if most is None else -(-isqrt(patches) // max(1, isqrt(most)))


def split(x: np.ndarray, segments: Iterable[Segment]) -> Iterator[np.ndarray]:
    """The samples' parts of an array [1, T, H]."""
    start = 0
    for segment in segments:
        yield x[:, start : start + segment.tokens]
        start += segment.tokens
