# SPDX-License-Identifier: Apache-2.0
"""What a bundle will take, on disk and in memory, before it is written: no weight is read.

Sizes of files are exact, for the graphs are written by the functions that export them, over a model that has shapes only. What
memory they take is a model of an engine, with constants that were measured (they stand beside their names).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from textwrap import indent
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from pgxport.compile.memory import COPIES, WORKSPACE_BYTES, build_memory
from pgxport.errors import UsageError, choose
from pgxport.exporter.export import context_length, find_recipe
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.graphs import TABLE_FILE, NoStatistics, SpecSource, file_sizes, write_graphs
from pgxport.exporter.lower_onnxruntime import SHORTLIST_TABLE
from pgxport.exporter.recipe import RECIPE_NAMES, Recipe
from pgxport.exporter.recipe_toml import to_toml
from pgxport.exporter.stream import DataLayout, LazyTensor
from pgxport.exporter.targets import TARGETS, Target, find_target
from pgxport.hub.locate import TINY, ModelChoice, published_name
from pgxport.machine.board import BOARDS, BoardSpec
from pgxport.models.checkpoint import BLOCK_BYTES, Checkpoint, TensorSource
from pgxport.models.config import read_config
from pgxport.models.gemma import TOKEN_TABLE
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import SIZES, TINY_RESOLUTIONS, ModelSpec, published, without_window
from pgxport.models.weights import weight_shapes
from pgxport.text import size, table

PARTS = {"vision_tower": "vision encoder", "multi_modal_projector": "projector"}
TOKENIZER_BYTES = {"paligemma": 17_500_000, "paligemma2": 34_600_000}  # Google's tokenizer.json, where there is no checkpoint
# Python, numpy, onnx_ir and a graph of 46 layers; then blocks of rows on their way: as stored, widened, transformed, narrowed.
# Measured: 132 to 146 MB for exports of 0.8 GB, with a tokenizer.json of 0.3 MB.
EXPORT_BASE, EXPORT_BLOCKS = 125_000_000, 4
# Measuring ranges for float16 holds activations in float32: this many of the MLP's width for each token of a scene. Measured:
# 194 MB with the true widths of PaliGemma 2 3B at 448 px, on one layer.
RANGES_BUFFERS = 5.2
# What the tokenizer takes once it is parsed: measured with 255,000 pieces and half a million merges, as the published ones have.
TOKENIZER_MEMORY, TOKENIZER_FACTOR = 320_000_000, 10
# Python, numpy, Pillow and ONNX Runtime on the CPU, measured. On a GPU its libraries and a CUDA context: assumed.
RUN_BASE = {"cpu": 70_000_000}
RUN_BASE_GPU = 600_000_000
# ONNX Runtime 1.31 on the CPU, in activations of one token: outputs of the MLP's products and its GELU, and some of the
# stream's width. Measured on 3 to 4 layers at 1,500 and 4,500 tokens: plans of whole runs were 1 to 13 % above.
MLP_BUFFERS, STREAM_BUFFERS, QKV_BUFFERS = 3, 6, 4


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
class RunMemory:
    """Private memory of a run in bytes: what stays, what an answer adds, and the most at any moment."""

    base: int
    weights: int  # of all graphs, as the engine holds them
    loading: int  # more of them for a moment, while the engine loads
    kv: int
    logits: int
    vision: int
    prefill: int

    @property
    def peak(self) -> int:
        return self.base + self.weights + max(self.loading, self.kv + self.logits + self.vision + self.prefill)


@dataclass(frozen=True)
class Plan:
    """What a bundle takes. All sizes are bytes."""

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
        there = sorted(self.needs.items(), key=lambda item: -item[1])
        # Where two need as much, as on a CPU that widens one to the other, the one named first stores more.
        return [name for name, need in there if need <= board.usable]

    def compile_memory(self) -> dict[int, int]:
        """Profiles -> what `pgx compile` takes on a board with one memory for CPU and GPU; of TensorRT alone."""
        if self.target != "tensorrt":
            return {}
        weights = max(self.files["decoder_step.data"] + self.files[TABLE_FILE], self.files["vision_encoder.data"])
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


def plan(options: PlanOptions) -> Plan:
    """Work out what a bundle would take.

    Raises:
        UsageError: an option names what does not exist.
        CheckpointError: the checkpoint that was given is not sound.
    """
    target = find_target(options.target, options.trt)
    recipe = find_recipe(options.precision, options.recipe, target)
    if options.board is not None and choose("board", options.board, BOARDS).gpu_only and target.name == "cpu":
        others = ", ".join(name for name in TARGETS if name != "cpu") or "none that this pgx has"
        raise UsageError(
            f"board {options.board!r} is a GPU, and target 'cpu' computes on the processor; choose --target {others}"
        )
    if options.local_window not in ("hf", "none"):
        raise UsageError(f"local window {options.local_window!r} does not exist; choose 'hf' or 'none'")
    model, source, spec, tokenizer = _model(options)
    context = context_length(spec, options.context)
    masks = _masks(options)
    text = tokenizer or TOKENIZER_BYTES[spec.family]
    sketch = _sketch(source, spec, spec, masks, recipe, target, context)
    run = sketch.memory(target, text)
    needs = {recipe.name: run.peak}
    for other in map(target.recipe, RECIPE_NAMES):
        # What the target has no kernels for is not a choice, nor what this model's shapes are not for.
        if other is not recipe and _computes(other, target):
            with suppress(UsageError):
                needs[other.name] = (
                    _sketch(source, spec, _one_layer(spec), masks, other, target, context).memory(target, text).peak
                )
    files, manifest = sketch.files()
    estimated = {"tokenizer.json": text} if tokenizer is None else {}
    estimated |= {"README.md": 2500, "manifest.json": manifest}
    files |= {"recipe.toml": len(to_toml(recipe).encode())}
    exact = {} if tokenizer is None else {"tokenizer.json": tokenizer}
    return Plan(
        model=model, family=spec.family, resolution=spec.resolution, precision=recipe.name, target=target.name, context=context,
        parameters=_parameters(spec), files=files | exact | estimated, estimated=tuple(estimated),
        export_memory=EXPORT_BASE + EXPORT_BLOCKS * BLOCK_BYTES + 2 * text + _ranges_memory(spec, recipe, target, text),
        run=run, needs={name: needs[name] for name in RECIPE_NAMES if name in needs}, options=options,
    )  # fmt: skip


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


@dataclass(frozen=True)
class _Sketch:
    """The graphs of a bundle, written over shapes.

    Attributes:
        spec: The model that the bundle is of.
        drawn: The model that the graphs are written for: the same, or with one layer in each tower, which stands for all.
    """

    spec: ModelSpec
    drawn: ModelSpec
    context: int
    graphs: dict[str, GraphBuilder]
    table: DataLayout

    def files(self) -> tuple[dict[str, int], int]:
        """The size of every file of weights and of every graph, and about that of the manifest."""
        described = sum(len(g.info().model_dump_json(indent=1)) for g in self.graphs.values())
        return file_sizes(self.graphs, self.table), 3000 + described

    def memory(self, target: Target, tokenizer: int) -> RunMemory:
        decoder, v, t = self.graphs["decoder_step"], self.spec.vision, self.spec.text
        axes = {"batch": 1} | dict.fromkeys(("capacity", "tokens", "total", "past", "keys"), self.context)
        inputs = {v.name or "": self._layers(v.name or "") * _nbytes(v, axes) for v in decoder.graph.inputs}
        outputs = {value.name or "": _nbytes(value, axes) for value in decoder.graph.outputs}
        weights = [(p, g.dtype) for g in self.graphs.values() for p in g.lazy_tensors.values()]
        if SHORTLIST_TABLE not in decoder.matrices:  # with a shortlist the engine reads rows of the table
            weights += [(p, decoder.dtype) for p in self.table.lazy_tensors]
        held = [(self._layers(p.name), *_held(p, dtype)) for p, dtype in weights]
        per_image = (
            v.image_tokens * self.graphs["vision_encoder"].dtype.itemsize * (MLP_BUFFERS * v.mlp + STREAM_BUFFERS * v.width)
        )
        qkv = (t.heads + 2 * t.kv_heads) * t.head_dim
        per_token = decoder.dtype.itemsize * (MLP_BUFFERS * t.mlp + STREAM_BUFFERS * t.width + QKV_BUFFERS * qkv)
        # Every head's scores of every pair of tokens at once: that is how ONNX Runtime attends on a CPU.
        scores = t.heads * self.context**2 * 4
        fed = sum(size for name, size in inputs.items() if not name.startswith("past_key_values."))
        return RunMemory(
            base=RUN_BASE.get(target.name, RUN_BASE_GPU) + _tokenizer_memory(tokenizer),
            weights=sum(layers * size for layers, size, _ in held),
            loading=max(extra for *_, extra in held),
            kv=sum(size for name, size in inputs.items() if name.startswith("past_key_values.")),
            logits=outputs["logits"],
            vision=per_image,
            prefill=self.context * per_token + scores + 2 * fed,
        )  # fmt: skip

    def _layers(self, name: str) -> int:
        """The layers of the model that one weight or input of the drawn graphs stands for."""
        if name.startswith(("language_model.model.layers.", "past_key_values.", "cache.")):
            return self.spec.text.depth // self.drawn.text.depth
        if name.startswith("vision_tower.vision_model.encoder.layers."):
            return self.spec.vision.depth // self.drawn.vision.depth
        return 1


def _sketch(
    source: TensorSource,
    spec: ModelSpec,
    drawn: ModelSpec,
    masks: MaskWeights | None,
    recipe: Recipe,
    target: Target,
    context: int,
) -> _Sketch:
    graphs, table = write_graphs(source, drawn, masks, recipe, target, context, NoStatistics())
    return _Sketch(spec, drawn, context, graphs, table)


def _one_layer(spec: ModelSpec) -> ModelSpec:
    """The model with one layer in each tower, which has a local window if any layer has; a named recipe treats all layers alike."""
    local = (0,) if spec.text.local_layers else ()
    return replace(spec, vision=replace(spec.vision, depth=1), text=replace(spec.text, depth=1, local_layers=local))


def _held(tensor: LazyTensor, computed: np.dtype[Any]) -> tuple[int, int]:
    """What an engine holds of a weight once it is loaded, and what more for a moment.

    ONNX Runtime maps the files, and packs what it multiplies by into memory of its own: as large, and what was mapped is let go.
    A float stored in another type than it is computed in is cast whole before it is packed.
    """
    if tensor.dtype == computed:
        return tensor.nbytes, 0
    if tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16:
        wide = prod(tensor.shape) * computed.itemsize
        return wide, wide
    return tensor.nbytes, tensor.nbytes


def _ranges_memory(spec: ModelSpec, recipe: Recipe, target: Target, tokenizer: int) -> int:
    if target.compute(recipe.rules[-1].scheme.dtype) != "float16":
        return 0
    activations = int(spec.image_tokens * RANGES_BUFFERS * max(spec.vision.mlp, spec.text.mlp) * 4)
    return activations + _tokenizer_memory(tokenizer)


def _tokenizer_memory(size: int) -> int:
    # The same vocabulary is written with more or less space around it.
    return min(TOKENIZER_MEMORY, TOKENIZER_FACTOR * size) if size < 10_000_000 else TOKENIZER_MEMORY


def _nbytes(value: ir.Value, axes: Mapping[str, int]) -> int:
    assert value.shape is not None, f"Bug: {value.name} has no shape"
    assert value.dtype is not None, f"Bug: {value.name} has no type"
    return prod(d if isinstance(d, int) else axes[str(d.value)] for d in value.shape) * value.dtype.numpy().itemsize


def _computes(recipe: Recipe, target: Target) -> bool:
    try:
        target.check(recipe)
    except UsageError:
        return False
    return True


def _model(options: PlanOptions) -> tuple[str, TensorSource, ModelSpec, int | None]:
    """A name for people, what the graphs are written over, the spec, and the bytes of tokenizer.json where it is there."""
    window = options.local_window == "hf"
    if options.checkpoint is None and options.size != "tiny":
        if options.size is None or options.res is None:
            raise UsageError("no model was named; pass --size 3b --res 448, --size tiny, or --checkpoint DIR")
        if options.size not in SIZES:
            raise UsageError(f"size {options.size!r} does not exist; choose --size {', '.join(SIZES)}, or --checkpoint DIR")
        spec = published(options.family, options.size, options.res)
        spec = spec if window else without_window(spec)
        return published_name(options.family, options.size, options.res, options.variant), SpecSource(spec), spec, None
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
    spec = read_config(checkpoint.config, local_window=window)
    if options.res is not None and options.res != spec.resolution:
        raise UsageError(f"--res {options.res} was asked for, and {folder.name} is a checkpoint for {spec.resolution} px")
    tokenizer = checkpoint.file("tokenizer.json")
    return folder.resolve().name, checkpoint, spec, tokenizer.stat().st_size if tokenizer else None


def _masks(options: PlanOptions) -> MaskWeights | None:
    if options.masks:
        return MaskWeights(Path(options.masks))
    return MaskWeights(TINY / "vae-oid.npz") if options.size == "tiny" and options.checkpoint is None else None


def _parameters(spec: ModelSpec) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in weight_shapes(spec).items():
        part = PARTS.get(name.partition(".")[0], "token table" if name == TOKEN_TABLE else "decoder")
        parts[part] = parts.get(part, 0) + prod(shape)
    return parts


def _flags(options: PlanOptions) -> str:
    """The options that name the model, as they were given."""
    if options.checkpoint is not None:
        return f"--checkpoint {options.checkpoint}" + (f" --context {options.context}" if options.context else "")
    family = "" if options.family == PlanOptions.family or options.size == "tiny" else f" --family {options.family}"
    res = f" --res {options.res}" if options.res else ""
    return f"--size {options.size}{res}{family}" + (f" --context {options.context}" if options.context else "")
