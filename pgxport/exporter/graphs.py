# SPDX-License-Identifier: Apache-2.0
"""All graphs of a bundle together, written over anything that knows the weights' shapes."""

from collections.abc import Iterable
from math import prod
from typing import cast

from pgxport.bundle import Float
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.stream import DataLayout, Promise
from pgxport.exporter.targets import Target
from pgxport.models.checkpoint import TensorSource
from pgxport.models.gemma import TOKEN_TABLE, decoder_step
from pgxport.models.mask_decoder import MaskWeights, mask_decoder
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec

TABLE_FILE = "token_table.bin"


def write_graphs(
    source: TensorSource, spec: ModelSpec, masks: MaskWeights | None, recipe: Recipe, target: Target, context_length: int
) -> tuple[dict[str, GraphBuilder], Promise]:
    """The graphs by name, and the token table, which is a file of its own."""
    graphs = {}
    for write in (vision_encoder, projector, decoder_step):
        g = graphs[write.__name__] = GraphBuilder(write.__name__, source, recipe, target, context_length=context_length)
        write(g, spec)
    if masks:
        graphs["mask_decoder"] = GraphBuilder("mask_decoder", masks, recipe, target)
        mask_decoder(graphs["mask_decoder"])
    return graphs, graphs["decoder_step"].promises.pop(TOKEN_TABLE)


def stored(graphs: dict[str, GraphBuilder], table: Promise) -> dict[str, dict[Float, int]]:
    """How many weights of each dtype, by graph, and for the token table."""
    counts: dict[str, dict[Float, int]] = {}
    parts: dict[str, Iterable[Promise]] = {"token_table": [table], **{name: g.promises.values() for name, g in graphs.items()}}
    for part, promises in parts.items():
        of_part = counts.setdefault(part, {})
        for promise in promises:
            if not promise.name.startswith("rotary."):  # tables that are worked out, not weights
                dtype = cast(Float, promise.dtype.name)
                of_part[dtype] = of_part.get(dtype, 0) + prod(promise.shape)
    return counts


def serialized(g: GraphBuilder, layout: DataLayout, table: Promise) -> bytes:
    """The graph's .onnx file, its weights in the data file of its name and in the token table's."""
    places = {name: (f"{g.name}.data", *place) for name, place in layout.places.items()}
    return g.serialize({**places, table.name: (TABLE_FILE, 0, table.nbytes)})


def file_sizes(graphs: dict[str, GraphBuilder], table: Promise) -> dict[str, int]:
    """Bytes of every file of weights, and of every graph."""
    sizes = {TABLE_FILE: table.nbytes}
    for name, g in graphs.items():
        layout = DataLayout(g.promises.values())
        if g.promises:
            sizes[f"{name}.data"] = layout.nbytes
        sizes[f"{name}.onnx"] = len(serialized(g, layout, table))
    return sizes
