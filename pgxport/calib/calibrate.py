# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `pgx calibrate`: find the model, read the samples, run them observed, write the file."""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgxport import __version__
from pgxport.activations.calibration_file import About, Array, Calibration, checkpoint_sha256, write_calibration
from pgxport.activations.encoding import EncodedSample, digest, encode
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.data.loader import first_samples
from pgxport.errors import EngineError, InputError, UsageError
from pgxport.exporter.stream import Progress
from pgxport.files import check_output, disk_errors, locked
from pgxport.hub.locate import ModelChoice, locate
from pgxport.metrics.sample import Sample
from pgxport.models.safetensors import Tensor
from pgxport.runners.saved_tokenizer import find_tokenizer
from pgxport.runners.tokenizer import PromptTokenizer

Say = Callable[[str], None]
LONGEST = 8192  # tokens of a sample, Gemma's context; attention takes their square
RUN = "run.json"  # in a folder of work: the calibration that it belongs to


@dataclass(frozen=True)
class CalibrateOptions(ModelChoice):
    """What to calibrate. Names are those of `pgx calibrate`'s flags.

    Attributes:
        checkpoint: A bundle, a checkpoint in hub layout, or a hub id; None where `size` says which.
        data: A data set's file or folder (docs/reference/data.md); None draws scenes.
        samples: How many samples to take, from the first on.
        moments: Whether to keep the second moments E[x xᵀ], which GPTQ needs.
    """

    output: str | Path = "calibration.safetensors"
    data: str | Path | None = None
    samples: int = 32
    moments: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class CalibrationData:
    """The samples, the sha256 of what they ask, and how many records before the last cannot be used."""

    encoded: list[EncodedSample]
    sha256: str
    skipped: int


@dataclass(frozen=True)
class CalibrationJob:
    """A calibration that has passed every check that needs no activation."""

    name: str
    model_sha256: str
    data: CalibrationData
    image_tokens: int
    layers: int
    options: CalibrateOptions

    @property
    def samples(self) -> list[EncodedSample]:
        return self.data.encoded

    def about(self, **findings: object) -> About:
        o = self.options
        command: list[object] = ["pgx calibrate", *(["--size", o.size] if o.size else [self.name])]
        command += [part for adapter in o.adapters for part in ("--adapter", adapter.name)]
        command += ["--res", o.res] if o.res else []
        command += ["--data", Path(o.data).name] if o.data else []
        command += ["--samples", o.samples, "--moments" if o.moments else "--no-moments"]
        versions = {p: importlib.metadata.version(p) for p in ("numpy", "onnxruntime")}
        return About.model_validate(
            {
                "model": self.name,
                "model_sha256": self.model_sha256,
                "samples": len(self.samples),
                "skipped": self.data.skipped,
                "samples_sha256": self.data.sha256,
                "prefix_tokens": sum(self.image_tokens + len(s.prompt) for s in self.samples),
                "suffix_tokens": sum(len(s.answer) for s in self.samples),
                "moments": o.moments,
                "layers": self.layers,
                "versions": {"pgxport": __version__, **versions},
                "command": " ".join(map(str, command)),
                **findings,
            }
        )


def calibrate(options: CalibrateOptions, *, progress: Progress | None = None, say: Say | None = None) -> Calibration:
    """Run samples through a model and write statistics of the inputs of its linears.

    A checkpoint is run layer by layer, and a stopped run goes on with its layer; a bundle is run whole.

    Args:
        say: Is told which records cannot be used, and why; the file has their number.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        InputError: the checkpoint cannot be used, or too many records.
        NumericError: memory does not suffice, or activations are not finite.
        DiskError: the file cannot be written; nothing is left at its name.
    """
    try:
        import onnxruntime.quantization.calibrate  # noqa: F401  the entropy observer's search
    except ImportError as error:
        raise EngineError(f'pgx calibrate needs ONNX Runtime: pip install "pgxport[cpu]" ({error})') from error
    check_output(Path(options.output), overwrite=options.overwrite)
    if (options.checkpoint is None) == (options.size is None) and (options.size or not options.adapters):
        raise UsageError("name one model: a bundle, a checkpoint, --size tiny --res 224, or an --adapter that names its base")
    if options.checkpoint is not None and (Path(options.checkpoint) / MANIFEST).is_file():
        return _bundle(Bundle.open(options.checkpoint), options, progress, say)
    return _checkpoint(options, progress, say)


