# SPDX-License-Identifier: Apache-2.0
"""Open a bundle, and verify it before an engine sees it.

Every file is listed, is a plain file inside the folder, and has its size and sha256;
every graph reads and writes what runners rely on, and its weights lie in these files.
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pgxport.bundle.manifest import CARD, MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from pgxport.bundle.onnx_wire import read_signature
from pgxport.bundle.token_table import Embedding
from pgxport.errors import IntegrityError
from pgxport.files import CHECK_DISK, STAGED, disk_errors, hashed
from pgxport.text import listed


@dataclass(frozen=True)
class Bundle:
    """A complete bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "Bundle":
        """Open a bundle and verify every byte of it.

        Raises:
            IntegrityError: it is not a bundle, is not complete, or is not what its manifest promises.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if verify:
            _verify(path, manifest)
        return cls(path, manifest)

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.manifest.files.values())

    def digest(self) -> str:
        """The sha256 of what this bundle computes: of the manifest without what a report puts there and into the card."""
        with disk_errors("cannot read", CHECK_DISK, path=self.path):
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        manifest["files"].pop(CARD, None)
        manifest.pop("measured", None)
        return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

    def graph(self, name: str) -> Path:
        return self.path / self.manifest.graphs[name].file

    def token_table(self) -> "Embedding":
        return Embedding(self.path / self.manifest.token_table.file, self.manifest.token_table)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise IntegrityError(f"{path}: no such folder; `pgx export -o {path}` writes one")
    file = path / MANIFEST
    with disk_errors(f"cannot read {file}", CHECK_DISK):
        if not os.path.lexists(file):
            raise IntegrityError(f"{path} is not a bundle: it has no {MANIFEST}, which is written last; export it again")
        if (size := _plain_size(file)) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{file} has {size} bytes; no manifest is longer than {MAX_MANIFEST_BYTES}")
        return parse_manifest(file.read_bytes(), str(file))


def _verify(path: Path, manifest: Manifest) -> None:
    with disk_errors("cannot read", CHECK_DISK, path=path):
        _check_files(path, manifest)
        for (name, info), seen in zip(manifest.files.items(), hashed([path / name for name in manifest.files]), strict=True):
            if seen != info.sha256:
                raise IntegrityError(
                    f"{path / name} was changed: its sha256 begins {seen[:12]}, the manifest says {info.sha256[:12]}; copy or export the bundle again"
                )
        _check_table(path, manifest)
        _check_graphs(path, manifest)


def _check_files(path: Path, manifest: Manifest) -> None:
    """The folder holds the files that the manifest lists, of their sizes, and nothing else."""
    named = {g.file for g in manifest.graphs.values()} | {manifest.token_table.file, "tokenizer.json"}
    if missing := named - set(manifest.files):
        raise IntegrityError(f"{path}: the manifest uses {', '.join(sorted(missing))} without listing it under files")
    if strangers := sorted(set(os.listdir(path)) - {MANIFEST, *manifest.files}):
        raise IntegrityError(f"{path} holds {listed(map(repr, strangers))}, which its manifest does not list")
    for name, info in manifest.files.items():
        if (size := _plain_size(path / name)) != info.size:
            raise IntegrityError(f"{path / name} has {size} bytes where the manifest promises {info.size}")


def _plain_size(file: Path) -> int:
    for _ in range(2):  # between the two looks of one round a writer may take its link away
        try:
            status = file.lstat()
        except FileNotFoundError:
            raise IntegrityError(f"{file} is missing; export the bundle again") from None
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 + _staged(file, status):
            return status.st_size
    raise IntegrityError(f"{file} is not a plain file of its own (a link, a pipe or a folder)")


def _staged(file: Path, found: os.stat_result) -> bool:
    """Whether the same file is also where a writer puts it that replaces this bundle, or that was killed while it did."""
    folder = file.parent.resolve()
    try:
        other = folder.with_name(folder.name + STAGED).joinpath(file.name).lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the root has no name
        return False
    return os.path.samestat(found, other)


def _check_table(path: Path, manifest: Manifest) -> None:
    table, size = manifest.token_table, manifest.files[manifest.token_table.file].size
    if table.scales_offset is not None and table.scales_offset < table.shape[0] * table.row_bytes:
        raise IntegrityError(f"{path / table.file}: the scales at {table.scales_offset} lie among the rows")
    if size != table.nbytes:
        raise IntegrityError(f"{path / table.file} has {size} bytes, which is not {table.shape} {table.dtype}")
    ids = manifest.token_ids  # an image's features stand in for `<image>`, whose row is never looked up
    if (top := max(ids.bos, ids.eos, ids.pad, ids.newline)) >= table.shape[0]:
        raise IntegrityError(f"{path}: the manifest has a token {top}, and its token table {table.shape[0]} rows")


def _check_graphs(path: Path, manifest: Manifest) -> None:
    """The graphs are those that runners know, as the manifest describes them, and they keep to the bundle's files."""
    expected, sizes = manifest.signatures(), {name: info.size for name, info in manifest.files.items()}
    if expected.keys() != manifest.graphs.keys():
        raise IntegrityError(f"{path} has the graphs {', '.join(manifest.graphs)}; a bundle has {', '.join(expected)}")
    for name, graph in manifest.graphs.items():
        file = path / graph.file
        if file.suffix != ".onnx":  # what an engine does with a file depends on its name
            raise IntegrityError(f"{path}: the graph {name} is called {graph.file!r}, which does not end in .onnx")
        signature = read_signature(file, sizes)
        described = tuple({t.name: t.shape for t in tensors} for tensors in (graph.inputs, graph.outputs))
        if signature != described or tuple(map(set, signature)) != expected[name]:
            raise IntegrityError(f"{file} has other inputs or outputs than the manifest and the runners know; export it again")
    width = manifest.token_table.shape[1]
    embeds = {t.name: t.shape for t in manifest.graphs["decoder_step"].inputs}["inputs_embeds"]
    features = manifest.graphs["projector"].outputs[0].shape
    if (embeds[-1:], features[1:]) != ((width,), (manifest.image_tokens, width)):
        raise IntegrityError(
            f"{path}: rows of the token table are {width} wide and an image has {manifest.image_tokens} tokens, "
            f"but the graphs have inputs_embeds {list(embeds)} and image_features {list(features)}"
        )
