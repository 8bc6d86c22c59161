# SPDX-License-Identifier: Apache-2.0
"""One pass over a checkpoint in numpy: all samples go through one layer before the next, observed; a killed pass can go on.

Memory holds one layer's statistics, a few row blocks of its weights and one pack's activations; all others
wait in files.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import numpy as np

from pgxport.activations.calibration_file import Array, read_metadata, write_tensors
from pgxport.activations.encoding import token_weights
from pgxport.activations.observe import Changes, InputObserver, Needs
from pgxport.activations.ranges import ActivationRanges
from pgxport.activations.statistics import Statistics
from pgxport.activations.steps import PIXELS, ModelSteps, Pack, Step, StepSample
from pgxport.files import disk_errors
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import Eager, Segment
from pgxport.models.safetensors import Tensor, read_header
from pgxport.models.spec import ModelSpec

Progress = Callable[[str, int, int], None]  # the step, bytes of activations so far, bytes in all
# What a recipe does to the inputs of the linears whose statistics are known now, those of one step.
ChangesOf = Callable[[Statistics], Changes]
LOGITS = "logits"  # the file of what scored samples gave


@dataclass(frozen=True)
class Observed:
    """What a pass found.

    Attributes:
        tensors: Of the calibration file, each in the file of its step.
        inputs: A linear's weight, and the weight under whose name its input is stored.
        activation_ranges: Of all samples, for float16.
        logits: Of the scored samples, each [answer tokens + 1, V], in the file.
    """

    activation_ranges: ActivationRanges
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    logits: list[np.ndarray] = field(default_factory=list)


def observe_checkpoint(
    source: TensorSource,
    spec: ModelSpec,
    samples: Sequence[StepSample],
    work: Path,
    needs: Needs,
    *,
    changes: ChangesOf | None = None,
    progress: Progress | None,
) -> Observed:
    """Run every step that has no file in `work` yet, and return what all have found.

    Each step's file is written when the step is done: its tensors, and beside them its activation ranges and which linears
    share an input. Statistics are of the samples that are not scored, which come first.

    Args:
        changes: Has to be given where `needs` wants changed inputs.

    Raises:
        NumericError: activations are not finite.
        DiskError: the folder of work cannot be written.
    """
    assert sorted(samples, key=lambda s: s.scored) == list(samples), "Bug: a scored sample comes before one that is observed"
    model = ModelSteps(source, spec)
    steps, packs = model.all(), model.packs(samples)
    files = [work / f"step-{i:03}.safetensors" for i in range(len(steps))]
    sizes = [sum(4 * prod(step.shape(pack)) for pack in packs) for step in steps]
    done = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    for i in range(done, len(steps)):
        arriving, leaving = work / f"stream-{i:03}", work / (LOGITS if i + 1 == len(steps) else f"stream-{i + 1:03}")
        statistics, activation_ranges = InputObserver(needs, work), ActivationRanges(spec)
        before, count = sum(sizes[:i]), 0
        with disk_errors(f"cannot write {leaving}"), open(leaving, "wb") as out:
            for pack, x, w in zip(packs, _arrivals(arriving, steps[i], packs), _weights(model, packs), strict=True):
                observer = _Observer(statistics, activation_ranges, steps[i], pack, w)
                y = steps[i].run(Eager(source, {}, prefix=steps[i].segments(pack), observe=observer), pack, x)
                observer.flush()
                if y is not None:
                    out.write(np.ascontiguousarray(y, np.float32).data)
                count += x.nbytes
                if progress:
                    progress(steps[i].name, before + count, sum(sizes))
            out.flush()
            os.fsync(out.fileno())
        _write(files[i], statistics, activation_ranges, changes)
        arriving.unlink(missing_ok=True)  # from here on, the step is done
    return _found(files, spec, packs, work / LOGITS)


def scored_logits(
    model: ModelSteps,
    samples: Sequence[StepSample],
    eager: Callable[[list[Segment]], Eager],
    *,
    progress: Progress | None = None,
    label: str = "",
) -> list[np.ndarray]:
    """Run all samples through one step before the next, and return the logits [answer tokens + 1, V] of each.

    Args:
        eager: Makes what computes a pack, whose samples have these segments.
        label: For progress, before the names of the steps.
    """
    steps, packs = model.all(), model.packs(samples)
    sizes = [sum(4 * prod(step.shape(pack)) for pack in packs) for step in steps]
    arrays: list[np.ndarray | None] = [None] * len(packs)
    for i, step in enumerate(steps):
        for number, pack in enumerate(packs):
            if progress:
                progress(f"{label}{step.name}", sum(sizes[:i]), sum(sizes))
            x = arrays[number]
            arrays[number] = step.run(eager(step.segments(pack)), pack, _pictures(pack) if x is None else x)
    if progress:
        progress(f"{label}{steps[-1].name}", sum(sizes), sum(sizes))
    whole = (y[0] for y in arrays if y is not None)
    return [rows for pack, y in zip(packs, whole, strict=True) for rows in _by_sample(pack, y)]


def _by_sample(pack: Pack, logits: np.ndarray) -> list[np.ndarray]:
    """The rows [answer tokens + 1, V] of each sample of [P, V]."""
    ends = [0, *accumulate(len(sample.answer) + 1 for sample in pack)]
    return [logits[start:stop] for start, stop in pairwise(ends)]


def _write(file: Path, statistics: InputObserver, activation_ranges: ActivationRanges, changes: ChangesOf | None) -> None:
    tensors = statistics.tensors()
    if statistics.waiting:
        assert changes is not None, "Bug: changed inputs are wanted, and nobody says how they are changed"
        known = {name: Array(values) for name, values in tensors.items()}
        tensors |= statistics.changed(changes(Statistics("this step", statistics.inputs, known, None)))
    about = {
        "census": json.dumps([activation_ranges.largest, activation_ranges.where]),
        "inputs": json.dumps(statistics.inputs),
    }
    write_tensors(file, {name: Array(values) for name, values in tensors.items()}, about)


def _found(files: Sequence[Path], spec: ModelSpec, packs: Sequence[Pack], logits: Path) -> Observed:
    found = Observed(ActivationRanges(spec))
    for file in files:
        metadata = read_metadata(file)
        largest, where = json.loads(metadata["census"])
        for kind, top in largest.items():
            found.activation_ranges.add(kind, where[kind], top)
        found.inputs.update(json.loads(metadata["inputs"]))
        found.tensors.update(read_header(file))
    scored = [sample for pack in packs if any(s.scored for s in pack) for sample in pack]
    if scored:
        whole = np.memmap(logits, np.float32, "r").reshape(-1, spec.text.vocab)
        found.logits.extend(rows for sample, rows in zip(scored, _by_sample(scored, whole), strict=True) if sample.scored)
    return found


class _Observer:
    """Sorts what an Eager shows of a pack into statistics, of the samples that are not scored, and activation ranges, of all."""

    def __init__(
        self, statistics: InputObserver, activation_ranges: ActivationRanges, step: Step, pack: Pack, weights: np.ndarray
    ):
        self._statistics, self._ranges, self._layer = statistics, activation_ranges, step.layer
        observed = [sample for sample in pack if not sample.scored]
        # The last step shows the positions that answers are read from, all others show all tokens.
        read, tokens = sum(len(s.answer) + 1 for s in observed), sum(s.tokens for s in step.segments(observed))
        self._tokens = read if step.last else tokens
        self._weights = weights if step.layer is not None else None
        self._input: tuple[list[str], np.ndarray] | None = None

    def __call__(self, kind: str, where: str, values: np.ndarray) -> None:
        if kind == "linear input":
            if self._input and self._input[1] is values:  # q, k and v have one input
                self._input[0].append(where)
            else:
                self.flush()
                self._input = [where], values
        elif kind in ("cache key", "cache value"):
            assert self._layer is not None, f"Bug: {where} is cached outside of the decoder"
            if self._tokens:
                self._statistics.add_cache(self._layer, kind.removeprefix("cache "), values[:, :, : self._tokens])
        else:
            self._ranges(kind, where, values)

    def flush(self) -> None:
        """Count the input that was shown last: all linears that have it are known now."""
        if self._input is None:
            return
        (paths, values), self._input = self._input, None
        if self._tokens:
            self._statistics.add_input(paths, values[:, : self._tokens], self._weights)


def _weights(model: ModelSteps, packs: Sequence[Pack]) -> Iterator[np.ndarray]:
    """The weights of the tokens of each pack's samples that are not scored."""
    observed = [sample for pack in packs for sample in pack if not sample.scored]
    of_sample = iter(token_weights(observed, [model.image_segment(sample).tokens for sample in observed]))
    for pack in packs:
        weights = [next(of_sample) for sample in pack if not sample.scored]
        yield np.concatenate(weights) if weights else np.zeros(0, np.float32)


def _pictures(pack: Pack) -> np.ndarray:
    return np.concatenate([sample.pixels() for sample in pack])


def _arrivals(file: Path, step: Step, packs: Sequence[Pack]) -> Iterator[np.ndarray]:
    """The array that each pack brings into a step: pictures, later what the step before wrote."""
    if step.name == PIXELS:
        yield from map(_pictures, packs)
        return
    with disk_errors(f"cannot read {file}"), open(file, "rb") as stream:
        for pack in packs:
            shape = step.shape(pack)
            yield np.fromfile(stream, np.float32, prod(shape)).reshape(shape)
