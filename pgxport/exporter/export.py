# SPDX-License-Identifier: Apache-2.0
"""Export a bundle: find the checkpoint, check it, write the graphs, stream the weights, compare, commit."""

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from pgxport import __version__
from pgxport.activations.calibration_file import checkpoint_sha256
from pgxport.activations.ranges import residual_divisor
from pgxport.bundle.manifest import CARD, Cache, CacheDtype, Manifest, Parity, Provenance, Ranges
from pgxport.bundle.model_card import card
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.compile.lint import check
from pgxport.errors import CheckpointError, GateError
from pgxport.exporter.check.acceptance import answer_scene
from pgxport.exporter.check.parity import StoredModel, StoredWeights, parity
from pgxport.exporter.gather import Gathered, Say, gather, price
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.graphs import Files, NoStatistics, file_sizes, serialized, stored, token_table, write_graphs
from pgxport.exporter.inputs.equivalent import Equivalent, EquivalentStatistics, equivalent
from pgxport.exporter.inputs.scaling import InputStatistics
from pgxport.exporter.prepare import ExportOptions, PreparedExport, prepare
from pgxport.exporter.recipe_toml import to_toml
from pgxport.exporter.sketch import Sketch
from pgxport.exporter.stream import Counter, DataLayout, Progress, ahead
from pgxport.models.checkpoint import TensorSource
from pgxport.models.generation_config import unheeded
from pgxport.models.spec import ModelSpec, shrunk
from pgxport.models.weights import parameters
from pgxport.text import listed

WINDOW_INPUTS = ("local_bias", "local_visible")  # decoder inputs that hide what lies outside the local window


@dataclass(frozen=True)
class FittedModel:
    """A model as its graphs compute it: scaled and rotated for the recipe, its residual stream divided to fit float16.

    Attributes:
        statistics: Of the changed activations; None without calibration.
        ranges: The activation ranges that the divisor was chosen by; None where activations are not float16.
    """

    spec: ModelSpec
    source: TensorSource
    statistics: InputStatistics | None
    ranges: Ranges | None


@dataclass(frozen=True)
class BuiltGraphs:
    """The graphs of a bundle by name, and where each weight lies, in the data file of its graph or in one that is shared.

    Attributes:
        shared: By file name.
        layouts: By graph.
    """

    graphs: dict[str, GraphBuilder]
    shared: Files
    layouts: dict[str, DataLayout]


@dataclass(frozen=True)
class ExportedBundle(Bundle):
    """A bundle that was just written, opened and verified.

    Attributes:
        not_answered: Why no scene was answered with it here; None: one was.
        notes: What someone should know about how the checkpoint was read, and what it asks for and the bundle does otherwise.
    """

    not_answered: str | None = None
    notes: tuple[str, ...] = ()


def export(options: ExportOptions, *, progress: Progress | None = None, say: Say | None = None) -> ExportedBundle:
    """Write a bundle from a checkpoint, open it, and answer a drawn scene with it where this machine can.

    Args:
        say: Is told what takes long before it begins.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        CheckpointError: the checkpoint is not a complete, sound PaliGemma.
        GateError: the bundle agrees with the checkpoint on fewer tokens than `gate` asks for.
        EngineError: the engine that the bundle is for refuses it.
        NumericError: its numbers are not finite.
        DiskError: the bundle cannot be written; nothing is left at its name.
    """
    job = prepare(options, progress=progress)
    with BundleWriter(job.output, overwrite=options.overwrite) as writer, ThreadPoolExecutor(1) as beside:
        digest = beside.submit(checkpoint_sha256, job.checkpoint.files()) if job.calibration else None
        if job.calibration and digest:
            job.calibration.check(digest.result(), job.found.name)
        with TemporaryDirectory(dir=writer.staging) as work:
            gathered = gather(job, Path(work), progress=progress, say=say)
            # Not before: a product on all cores waits for the last of them, and hashing beside it cost a third of the pass.
            digest = digest or beside.submit(checkpoint_sha256, job.checkpoint.files())
            model = fit(job, gathered)
            built = build(job, model)
            _write(job, built, writer, progress)
            compared = _compare(job, model, built, writer.staging, gathered, progress, say)
        manifest = _manifest(job, model, built, compared, _provenance(job, gathered.origin, digest.result()))
        writer.write(CARD, [card(manifest.model_copy(update={"files": writer.files})).encode()])
        staged = writer.complete(manifest.model_copy(update={"files": writer.files}))
        not_answered = _answer(job, model, built, staged, progress)
        writer.publish()
        return ExportedBundle(writer.path, staged.manifest, not_answered, _notes(job))