def _samples(
    options: CalibrateOptions, tokenizer: PromptTokenizer, image_tokens: int, most: int, say: Say | None
) -> CalibrationData:
    """The samples that the model takes, each of at most `most` tokens with its image and its answer."""

    def accept(sample: Sample) -> None:
        encoded = encode(sample, tokenizer)
        if (length := image_tokens + len(encoded.prompt) + len(encoded.answer)) > most:
            raise InputError(f"sample {sample.id}: image, prompt and answer have {length} tokens, more than {most}; shorten them")

    data = first_samples(Path(options.data) if options.data else None, options.samples, accept)
    if say:
        for remark in data.remarks:
            say(remark)
    encoded = [encode(sample, tokenizer) for sample in data.samples]
    return CalibrationData(encoded, digest(data.samples), len(data.unusable))


def _bundle(bundle: Bundle, options: CalibrateOptions, progress: Progress | None, say: Say | None) -> Calibration:
    from pgxport.calib.bundle_pass import observe_bundle

    m = bundle.manifest
    tokenizer = PromptTokenizer(bundle.path / "tokenizer.json", m.token_ids)
    samples, checkpoint = _samples(options, tokenizer, m.image_tokens, m.context_length, say), m.provenance.checkpoint_sha256
    job = CalibrationJob(m.name, checkpoint, samples, m.image_tokens, m.cache.layers, options)
    statistics = observe_bundle(bundle, job.samples, moments=options.moments, progress=progress)
    # Scores and variances are inside of fused operators, so activation ranges cannot be measured.
    about = job.about(engine="onnxruntime", inputs=statistics.inputs, ranges=None)
    tensors = {name: Array(values) for name, values in statistics.tensors().items()}
    return write_calibration(Path(options.output), about, tensors, overwrite=options.overwrite)


def _checkpoint(options: CalibrateOptions, progress: Progress | None, say: Say | None) -> Calibration:
    from pgxport.activations.checkpoint_pass import observe_checkpoint, step_findings
    from pgxport.activations.ranges import ActivationRanges
    from pgxport.exporter.prepare import check_weights, open_checkpoint
    from pgxport.models.processor_config import pixels_of
    from pgxport.models.safetensors import read_header

    model = locate(options, progress=progress)
    if say:
        for sentence in model.notes:
            say(sentence)
    checkpoint = open_checkpoint(model, options)
    spec = checkpoint.spec()
    check_weights(checkpoint, spec)
    tokenizer = find_tokenizer(checkpoint.path, checkpoint.config, options.adapters).words()
    samples, sha256 = _samples(options, tokenizer, spec.image_tokens, LONGEST, say), checkpoint_sha256(checkpoint.files())
    job = CalibrationJob(model.name, sha256, samples, spec.image_tokens, spec.text.depth, options)
    # The key names versions: another pgx or numpy would have computed finished steps differently.
    pixels = pixels_of(checkpoint, spec)
    key = job.about(engine="numpy", inputs={}, ranges=None).model_dump_json() + pixels.model_dump_json()
    output, activation_ranges = Path(options.output), ActivationRanges(spec)
    inputs: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    with _workplace(output.with_name(output.name + ".work"), key) as work:
        steps = observe_checkpoint(checkpoint, spec, job.samples, work, pixels, moments=options.moments, progress=progress)
        for step in steps:
            inputs |= step_findings(step, activation_ranges)
            tensors |= read_header(step)
        about = job.about(engine="numpy", inputs=inputs, ranges=activation_ranges.ranges(len(job.samples)))
        made = write_calibration(output, about, tensors, overwrite=options.overwrite)
    shutil.rmtree(work)
    return made


@contextmanager
def _workplace(folder: Path, key: str) -> Iterator[Path]:
    """A folder of unfinished work for one run; the files of another run are deleted.

    Raises:
        UsageError: another pgx works there, or the folder is something else.
    """
    with ExitStack() as stack:
        with disk_errors(f"cannot use {folder}"):
            folder.mkdir(exist_ok=True)
            stack.enter_context(locked(folder, f"another pgx works in {folder}; wait for it, or choose another -o"))
            _claim(folder, key)
        yield folder


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
