# SPDX-License-Identifier: Apache-2.0
"""The pass over a checkpoint that an export makes: statistics for its recipe, ranges for float16, and the check's reference."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pgxport.activations.checkpoint_pass import observe_checkpoint
from pgxport.activations.encoding import encode, step_sample
from pgxport.activations.observe import NOTHING, Changes, Needs
from pgxport.activations.statistics import Statistics
from pgxport.activations.steps import StepSample, every_for, kept_patches, text_segment
from pgxport.bundle.manifest import Ranges
from pgxport.data.loader import first_samples
from pgxport.exporter.check.parity import FIRST_SCENE, scene
from pgxport.exporter.inputs.equivalent import Equivalent, equivalent
from pgxport.exporter.inputs.needs import needs_of
from pgxport.exporter.prepare import PreparedExport, open_checkpoint
from pgxport.exporter.recipe import Recipe, Scheme
from pgxport.exporter.stream import Progress
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import TokenizedSample
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import parameters
from pgxport.text import duration

Say = Callable[[str], None]
# Drawn scenes that statistics are taken of where no calibration is given, and the image tokens of each at most. What lies beyond
# a static range is cut off, which costs more than a scale that is a little off: w8a8-static has a KL of 0.028 with two
# scenes, 0.0011 with 8 and 0.0006 with 32 (tiny-112), and w8a8 0.0005, 0.0004 and 0.0003. Second moments have more
# numbers than a few scenes have tokens: they take as many as pgx calibrate does.
SCENES, RANGE_SCENES, MOMENT_SCENES, SCENE_TOKENS = 2, 8, 32, 64
# What the ranges of so few scenes are widened by. At tiny-224 with outliers, w8a8-static has a KL of 0.0064 without, 0.0034
# with 1.25 and 0.0019 with 1.5; int4-fast-kv8 0.0099, 0.0080 and 0.0074, and 0.0073 with 2.
HEADROOM = 1.5
# Image tokens of a scene of the check at most: the first of these with which a scene takes no more multiplications than that.
CHECK_TOKENS, CHECK_PRODUCTS = (256, 64), 2e11
WIDENING = 60  # tokens whose products take about as long as reading a weight and making a float32 of it


@dataclass(frozen=True)
class Gathered:
    """What an export knows of a checkpoint's activations.

    Attributes:
        statistics: Of the inputs of linears, from a calibration file or gathered here; None where the recipe needs none.
        ranges: For float16; None where activations are not float16.
        origin: Where the statistics come from if not from a file.
        checked: The scenes of the check.
        reference: The checkpoint's logits on these, each [answer tokens + 1, V].
    """

    statistics: Statistics | None = None
    ranges: Ranges | None = None
    origin: str | None = None
    checked: list[StepSample] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)


def gather(job: PreparedExport, work: Path, *, progress: Progress | None = None, say: Say | None = None) -> Gathered:
    """Take what the options gave, and find the rest in one pass over the checkpoint; none where nothing is missing.

    Args:
        work: A folder for what is found; it has to stay until the bundle is written.
        say: Is told what will be done, and about how long it takes.

    Raises:
        NumericError: activations are not finite.
        DiskError: the folder cannot be written.
    """
    calibration, float16 = job.calibration, job.target.compute(job.recipe.rules[-1].scheme.dtype) == "float16"
    needs = NOTHING if calibration else needs_of(job.recipe, job.spec)
    ranges = calibration.ranges if calibration and float16 else None
    checked = check_scenes(job) if _is_checked(job) else []
    scenes = _scenes(needs) if needs or (float16 and ranges is None) else 0
    if not scenes and not checked:
        return Gathered(calibration)
    observed = embedded_scenes(job, scenes)
    if say:
        say(_announced(job, observed, checked, needs))
    # A checkpoint of its own: rows that this pass reads do not count as exported.
    source = open_checkpoint(job.found, job.options)
    found = observe_checkpoint(
        source,
        job.spec,
        [*observed, *checked],
        work,
        needs,
        changes=partial(changes_of, source, job.spec, job.recipe),
        progress=progress,
    )
    if float16 and ranges is None:
        ranges = found.activation_ranges.ranges(len(observed) + len(checked))
    if not needs:
        return Gathered(calibration, ranges, None, checked, found.logits)
    origin = f"embedded scenes ({scenes})"
    statistics = Statistics(origin, found.inputs, found.tensors, job.recipe.name, headroom=HEADROOM)
    return Gathered(statistics, ranges, origin, checked, found.logits)


def _scenes(needs: Needs) -> int:
    if needs.moments:
        return MOMENT_SCENES
    return RANGE_SCENES if needs.ranges or needs.changed or needs.caches else SCENES


def changes_of(source: TensorSource, spec: ModelSpec, recipe: Recipe, known: Statistics) -> Changes:
    """What the recipe does to the inputs of the linears that something is known of."""

    def scheme_of(path: str) -> Scheme:
        return recipe.scheme(path) if path in known.inputs else Scheme()

    changed = equivalent(source, spec, scheme_of, known)
    return changed if isinstance(changed, Equivalent) else Equivalent(source, {}, {})


def embedded_scenes(job: PreparedExport, count: int) -> list[StepSample]:
    """The first scenes of the embedded calibration split, with an even subset of their patches."""
    words, every = job.tokenizer.words(), every_for(job.spec.image_tokens, SCENE_TOKENS)
    encoded = (encode(sample, words) for sample in first_samples(None, count).samples)
    return [step_sample(sample, job.spec, job.pixels, every) for sample in encoded]


def check_scenes(job: PreparedExport) -> list[StepSample]:
    """The scenes of the check, which calibration does not use, with an even subset of their patches."""
    words, every = job.tokenizer.words(), every_for(job.spec.image_tokens, check_tokens(job.spec, job.options.parity_tokens))

    def fed(sample: TokenizedSample) -> StepSample:
        return StepSample(lambda: sample.pixels, tuple(sample.prompt), tuple(sample.answer), every, scored=True)

    return [fed(scene(FIRST_SCENE + i, job.spec, words, job.pixels)) for i in range(job.options.parity)]


def check_tokens(spec: ModelSpec, asked: int | None) -> int:
    """The image tokens of a scene of the check at most.

    Args:
        asked: That many, 0 for all; None leaves it to the size of the model.
    """
    if asked is not None:
        return asked or spec.image_tokens
    return next((n for n in CHECK_TOKENS if n * parameters(spec) <= CHECK_PRODUCTS), CHECK_TOKENS[-1])


def price(what: str, spec: ModelSpec, samples: Sequence[StepSample]) -> str:
    """What passes through the model, and about how long it takes, by a product of its size that is timed now."""
    tokens = sum(text_segment(spec, sample).tokens for sample in samples)
    x, w = (np.ones((rows, spec.text.width), np.float32) for rows in (256, 1024))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        x @ w.T
        seconds.append(time.perf_counter() - start)
    each = min(seconds) / (len(x) * w.size)
    # Each weight is read and widened once, too, which takes as long as several products.
    about = each * (tokens + WIDENING) * parameters(spec)
    spent = f"about {duration(about)}" if about >= 1 else "under a second"
    return f"{what}: {tokens} tokens through {spec.vision.depth + spec.text.depth} layers, {spent}"


def _is_checked(job: PreparedExport) -> bool:
    """Floats are compared where there is a gate."""
    return bool(job.options.parity) and (job.recipe.lossy or job.options.gate is not None)


def _announced(job: PreparedExport, observed: Sequence[StepSample], checked: Sequence[StepSample], needs: Needs) -> str:
    """What the pass will do, and about how long it will take, in a sentence."""
    parts = []
    if needs:
        of = "second moments and other statistics" if needs.moments else "statistics"
        parts.append(f"{of} of {len(observed)} embedded scenes (--calibration takes yours)")
    elif observed:
        parts.append(f"the range of activations on {len(observed)} embedded scenes")
    if checked:
        kept, whole = (len(kept_patches(job.spec.image_tokens, every)) for every in (checked[0].every, 1))
        subset = "" if kept == whole else f", {kept} of {whole} image tokens each"
        parts.append(f"the reference of the check on {len(checked)} more{subset}")
    moments = ", and as long again for second moments" if needs.moments else ""
    return price(f"one pass for {' and '.join(parts)}", job.spec, (*observed, *checked)) + moments
