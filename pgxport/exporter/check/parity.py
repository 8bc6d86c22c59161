# SPDX-License-Identifier: Apache-2.0
"""The cost of rounding: a bundle's files, read back, compared with the checkpoint on scenes that calibration does not use.

Both are run in numpy, for an export needs no engine and holds a few row blocks of
weights. What the bundle rounds while it runs (activations, the KV cache) is
rounded here as well; what an engine adds of its own is measured by `pgx report`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgxport.activations.checkpoint_pass import scored_logits
from pgxport.activations.steps import ModelSteps, StepSample
from pgxport.bundle.manifest import Parity, Pixels
from pgxport.exporter.check.input_rounding import InputRounding
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.inputs.equivalent import Equivalent
from pgxport.exporter.inputs.rotation import rotated_inputs
from pgxport.exporter.inputs.scaling import InputStatistics
from pgxport.exporter.lower_onnxruntime import CANDIDATES, SHORTLIST_TABLE, prefix_copy
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import DataLayout, Progress
from pgxport.exporter.targets import CPU, Target
from pgxport.metrics.fidelity import kl_divergence
from pgxport.models.checkpoint import TensorSource, to_float32
from pgxport.models.eager import Eager, Segment, TokenizedSample
from pgxport.models.spec import ModelSpec
from pgxport.models.tiny.scenes import Question, ask, draw, locations
from pgxport.runners.image import PALIGEMMA, pixel_values
from pgxport.runners.tokenizer import PromptTokenizer

FIRST_SCENE = 1 << 20  # beyond what anybody calibrates on


class StoredWeights:
    """The weights in a bundle's files, under the checkpoint's names, read back and dequantized to float32.

    Args:
        layouts: By data file.
    """

    def __init__(self, source: TensorSource, graphs: Mapping[str, GraphBuilder], layouts: Mapping[Path, DataLayout]):
        self._source = source
        self.matrices = {path: matrix for g in graphs.values() for path, matrix in g.matrices.items()}
        self.copies = {name for g in graphs.values() for name in g.copies}
        self._changes = {path: change for g in graphs.values() for path, change in g.changes.items()}
        self._changes |= {prefix_copy(path): change for path, change in self._changes.items()}
        self._dtypes = {p.name: p.dtype for layout in layouts.values() for p in layout.lazy_tensors}
        # What rounding took from the mean output is in a bias's bytes alone.
        self._biases = {f"{path.removesuffix('weight')}bias": m for path, m in self.matrices.items() if m.scheme.compensate}
        wanted = {p.name for matrix in self.matrices.values() for p in matrix.lazy_tensors} | self._biases.keys()
        self._parts: dict[str, np.ndarray] = {}
        for file, layout in layouts.items():
            for p in layout.lazy_tensors:
                if p.name in wanted:
                    dtype, shape = p.stored
                    self._parts[p.name] = np.memmap(file, dtype, "r", layout.places[p.name][0], shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.matrices[name].shape if name in self.matrices else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self.matrices:
            return self.matrices[name].dequantized(self._parts, start, stop)
        if name in self._parts:
            return to_float32(self._parts[name][start:stop]) / np.float32(self._biases[name].gain)
        exact = to_float32(self._source.rows(name, start, stop))
        with np.errstate(over="ignore"):
            rounded = to_float32(exact.astype(self._dtypes[name]))
        return np.where(np.isfinite(rounded), rounded, exact)  # what is beyond float16 was divided with the stream it is added to

    def changed(self, path: str, x: np.ndarray) -> np.ndarray:
        """The input [..., K] of a linear as the bundle's graph divides and rotates it."""
        change = self._changes.get(path)
        if change is None:
            return x
        if change.divided:
            assert isinstance(self._source, Equivalent), f"Bug: nothing says what the input of {path} is divided by"
            x = x * (1 / self._source.column_factors[path])
        return rotated_inputs(x, change.block)


