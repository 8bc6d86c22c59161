# SPDX-License-Identifier: Apache-2.0
"""The options of an export, and every check of them that reads no weight."""

from dataclasses import dataclass
from pathlib import Path

from pgxport.activations.calibration_file import Calibration
from pgxport.bundle.manifest import Generation, Pixels
from pgxport.bundle.writer import BundleWriter
from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.inputs.needs import check_gathered
from pgxport.exporter.inputs.scaling import check_sites
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipe_toml import read_recipe
from pgxport.exporter.stream import Progress
from pgxport.exporter.targets import Target, find_target
from pgxport.hub.locate import Located, ModelChoice, locate
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.generation_config import generation_of
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.processor_config import pixels_of
from pgxport.models.spec import ModelSpec, without_window
from pgxport.models.weights import weight_shapes
from pgxport.runners.saved_tokenizer import SavedTokenizer, check_token_rows, find_tokenizer
from pgxport.text import listed

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class ExportOptions(ModelChoice):
    """Options of an export, called as the flags of `pgx export`.

    Attributes:
        output: Folder to write; None names it after the model.
        precision: Name of a recipe.
        recipe: A TOML file in place of a named recipe.
        calibration: A file of `pgx calibrate`; None: recipes that need statistics take them of embedded scenes.
        trt: Version of TensorRT to write for, "10.3", "10.16" or "11"; None: 11.
        sm: Compute capability of the GPU, as "8.7"; the graphs then keep to its precisions.
        context: Longest prefix and answer together, in tokens; None leaves room for a long prompt and answer.
        local_window: "hf": generated tokens see a window of the prefix in Gemma 2's local layers, as in transformers;
            "none": they see all of it, as in the training code. Both are the same below 4,096 tokens.
        parity: Scenes on which a quantized bundle is compared with the checkpoint before it gets its name; 0: none.
        parity_tokens: Image tokens of each that are compared at most, an even subset; 0: all; None: by the model's size.
        gate: Least token agreement with the checkpoint, 0 to 1; below it nothing is written.
        answer: Answer a drawn scene with the bundle before it gets its name, where this machine can.
    """

    output: str | Path | None = None
    precision: str = "fp32"
    recipe: str | Path | None = None
    calibration: str | Path | None = None
    target: str = "cpu"
    trt: str | None = None
    sm: str | None = None
    context: int | None = None
    local_window: str = "hf"
    parity: int = 1
    parity_tokens: int | None = None
    gate: float | None = None
    answer: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class PreparedExport:
    """An export that has passed every check that reads no weight."""

    options: ExportOptions
    found: Located
    checkpoint: Checkpoint
    spec: ModelSpec
    recipe: Recipe
    target: Target
    context: int
    masks: MaskWeights | None
    tokenizer: SavedTokenizer
    pixels: Pixels
    generation: Generation
    output: Path
    calibration: Calibration | None

    @property
    def max_new_tokens(self) -> int:
        """The longest answer, unless the caller says otherwise."""
        return self.generation.max_new_tokens or MAX_NEW_TOKENS


def prepare(options: ExportOptions, *, progress: Progress | None = None) -> PreparedExport:
    """Find the checkpoint, and check it against its config, the options and the target.

    Raises:
        UsageError: an option names what does not exist, or options contradict each other.
        CheckpointError: the checkpoint is not a complete PaliGemma.
    """
    target = find_target(options.target, options.trt)
    recipe = find_recipe(options.precision, options.recipe, target)
    calibration = Calibration.open(options.calibration) if options.calibration else None
    _check_options(options, target)
    found = locate(options, precision=recipe.name, progress=progress)
    output = Path(options.output) if options.output else Path(f"{found.name}-{recipe.name}-{target.name}")
    BundleWriter(output, overwrite=options.overwrite).check_output()
    checkpoint = open_checkpoint(found, options)
    spec = checkpoint.spec(local_window=options.local_window == "hf")
    _check_spec(spec, found, options)
    check_weights(checkpoint, spec)
    recipe = recipe.fitted(weight_shapes(spec))
    recipe.check(weight_shapes(spec))
    check_sites(spec, recipe.scheme)
    if calibration:
        check_gathered(calibration, recipe, spec, str(options.recipe or options.precision))
    pixels = pixels_of(checkpoint, spec)
    generation = generation_of(checkpoint)
    context = context_length(spec, options.context, generation)
    masks = options.masks or found.masks
    tokenizer = find_tokenizer(checkpoint.path, checkpoint.config, options.adapters)
    check_token_rows(tokenizer, spec.text.vocab)
    return PreparedExport(
        options,
        found,
        checkpoint,
        spec,
        recipe,
        target,
        context,
        MaskWeights(Path(masks)) if masks else None,
        tokenizer,
        pixels,
        generation,
        output,
        calibration,
    )


