# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `pgx export`: find the checkpoint, check it, write the graphs, stream the weights, commit the bundle."""

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
from pgxport.exporter.parity import FIRST_SCENE, Run, StoredWeights, parity, scene
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipe_toml import read_recipe, to_toml
from pgxport.exporter.scaling import Rescaled, RescaledStatistics, Statistics, check_sites, rescaled
from pgxport.exporter.stream import Counter, DataLayout, Progress, ahead
from pgxport.exporter.targets import Target, find_target
from pgxport.hub.locate import Located, locate
from pgxport.models.checkpoint import Checkpoint, TensorSource
from pgxport.models.config import read_config
from pgxport.models.eager import TokenizedSample
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec, shrunk, without_window
from pgxport.models.weights import parameters, weight_shapes
from pgxport.runners.tokenizer import read_token_ids

MAX_NEW_TOKENS = 256
LOCAL = ("local_bias", "local_visible")  # inputs that tell what a window hides


@dataclass(frozen=True)
class ExportOptions:
    """What to export. Names are those of `pgx export`'s flags.

    Attributes:
        output: The folder to write; None names it after the model.
        size: A published size, or "tiny" for the embedded checkpoint; None where `checkpoint` says all.
        res: Pixels a side.
        checkpoint: A folder in hub layout, or a hub id.
        adapter: A LoRA adapter in PEFT layout, merged into the checkpoint as it is read.
        masks: `vae-oid.npz`, for the mask decoder; the embedded checkpoint brings its own.
        trt: The version of TensorRT to write for, "10.3", "10.16" or "11"; None: 11.
        sm: The compute capability of the GPU, as "8.7", whose precisions the graphs then have to keep to.
        context: The longest prefix and answer together, in tokens; None leaves room for a long prompt and answer.
        recipe: A TOML file in place of a named precision.
        calibration: What `pgx calibrate` wrote, for the recipes that need it.
        local_window: "hf": generated tokens see a window of the prefix in Gemma 2's local layers, as in transformers;
            "none": they see all of it, as in the training code. The same below 4,096 tokens.
        parity: Scenes on which a bundle of whole numbers is compared with the checkpoint before it gets its name; 0: none.
        gate: The least share of tokens on which both must agree, 0 to 1; below it nothing is written.
    """

    output: str | Path | None = None
    size: str | None = None
    res: int | None = None
    family: str = "paligemma2"
    variant: str = "pt"
    checkpoint: str | Path | None = None
    adapter: str | Path | None = None
    masks: str | Path | None = None
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
class Job:
    """An export that has passed every check that needs no weight."""

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


