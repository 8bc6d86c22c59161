# SPDX-License-Identifier: Apache-2.0
"""The size of a bundle on disk and in memory, worked out before it is written, without reading a weight.

Sizes of files are exact, for the graphs are written by the
functions that export them, over a model that has shapes only.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from textwrap import indent
from typing import Any

from pgxport.bundle.manifest import Generation
from pgxport.compile.memory import COPIES, WORKSPACE_BYTES, build_memory
from pgxport.errors import UsageError, choose
from pgxport.exporter.graphs import HEAD_FILE, TABLE_FILE, SpecSource
from pgxport.exporter.prepare import context_length, find_recipe
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipe_toml import to_toml
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.sketch import RunMemory, collector_paused, export_memory, one_layer, sketch
from pgxport.exporter.targets import TARGETS, Target, find_target
from pgxport.hub.locate import TINY, ModelChoice, published_name
from pgxport.machine.board import BOARDS, BoardSpec
from pgxport.models.checkpoint import Checkpoint, TensorSource
from pgxport.models.generation_config import generation_of
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import SIZES, TINY_RESOLUTIONS, ModelSpec, published, without_window
from pgxport.models.weights import part_of, weight_shapes
from pgxport.text import size, table

TOKENIZER_BYTES = {"paligemma": 17_500_000, "paligemma2": 34_600_000}  # Google's tokenizer.json, where there is no checkpoint


@dataclass(frozen=True)
class PlanOptions(ModelChoice):
    """Options of a plan, called as the flags of `pgx plan` and as those of `ExportOptions`."""

    precision: str = "fp32"
    recipe: str | Path | None = None
    target: str = "cpu"
    trt: str | None = None
    context: int | None = None
    local_window: str = "hf"
    board: str | None = None


@dataclass(frozen=True)
class Plan:
    """The sizes of a bundle's files and of the memory it needs, in bytes."""

    model: str
    family: str
    resolution: int
    precision: str
    target: str
    context: int
    parameters: Mapping[str, int]
    files: Mapping[str, int]
    estimated: tuple[str, ...]  # the files whose size is not exact
    export_memory: int
    run: RunMemory
    needs: Mapping[str, int]  # peak memory of a run, by precision, for every one that the target computes
    options: PlanOptions = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def boards(self) -> list[BoardSpec]:
        """The boards that have what the target computes on, or the one that was asked for."""
        if self.options.board:
            return [BOARDS[self.options.board]]
        return [b for b in BOARDS.values() if self.target != "cpu" or not b.gpu_only]

    def fitting(self, board: BoardSpec) -> list[str]:
        """The precisions that fit, the largest first."""
        by_need = sorted(self.needs.items(), key=lambda item: -item[1])
        # Where two need as much, as on a CPU that widens one to the other, the one named first stores more.
        return [name for name, need in by_need if need <= board.usable]

    def compile_memory(self) -> dict[int, int]:
        """Profiles -> what `pgx compile` takes on a board with one memory for CPU and GPU; of TensorRT alone."""
        if self.target != "tensorrt":
            return {}
        output = self.files.get(HEAD_FILE, self.files[TABLE_FILE])
        weights = max(self.files["decoder_step.data"] + output, self.files["vision_encoder.data"])
        return {count: sum(build_memory(weights, count, WORKSPACE_BYTES)) for count in COPIES}

    def to_json(self) -> dict[str, Any]:
        names = ("model", "family", "resolution", "precision", "target", "context")
        return {
            **{name: getattr(self, name) for name in names},
            "parameters": dict(self.parameters),
            "files": dict(self.files),
            "estimated": list(self.estimated),
            "bundle_bytes": self.nbytes,
            "export_peak_bytes": self.export_memory,
            "run": {**asdict(self.run), "peak": self.run.peak},
            "run_peak_by_precision": dict(self.needs),
            "compile_peak_by_profiles": self.compile_memory(),
            "boards": [
                {
                    "name": b.name,
                    "memory": b.memory,
                    "usable": b.usable,
                    "fits": self.run.peak <= b.usable,
                    "precisions": self.fitting(b),
                }
                for b in self.boards()
            ],
            "try": self.next_command(),
        }

    def next_command(self) -> str:
        """The export to try: as planned, or in a precision that fits the board which was asked for."""
        precision, board = self.precision, self.options.board
        trt = f" --trt {self.options.trt}" if self.options.trt else ""
        if board and precision not in (fitting := self.fitting(BOARDS[board])):
            if not fitting:
                return f"pgx plan {_flags(self.options)} --precision {precision} --target {self.target}{trt}"
            precision = fitting[0]
        return f"pgx export {_flags(self.options)} --precision {precision} --target {self.target}{trt} -o bundle"


