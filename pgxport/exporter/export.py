# SPDX-License-Identifier: Apache-2.0
"""Export a bundle: find the checkpoint, check it, write the graphs, stream the weights, compare, commit."""

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from pgxport import __version__
from pgxport.bundle.manifest import CARD, Cache, CacheDtype, Manifest, Parity, Provenance, Ranges, TokenIds
from pgxport.bundle.model_card import card
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.compile.lint import check
from pgxport.errors import CheckpointError, GateError, UsageError
from pgxport.exporter.activation_ranges import measure_ranges, residual_divisor
from pgxport.exporter.calibration_file import Calibration, checkpoint_sha256
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.graphs import TABLE_FILE, file_sizes, serialized, stored, token_table, write_graphs
from pgxport.exporter.parity import FIRST_SCENE, EagerModel, StoredWeights, parity, scene
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipe_toml import read_recipe, to_toml
from pgxport.exporter.scaling import InputStatistics, Rescaled, RescaledStatistics, check_sites, rescaled
from pgxport.exporter.stream import Counter, DataLayout, Progress, ahead
from pgxport.exporter.targets import Target, find_target
from pgxport.hub.locate import Located, ModelChoice, locate
from pgxport.models.checkpoint import Checkpoint, TensorSource
from pgxport.models.config import read_config
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec, shrunk, without_window
from pgxport.models.weights import parameters, weight_shapes
from pgxport.runners.tokenizer import read_token_ids
from pgxport.text import listed

MAX_NEW_TOKENS = 256
WINDOW_INPUTS = ("local_bias", "local_visible")  # decoder inputs that hide what lies outside the local window


