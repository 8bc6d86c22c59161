# SPDX-License-Identifier: Apache-2.0
"""The graphs of a bundle written over shapes alone, and the memory that an engine and an export take for them.

Memory is a model of an engine, with constants that were measured (they stand beside their names).
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from pgxport.activations.steps import PACK
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.graphs import TABLE_FILE, Files, NoStatistics, file_sizes, write_graphs
from pgxport.exporter.lower_onnxruntime import SHORTLIST_TABLE
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import LazyTensor
from pgxport.exporter.targets import Target
from pgxport.models.checkpoint import BLOCK_BYTES, TensorSource
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec

# Python, numpy, onnx_ir and a graph of 46 layers; then blocks of rows on their way: as stored, widened,
# transformed, narrowed. Measured: 132 to 146 MB for exports of 0.8 GB, with a tokenizer.json of 0.3 MB.
EXPORT_BASE, EXPORT_BLOCKS = 125_000_000, 4


# The pass over the checkpoint, and the check after it, hold activations in float32: this many of the MLP's width for each token
# of a pack. Measured: 194 MB for 1,024 tokens with the true widths of PaliGemma 2 3B, on one layer.
PASS_BUFFERS, PASS_TOKENS = 5.2, 512


# What reading and building the tokenizer takes: measured with 257,000
# pieces and half a million merges, as the published ones have.
TOKENIZER_MEMORY, TOKENIZER_FACTOR = 250_000_000, 10


# Python, numpy, Pillow and ONNX Runtime on the CPU, measured.
# On a GPU its libraries and a CUDA context: assumed.
RUN_BASE = {"cpu": 70_000_000}


RUN_BASE_GPU = 600_000_000


# ONNX Runtime 1.31 on the CPU, in activations of one token: outputs of the
# MLP's products and its GELU, and some of the stream's width. Measured on 3 to
# 4 layers at 1,500 and 4,500 tokens: plans of whole runs were 1 to 13 % above.
MLP_BUFFERS, STREAM_BUFFERS, QKV_BUFFERS = 3, 6, 4


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
class Sketch:
    """The graphs of a bundle, written over shapes.

    Attributes:
        spec: The model that the bundle is of.
        drawn: The model that the graphs are written for: the same, or with one layer in each tower, which stands for all.
    """

    spec: ModelSpec
    drawn: ModelSpec
    context: int
    graphs: dict[str, GraphBuilder]
    shared: Files

    def files(self) -> tuple[dict[str, int], int]:
        """The size of every file of weights and of every graph, and about that of the manifest."""
        described = sum(len(g.info().model_dump_json(indent=1)) for g in self.graphs.values())
        return file_sizes(self.graphs, self.shared), 3000 + described

    def memory(self, target: Target, tokenizer: int) -> RunMemory:
        decoder, v, t = self.graphs["decoder_step"], self.spec.vision, self.spec.text
        axes = {"batch": 1} | dict.fromkeys(("capacity", "tokens", "total", "past", "keys"), self.context)
        inputs = {v.name or "": self._layers(v.name or "") * _nbytes(v, axes) for v in decoder.graph.inputs}
        outputs = {value.name or "": _nbytes(value, axes) for value in decoder.graph.outputs}
        weights = [(p, g.dtype) for g in self.graphs.values() for p in g.lazy_tensors.values()]
        if SHORTLIST_TABLE not in decoder.matrices:  # with a shortlist the engine reads rows of the output matrix
            multiplied = (layout for file, layout in self.shared.items() if t.tied or file != TABLE_FILE)
            weights += [(p, decoder.dtype) for layout in multiplied for p in layout.lazy_tensors]
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
        )

    def _layers(self, name: str) -> int:
        """The layers of the model that one weight or input of the drawn graphs stands for."""
        if name.startswith(("language_model.model.layers.", "past_key_values.", "cache.")):
            return self.spec.text.depth // self.drawn.text.depth
        if name.startswith("vision_tower.vision_model.encoder.layers."):
            return self.spec.vision.depth // self.drawn.vision.depth
        return 1


def sketch(
    source: TensorSource,
    spec: ModelSpec,
    drawn: ModelSpec,
    masks: MaskWeights | None,
    recipe: Recipe,
    target: Target,
    context: int,
) -> Sketch:
    graphs, shared = write_graphs(source, drawn, masks, recipe, target, context, NoStatistics())
    return Sketch(spec, drawn, context, graphs, shared)


def one_layer(spec: ModelSpec) -> ModelSpec:
    """The model with one layer in each tower, which has a local window if any layer has; a named recipe treats all layers alike."""
    local = (0,) if spec.text.local_layers else ()
    return replace(spec, vision=replace(spec.vision, depth=1), text=replace(spec.text, depth=1, local_layers=local))


def _held(tensor: LazyTensor, computed: np.dtype[Any]) -> tuple[int, int]:
    """Returns the bytes an engine holds of a weight once it is loaded, and the further bytes it holds while loading.

    ONNX Runtime maps the files, and packs what it multiplies by into memory
    of its own: as large, and what was mapped is let go. A float stored in
    another type than it is computed in is cast whole before it is packed.
    """
    if tensor.dtype == computed:
        return tensor.nbytes, 0
    if tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16:
        wide = prod(tensor.shape) * computed.itemsize
        return wide, wide
    return tensor.nbytes, tensor.nbytes


def _pass_memory(spec: ModelSpec, recipe: Recipe, target: Target) -> int:
    """The memory of a pass over the default scenes, second moments not counted."""
    if target.compute(recipe.rules[-1].scheme.dtype) != "float16" and not recipe.lossy:
        return 0
    return int(min(PACK, PASS_TOKENS * max(spec.vision.mlp, spec.text.mlp)) * PASS_BUFFERS * 4)


def _tokenizer_memory(size: int) -> int:
    # The same vocabulary is written with more or less space around it.
    return min(TOKENIZER_MEMORY, TOKENIZER_FACTOR * size) if size < 10_000_000 else TOKENIZER_MEMORY


def _nbytes(value: ir.Value, axes: Mapping[str, int]) -> int:
    assert value.shape is not None, f"Bug: {value.name} has no shape"
    assert value.dtype is not None, f"Bug: {value.name} has no type"
    return prod(d if isinstance(d, int) else axes[str(d.value)] for d in value.shape) * value.dtype.numpy().itemsize


def export_memory(spec: ModelSpec, recipe: Recipe, target: Target, tokenizer: int) -> int:
    """The memory in bytes that an export takes, whatever the model's size; `tokenizer` is the size of tokenizer.json."""
    # Blocks of rows are on their way after the tokenizer was built and given up.
    blocks = max(EXPORT_BLOCKS * BLOCK_BYTES, _tokenizer_memory(tokenizer))
    return EXPORT_BASE + blocks + 2 * tokenizer + _pass_memory(spec, recipe, target)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cycle collector, which goes through all nodes of a graph again and again while they are made, and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
