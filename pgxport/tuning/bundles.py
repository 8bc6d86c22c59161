# SPDX-License-Identifier: Apache-2.0
"""Measure recipes of one checkpoint: each is exported whole, run over the samples, and deleted; what was kept is not run again.

A probe, a recipe that rounds one group, is a whole bundle too: it is what a user would get, and the same for every method.
Only the image features of a vision encoder in floats are kept, so that probes of the decoder leave the vision encoder alone.

What that costs for 3B at 224 px, estimated for two cores, not measured: an export of 6 GB takes half a minute (minutes more where
AWQ or GPTQ is solved for a group); a sample, 1.4 TFLOP of prefill, 15 to 20 s, and 0.3 s a token of its answer; timing, a few
minutes. So 16 samples are some 10 minutes a probe, of which the export is a twentieth: writing only what changed would save no more
than that. 80 probes (20 groups, 4 candidates) are half a day. On disk: the float32 bundle, 12 GB, and one of 6 GB.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pgxport.bundle.reader import Bundle
from pgxport.cluster.pool import Cluster
from pgxport.exporter.export import ExportOptions, export
from pgxport.exporter.recipe import FP32, Recipe
from pgxport.exporter.recipe_toml import HEADER, to_toml
from pgxport.files import disk_errors
from pgxport.metrics.sample import Sample
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import weight_shapes
from pgxport.runners.pipeline import Pipeline
from pgxport.tuning.cluster_score import Scorer
from pgxport.tuning.loss import Loss, loss
from pgxport.tuning.score import STAGES, Answers, Samples, Seconds, ratios
from pgxport.tuning.store import Store, digest

# Samples of a probe. The search goes by KL, which every token of an answer tells something about, not by the metric, which
# needs hundreds of answers; whole bundles are run over all samples.
PROBED = 40
PROMPT_TOKENS = 8  # of the prefill that is timed
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
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
class Subject:
    """What recipes are tried on.

    Attributes:
        export: Which checkpoint, for which target, with which calibration; output and recipe are set for each bundle.
        common: What every result depends on, as plain data.
        threads: Of the engine.
    """

    export: ExportOptions
    spec: ModelSpec
    samples: tuple[Sample, ...]
    common: dict[str, Any]
    threads: int | None


class Bundles:
    """Recipes as bundles, measured beside the float32 one, which stays open.

    Args:
        cluster: Where samples are scored; None: here.
    """

    def __init__(self, subject: Subject, work: Path, say: Say, cluster: Cluster | None = None):
        self._subject, self._work, self._say = subject, work, say
        self._scorer = Scorer(cluster, subject.export.target, subject.threads) if cluster else None
        self._export, self._samples, self._threads = subject.export, subject.samples, subject.threads
        self._store = Store(work / "results", subject.common)
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
            kept = self._store.find(reference=True)
            self._asked = Samples(self._samples, self._folder, kept["ids"] if kept else ())
            if kept is None or not self._asked.complete():
                self._asked.answer_all(self._reference, self._say)
                _, seconds = ratios(self._reference, self._reference, self._prefix_tokens())
                kept = {"ids": self._asked.ids, "seconds": seconds}
                self._store.keep(kept, reference=True)
            self._seconds: Seconds = kept["seconds"]
            self._answers = Answers(self._reference, self._samples)
            self._expected = self._answers(range(len(self._samples)), self._asked.ids)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def answer_tokens(self) -> float:
        """Of the reference's answers, the mean."""
        return float(np.mean([len(ids) for ids in self._asked.ids]))

    @property
    def reference_ms(self) -> float:
        """Of one answer of the float32 bundle."""
        return self._ms(dict.fromkeys(STAGES, 1.0))

    def known(self, recipe: Recipe, *, probe: bool = False) -> bool:
        """Whether a recipe was measured before."""
        return self._store.find(rules=rules_text(recipe), samples=len(self._places(probe=probe))) is not None

    def measure(self, label: str, recipe: Recipe, *, probe: bool = False) -> Measured:
        """Export a recipe and run it, or take what is known of it.

        Args:
            probe: On `PROBED` of the samples.

        Raises:
            UsageError: no bundle can be written by it.
            NumericError: its numbers are not finite, or a method does not find a solution.
        """
        places = self._places(probe=probe)
        what = {"rules": rules_text(recipe), "samples": len(places)}
        result = self._store.find(**what)
        if result is None:
            result = self._run(recipe, places)
            self._store.keep(result, **what)
        score = {key: result[key] for key in ("kl", "kl_worst", "agreement")}
        samples, expected = [self._samples[i] for i in places], [self._expected[i] for i in places]
        lost = loss(samples, self._answers(places, result["ids"]), expected)
        return Measured(label, recipe, result["nbytes"], self._ms(result["stages"]), result["stages"], **score, loss=lost)

    def _places(self, *, probe: bool) -> list[int]:
        """Evenly spaced, for samples are often sorted by task."""
        count = len(self._samples)
        taken = min(count, PROBED) if probe else count
        return [i * count // taken for i in range(taken)]

    def _run(self, recipe: Recipe, places: list[int]) -> dict[str, Any]:
        file, output = self._work / "recipe.toml", self._work / "bundle"
        with disk_errors(f"cannot write {file}"):
            file.write_text(to_toml(recipe))
        try:
            bundle = export(replace(self._export, output=output, recipe=file, overwrite=True))
            schemes = {name: recipe.scheme(name) for name in self._before_decoder}
            floats = all(scheme.bits is None for scheme in schemes.values())
            vision = digest({name: repr(scheme) for name, scheme in schemes.items()})
            if self._scorer:
                score = self._scorer.score(bundle.path, self._asked, places, vision, keep=floats)
            # Times are measured here in any case, when no node of the cluster works for us: those of several would not compare.
            with Pipeline(bundle, engine=self._export.target, threads=self._threads) as pipeline:
                if not self._scorer:
                    score = self._asked.score(pipeline, places, vision, keep=floats)
                stages, _ = ratios(pipeline, self._reference, self._prefix_tokens())
            return {**asdict(score), "nbytes": bundle.nbytes, "stages": stages}
        finally:
            shutil.rmtree(output, ignore_errors=True)
            file.unlink(missing_ok=True)

    def _prefix_tokens(self) -> int:
        return self._reference.manifest.image_tokens + PROMPT_TOKENS

    def _ms(self, stages: Seconds) -> float:
        counts = {"vision": 1.0, "prefill": 1.0, "step": self.answer_tokens}
        return 1000 * sum(counts[stage] * self._seconds[stage] * stages[stage] for stage in STAGES)


def rules_text(recipe: Recipe) -> str:
    """A recipe without its name, as text: two that store the same weights in the same way have the same."""
    return to_toml(replace(recipe, name="any")).removeprefix(HEADER)