def find_recipe(precision: str, file: str | Path | None, target: Target) -> Recipe:
    """The recipe of that name, or in that file, for the target.

    Raises:
        UsageError: there is none, the file is not sound, both were given, or the target cannot run it.
    """
    if file is None:
        recipe = target.recipe(precision)
    elif precision != ExportOptions.precision:
        raise UsageError(
            f"--precision {precision} and --recipe {file} were both given; a recipe says the precision of every weight"
        )
    else:
        recipe = read_recipe(Path(file))
    target.check(recipe)
    return recipe


def context_length(spec: ModelSpec, asked: int | None, generation: Generation | None = None) -> int:
    """The longest prefix and answer together, in tokens.

    Args:
        asked: The length that was asked for; None: room for a long prompt and a long answer.
        generation: What the checkpoint says of the longest answer.

    Raises:
        UsageError: an image and a prompt do not fit.
    """
    answer = max(MAX_NEW_TOKENS, (generation and generation.max_new_tokens) or 0)
    length = spec.image_tokens + MAX_NEW_TOKENS + answer if asked is None else asked
    if length <= spec.image_tokens:
        raise UsageError(f"--context {length} has no room for an image of {spec.image_tokens} tokens and a prompt")
    return length


def check_weights(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """The checkpoint holds every weight of the spec in its shape, and no other.

    Raises:
        CheckpointError: it does not.
    """
    expected, present = weight_shapes(spec), set(checkpoint.names())
    where = checkpoint.path.name
    if missing := [n for n in expected if n not in present]:
        raise CheckpointError(f"{where}: {_listed(missing)} missing; give a complete checkpoint of the sizes in its config.json")
    if strangers := sorted(present - set(expected)):
        raise CheckpointError(
            f"{where}: {_listed(strangers)} not part of a PaliGemma of the sizes in its config.json, and would not be used; "
            f"give the config.json that was saved with the weights, or take these tensors out"
        )
    if wrong := [n for n, shape in expected.items() if checkpoint.shape(n) != shape]:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} is {list(checkpoint.shape(name))} where config.json says {list(expected[name])}"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )


def _check_options(options: ExportOptions, target: Target) -> None:
    """Options that need each other are given together, and none that contradict each other.

    Raises:
        UsageError: they are not.
    """
    if options.sm is not None and target.tensorrt is None:
        raise UsageError(
            f"--sm {options.sm} is of a GPU, and the target is {target.name!r}; leave --sm away, or --target tensorrt"
        )
    if options.gate is not None and not options.parity:
        raise UsageError(
            f"--gate {options.gate:g} judges by what --parity measures, which is 0 scenes; leave --parity away, or --gate"
        )
    if options.local_window not in ("hf", "none"):
        raise UsageError(f"local window {options.local_window!r} does not exist; choose 'hf' or 'none'")


def _check_spec(spec: ModelSpec, found: Located, options: ExportOptions) -> None:
    expected = found.spec and (found.spec if options.local_window == "hf" else without_window(found.spec))
    if expected and expected != spec:
        raise CheckpointError(f"{found.name} is not the {options.size} model its name promises: its config.json says {spec}")
    if options.res is not None and spec.resolution != options.res:
        raise UsageError(
            f"--res {options.res} was asked for, and {found.name} is a checkpoint for {spec.resolution} px; leave --res away"
        )


def open_checkpoint(found: Located, options: ModelChoice) -> Checkpoint:
    """The checkpoint that was found, with the adapters that were chosen."""
    return Checkpoint.open(found.path, options.adapters)


def _listed(names: list[str]) -> str:
    """At most five names and a count, with the verb that fits."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"
