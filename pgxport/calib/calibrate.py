# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `pgx calibrate`: find the model, read the samples, run them observed, write the file."""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pgxport import __version__
from pgxport.activations.calibration_file import About, Array, Calibration, checkpoint_sha256, contents, write_calibration
from pgxport.activations.checkpoint_pass import observe_checkpoint
from pgxport.activations.encoding import EncodedSample, digest, encode, step_sample
from pgxport.activations.observe import EVERYTHING, Needs
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.data.loader import first_samples
from pgxport.errors import EngineError, InputError, UsageError
from pgxport.exporter.gather import changes_of
from pgxport.exporter.inputs.needs import changes_sha256, needs_of
from pgxport.exporter.prepare import ExportOptions, check_weights, find_recipe, open_checkpoint
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import Progress
from pgxport.exporter.targets import find_target
from pgxport.files import check_output, disk_errors, locked
from pgxport.hub.locate import ModelChoice, locate
from pgxport.metrics.sample import Sample
from pgxport.models.processor_config import pixels_of
from pgxport.models.safetensors import Tensor
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import weight_shapes
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
        moments: Whether to keep the second moments E[x xᵀ], which GPTQ needs; None: where the recipe has a use for them.
        recipe: A recipe's name, or its TOML file: gather what it needs and nothing else; None: what any needs.
        target: What the recipe is for, where that is a name.
    """

    output: str | Path = "calibration.safetensors"
    data: str | Path | None = None
    samples: int = 32
    moments: bool | None = None
    recipe: str | Path | None = None
    target: str = "cpu"
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
    spec: ModelSpec
    recipe: Recipe | None
    options: CalibrateOptions

    @property
    def image_tokens(self) -> int:
        return self.spec.image_tokens

    @property
    def needs(self) -> Needs:
        """What is gathered."""
        needs = needs_of(self.recipe, self.spec) if self.recipe else EVERYTHING
        return needs if self.options.moments is not False else replace(needs, moments=frozenset())

    @property
    def moments(self) -> bool:
        return self.needs.moments is None or bool(self.needs.moments)

    @property
    def samples(self) -> list[EncodedSample]:
        return self.data.encoded

    def about(self, **findings: object) -> About:
        o = self.options
        command: list[object] = ["pgx calibrate", *(["--size", o.size] if o.size else [self.name])]
        command += [part for adapter in o.adapters for part in ("--adapter", adapter.name)]
        command += ["--res", o.res] if o.res else []
        command += ["--data", Path(o.data).name] if o.data else []
        command += ["--samples", o.samples]
        command += ["--for", Path(o.recipe).name] if o.recipe else []
        command += ["--target", o.target] if o.recipe and o.target != "cpu" else []
        command += [] if o.moments is None else ["--moments" if o.moments else "--no-moments"]
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
                "moments": self.moments,
                "recipe": self.recipe.name if self.recipe else None,
                "changes_sha256": changes_sha256(self.recipe, self.spec) if self.recipe and self.needs.changes else None,
                "layers": self.spec.text.depth,
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
    from pgxport.calib.bundle_pass import model_of, observe_bundle

    m = bundle.manifest
    tokenizer = PromptTokenizer(bundle.path / "tokenizer.json", m.token_ids)
    samples, checkpoint = _samples(options, tokenizer, m.image_tokens, m.context_length, say), m.provenance.checkpoint_sha256
    spec = model_of(bundle)
    job = CalibrationJob(m.name, checkpoint, samples, spec, _recipe(options, spec), options)
    if job.needs.changes:
        raise UsageError(
            f"the recipe {options.recipe} scales or rotates inputs before it rounds them to a static range, which a bundle does "
            f"not show; calibrate the checkpoint"
        )
    statistics = observe_bundle(bundle, job.samples, job.needs, progress=progress)
    # Scores and variances are inside of fused operators, so activation ranges cannot be measured.
    tensors = {name: Array(values) for name, values in statistics.tensors().items()}
    about = job.about(engine="onnxruntime", ranges=None, **_contents(job, statistics.inputs, tensors))
    return write_calibration(Path(options.output), about, tensors, overwrite=options.overwrite)


def _contents(job: CalibrationJob, inputs: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return contents(inputs, tensors, layers=job.spec.text.depth, moments=job.moments)


def _recipe(options: CalibrateOptions, spec: ModelSpec) -> Recipe | None:
    """The recipe that is calibrated for, as it fits the model.

    Raises:
        UsageError: there is none of that name, it needs no calibration, or what it needs was ruled out.
    """
    if options.recipe is None:
        return None
    target, shapes = find_target(options.target), weight_shapes(spec)
    file = options.recipe if Path(options.recipe).suffix == ".toml" else None
    recipe = find_recipe(ExportOptions.precision if file else str(options.recipe), file, target).fitted(shapes)
    recipe.check(shapes)
    needs = needs_of(recipe, spec)
    if not needs:
        raise UsageError(f"the recipe {options.recipe} needs nothing that a calibration measures; export with it as it is")
    if options.moments is not None and bool(needs.moments) != options.moments:
        state = "has a use for second moments" if needs.moments else "has no use for second moments"
        raise UsageError(f"the recipe {options.recipe} {state}; leave {'--moments' if options.moments else '--no-moments'} away")
    return recipe


def _checkpoint(options: CalibrateOptions, progress: Progress | None, say: Say | None) -> Calibration:
    model = locate(options, progress=progress)
    if say:
        for sentence in model.notes:
            say(sentence)
    checkpoint = open_checkpoint(model, options)
    spec = checkpoint.spec()
    check_weights(checkpoint, spec)
    tokenizer = find_tokenizer(checkpoint.path, checkpoint.config, options.adapters).words()
    samples, sha256 = _samples(options, tokenizer, spec.image_tokens, LONGEST, say), checkpoint_sha256(checkpoint.files())
    job = CalibrationJob(model.name, sha256, samples, spec, _recipe(options, spec), options)
    # The key names versions: another pgx or numpy would have computed finished steps differently.
    pixels = pixels_of(checkpoint, spec)
    key = job.about(engine="numpy", inputs={}, ranges=None).model_dump_json() + pixels.model_dump_json()
    output = Path(options.output)
    fed = [step_sample(sample, spec, pixels) for sample in job.samples]
    changes = partial(changes_of, checkpoint, spec, job.recipe) if job.recipe else None
    with _workplace(output.with_name(output.name + ".work"), key) as work:
        found = observe_checkpoint(checkpoint, spec, fed, work, job.needs, changes=changes, progress=progress)
        ranges = found.activation_ranges.ranges(len(job.samples))
        about = job.about(engine="numpy", ranges=ranges, **_contents(job, found.inputs, found.tensors))
        made = write_calibration(output, about, found.tensors, overwrite=options.overwrite)
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