@collector_paused()
def plan(options: PlanOptions) -> Plan:
    """Work out what a bundle would take.

    Raises:
        UsageError: an option names what does not exist.
        CheckpointError: the checkpoint that was given is not sound.
    """
    target = find_target(options.target, options.trt)
    asked = find_recipe(options.precision, options.recipe, target)
    if options.board is not None and choose("board", options.board, BOARDS).gpu_only and target.name == "cpu":
        others = ", ".join(name for name in TARGETS if name != "cpu") or "none that this pgx has"
        raise UsageError(
            f"board {options.board!r} is a GPU, and target 'cpu' computes on the processor; choose --target {others}"
        )
    if options.local_window not in ("hf", "none"):
        raise UsageError(f"local window {options.local_window!r} does not exist; choose 'hf' or 'none'")
    model, source, spec, tokenizer, generation = _model(options)
    weights = weight_shapes(spec)
    recipe = asked.fitted(weights)
    context = context_length(spec, options.context, generation)
    masks = _masks(options)
    text = tokenizer or TOKENIZER_BYTES[spec.family]
    drawn = sketch(source, spec, spec, masks, recipe, target, context)
    run = drawn.memory(target, text)
    needs = {recipe.name: run.peak}
    for other in map(target.recipe, RECIPE_NAMES):
        # What the target has no kernels for is not a choice, nor what this model's shapes are not for.
        if other is not asked and runs_on(other, target):
            with suppress(UsageError):
                small = sketch(source, spec, one_layer(spec), masks, other.fitted(weights), target, context)
                needs[other.name] = small.memory(target, text).peak
    files, manifest = drawn.files()
    files |= {"recipe.toml": len(to_toml(recipe).encode())} | ({"tokenizer.json": tokenizer} if tokenizer else {})
    estimated = ({} if tokenizer else {"tokenizer.json": text}) | {"README.md": 2500, "manifest.json": manifest}
    return Plan(
        model=model,
        family=spec.family,
        resolution=spec.resolution,
        precision=recipe.name,
        target=target.name,
        context=context,
        parameters=_parameters(spec),
        files=files | estimated,
        estimated=tuple(estimated),
        export_memory=export_memory(spec, recipe, target, text),
        run=run,
        needs={name: needs[name] for name in RECIPE_NAMES if name in needs},
        options=options,
    )


