# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `pgx calibrate`: find the model, read the samples, run them observed, write the calibration file."""

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgxport import __version__
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.data.calibration_samples import Encoded, digest, encode, read_samples
from pgxport.errors import CheckpointError, EngineError, UsageError
from pgxport.exporter.calibration_file import About, Array, Calibration, check_output, checkpoint_sha256, disk, write_calibration
from pgxport.exporter.stream import Progress
from pgxport.hub.locate import ModelChoice, locate
from pgxport.models.safetensors import Tensor
from pgxport.runners.tokenizer import PromptTokenizer, read_token_ids

RUN = "run.json"  # of a folder of work: what it was begun for


@dataclass(frozen=True)
class CalibrateOptions(ModelChoice):
    """What to calibrate. Names are those of `pgx calibrate`'s flags.

    Attributes:
        checkpoint: A bundle, a checkpoint in hub layout, or a hub id; None where `size` says which.
        data: A JSONL file or a folder of samples; None draws scenes.
        samples: How many to take, from the beginning.
        moments: Whether to keep the second moments E[x xᵀ], which GPTQ needs.
    """

    output: str | Path = "calibration.safetensors"
    data: str | Path | None = None
    samples: int = 32
    moments: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """A calibration that has passed every check that needs no activation."""

    name: str
    model_sha256: str
    samples: list[Encoded]
    samples_sha256: str
    image_tokens: int
    layers: int
    options: CalibrateOptions

    def about(self, **findings: object) -> About:
        o = self.options
        words = ["pgx calibrate", *([self.name] if o.checkpoint else ["--size", o.size])]
        words += ["--res", o.res] if o.res else []
        words += ["--data", Path(o.data).name] if o.data else []
        words += ["--samples", o.samples, "--moments" if o.moments else "--no-moments"]
        versions = {p: importlib.metadata.version(p) for p in ("numpy", "onnxruntime")}
        return About.model_validate({
            "model": self.name, "model_sha256": self.model_sha256, "samples": len(self.samples), "samples_sha256": self.samples_sha256,
            "prefix_tokens": sum(self.image_tokens + len(s.prompt) for s in self.samples), "suffix_tokens": sum(len(s.answer) for s in self.samples),
            "moments": o.moments, "layers": self.layers, "versions": {"pgxport": __version__, **versions}, "command": " ".join(map(str, words)), **findings,
        })  # fmt: skip


def calibrate(options: CalibrateOptions, *, progress: Progress | None = None) -> Calibration:
    """Run samples through a model and write what the inputs of its linears were.

    A checkpoint is run layer by layer, and a run that was stopped goes on where it was; a bundle is run whole.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        InputError: the checkpoint or a sample cannot be used.
        NumericError: memory does not suffice, or activations are not finite.
        DiskError: the file cannot be written; nothing is left at its name.
    """
    try:
        import onnxruntime.quantization.calibrate  # noqa: F401  finds the ranges of the entropy observer
    except ImportError as error:
        raise EngineError(f'pgx calibrate needs ONNX Runtime: pip install "pgxport[cpu]" ({error})') from error
    check_output(Path(options.output), overwrite=options.overwrite)
    if (options.checkpoint is None) == (options.size is None):
        raise UsageError("name one model: a bundle, a checkpoint, or --size tiny --res 224")
    if options.checkpoint is not None and (Path(options.checkpoint) / MANIFEST).is_file():
        return _bundle(Bundle.open(options.checkpoint), options, progress)
    return _checkpoint(options, progress)


def _bundle(bundle: Bundle, options: CalibrateOptions, progress: Progress | None) -> Calibration:
    from pgxport.calib.bundle_pass import observe_bundle

    m = bundle.manifest
    words = PromptTokenizer(bundle.path / "tokenizer.json", m.token_ids)
    samples = read_samples(Path(options.data) if options.data else None, options.samples)
    job = Job(
        m.name, m.provenance.checkpoint_sha256, [encode(s, words) for s in samples], digest(samples), m.image_tokens, m.cache.layers, options
    )  # fmt: skip
    found = observe_bundle(bundle, job.samples, moments=options.moments, progress=progress)
    # Scores and variances are inside of fused operators, so activation ranges cannot be measured.
    about = job.about(engine="onnxruntime", inputs=found.inputs, ranges=None)
    tensors = {name: Array(values) for name, values in found.tensors().items()}
    return write_calibration(Path(options.output), about, tensors, overwrite=options.overwrite)


def _checkpoint(options: CalibrateOptions, progress: Progress | None) -> Calibration:
    from pgxport.calib.checkpoint_pass import observe_checkpoint, step_findings
    from pgxport.exporter.activation_ranges import ActivationRanges
    from pgxport.exporter.export import check_weights as check_weights
    from pgxport.models.checkpoint import Checkpoint
    from pgxport.models.config import read_config
    from pgxport.models.safetensors import read_header

    found = locate(options, progress=progress)
    checkpoint = Checkpoint.open(found.path, Path(options.adapter) if options.adapter else None)
    spec = read_config(checkpoint.config)
    check_weights(checkpoint, spec)
    tokenizer = checkpoint.file("tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(
            f"{found.name}: tokenizer.json is missing; download it beside the weights, from the same repository"
        )
    words = PromptTokenizer(tokenizer, read_token_ids(tokenizer, checkpoint.config))
    samples = read_samples(Path(options.data) if options.data else None, options.samples)
    job = Job(
        found.name, checkpoint_sha256(checkpoint.files()), [encode(s, words) for s in samples], digest(samples), spec.image_tokens,
        spec.text.depth, options,
    )  # fmt: skip
    # Of another version of pgx or numpy, finished steps are not those that this one would have made.
    key = job.about(engine="numpy", inputs={}, ranges=None).model_dump_json()
    output, activation_ranges = Path(options.output), ActivationRanges(spec)
    inputs: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    with _workplace(output.with_name(output.name + ".work"), key) as work:
        steps = observe_checkpoint(checkpoint, spec, job.samples, work, moments=options.moments, progress=progress)
        for step in steps:
            inputs |= step_findings(step, activation_ranges)
            tensors |= read_header(step)
        about = job.about(engine="numpy", inputs=inputs, ranges=activation_ranges.ranges(len(samples)))
        made = write_calibration(output, about, tensors, overwrite=options.overwrite)
    shutil.rmtree(work)
    return made


@contextmanager
def _workplace(folder: Path, key: str) -> Iterator[Path]:
    """A folder of unfinished work for one run; what another run left there is deleted.

    Raises:
        UsageError: another pgx works there, or the folder is something else.
    """
    with disk(f"cannot use {folder}"):
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process dies
        with disk(f"cannot use {folder}"):
            _claim(folder, key)
        yield folder
    except BlockingIOError:
        raise UsageError(f"another pgx works in {folder}; wait for it, or choose another -o") from None
    finally:
        os.close(lock)


def _claim(folder: Path, key: str) -> None:
    files, run = list(folder.iterdir()), folder / RUN
    if files and not run.is_file():
        raise UsageError(
            f"{folder} is where unfinished work would go, and holds {files[0].name!r}; move it, or choose another -o"
        )
    if run.is_file() and run.read_text() == key:
        return
    for file in (f for f in files if f != run):
        file.unlink()
    run.write_text(key)