def export(options: ExportOptions, *, progress: Progress | None = None) -> Bundle:
    """Write a bundle from a checkpoint.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        CheckpointError: the checkpoint is not a complete, sound PaliGemma.
        DiskError: the bundle cannot be written; nothing is left at its name.
    """
    job = prepare(options, progress=progress)
    spec, calibration = job.spec, job.calibration
    ranges: Ranges | None = None
    if calibration:
        calibration.check(checkpoint_sha256(job.checkpoint.files()), job.found.name)
    if job.target.compute(job.recipe.rules[-1].scheme.dtype) == "float16":
        measured = calibration.ranges if calibration else None
        # A checkpoint of its own: rows that the measurement reads do not count as exported.
        measured = measured or measure_ranges(_open(job.found, options), spec, job.tokenizer, job.token_ids)
        spec, ranges = shrunk(spec, residual_divisor(measured)), measured
    source, statistics = (job.checkpoint, None) if calibration is None else rescaled_for(job, spec, calibration)

    graphs, table = write_graphs(source, spec, job.masks, job.recipe, job.target, job.context, statistics)
    layouts = {name: DataLayout(g.lazy_tensors.values()) for name, g in graphs.items()}
    _lint(graphs, table, job.target, options.sm)
    count = Counter(progress, table.nbytes + sum(layout.nbytes for layout in layouts.values()))
    with BundleWriter(job.output, overwrite=options.overwrite) as writer, ThreadPoolExecutor(1) as beside:
        digest = beside.submit(checkpoint_sha256, job.checkpoint.files())
        writer.write(TABLE_FILE, count(TABLE_FILE, ahead(table.bytes())))
        for name, g in graphs.items():
            if g.lazy_tensors:
                writer.write(f"{name}.data", count(f"{name}.data", ahead(layouts[name].bytes())))
            writer.write(f"{name}.onnx", [serialized(g, layouts[name], table)])
        writer.write("recipe.toml", [to_toml(job.recipe).encode()])
        writer.write("tokenizer.json", [job.tokenizer.read_bytes()])
        if left := job.checkpoint.unread():
            raise CheckpointError(f"Bug: {', '.join(left[:5])} of {job.found.name} reached no graph")
        compared = None
        if job.recipe.lossy and options.parity:
            files = {name: (writer.staging / f"{name}.data", layout) for name, layout in layouts.items()}
            files["token_table"] = (writer.staging / TABLE_FILE, table)
            rounded = Run(StoredWeights(source, graphs, files), spec, job.recipe, statistics, job.target)
            compared = parity(Run(job.checkpoint, job.spec), rounded, _scenes(job, options.parity), progress=progress)
            _gate(job, compared, options.gate)
        infos, decoder = {name: g.info() for name, g in graphs.items()}, graphs["decoder_step"]
        manifest = Manifest(
            name=job.found.name,
            family=spec.family,
            resolution=spec.resolution,
            image_tokens=spec.image_tokens,
            context_length=job.context,
            max_new_tokens=MAX_NEW_TOKENS,
            local_window=spec.text.window if any(t.name in LOCAL for t in infos["decoder_step"].inputs) else None,
            residual_divisor=spec.text.residual_divisor,
            ranges=ranges,
            parity=compared,
            recipe=job.recipe.name,
            target=job.target.name,
            tensorrt=job.target.tensorrt,
            parameters=parameters(spec),
            stored=stored(graphs, table),
            spec=asdict(spec),
            token_ids=job.token_ids,
            token_table=token_table(graphs, table, spec),
            cache=Cache(
                kind=job.target.cache_kind,
                layers=spec.text.depth,
                kv_heads=spec.text.kv_heads,
                head_dim=spec.text.head_dim,
                dtype=cast(CacheDtype, decoder.cache_dtype.name),
            ),
            graphs=infos,
            files={},
            provenance=_provenance(job.found, digest.result(), calibration),
        )
        writer.write(CARD, [card(manifest.model_copy(update={"files": writer.files})).encode()])
        return writer.commit(manifest.model_copy(update={"files": writer.files}))


def dry_run(options: ExportOptions, *, progress: Progress | None = None) -> dict[str, int]:
    """Check everything that an export checks before it reads a weight, and say how large each file would be.

    Raises:
        PgxError: as `export` would.
    """
    job = prepare(options, progress=progress)
    graphs, table = write_graphs(job.checkpoint, job.spec, job.masks, job.recipe, job.target, job.context, job.calibration)
    _lint(graphs, table, job.target, options.sm)
    return {**file_sizes(graphs, table), "tokenizer.json": job.tokenizer.stat().st_size}


def prepare(options: ExportOptions, *, progress: Progress | None = None) -> Job:
    """Find the checkpoint and check it against its config, the options and the target."""
    target = find_target(options.target, options.trt)
    if options.sm is not None and target.tensorrt is None:
        raise UsageError(
            f"--sm {options.sm} is of a GPU, and the target is {target.name!r}; leave --sm away, or --target tensorrt"
        )
    recipe = named(options.precision, options.recipe, target)
    calibration = Calibration.open(options.calibration) if options.calibration else None
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
    found = locate(
        options.size, options.res, options.family, options.variant, options.checkpoint, precision=recipe.name, progress=progress
    )
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
    return Job(
        found, checkpoint, spec, recipe, target, context, MaskWeights(Path(masks)) if masks else None, tokenizer,
        read_token_ids(tokenizer, checkpoint.config), output, calibration,
    )  # fmt: skip


