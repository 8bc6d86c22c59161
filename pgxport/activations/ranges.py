# SPDX-License-Identifier: Apache-2.0
"""Activation ranges, measured on calibration scenes, and the residual divisor that float16 needs.

One pass in float32 over the checkpoint, layer by layer: a few
row blocks of weights in memory, whatever the model's size.
"""

import math
from collections.abc import Callable

import numpy as np

from pgxport.bundle.manifest import Pixels, Ranges
from pgxport.errors import UsageError
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import Eager, inputs_embeds
from pgxport.models.gemma import decoder_step
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec
from pgxport.models.tiny.scenes import caption, draw
from pgxport.runners.image import PALIGEMMA, pixel_values
from pgxport.runners.tokenizer import PromptTokenizer

FLOAT16_MAX = 65504.0
# Other pictures may give larger numbers than the few that were measured.
HEADROOM = 8.0
SCENES = 2
# What a float16 engine holds in float16 and no divisor reaches;
# squares, variances and scores are summed in float32.
HELD = ("vision residual", "MLP product", "linear output")
# What an Eager shows besides, for the statistics: each is counted as what it was made by.
ELSEWHERE = ("linear input", "cache key", "cache value")


class ActivationRanges:
    """The largest |x| of each kind of number, and where it was."""

    def __init__(self, spec: ModelSpec):
        self.largest: dict[str, float] = {}
        self.where: dict[str, str] = {}
        # Products that go into the stream as they are, and are divided with it.
        branches = () if spec.text.post_norms else ("o_proj.weight", "down_proj.weight")
        self._entering = ("multi_modal_projector.linear.weight", *branches)

    def __call__(self, kind: str, where: str, values: np.ndarray) -> None:
        """Count numbers in; an `Eager` observes through this."""
        if kind in ELSEWHERE:
            return
        if kind == "residual" and where.startswith("vision_tower"):
            kind = "vision residual"  # no divisor reaches it
        elif where.endswith(self._entering):
            kind = "residual"
        self.add(kind, where, max(float(values.max()), -float(values.min())))

    def add(self, kind: str, where: str, top: float) -> None:
        if top > self.largest.get(kind, -1.0) or math.isnan(top):
            self.largest[kind], self.where[kind] = top, where

    def ranges(self, scenes: int) -> Ranges:
        kinds = sorted(self.largest)
        return Ranges(largest={k: self.largest[k] for k in kinds}, where={k: self.where[k] for k in kinds}, scenes=scenes)


def measure_ranges(
    source: TensorSource, spec: ModelSpec, words: PromptTokenizer, pixels: Pixels = PALIGEMMA, *, scenes: int = SCENES
) -> Ranges:
    """The largest |x| of each kind of number, over prefix and answer of calibration scenes, and where it was.

    Raises:
        UsageError: numbers that no divisor reaches exceed float16, so that it cannot be used.
    """
    observe = ActivationRanges(spec)
    prompt = words.prompt_ids("caption en", 0)
    for index in range(scenes):  # one at a time: the weights are read again, and activations take half the memory of two
        scene = draw("calibration", index)
        tokens = prompt + words.prompt_ids(caption(scene), 0)[1:-1]  # without bos and newline
        picture = pixel_values(scene.image, spec.resolution, pixels)[None]
        hidden = _run(Eager(source, {"pixel_values": picture}, observe=observe), vision_encoder, spec, "image_hidden")
        features = _run(Eager(source, {"image_hidden": hidden}, observe=observe), projector, spec, "image_features")
        embeds = inputs_embeds(source, spec, features, tokens)
        observe("residual", "inputs_embeds", embeds)
        eager = Eager(source, {"inputs_embeds": embeds}, prefix=spec.image_tokens + len(prompt), observe=observe)
        _run(eager, decoder_step, spec, "logits")
    return observe.ranges(scenes)


def residual_divisor(ranges: Ranges) -> float:
    """The power of two that keeps the residual stream, with headroom, inside float16.

    Raises:
        UsageError: a number that no divisor reaches exceeds float16.
    """
    for kind in HELD:
        if not ranges.largest[kind] < FLOAT16_MAX:
            raise UsageError(
                f"float16 ends at {FLOAT16_MAX:g}, and the {kind} at {ranges.where[kind]} reached {ranges.largest[kind]:g} "
                f"on {ranges.scenes} calibration scenes; use --precision bf16 or fp32"
            )
    return 2.0 ** max(0, math.ceil(math.log2(ranges.largest["residual"] * HEADROOM / FLOAT16_MAX)))


def _run(eager: Eager, model: Callable[[Eager, ModelSpec], None], spec: ModelSpec, output: str) -> np.ndarray:
    model(eager, spec)
    return eager.outputs[output]