def render(plan: Plan) -> str:
    """The same, for people."""
    lines = [
        f"{plan.model} at {plan.resolution} px, {plan.precision} for {plan.target}: {size(plan.nbytes)}, "
        f"{sum(plan.parameters.values()):,} parameters"
    ]
    parameters = [[name, f"{count:,}", "parameters"] for name, count in plan.parameters.items()]
    files = [[name, f"{'≈ ' if name in plan.estimated else ''}{count:,}", "bytes"] for name, count in plan.files.items()]
    lines.append(indent(table([*parameters, *files], right=[1]), "  "))
    run, build = plan.run, plan.compile_memory()
    lines.append(f"export needs ≈ {size(plan.export_memory)} of memory, and {size(plan.nbytes)} of disk")
    if build:
        lines.append(f"compile needs ≈ {size(build[2])} of memory on a board, {size(build[1])} with --profiles 1")
    lines += [
        f"run needs ≈ {size(run.peak)} of memory at its peak, with {plan.context:,} tokens of prefix and answer:",
        f"  weights {size(run.weights)} (+ {size(run.loading)} while loading), KV {size(run.kv)}, logits {size(run.logits)}, "
        f"vision {size(run.vision)}, prefill {size(run.prefill)}, the rest {size(run.base)}",
    ]
    rows = [["board", "usable", *plan.needs]]
    for board in plan.boards():
        fitting = plan.fitting(board)
        rows.append([board.name, size(board.usable), *("fits" if name in fitting else "–" for name in plan.needs)])
    lines.append(indent(table(rows, right=range(1, len(rows[0]))), "  "))
    if plan.options.board and not plan.fitting(BOARDS[plan.options.board]):
        lines.append(f"nothing fits {plan.options.board}; a smaller --size, --res or --context needs less")
    return "\n".join([*lines, f"try: {plan.next_command()}"])


def runs_on(recipe: Recipe, target: Target) -> bool:
    try:
        target.check(recipe)
    except UsageError:
        return False
    return True


def _model(options: PlanOptions) -> tuple[str, TensorSource, ModelSpec, int | None, Generation]:
    """Returns the model's name, the source of its shapes, its spec, the bytes of its tokenizer.json, and what it says of answers."""
    window = options.local_window == "hf"
    if options.checkpoint is None and options.size != "tiny":
        if options.size is None or options.res is None:
            raise UsageError("no model was named; pass --size 3b --res 448, --size tiny, or --checkpoint DIR")
        if options.size not in SIZES:
            raise UsageError(f"size {options.size!r} does not exist; choose --size {', '.join(SIZES)}, or --checkpoint DIR")
        spec = published(options.family, options.size, options.res)
        spec = spec if window else without_window(spec)
        return (
            published_name(options.family, options.size, options.res, options.variant),
            SpecSource(spec),
            spec,
            None,
            Generation(),
        )
    if options.checkpoint is None:
        res = options.res or TINY_RESOLUTIONS[0]
        if res not in TINY_RESOLUTIONS:
            raise UsageError(f"the embedded checkpoint has no {res} px; choose --res {' or '.join(map(str, TINY_RESOLUTIONS))}")
        folder = TINY / f"tiny-{res}"
    elif not (folder := Path(options.checkpoint)).exists():
        raise UsageError(
            f"{folder} does not exist, and a plan downloads nothing; name a published model by --size and --res instead"
        )
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec(local_window=window)
    if options.res is not None and options.res != spec.resolution:
        raise UsageError(f"--res {options.res} was asked for, and {folder.name} is a checkpoint for {spec.resolution} px")
    tokenizer = checkpoint.file("tokenizer.json")
    generation = generation_of(checkpoint)
    return folder.resolve().name, checkpoint, spec, tokenizer.stat().st_size if tokenizer else None, generation


def _masks(options: PlanOptions) -> MaskWeights | None:
    if options.masks:
        return MaskWeights(Path(options.masks))
    return MaskWeights(TINY / "vae-oid.npz") if options.size == "tiny" and options.checkpoint is None else None


def _parameters(spec: ModelSpec) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in weight_shapes(spec).items():
        parts[part_of(name)] = parts.get(part_of(name), 0) + prod(shape)
    return parts


def _flags(options: PlanOptions) -> str:
    """The options that name the model, as they were given."""
    if options.checkpoint is not None:
        return f"--checkpoint {options.checkpoint}" + (f" --context {options.context}" if options.context else "")
    family = "" if options.family == PlanOptions.family or options.size == "tiny" else f" --family {options.family}"
    res = f" --res {options.res}" if options.res else ""
    return f"--size {options.size}{res}{family}" + (f" --context {options.context}" if options.context else "")
