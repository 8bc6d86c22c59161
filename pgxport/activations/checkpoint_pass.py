# SPDX-License-Identifier: Apache-2.0
"""Calibrate on a checkpoint: all samples pass one layer before the next, in numpy; a killed run can go on.

Memory holds one layer's statistics, a few row blocks of its weights and one sample's activations; all others
wait in files.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np

from pgxport.activations.calibration_file import Array, read_metadata, write_tensors
from pgxport.activations.encoding import EncodedSample, token_weights
from pgxport.activations.observe import InputObserver
from pgxport.activations.ranges import ActivationRanges
from pgxport.activations.steps import PIXELS, ModelSteps, Step
from pgxport.bundle.manifest import Pixels
from pgxport.files import disk_errors
from pgxport.models.checkpoint import TensorSource
from pgxport.models.eager import Eager
from pgxport.models.spec import ModelSpec
from pgxport.runners.image import PALIGEMMA, pixel_values

Progress = Callable[[str, int, int], None]  # the step, bytes of activations so far, bytes in all


def observe_checkpoint(
    source: TensorSource,
    spec: ModelSpec,
    samples: Sequence[EncodedSample],
    work: Path,
    pixels: Pixels = PALIGEMMA,
    *,
    moments: bool,
    progress: Progress | None,
) -> list[Path]:
    """Run every step that has no file in `work` yet, and return the files, in order.

    Each is written when its step is done: the step's tensors, and beside them its activation ranges and which
    linears share an input.

    Raises:
        NumericError: activations are not finite.
        DiskError: the folder of work cannot be written.
    """
    steps = ModelSteps(source, spec).all()
    files = [work / f"step-{i:03}.safetensors" for i in range(len(steps))]
    sizes = [sum(4 * prod(step.shape(sample)) for sample in samples) for step in steps]
    weights = token_weights(samples, spec.image_tokens)
    done = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    for i in range(done, len(steps)):
        arriving, leaving = work / f"stream-{i:03}", work / f"stream-{i + 1:03}"
        statistics, activation_ranges = InputObserver(moments=moments), ActivationRanges(spec)
        before, count = sum(sizes[:i]), 0
        with disk_errors(f"cannot write {leaving}"), open(leaving, "wb") as out:
            for sample, x, w in zip(samples, _arrivals(arriving, steps[i], samples, spec, pixels), weights, strict=True):
                prefix = spec.image_tokens + len(sample.prompt)
                g = Eager(source, {}, prefix=prefix, observe=_Observer(statistics, activation_ranges, steps[i].layer, w))
                y = steps[i].run(g, sample, x)
                if y is not None:
                    out.write(np.ascontiguousarray(y, np.float32).data)
                count += x.nbytes
                if progress:
                    progress(steps[i].name, before + count, sum(sizes))
            out.flush()
            os.fsync(out.fileno())
        about = {
            "census": json.dumps([activation_ranges.largest, activation_ranges.where]),
            "inputs": json.dumps(statistics.inputs),
        }
        write_tensors(files[i], {name: Array(values) for name, values in statistics.tensors().items()}, about)
        arriving.unlink(missing_ok=True)  # from here on, the step is done
    return files


def step_findings(file: Path, activation_ranges: ActivationRanges) -> dict[str, str]:
    """Add a step's activation ranges; return its linears, each with the one its input is stored under."""
    metadata = read_metadata(file)
    largest, where = json.loads(metadata["census"])
    for kind, top in largest.items():
        activation_ranges.add(kind, where[kind], top)
    return dict(json.loads(metadata["inputs"]))


class _Observer:
    """Sorts what an Eager shows into statistics and activation ranges."""

    def __init__(self, statistics: InputObserver, activation_ranges: ActivationRanges, layer: int | None, weights: np.ndarray):
        self._statistics, self._ranges, self._layer = statistics, activation_ranges, layer
        self._weights = weights if layer is not None else None
        self._input: tuple[str, np.ndarray] | None = None

    def __call__(self, kind: str, where: str, values: np.ndarray) -> None:
        if kind == "linear input":
            if self._input and self._input[1] is values:  # q, k and v have one input
                self._statistics.inputs[where] = self._input[0]
            else:
                self._statistics.add_input([where], values, self._weights)
                self._input = where, values
        elif kind in ("cache key", "cache value"):
            assert self._layer is not None, f"Bug: {where} is cached outside of the decoder"
            self._statistics.add_cache(self._layer, kind.removeprefix("cache "), values)
        else:
            self._ranges(kind, where, values)


def _arrivals(file: Path, step: Step, samples: Sequence[EncodedSample], spec: ModelSpec, pixels: Pixels) -> Iterator[np.ndarray]:
    """The array that each sample brings into a step: pixels, later what the step before wrote."""
    if step.name == PIXELS:
        for sample in samples:
            yield pixel_values(sample.sample.open(), spec.resolution, pixels)[None]
        return
    with disk_errors(f"cannot read {file}"), open(file, "rb") as stream:
        for sample in samples:
            shape = step.shape(sample)
            yield np.fromfile(stream, np.float32, prod(shape)).reshape(shape)