def dry_run(options: ExportOptions, *, progress: Progress | None = None) -> dict[str, int]:
    """Check everything that an export checks before it reads a weight, and return the size of each file in bytes.

    Raises:
        PgxError: as `export` would.
    """
    job = prepare(options, progress=progress)
    statistics = job.calibration or (NoStatistics() if job.recipe.calibrated else None)
    built = build(job, FittedModel(job.spec, job.checkpoint, statistics, None))
    return {**file_sizes(built.graphs, built.shared), "tokenizer.json": len(job.tokenizer.content)}


def fit(job: PreparedExport, gathered: Gathered) -> FittedModel:
    """Divide the residual stream where float16 would overflow, and scale and rotate inputs as the recipe asks.

    Raises:
        UsageError: activations exceed float16 whatever the divisor.
    """
    statistics, ranges = gathered.statistics, gathered.ranges
    spec = shrunk(job.spec, residual_divisor(ranges)) if ranges else job.spec
    source = equivalent(job.checkpoint, spec, job.recipe.scheme, statistics)
    if statistics and isinstance(source, Equivalent):
        return FittedModel(spec, source, EquivalentStatistics(statistics, source), ranges)
    return FittedModel(spec, source, statistics, ranges)


def build(job: PreparedExport, model: FittedModel) -> BuiltGraphs:
    """Write the graphs, and check those for TensorRT against its version and the GPU's compute capability.

    Raises:
        UsageError: that TensorRT or that GPU would refuse a graph.
    """
    graphs, shared = write_graphs(model.source, model.spec, job.masks, job.recipe, job.target, job.context, model.statistics)
    layouts = {name: DataLayout(g.lazy_tensors.values()) for name, g in graphs.items()}
    if job.target.tensorrt is not None:
        for name, g in graphs.items():
            check(f"{name}.onnx", serialized(g, layouts[name], shared), job.target.tensorrt, job.options.sm)
    return BuiltGraphs(graphs, shared, layouts)


def _write(job: PreparedExport, built: BuiltGraphs, writer: BundleWriter, progress: Progress | None) -> None:
    """Stream the weights, and write the graphs, the recipe and the tokenizer; every weight of the checkpoint was read then."""
    count = Counter(progress, sum(layout.nbytes for layout in (*built.shared.values(), *built.layouts.values())))
    for file, layout in built.shared.items():
        writer.write(file, count(file, ahead(layout.bytes())))
    for name, g in built.graphs.items():
        if g.lazy_tensors:
            writer.write(f"{name}.data", count(f"{name}.data", ahead(built.layouts[name].bytes())))
        writer.write(f"{name}.onnx", [serialized(g, built.layouts[name], built.shared)])
    writer.write("recipe.toml", [to_toml(job.recipe).encode()])
    writer.write("tokenizer.json", [job.tokenizer.content])
    if unread := job.checkpoint.unread():
        raise CheckpointError(f"Bug: {listed(unread)} of {job.found.name} reached no graph")


def _compare(
    job: PreparedExport,
    model: FittedModel,
    built: BuiltGraphs,
    folder: Path,
    gathered: Gathered,
    progress: Progress | None,
    say: Say | None,
) -> Parity | None:
    """Compare the written files with the checkpoint, teacher-forced on drawn scenes; None for floats without a gate.

    Raises:
        GateError: token agreement is below `gate`.
    """
    if not gathered.checked:
        return None
    files = built.shared | {f"{name}.data": layout for name, layout in built.layouts.items()}
    weights = StoredWeights(model.source, built.graphs, {folder / name: layout for name, layout in files.items()})
    rounded = StoredModel(weights, model.spec, job.recipe, model.statistics, job.target)
    if say:
        say(price("the same scenes through the bundle's files", job.spec, gathered.checked))
    measured = parity(gathered.reference, rounded, gathered.checked, progress=progress)
    least = job.options.gate
    if least is not None and measured.agreement < least:
        remedy = "Take a --precision with more bits"
        for path, decibels in measured.losses[:1]:
            remedy = f"Of the matrices {path} lost most ({decibels:.1f} dB): give it more bits by a rule, or calibrate"
        raise GateError(
            f"{job.found.name} in {job.recipe.name} agrees with the checkpoint on {measured.agreement:.1%} of "
            f"{measured.positions} tokens, and --gate asks for {least:.1%}; nothing was written. {remedy}"
        )
    return measured