@dataclass(frozen=True)
class StoredModel:
    """A bundle's files to run in numpy, and what its engine rounds by."""

    weights: StoredWeights
    spec: ModelSpec
    recipe: Recipe
    statistics: InputStatistics | None = None
    target: Target = CPU

    def eager(self, segments: list[Segment]) -> Eager:
        """What computes a pack of samples with the bundle's files."""
        return _AsStored(self.weights, {}, prefix=segments, rounding=self._rounding)

    def _rounding(self, kind: str, where: str, x: np.ndarray) -> np.ndarray:
        """Returns x as the engine multiplies or caches it; `where` is a weight, or begins with a layer's path."""
        engine = InputRounding(self.recipe, self.target, self.statistics)
        if kind != "linear input":
            layer = int(where.partition(".layers.")[2].partition(".")[0])
            return engine.cached(x, kind.removeprefix("cache "), layer)
        scheme = self.weights.matrices[where].scheme if where in self.weights.copies else self.recipe.scheme(where)
        return engine.rounded(self.weights.changed(where, x), scheme, where)


class _AsStored(Eager):
    """Multiplies by the copies of a weight where the bundle's graphs do."""

    def lm_head(self, x: np.ndarray, name: str) -> np.ndarray:
        if SHORTLIST_TABLE not in self._copies:
            return super().lm_head(x, name)
        rough, exact = self._multiply(x, SHORTLIST_TABLE, 1.0), self._product(x, name, 1.0)
        likely = np.argpartition(rough, -min(CANDIDATES, rough.shape[-1]))[..., -CANDIDATES:]
        np.put_along_axis(rough, likely, np.take_along_axis(exact, likely, -1), -1)
        return rough

    def _multiply(self, x: np.ndarray, path: str, gain: float) -> np.ndarray:
        if (copy := prefix_copy(path)) not in self._copies:
            return super()._multiply(x, path, gain)
        in_prefix = np.concatenate([np.arange(s.tokens) < s.prefix for s in self.segments(x.shape[1])])
        y = np.empty((*x.shape[:-1], self.source.shape(path)[0]), np.float32)
        for name, tokens in ((copy, in_prefix), (path, ~in_prefix)):
            y[:, tokens] = super()._multiply(x[:, tokens], name, gain)
        return y

    @property
    def _copies(self) -> set[str]:
        assert isinstance(self.source, StoredWeights), "Bug: only a bundle's files have copies"
        return self.source.copies


def parity(
    reference: Sequence[np.ndarray], rounded: StoredModel, samples: Sequence[StepSample], *, progress: Progress | None = None
) -> Parity:
    """Run a bundle's files layer by layer, teacher-forced with the samples' answers, and compare the logits at every token.

    Args:
        reference: The checkpoint's logits on the samples, each [answer tokens + 1, V].
    """
    model = ModelSteps(rounded.weights, rounded.spec)
    logits = scored_logits(model, samples, rounded.eager, progress=progress, label="comparing with the checkpoint: ")
    losses: list[float] = []
    agreed = 0
    for p, q in zip(reference, logits, strict=True):
        # A token at a time: a row is wide.
        losses += [float(kl_divergence(b[None], a[None])[0]) for a, b in zip(p, q, strict=True)]
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    matrices = ((path, m) for path, m in rounded.weights.matrices.items() if path not in rounded.weights.copies)
    # Infinite where rounding changed nothing, which JSON cannot say.
    sqnr = {path: round(m.sqnr, 2) if math.isfinite(m.sqnr) else None for path, m in matrices}
    return Parity(
        scenes=len(samples),
        image_tokens=model.image_segment(samples[0]).tokens,
        positions=len(losses),
        kl=float(np.mean(losses)),
        kl_worst=max(losses),
        agreement=agreed / len(losses),
        sqnr=dict(sorted(sqnr.items(), key=lambda item: math.inf if item[1] is None else item[1])),
    )


def scene(index: int, spec: ModelSpec, words: PromptTokenizer, pixels: Pixels = PALIGEMMA) -> TokenizedSample:
    """Returns a scene of the calibration split with one of its questions: a caption or boxes, in turn."""
    drawn = draw("calibration", index)
    kinds = {q.task: q for q in ask(drawn, index)}
    question = kinds["detect"] if index % 2 and "detect" in kinds else kinds["caption"]
    prompt = words.prompt_ids(question.prompt, 0)
    answer = words.prompt_ids(_answer(question), 0)[1:-1]  # without bos and newline
    return TokenizedSample(pixel_values(drawn.image, spec.resolution, pixels)[None], prompt, answer)


def _answer(question: Question) -> str:
    if question.answer is not None:
        return question.answer
    return " ; ".join(f"{locations(thing.box)} {label}" for label, thing in question.things)
