# SPDX-License-Identifier: Apache-2.0
"""Let ONNX Runtime pack the weights of a bundle for this CPU, and keep what it packed in the engine cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from pgxport.bundle.reader import Bundle
from pgxport.compile.options import Compiled, Progress
from pgxport.errors import DiskError, EngineError, IntegrityError
from pgxport.interrupts import check_interrupted
from pgxport.runners.engine_cache import Entry, EntryWriter, cache_folder, entry_folder
from pgxport.runners.loop import Decoder
from pgxport.runners.ort import OrtSession
from pgxport.runners.packed import check, engine_key, flags, is_current
from pgxport.runners.session import Session
from pgxport.text import size

ALIGNMENT = 64  # bytes; kernels lay packed weights out from the first address that divides by it
DISK_COPIES = 2.2  # bundle sizes on disk: ONNX Runtime writes the weights as they were beside the packed ones


def pack_unless_current(bundle: Bundle, cache: Path | None = None, *, progress: Progress | None = None) -> Compiled:
    """The packed weights of a bundle, from the cache where they are sound and of this machine and its flags.

    Raises:
        DiskError: there is no room.
        EngineError: ONNX Runtime refuses a graph, or computes something else from its own packed weights.
    """
    folder = entry_folder(cache_folder(cache), bundle.digest(), engine_key())
    if folder.is_dir():
        try:
            entry = check(folder)
        except IntegrityError:  # replaced, and never loaded
            pass
        else:
            if is_current(entry, bundle):
                return Compiled(folder, entry, built=False)
    return Compiled(folder, pack(bundle, cache, progress=progress), built=True)


def pack(bundle: Bundle, cache: Path | None = None, *, progress: Progress | None = None) -> Entry:
    """Pack every graph, and check that the packed graphs compute the same, bit for bit.

    Raises:
        DiskError: there is no room.
        EngineError: ONNX Runtime refuses a graph, or computes something else from its own packed weights.
    """
    root = cache_folder(cache)
    graphs = list(bundle.manifest.graphs)
    with EntryWriter(root, bundle.digest(), engine_key(), flags()) as writer:
        if (free := shutil.disk_usage(writer.staging).free) < DISK_COPIES * bundle.nbytes:
            raise DiskError(
                f"packed weights of {bundle.path} may take {size(DISK_COPIES * bundle.nbytes)}, and {root} has "
                f"{size(free)} left; free some space, or choose another --cache"
            )
        for i, name in enumerate(graphs):
            if progress:
                progress(f"pack {name}", i, len(graphs))
            _pack_graph(bundle, name, writer)
            check_interrupted()
        if progress:
            progress("packed", len(graphs), len(graphs))
        return writer.commit()


def _pack_graph(bundle: Bundle, name: str, writer: EntryWriter) -> None:
    file = writer.staging / f"{name}.onnx"
    before = sample_outputs(OrtSession(bundle.graph(name), save_packed=file), bundle, name)
    align(file)
    after = sample_outputs(OrtSession(file), bundle, name)
    if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
        raise EngineError(
            f"{bundle.graph(name)}: onnxruntime {engine_key().version} computes something else from the weights it packed "
            f"itself; nothing was kept, and the bundle runs without"
        )
    for packed in sorted(writer.staging.glob(f"{name}.onnx*")):
        writer.adopt(packed.name)


def align(graph: Path) -> None:
    """Move the packed weights of a graph's data file to offsets that kernels read unshifted.

    ONNX Runtime aligns only packed weights of more than a megabyte in its file. MatMulNBits reads from the
    next multiple of 64 of the address that it gets, so that smaller ones, mapped from between two multiples,
    are read shifted (with 1.31.1: as NaN).
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
    """The initializers of a graph and of its branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _initializers(attribute.g)


def _moved(data: BinaryIO, blob: str) -> str:
    """The place of a blob, "offset;length;checksum"; an unaligned blob is first copied to the file's end."""
    offset, length, checksum = blob.split(";")
    if int(offset) % ALIGNMENT == 0:
        return blob
    data.seek(int(offset))
    content = data.read(int(length))
    end = data.seek(0, 2)
    start = -(-end // ALIGNMENT) * ALIGNMENT
    data.write(bytes(start - end) + content)
    return f"{start};{length};{checksum}"


def sample_outputs(session: Session, bundle: Bundle, name: str) -> list[np.ndarray]:
    """A graph's outputs for random inputs; closes the session.

    The decoder runs a prefix and a step, which use different kernels.
    """
    draw = np.random.default_rng(0).standard_normal
    manifest = bundle.manifest
    try:
        if name == "decoder_step":
            decoder = Decoder(session, manifest, min(manifest.context_length, 8))
            width = manifest.token_table.shape[1]
            return [np.array(decoder.feed(draw((1, tokens, width), np.float32))) for tokens in (4, 1)]
        (tensor,) = manifest.graphs[name].inputs
        shape = [1 if isinstance(n, str) else n for n in tensor.shape]
        feed = np.zeros(shape, np.int64) if tensor.dtype == "int64" else draw(shape, np.float32)
        return [np.array(output) for output in session.run({tensor.name: feed}).values()]
    finally:
        session.close()