def _answer(job: PreparedExport, model: FittedModel, built: BuiltGraphs, staged: Bundle, progress: Progress | None) -> str | None:
    """Answer a drawn scene with the bundle; the reason where it was not."""
    if not job.options.answer:
        return "it was not to be asked"
    if progress:
        progress("answering a scene", 0, 1)
    sketch = Sketch(model.spec, model.spec, job.context, built.graphs, built.shared)
    return answer_scene(staged, sketch.memory(job.target, len(job.tokenizer.content)).peak)


def _notes(job: PreparedExport) -> tuple[str, ...]:
    """What someone should know about how the checkpoint was read, and what it asks for and the bundle does otherwise."""
    notes = [*job.found.notes, *job.checkpoint.remarks]
    if job.tokenizer.note:
        notes.append(f"the tokenizer is that {job.tokenizer.note}")
    if keys := unheeded(job.generation):
        asked = ", ".join(f"{key} {job.generation.kept[key]!r:.60}" for key in keys)
        notes.append(f"the checkpoint asks for {asked}: the bundle answers greedily without, and keeps it in its manifest")
    return tuple(notes)


def _manifest(
    job: PreparedExport, model: FittedModel, built: BuiltGraphs, compared: Parity | None, provenance: Provenance
) -> Manifest:
    """The manifest of the bundle, its files not yet listed."""
    spec, infos = model.spec, {name: g.info() for name, g in built.graphs.items()}
    windowed = any(tensor.name in WINDOW_INPUTS for tensor in infos["decoder_step"].inputs)
    return Manifest(
        name=job.found.name,
        family=spec.family,
        resolution=spec.resolution,
        image_tokens=spec.image_tokens,
        context_length=job.context,
        max_new_tokens=job.max_new_tokens,
        local_window=spec.text.window if windowed else None,
        residual_divisor=spec.text.residual_divisor,
        ranges=model.ranges,
        parity=compared,
        recipe=job.recipe.name,
        target=job.target.name,
        tensorrt=job.target.tensorrt,
        parameters=parameters(spec),
        stored=stored(built.graphs, built.shared),
        spec=spec.described(),
        pixels=job.pixels,
        generation=job.generation,
        token_ids=job.tokenizer.ids,
        token_table=token_table(built.graphs, built.shared, spec),
        cache=Cache(
            kind=job.target.cache_kind,
            layers=spec.text.depth,
            kv_heads=spec.text.kv_heads,
            head_dim=spec.text.head_dim,
            dtype=cast(CacheDtype, built.graphs["decoder_step"].cache_dtype.name),
        ),
        graphs=infos,
        files={},
        provenance=provenance,
    )


def _provenance(job: PreparedExport, statistics: str | None, checkpoint_digest: str) -> Provenance:
    found, calibration = job.found, job.calibration
    packages = ("numpy", "onnx-ir", "ml-dtypes")
    versions = {"pgxport": __version__, **{p: importlib.metadata.version(p) for p in packages}}
    return Provenance(
        checkpoint=found.name,
        revision=found.revision,
        repository=found.repository,
        license=found.license,
        adapters=tuple(adapter.resolve().name for adapter in job.options.adapters),
        skipped=job.checkpoint.skipped,
        remarks=job.checkpoint.remarks,
        tokenizer=job.tokenizer.note,
        checkpoint_sha256=checkpoint_digest,
        calibration=statistics,
        calibration_sha256=calibration.digest if calibration else None,
        versions=versions,
    )
