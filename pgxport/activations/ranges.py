# SPDX-License-Identifier: Apache-2.0
"""Activation ranges, and the residual divisor that float16 needs."""

import math

import numpy as np

from pgxport.bundle.manifest import Ranges
from pgxport.errors import UsageError
from pgxport.models.spec import ModelSpec

FLOAT16_MAX = 65504.0
# Other pictures may give larger numbers than the few that were measured.
HEADROOM = 8.0
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
