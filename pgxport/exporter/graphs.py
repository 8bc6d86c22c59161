# SPDX-License-Identifier: Apache-2.0
"""All graphs of a bundle, written from any source that has the weights' shapes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np

from pgxport.bundle.manifest import CountedDtype, TokenTable
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.inputs.equivalent import input_changes
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import DataLayout, LazyTensor
from pgxport.exporter.targets import Target
from pgxport.models.checkpoint import TensorSource
from pgxport.models.gemma import decoder_step
from pgxport.models.mask_decoder import MaskWeights, mask_decoder
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import EMBEDDING, LM_HEAD, weight_shapes

if TYPE_CHECKING:
    from pgxport.exporter.inputs.scaling import InputStatistics

# Files of weights beside those of the graphs: the token table, which runners read too, and an output matrix that is not it.
TABLE_FILE, HEAD_FILE = "token_table.bin", "lm_head.data"
PARTS = {EMBEDDING: "token_table", LM_HEAD: "lm_head"}  # as `stored` calls them
Files = dict[str, DataLayout]  # by name


def write_graphs(
    source: TensorSource,
    spec: ModelSpec,
    masks: MaskWeights | None,
    recipe: Recipe,
    target: Target,
    context_length: int,
    statistics: InputStatistics | None = None,
) -> tuple[dict[str, GraphBuilder], Files]:
    """The graphs by name, and the files of weights that are not a graph's own: the token table, and an untied output matrix."""
    graphs, changes = {}, input_changes(spec, recipe.scheme)
    for write in (vision_encoder, projector, decoder_step):
        g = GraphBuilder(
            write.__name__, source, recipe, target, context_length=context_length, statistics=statistics, changes=changes
        )
        write(g, spec)
        graphs[g.name] = g
    if masks:
        graphs["mask_decoder"] = GraphBuilder("mask_decoder", masks, _floats(recipe), target)
        mask_decoder(graphs["mask_decoder"])
    decoder = graphs["decoder_step"]
    decoder.add_greedy_outputs()
    if spec.text.tied:
        return graphs, {TABLE_FILE: _own_file(decoder, EMBEDDING)}
    return graphs, {TABLE_FILE: DataLayout(_looked_up(decoder, EMBEDDING)), HEAD_FILE: _own_file(decoder, LM_HEAD)}


def _own_file(g: GraphBuilder, path: str) -> DataLayout:
    """Takes the parts of a matrix out of what goes into the graph's data file."""
    return DataLayout([g.lazy_tensors.pop(p) for p in [*g.lazy_tensors] if p == path or p.startswith(f"{path}.")])


def _looked_up(g: GraphBuilder, path: str) -> list[LazyTensor]:
    """Returns the parts of a matrix whose rows a runner looks up, and that the graph does not read."""
    scheme = g.recipe.scheme(path)
    if scheme.bits is None:
        return [g.floats(path)]
    view = g.inside(g.graph)
    view.statistics = None  # nothing is multiplied by it, so that no input was measured
    return view.quantized_matrix(path, "rows" if scheme.group_size is None else "blocks").lazy_tensors


def _floats(recipe: Recipe) -> Recipe:
    """Returns the recipe of the mask decoder: what the last rule says of all other weights, for it is a small model of another kind.

    It stays in float32 where the rest is bfloat16: ConvTranspose knows it neither in ONNX
    Runtime on a GPU (1.31.1) nor in TensorRT-RTX (1.7.1), which parses it and fails to build.
    """
    last = recipe.rules[-1]
    dtype = "float32" if last.scheme.dtype == "bfloat16" else last.scheme.dtype
    return Recipe(recipe.name, (replace(last, scheme=replace(last.scheme, dtype=dtype)),))


def stored(graphs: dict[str, GraphBuilder], shared: Files) -> dict[str, dict[CountedDtype, int]]:
    """Counts the weights of each dtype, by graph, and those of the token table and of an untied output matrix."""
    counts: dict[str, dict[CountedDtype, int]] = {"token_table": {}}
    for g in graphs.values():
        for path, matrix in g.matrices.items():
            if path in g.copies:
                continue
            kind = "float8" if matrix.scheme.format == "e4m3" else f"int{matrix.scheme.bits}"
            _count(counts, PARTS.get(path, g.name), kind, matrix.shape)
        parts = {p.name for matrix in g.matrices.values() for p in matrix.lazy_tensors}
        for tensor in g.lazy_tensors.values():
            # Tables and factors that are worked out are no weights, nor are the scales of quantized matrices.
            if tensor.name not in parts and not tensor.name.startswith(("rotary.", "cache.", "lm_head.", "input.")):
                _count(counts, g.name, tensor.dtype.name, tensor.shape)
    for tensor in (t for layout in shared.values() for t in layout.lazy_tensors if t.name in PARTS):
        _count(counts, PARTS[tensor.name], tensor.dtype.name, tensor.shape)
    return counts


def _count(counts: dict[str, dict[CountedDtype, int]], part: str, kind: str, shape: tuple[int, ...]) -> None:
    of_part = counts.setdefault(part, {})
    of_part[cast(CountedDtype, kind)] = of_part.get(cast(CountedDtype, kind), 0) + prod(shape)


def token_table(graphs: dict[str, GraphBuilder], shared: Files, spec: ModelSpec) -> TokenTable:
    """Returns the manifest's entry of the token table."""
    matrix, table = graphs["decoder_step"].matrices.get(EMBEDDING), shared[TABLE_FILE]
    described: dict[str, Any] = {"dtype": table.lazy_tensors[0].dtype.name}
    if matrix is not None:
        assert matrix.zero_points is None, "Bug: a token table was lowered with zero points"
        place = {"scales_offset": table.places[matrix.scales.name][0], "scales_dtype": matrix.scales.dtype.name}
        described = {"dtype": f"int{matrix.scheme.bits}", "group": matrix.scheme.group_size, **place}
    return TokenTable(file=TABLE_FILE, shape=(spec.text.vocab, spec.text.width), scale=spec.text.embed_scale, **described)


def serialized(g: GraphBuilder, layout: DataLayout, shared: Files) -> bytes:
    """The graph's .onnx file, its weights in the data file of its name and in those that are shared."""
    files = {f"{g.name}.data": layout, **shared}
    return g.serialize({name: (file, *place) for file, layout in files.items() for name, place in layout.places.items()})


def file_sizes(graphs: dict[str, GraphBuilder], shared: Files) -> dict[str, int]:
    """Bytes of every file of weights, and of every graph."""
    sizes = {file: layout.nbytes for file, layout in shared.items()}
    for name, g in graphs.items():
        layout = DataLayout(g.lazy_tensors.values())
        if g.lazy_tensors:
            sizes[f"{name}.data"] = layout.nbytes
        sizes[f"{name}.onnx"] = len(serialized(g, layout, shared))
    return sizes


class NoStatistics:
    """A calibration without numbers, for sizes: a graph has the same size with any statistics."""

    def range(self, path: str, observer: str) -> tuple[float, float]:
        return -1.0, 1.0

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"Bug: a plan needs no calibration, and {name} was asked for")


class SpecSource:
    """A checkpoint that has shapes and no values, for sizes."""

    def __init__(self, spec: ModelSpec):
        self._shapes = weight_shapes(spec)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        raise AssertionError(f"Bug: a plan reads no weight, and {name} was read")
