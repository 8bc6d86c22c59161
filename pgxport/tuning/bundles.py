# SPDX-License-Identifier: Apache-2.0
"""Measure recipes of one checkpoint: each is exported whole, run over the samples, and deleted.

A probe, a recipe that quantizes one group, is a whole bundle too: it is what a user would get, and the same
for every method. Only the image features of a float vision encoder are kept, so that probes of the decoder
need not run it.

What that costs for 3B at 224 px, estimated for two cores, not measured: an export of 6 GB takes half a minute
(minutes more where AWQ or GPTQ is solved for a group); a sample, 1.4 TFLOP of prefill, 15 to 20 s, and 0.3 s
a token of its answer; timing, a few minutes. So 16 samples are some 10 minutes a probe, of which the export
is a twentieth: writing only what changed would save no more than that. 80 probes (20 groups, 4 candidates)
are half a day. On disk: the float32 bundle, 12 GB, and one of 6 GB.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter

from pgxport.bundle.reader import Bundle
from pgxport.cluster.pool import Cluster
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipe_toml import HEADER, to_toml
from pgxport.exporter.recipes import FP32
from pgxport.files import disk_errors
from pgxport.metrics.sample import Sample
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import weight_shapes
from pgxport.reporting.store import ResultFile, StoredLine, digest
from pgxport.runners.pipeline import Pipeline
from pgxport.tuning.loss import Loss, loss
from pgxport.tuning.score import (
    STAGES,
    CandidateScore,
    ParsedAnswers,
    ReferenceAnswers,
    Seconds,
    ratios,
    score_here,
    score_on_cluster,
)

# Samples of a probe. The search goes by KL, which every token of an answer tells something about, not by the
# metric, which needs hundreds of answers; whole bundles are run over all samples.
PROBED = 40
PROMPT_TOKENS = 8  # of the prefill that is timed
Say = Callable[[str], None]


@dataclass(frozen=True)
class MeasuredRecipe:
    """A recipe as a bundle: its size, the time of one answer, and what it lost to the float32 bundle.

    Attributes:
        label: A named recipe's name, a mix's number, or group and candidate of a probe.
        stages: Times as long as the float32 bundle: vision (and projector), prefill, decode step.
        ms: Of one answer of the reference's mean length, without reading the image and the text.
    """

    label: str
    recipe: Recipe
    nbytes: int
    ms: float
    stages: Seconds
    kl: float
    kl_worst: float
    agreement: float
    loss: Loss

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": rules_text(self.recipe)}


@dataclass(frozen=True)
class TunedModel:
    """The model and the samples that recipes are tried on.

    Attributes:
        export: The checkpoint, target and calibration; output and recipe are set for each bundle.
        common: What every result depends on, as plain data.
        threads: Of the engine.
        remarks: What to know about the model and the samples: another base, records left out, and why.
    """

    export: ExportOptions
    spec: ModelSpec
    samples: tuple[Sample, ...]
    common: dict[str, Any]
    threads: int | None
    remarks: tuple[str, ...]


class ReferenceLine(StoredLine):
    """The float32 bundle's answers, and the seconds of its stages."""

    kind: Literal["reference"] = "reference"
    ids: list[list[int]]
    seconds: Seconds


class CandidateLine(StoredLine):
    """A recipe's bundle on so many samples, evenly spaced."""

    kind: Literal["candidate"] = "candidate"
    rules: str
    samples: int
    nbytes: int
    stages: Seconds
    score: CandidateScore


TuneLine = ReferenceLine | CandidateLine
LINES: TypeAdapter[TuneLine] = TypeAdapter(Annotated[TuneLine, Field(discriminator="kind")])


