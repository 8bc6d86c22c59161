# SPDX-License-Identifier: Apache-2.0
"""`pgx compile --engine cpu`: let ONNX Runtime pack the weights of a bundle for this CPU, and keep what it made."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from pgxport.bundle.reader import Bundle
from pgxport.errors import DiskError, EngineError
from pgxport.runners.engine_cache import Entry, EntryWriter, cache_folder
from pgxport.runners.loop import Decoder
from pgxport.runners.ort import OrtSession
from pgxport.runners.packed import flags, machine
from pgxport.runners.session import Session

Progress = Callable[[str, int, int], None]  # what is being packed, graphs so far, graphs in all
ALIGNMENT = 64  # bytes; kernels lay packed weights out from the first address that divides by it
COPIES = 2.2  # ONNX Runtime writes the weights as they were, beside the packed ones


def pack(bundle: Bundle, cache: Path | None = None, *, progress: Progress | None = None) -> Entry:
    """Pack every graph, and see that the packed ones compute the same, bit for bit.

    Raises:
        DiskError: there is no room.
        EngineError: ONNX Runtime refuses a graph, or computes something else from what it packed itself.
    """
    root = cache_folder(cache)
    graphs = list(bundle.manifest.graphs)
    with EntryWriter(root, bundle.digest(), machine(), flags()) as writer:
        if (free := shutil.disk_usage(writer.staging).free) < COPIES * bundle.nbytes:
            raise DiskError(
                f"packed weights of {bundle.path} may take {COPIES * bundle.nbytes / 1e9:.1f} GB, and {root} has "
                f"{free / 1e9:.1f} GB left; free some space, or choose another --cache"
            )
        for i, name in enumerate(graphs):
            if progress:
                progress(f"pack {name}", i, len(graphs))
            file = writer.staging / f"{name}.onnx"
            before = _answer(OrtSession(bundle.graph(name), save_packed=file), bundle, name)
            align(file)
            after = _answer(OrtSession(file), bundle, name)
            if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
                raise EngineError(
                    f"{bundle.graph(name)}: onnxruntime {machine().version} computes something else from the weights it packed "
                    f"itself; nothing was kept, and the bundle runs without"
                )
            for written in sorted(writer.staging.glob(f"{name}.onnx*")):
                writer.adopt(written.name)
        if progress:
            progress("packed", len(graphs), len(graphs))
        return writer.commit()


def align(graph: Path) -> None:
    """Move packed weights to where they are read as they were written.

    ONNX Runtime aligns those of more than a megabyte in its file. MatMulNBits begins at the next multiple of 64 of whatever address
    its packed weights have, so that smaller ones, mapped from between two, would be read shifted (seen with 1.31.1: as NaN).
    """
    model = onnx.load(graph, load_external_data=False)
    with open(graph.with_name(f"{graph.name}.data"), "r+b") as data:
        for tensor in _initializers(model.graph):
            for entry in tensor.external_data:
                if entry.key.startswith("prepacked_"):
                    kernel, *blobs = entry.value.split("|")
                    entry.value = "|".join([kernel, *(_moved(data, blob) for blob in blobs)])
    onnx.save(model, graph)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Those of the graph, and of its branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _initializers(attribute.g)


def _moved(data: BinaryIO, blob: str) -> str:
    """A blob, "offset;length;checksum", at the end of the file where its offset was not aligned."""
    offset, length, checksum = blob.split(";")
    if int(offset) % ALIGNMENT == 0:
        return blob
    data.seek(int(offset))
    content = data.read(int(length))
    end = data.seek(0, 2)
    start = -(-end // ALIGNMENT) * ALIGNMENT
    data.write(bytes(start - end) + content)
    return f"{start};{length};{checksum}"


def _answer(session: Session, bundle: Bundle, name: str) -> list[np.ndarray]:
    """What a graph gives for drawn numbers: the decoder for a prefix and a step, which run different kernels."""
    draw = np.random.default_rng(0).standard_normal
    manifest = bundle.manifest
    try:
        if name == "decoder_step":
            decoder = Decoder(session, manifest, min(manifest.context_length, 8))
            width = manifest.token_table.shape[1]
            return [np.array(decoder.feed(draw((1, tokens, width), np.float32))) for tokens in (4, 1)]
        (given,) = manifest.graphs[name].inputs
        shape = [1 if isinstance(n, str) else n for n in given.shape]
        feed = np.zeros(shape, np.int64) if given.dtype == "int64" else draw(shape, np.float32)
        return [np.array(x) for x in session.run({given.name: feed}).values()]
    finally:
        session.close()
