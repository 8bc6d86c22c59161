# SPDX-License-Identifier: Apache-2.0
"""Describe a bundle or a checkpoint from its manifest or its headers; no weight is read but an lm_head (`Checkpoint.tied`)."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from pgxport.bundle.manifest import MANIFEST, TensorInfo
from pgxport.bundle.reader import Bundle
from pgxport.errors import InputError

FACTS = {
    "name", "family", "resolution", "image_tokens", "context_length", "local_window", "recipe", "target", "parameters",
}  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """Describe a bundle, which is verified first, or a checkpoint as plain data.

    Raises:
        InputError: the path is neither.
        IntegrityError: the bundle is not sound.
    """
    if (path / MANIFEST).exists():
        return _bundle(Bundle.open(path))
    if path.is_dir():
        return _checkpoint(path)
    raise InputError(f"{path} is neither a bundle (no {MANIFEST}) nor a checkpoint folder")


def render(facts: dict[str, Any]) -> str:
    """What describe() returns, as lines for people."""
    if facts["kind"] == "checkpoint":
        lines = [
            f"{facts['name']}: {facts['family']} at {facts['resolution']} px, {facts['parameters']:,} parameters, {facts['bytes']:,} bytes"
        ]
        lines += _parts(facts)
        return "\n".join([*lines, f"try: pgx export --checkpoint {facts['path']} -o bundle"])
    lines = [
        f"{facts['name']}: {facts['family']} at {facts['resolution']} px, {facts['parameters']:,} parameters",
        f"  {facts['recipe']} for {facts['target']}, {facts['bytes']:,} bytes, every file as its manifest says",
        f"  {facts['image_tokens']} image tokens, up to {facts['context_length']} tokens of prefix and answer",
    ]
    lines += _parts(facts)
    for name, graph in facts["graphs"].items():
        lines.append(f"  graph {name}: {graph['bytes']:,} bytes with its weights")
        for kind in ("inputs", "outputs"):
            lines += [f"    {kind[:-1]:6} {row}" for row in _fold(graph[kind])]
    return "\n".join([*lines, f'try: pgx run {facts["path"]} --image photo.jpg --prompt "caption en"'])


def _parts(facts: dict[str, Any]) -> list[str]:
    return [
        f"  {part}: {row['parameters']:,} parameters, {row['bytes']:,} bytes ({row['dtypes']})"
        for part, row in facts["parts"].items()
    ]


def _bundle(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    graphs = {
        name: {
            "inputs": [t.model_dump() for t in graph.inputs],
            "outputs": [t.model_dump() for t in graph.outputs],
            "bytes": sum(info.size for file, info in m.files.items() if file.partition(".")[0] == name),
        }
        for name, graph in m.graphs.items()
    }
    parts = {
        part: {
            "parameters": sum(counts.values()),
            # The file also holds scales, and some weights twice.
            "bytes": m.files[m.token_table.file if part == "token_table" else f"{part}.data"].size,
            "dtypes": ", ".join(sorted(counts)),
        }
        for part, counts in m.stored.items()
    }
    return {
        "kind": "bundle", "path": str(bundle.path), **m.model_dump(include=FACTS), "bytes": bundle.nbytes, "parts": parts, "graphs": graphs,
        "files": {name: info.size for name, info in m.files.items()}, "spec": m.spec, "provenance": m.provenance.model_dump(),
    }  # fmt: skip


def _checkpoint(path: Path) -> dict[str, Any]:
    from pgxport.models.checkpoint import Checkpoint
    from pgxport.models.weights import part_of

    checkpoint = Checkpoint.open(path)
    spec = checkpoint.spec()
    parameters: Counter[str] = Counter()
    size: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    for name in checkpoint.names():
        part, count = part_of(name), prod(checkpoint.shape(name))
        parameters[part] += count
        size[part] += count * checkpoint.dtype(name).itemsize
        dtypes.setdefault(part, set()).add(checkpoint.dtype(name).name)
    parts = {p: {"parameters": n, "bytes": size[p], "dtypes": ", ".join(sorted(dtypes[p]))} for p, n in parameters.items()}
    return {
        "kind": "checkpoint", "name": path.resolve().name, "path": str(path), "family": spec.family, "resolution": spec.resolution,
        "parameters": parameters.total(), "bytes": size.total(), "parts": parts,
    }  # fmt: skip


def _fold(tensors: list[dict[str, Any]]) -> list[str]:
    """One line for each tensor, and one for a tensor of the KV cache that every layer has."""
    lines = []
    layers = 1 + max((int(t["name"].split(".")[1]) for t in tensors if t["name"].count(".") == 2), default=-1)
    for tensor in map(TensorInfo.model_validate, tensors):
        stem, dot, rest = tensor.name.partition(".")
        if dot and rest.startswith("0."):
            lines.append(f"{stem}.0…{layers - 1}.{rest[2:]} {tensor.dtype} {list(tensor.shape)}")
        elif not dot:
            lines.append(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}")
    return lines