def _lint(graphs: dict[str, GraphBuilder], table: DataLayout, target: Target, sm: str | None) -> None:
    """Graphs for TensorRT are what its version, and the GPU if it is known, would take."""
    if target.tensorrt is None:
        return
    for name, g in graphs.items():
        graph = serialized(g, DataLayout(g.lazy_tensors.values()), table)
        check(f"{name}.onnx", graph, target.tensorrt, sm)


def named(precision: str, file: str | Path | None, target: Target) -> Recipe:
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
    """The longest prefix and answer together, in tokens; without a wish, room for a long prompt and a long answer.

    Raises:
        UsageError: an image and a prompt do not fit.
    """
    length = spec.image_tokens + 2 * MAX_NEW_TOKENS if asked is None else asked
    if length <= spec.image_tokens:
        raise UsageError(f"--context {length} has no room for an image of {spec.image_tokens} tokens and a prompt")
    return length


def _open(found: Located, options: ExportOptions) -> Checkpoint:
    return Checkpoint.open(found.path, Path(options.adapter) if options.adapter else None)


def _check_spec(spec: ModelSpec, found: Located, options: ExportOptions) -> None:
    expected = found.spec and (found.spec if options.local_window == "hf" else without_window(found.spec))
    if expected and expected != spec:
        raise CheckpointError(f"{found.name} is not the {options.size} model its name promises: its config.json says {spec}")
    if options.res is not None and spec.resolution != options.res:
        raise UsageError(
            f"--res {options.res} was asked for, and {found.name} is a checkpoint for {spec.resolution} px; leave --res away"
        )


def check_weights(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    expected, there = weight_shapes(spec), set(checkpoint.names())
    where = checkpoint.path.name
    if missing := [n for n in expected if n not in there]:
        raise CheckpointError(f"{where}: {_named(missing)} missing; the checkpoint is not complete, download it again")
    if strangers := sorted(there - set(expected)):
        raise CheckpointError(
            f"{where}: {_named(strangers)} not part of a PaliGemma of this configuration; is config.json the right one?"
        )
    if wrong := [n for n, shape in expected.items() if checkpoint.shape(n) != shape]:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} is {list(checkpoint.shape(name))} where config.json says {list(expected[name])}"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )


def rescaled_for(job: Job, spec: ModelSpec, calibration: Calibration) -> tuple[TensorSource, Statistics]:
    """The checkpoint with input channels rescaled as the recipe asks, and the statistics of that."""
    source = rescaled(job.checkpoint, spec, job.recipe.scheme, calibration)
    return (source, RescaledStatistics(calibration, source)) if isinstance(source, Rescaled) else (source, calibration)


def _scenes(job: Job, count: int) -> list[TokenizedSample]:
    return [scene(FIRST_SCENE + i, job.spec, job.tokenizer, job.token_ids) for i in range(count)]


def _gate(job: Job, measured: Parity, least: float | None) -> None:
    if least is not None and measured.agreement < least:
        worst = next(iter(measured.sqnr))
        raise GateError(
            f"{job.found.name} in {job.recipe.name} agrees with the checkpoint on {measured.agreement:.1%} of "
            f"{measured.positions} tokens, and --gate asks for {least:.1%}; nothing was written. Of the matrices {worst} lost "
            f"most ({measured.sqnr[worst]:.1f} dB): give it more bits by a rule, or calibrate"
        )


def _provenance(found: Located, digest: str, calibration: Calibration | None) -> Provenance:
    packages = ("numpy", "onnx-ir", "ml-dtypes")
    versions = {"pgxport": __version__, **{p: importlib.metadata.version(p) for p in packages}}
    return Provenance(
        checkpoint=found.name, revision=found.revision, repository=found.repository, license=found.license,
        checkpoint_sha256=digest,
        calibration_sha256=calibration.digest if calibration else None, versions=versions,
    )  # fmt: skip


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} is" if len(names) == 1 else f"{shown}{f' and {len(names) - 5} more' if len(names) > 5 else ''} are"