class Bundles:
    """Recipes as bundles, measured beside the float32 one, which stays open.

    Args:
        cluster: Where samples are scored; None: here.
    """

    def __init__(self, subject: TunedModel, work: Path, say: Say, cluster: Cluster | None = None):
        self._subject, self._work, self._say = subject, work, say
        self._cluster = cluster
        self._export, self._samples, self._threads = subject.export, subject.samples, subject.threads
        results = work / "results"
        with disk_errors(f"cannot use {results}"):
            results.mkdir(parents=True, exist_ok=True)
        self._results = ResultFile(results, subject.common, LINES)
        self._folder = work / f"reference-{digest(subject.common)[:12]}"
        self._stack = ExitStack()
        self._before_decoder = [name for name in weight_shapes(subject.spec) if not name.startswith("language_model.")]

    def __enter__(self) -> Self:
        with self._stack:
            path = self._folder / "float32"
            if not path.exists():
                self._say("exporting the float model")
                export(replace(self._export, output=path, precision=FP32.name, calibration=None))
            bundle = Bundle.open(path)
            self._reference = self._stack.enter_context(Pipeline(bundle, engine=self._export.target, threads=self._threads))
            self.reference_bytes = bundle.nbytes
            kept = self._results.find(kind="reference")
            assert isinstance(kept, ReferenceLine | None)
            self._asked = ReferenceAnswers(self._samples, self._folder, kept.ids if kept else ())
            if kept is None or not self._asked.complete():
                self._asked.answer_all(self._reference, self._say)
                _, seconds = ratios(self._reference, self._reference, self._prefix_tokens())
                kept = ReferenceLine(ids=self._asked.ids, seconds=seconds)
                self._results.add(kept)
            self._seconds = kept.seconds
            self._answers = ParsedAnswers(self._reference, self._samples)
            self._expected = self._answers(range(len(self._samples)), self._asked.ids)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def answer_tokens(self) -> float:
        """Mean number of tokens of the reference's answers."""
        return float(np.mean([len(ids) for ids in self._asked.ids]))

    @property
    def reference_ms(self) -> float:
        """Milliseconds of one answer of the float32 bundle."""
        return self._ms(dict.fromkeys(STAGES, 1.0))

    def known(self, recipe: Recipe, *, probe: bool = False) -> bool:
        """Whether a recipe was measured before."""
        return self._kept(recipe, self._places(probe=probe)) is not None

    def measure(self, label: str, recipe: Recipe, *, probe: bool = False) -> MeasuredRecipe:
        """Export a recipe and run it, or take the kept result.

        Args:
            probe: On `PROBED` of the samples.

        Raises:
            UsageError: no bundle can be written by the recipe.
            NumericError: the bundle's numbers are not finite, or a method does not find a solution.
        """
        places = self._places(probe=probe)
        line = self._kept(recipe, places)
        if line is None:
            line = self._run(recipe, places)
            self._results.add(line)
        score, stages = line.score, line.stages
        samples, expected = [self._samples[i] for i in places], [self._expected[i] for i in places]
        lost = loss(samples, self._answers(places, score.ids), expected)
        return MeasuredRecipe(
            label, recipe, line.nbytes, self._ms(stages), stages, score.kl, score.kl_worst, score.agreement, loss=lost
        )

    def _kept(self, recipe: Recipe, places: list[int]) -> CandidateLine | None:
        line = self._results.find(kind="candidate", rules=rules_text(recipe), samples=len(places))
        assert isinstance(line, CandidateLine | None)
        return line

    def _places(self, *, probe: bool) -> list[int]:
        """Return the numbers of the samples, evenly spaced, for samples are often sorted by task."""
        count = len(self._samples)
        taken = min(count, PROBED) if probe else count
        return [i * count // taken for i in range(taken)]

    def _run(self, recipe: Recipe, places: list[int]) -> CandidateLine:
        file, output = self._work / "recipe.toml", self._work / "bundle"
        with disk_errors(f"cannot write {file}"):
            file.write_text(to_toml(recipe))
        try:
            bundle = export(replace(self._export, output=output, recipe=file, overwrite=True))
            schemes = {name: recipe.scheme(name) for name in self._before_decoder}
            floats = all(scheme.bits is None for scheme in schemes.values())
            vision = digest({name: repr(scheme) for name, scheme in schemes.items()})
            engine, threads = self._export.target, self._threads
            if self._cluster:
                scorer = partial(score_on_cluster, self._cluster, bundle.path, engine, threads)
                score = self._asked.score(places, vision, scorer, keep=floats)
            # Times are measured here in any case, when no node of the cluster works for us: those of several
            # would not compare.
            with Pipeline(bundle, engine=engine, threads=threads) as pipeline:
                if not self._cluster:
                    score = self._asked.score(places, vision, partial(score_here, pipeline), keep=floats)
                stages, _ = ratios(pipeline, self._reference, self._prefix_tokens())
            rules = rules_text(recipe)
            return CandidateLine(rules=rules, samples=len(places), nbytes=bundle.nbytes, stages=stages, score=score)
        finally:
            shutil.rmtree(output, ignore_errors=True)
            file.unlink(missing_ok=True)

    def _prefix_tokens(self) -> int:
        return self._reference.manifest.image_tokens + PROMPT_TOKENS

    def _ms(self, stages: Seconds) -> float:
        counts = {"vision": 1.0, "prefill": 1.0, "step": self.answer_tokens}
        return 1000 * sum(counts[stage] * self._seconds[stage] * stages[stage] for stage in STAGES)


def rules_text(recipe: Recipe) -> str:
    """Return a recipe's rules as text, the same for recipes that store weights in the same way."""
    return to_toml(replace(recipe, name="any")).removeprefix(HEADER)