@dataclass(frozen=True)
class ExportOptions(ModelChoice):
    """Options of an export, called as the flags of `pgx export`.

    Attributes:
        output: Folder to write; None names it after the model.
        precision: Name of a recipe.
        recipe: A TOML file in place of a named recipe.
        calibration: A file of `pgx calibrate`, for the recipes that need it.
        trt: Version of TensorRT to write for, "10.3", "10.16" or "11"; None: 11.
        sm: Compute capability of the GPU, as "8.7"; the graphs then keep to its precisions.
        context: Longest prefix and answer together, in tokens; None leaves room for a long prompt and answer.
        local_window: "hf": generated tokens see a window of the prefix in Gemma 2's local layers, as in transformers;
            "none": they see all of it, as in the training code. Both are the same below 4,096 tokens.
        parity: Scenes on which a quantized bundle is compared with the checkpoint before it gets its name; 0: none.
        gate: Least token agreement with the checkpoint, 0 to 1; below it nothing is written.
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
    parity: int = 2
    gate: float | None = None
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
    tokenizer: Path
    token_ids: TokenIds
    output: Path
    calibration: Calibration | None


@dataclass(frozen=True)
class FittedModel:
    """A model as its graphs compute it: rescaled for the recipe, its residual stream divided to fit float16.

    Attributes:
        statistics: Of the rescaled activations; None without calibration.
        ranges: The activation ranges that the divisor was chosen by; None where activations are not float16.
    """

    spec: ModelSpec
    source: TensorSource
    statistics: InputStatistics | None
    ranges: Ranges | None


@dataclass(frozen=True)
class BuiltGraphs:
    """The graphs of a bundle by name, its token table, and where each weight lies in the data file of its graph."""

    graphs: dict[str, GraphBuilder]
    table: DataLayout
    layouts: dict[str, DataLayout]


def export(options: ExportOptions, *, progress: Progress | None = None) -> Bundle:
    """Write a bundle from a checkpoint.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        CheckpointError: the checkpoint is not a complete, sound PaliGemma.
        GateError: the bundle agrees with the checkpoint on fewer tokens than `gate` asks for.
        DiskError: the bundle cannot be written; nothing is left at its name.
    """
    job = prepare(options, progress=progress)
    model = fit(job)
    built = build(job, model)
    with BundleWriter(job.output, overwrite=options.overwrite) as writer, ThreadPoolExecutor(1) as beside:
        digest = beside.submit(checkpoint_sha256, job.checkpoint.files())
        _write(job, built, writer, progress)
        compared = _compare(job, model, built, writer.staging, progress)
        manifest = _manifest(job, model, built, compared, digest.result())
        writer.write(CARD, [card(manifest.model_copy(update={"files": writer.files})).encode()])
        return writer.commit(manifest.model_copy(update={"files": writer.files}))


def dry_run(options: ExportOptions, *, progress: Progress | None = None) -> dict[str, int]:
    """Check everything that an export checks before it reads a weight, and return the size of each file in bytes.

    Raises:
        PgxError: as `export` would.
    """
    job = prepare(options, progress=progress)
    built = build(job, FittedModel(job.spec, job.checkpoint, job.calibration, None))
    return {**file_sizes(built.graphs, built.table), "tokenizer.json": job.tokenizer.stat().st_size}


def prepare(options: ExportOptions, *, progress: Progress | None = None) -> PreparedExport:
    """Find the checkpoint, and check it against its config, the options and the target.

    Raises:
        UsageError: an option names what does not exist, or options contradict each other.
        CheckpointError: the checkpoint is not a complete PaliGemma.
    """
    target = find_target(options.target, options.trt)
    recipe = find_recipe(options.precision, options.recipe, target)
    calibration = Calibration.open(options.calibration) if options.calibration else None
    _check_options(options, recipe, target, calibration)
    found = locate(options, precision=recipe.name, progress=progress)
    output = Path(options.output) if options.output else Path(f"{found.name}-{recipe.name}-{target.name}")
    BundleWriter(output, overwrite=options.overwrite).check_output()
    checkpoint = _open(found, options)
    spec = read_config(checkpoint.config, local_window=options.local_window == "hf")
    _check_spec(spec, found, options)
    check_weights(checkpoint, spec)
    recipe.check(weight_shapes(spec))
    check_sites(spec, recipe.scheme)
    context = context_length(spec, options.context)
    masks = options.masks or found.masks
    tokenizer = checkpoint.file("tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(
            f"{found.name}: tokenizer.json is missing; download it beside the weights, from the same repository"
        )
    return PreparedExport(
        options, found, checkpoint, spec, recipe, target, context, MaskWeights(Path(masks)) if masks else None, tokenizer,
        read_token_ids(tokenizer, checkpoint.config), output, calibration,
    )  # fmt: skip


def fit(job: PreparedExport) -> FittedModel:
    """Divide the residual stream where float16 would overflow, and rescale input channels as the recipe asks.

    Raises:
        UsageError: the calibration file is of another model, or activations exceed float16 whatever the divisor.
    """
    spec, calibration, ranges = job.spec, job.calibration, None
    if calibration:
        calibration.check(checkpoint_sha256(job.checkpoint.files()), job.found.name)
    if job.target.compute(job.recipe.rules[-1].scheme.dtype) == "float16":
        # A checkpoint of its own: rows that the measurement reads do not count as exported.
        ranges = (calibration and calibration.ranges) or measure_ranges(
            _open(job.found, job.options), spec, job.tokenizer, job.token_ids
        )
        spec = shrunk(spec, residual_divisor(ranges))
    if calibration is None:
        return FittedModel(spec, job.checkpoint, None, ranges)
    source = rescaled(job.checkpoint, spec, job.recipe.scheme, calibration)
    statistics = RescaledStatistics(calibration, source) if isinstance(source, Rescaled) else calibration
    return FittedModel(spec, source, statistics, ranges)


def build(job: PreparedExport, model: FittedModel) -> BuiltGraphs:
    """Write the graphs, and check those for TensorRT against its version and the GPU's compute capability.

    Raises:
        UsageError: that TensorRT or that GPU would refuse a graph.
    """
    graphs, table = write_graphs(model.source, model.spec, job.masks, job.recipe, job.target, job.context, model.statistics)
    layouts = {name: DataLayout(g.lazy_tensors.values()) for name, g in graphs.items()}
    if job.target.tensorrt is not None:
        for name, g in graphs.items():
            check(f"{name}.onnx", serialized(g, layouts[name], table), job.target.tensorrt, job.options.sm)
    return BuiltGraphs(graphs, table, layouts)


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


def context_length(spec: ModelSpec, asked: int | None) -> int:
    """The longest prefix and answer together, in tokens; None gives room for a long prompt and a long answer.

    Raises:
        UsageError: an image and a prompt do not fit.
    """
    length = spec.image_tokens + 2 * MAX_NEW_TOKENS if asked is None else asked
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
        raise CheckpointError(f"{where}: {_listed(missing)} missing; the checkpoint is not complete, download it again")
    if strangers := sorted(present - set(expected)):
        raise CheckpointError(
            f"{where}: {_listed(strangers)} not part of a PaliGemma of this configuration; is config.json the right one?"
        )
    if wrong := [n for n, shape in expected.items() if checkpoint.shape(n) != shape]:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} is {list(checkpoint.shape(name))} where config.json says {list(expected[name])}"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )


def _check_options(options: ExportOptions, recipe: Recipe, target: Target, calibration: Calibration | None) -> None:
    """Options that need each other are given together, and none that contradict each other.

    Raises:
        UsageError: they are not.
    """
    if options.sm is not None and target.tensorrt is None:
        raise UsageError(
            f"--sm {options.sm} is of a GPU, and the target is {target.name!r}; leave --sm away, or --target tensorrt"
        )
    if recipe.calibrated and calibration is None:
        raise UsageError(
            f"recipe {recipe.name!r} rounds by what calibration measured, and --calibration was not given; "
            f"`pgx calibrate` writes the file"
        )
    if calibration and not calibration.about.moments and any(rule.scheme.method == "gptq" for rule in recipe.rules):
        raise UsageError(
            f"recipe {recipe.name!r} rounds by gptq, which needs second moments, and {calibration.path} was made without; "
            f"calibrate with --moments, or choose the method clip"
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


def _open(found: Located, options: ExportOptions) -> Checkpoint:
    return Checkpoint.open(found.path, Path(options.adapter) if options.adapter else None)


def _write(job: PreparedExport, built: BuiltGraphs, writer: BundleWriter, progress: Progress | None) -> None:
    """Stream the weights, and write the graphs, the recipe and the tokenizer; every weight of the checkpoint was read then."""
    count = Counter(progress, built.table.nbytes + sum(layout.nbytes for layout in built.layouts.values()))
    writer.write(TABLE_FILE, count(TABLE_FILE, ahead(built.table.bytes())))
    for name, g in built.graphs.items():
        if g.lazy_tensors:
            writer.write(f"{name}.data", count(f"{name}.data", ahead(built.layouts[name].bytes())))
        writer.write(f"{name}.onnx", [serialized(g, built.layouts[name], built.table)])
    writer.write("recipe.toml", [to_toml(job.recipe).encode()])
    writer.write("tokenizer.json", [job.tokenizer.read_bytes()])
    if unread := job.checkpoint.unread():
        raise CheckpointError(f"Bug: {listed(unread)} of {job.found.name} reached no graph")


def _compare(
    job: PreparedExport, model: FittedModel, built: BuiltGraphs, folder: Path, progress: Progress | None
) -> Parity | None:
    """Compare the written files with the checkpoint, teacher-forced on drawn scenes; None for a bundle of floats.

    Raises:
        GateError: token agreement is below `gate`.
    """
    if not (job.recipe.lossy and job.options.parity):
        return None
    files = {name: (folder / f"{name}.data", layout) for name, layout in built.layouts.items()}
    files["token_table"] = (folder / TABLE_FILE, built.table)
    weights = StoredWeights(model.source, built.graphs, files)
    rounded = EagerModel(weights, model.spec, job.recipe, model.statistics, job.target)
    samples = [scene(FIRST_SCENE + i, job.spec, job.tokenizer, job.token_ids) for i in range(job.options.parity)]
    measured = parity(EagerModel(job.checkpoint, job.spec), rounded, samples, progress=progress)
    least = job.options.gate
    if least is not None and measured.agreement < least:
        worst = next(iter(measured.sqnr))
        raise GateError(
            f"{job.found.name} in {job.recipe.name} agrees with the checkpoint on {measured.agreement:.1%} of "
            f"{measured.positions} tokens, and --gate asks for {least:.1%}; nothing was written. Of the matrices {worst} lost "
            f"most ({measured.sqnr[worst]:.1f} dB): give it more bits by a rule, or calibrate"
        )
    return measured


def _manifest(
    job: PreparedExport, model: FittedModel, built: BuiltGraphs, compared: Parity | None, checkpoint_digest: str
) -> Manifest:
    """The manifest of the bundle, its files not yet listed."""
    spec, infos = model.spec, {name: g.info() for name, g in built.graphs.items()}
    windowed = any(tensor.name in WINDOW_INPUTS for tensor in infos["decoder_step"].inputs)
    return Manifest(
        name=job.found.name, family=spec.family, resolution=spec.resolution, image_tokens=spec.image_tokens,
        context_length=job.context, max_new_tokens=MAX_NEW_TOKENS, local_window=spec.text.window if windowed else None,
        residual_divisor=spec.text.residual_divisor, ranges=model.ranges, parity=compared,
        recipe=job.recipe.name, target=job.target.name, tensorrt=job.target.tensorrt,
        parameters=parameters(spec), stored=stored(built.graphs, built.table), spec=asdict(spec), token_ids=job.token_ids,
        token_table=token_table(built.graphs, built.table, spec),
        cache=Cache(
            kind=job.target.cache_kind, layers=spec.text.depth, kv_heads=spec.text.kv_heads, head_dim=spec.text.head_dim,
            dtype=cast(CacheDtype, built.graphs["decoder_step"].cache_dtype.name),
        ),
        graphs=infos, files={}, provenance=_provenance(job.found, checkpoint_digest, job.calibration),
    )  # fmt: skip


def _provenance(found: Located, checkpoint_digest: str, calibration: Calibration | None) -> Provenance:
    packages = ("numpy", "onnx-ir", "ml-dtypes")
    versions = {"pgxport": __version__, **{p: importlib.metadata.version(p) for p in packages}}
    return Provenance(
        checkpoint=found.name, revision=found.revision, repository=found.repository, license=found.license,
        checkpoint_sha256=checkpoint_digest, calibration_sha256=calibration.digest if calibration else None, versions=versions,
    )  # fmt: skip


def _listed(names: list[str]) -> str:
    """At most five names and a count, with the verb that fits."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"
