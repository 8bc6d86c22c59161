# SPDX-License-Identifier: Apache-2.0
"""The calibration file: what the inputs of every linear look like on samples, written once and read by any later export.

Laid out as safetensors (docs/calibration.md). A second moment
is read when it is asked for, and no two are held at once.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from pgxport.activations.statistics import CHANNELS, OBSERVERS, PARTS, Statistics, area
from pgxport.bundle.manifest import Ranges
from pgxport.errors import CheckpointError, IntegrityError, UsageError
from pgxport.files import check_output, disk_errors, file_sha256, writing
from pgxport.models.checkpoint import row_blocks
from pgxport.models.safetensors import Tensor, listed, opened, parse_json, read_exactly, read_header, shown

FORMAT, VERSION = "pgx calibration", "2"
READABLE = ("1", VERSION)  # what was written before there was `recipe` is complete
UNSIGNED = "0" * 64  # in the place of the digest while it is worked out
AGAIN = "make it again with pgx calibrate"


class About(BaseModel):
    """Metadata of a calibration file: its model, its samples, and how it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str  # a name for people, never a path
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    engine: Literal["numpy", "onnxruntime"]  # what ran the model: a checkpoint is run in numpy, a bundle by ONNX Runtime
    samples: PositiveInt
    skipped: int = Field(0, ge=0)  # records before the last sample that cannot be used
    samples_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    prefix_tokens: PositiveInt  # of all samples together, image tokens included
    suffix_tokens: int = Field(ge=0)
    moments: bool
    recipe: str | None = None  # the recipe that it was gathered for, and no more than that needs; None: for all
    lacks: tuple[str, ...] = ()  # tensors that were not gathered
    changed: tuple[str, ...] = ()  # tensors of inputs as the recipe changes them,
    changes_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")  # which it does by what this is the digest of
    layers: PositiveInt  # of the decoder, each with a cache of keys and values
    inputs: dict[str, str]  # a linear's weight, and the weight under whose name its input is stored: q, k and v share one
    ranges: Ranges | None  # of activations, for float16; None where a bundle was run
    versions: dict[str, str]
    command: str


@dataclass(frozen=True)
class Array:
    """A tensor in memory, as `write_calibration` takes it."""

    values: np.ndarray

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


class Calibration(Statistics):
    """A calibration file, open. Paths are those of weights in the checkpoint."""

    def __init__(self, path: Path, about: About, tensors: Mapping[str, Tensor], digest: str):
        super().__init__(str(path), about.inputs, tensors, about.recipe)
        self.path, self.about, self.digest = path, about, digest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a calibration file and verify every byte of it.

        Raises:
            UsageError: there is no such file.
            IntegrityError: it is damaged, is something else, or was written by another version of pgx.
        """
        path = Path(path)
        if not path.exists():
            raise UsageError(f"{path}: there is no such calibration file; pgx calibrate -o {path} writes one")
        try:
            tensors = read_header(path)
            metadata = read_metadata(path)
        except CheckpointError as error:
            raise IntegrityError(f"{path} is not a sound calibration file ({error}); {AGAIN}") from error
        if metadata.get("format") != FORMAT:
            raise IntegrityError(f"{path} is a safetensors file, and not one that pgx calibrate wrote; {AGAIN}")
        if metadata.get("format_version") not in READABLE:
            version = shown(str(metadata.get("format_version")))
            raise IntegrityError(f"{path} is a calibration file of version {version}, and this pgx reads {VERSION}; {AGAIN}")
        plain, unsigned = _digests(path, metadata.get("sha256", ""))
        if unsigned != metadata.get("sha256"):
            raise IntegrityError(
                f"{path} was changed after it was written: its own sha256 does not hold; copy it again, or {AGAIN}"
            )
        try:
            about = About.model_validate_json(metadata.get("about", ""))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise IntegrityError(f"{path}: {where}: {first['msg']}; {AGAIN}") from None
        _check_tensors(path, about, {name: tensor.shape for name, tensor in tensors.items()})
        return cls(path, about, tensors, plain)

    @property
    def model_sha256(self) -> str:
        return self.about.model_sha256

    @property
    def samples(self) -> int:
        return self.about.samples

    @property
    def tokens(self) -> int:
        """Positions of prefix and suffix that the decoder was observed at."""
        return self.about.prefix_tokens + self.about.suffix_tokens

    @property
    def ranges(self) -> Ranges | None:
        """The ranges of all activations, as `measure_ranges` gives them; None where a bundle was run."""
        return self.about.ranges

    def check(self, model_sha256: str, name: str) -> None:
        """Refuse a file that was made from another model.

        Raises:
            UsageError: it was.
        """
        if model_sha256 != self.model_sha256:
            raise UsageError(
                f"{self.path} was made from {shown(self.about.model)} (sha256 {self.model_sha256[:12]}), "
                f"and {name} is another model ({model_sha256[:12]}); run pgx calibrate on the checkpoint that is exported"
            )


def write_calibration(path: Path, about: About, tensors: Mapping[str, Tensor], *, overwrite: bool = False) -> Calibration:
    """Write the file, a few rows at a time, under another name until it is complete.

    Raises:
        UsageError: it is there already.
        DiskError: it cannot be written; nothing is left at its name.
    """
    check_output(path, overwrite=overwrite)
    _check_tensors(path, about, {name: tensor.shape for name, tensor in tensors.items()})
    metadata = {"format": FORMAT, "format_version": VERSION, "sha256": UNSIGNED, "about": about.model_dump_json()}
    write_tensors(path, tensors, metadata)
    return Calibration.open(path)


def contents(inputs: Mapping[str, str], tensors: Collection[str], *, layers: int, moments: bool) -> dict[str, Any]:
    """What a file of these tensors says of them, as fields of `About`."""
    sites, kinds = dict.fromkeys(inputs.values()), ("inputs", "range", *(("moment",) if moments else ()))
    whole = [f"{kind}/{site}" for site in sites for kind in kinds]
    whole += [f"cache/{layer}/{part}" for layer in range(layers) for part in PARTS]
    lacks, changed = [n for n in whole if n not in tensors], [n for n in tensors if n.startswith("changed/")]
    return {"inputs": dict(inputs), "lacks": lacks, "changed": changed}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of float32; the `sha256` of the metadata, where it is `UNSIGNED`, becomes that of the file.

    Raises:
        DiskError: it cannot be written.
    """
    head = _header(tensors, metadata)
    digest = hashlib.sha256(head)
    with disk_errors(f"cannot write {path}"), writing(path) as file:
        file.write(head)
        for tensor in tensors.values():
            for start, stop in row_blocks(tensor.shape[0], 4 * prod(tensor.shape[1:])):
                block = np.ascontiguousarray(tensor.rows(start, stop), np.float32)
                piece = block.reshape(-1).view(np.uint8).data
                digest.update(piece)
                file.write(piece)
        if metadata.get("sha256") == UNSIGNED:
            file.seek(head.index(UNSIGNED.encode()))
            file.write(digest.hexdigest().encode())


def checkpoint_sha256(files: Iterable[Path]) -> str:
    """One digest of all files of a checkpoint, their names included."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * prod(tensor.shape)
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_metadata(path: Path) -> dict[str, str]:
    """The strings of a file whose header `read_header` has accepted."""
    with opened(path) as file:
        length = int.from_bytes(read_exactly(file, 8, path), "little")
        metadata = parse_json(read_exactly(file, length, path), path).get("__metadata__", {})
    assert isinstance(metadata, dict), "Bug: read_header accepted metadata that is no table"
    return metadata


def _digests(path: Path, signature: str) -> tuple[str, str]:
    """sha256 of the file, and of the file as it was before its signature was put in."""
    plain, unsigned = hashlib.sha256(), hashlib.sha256()
    with opened(path) as file:
        length = int.from_bytes(start := read_exactly(file, 8, path), "little")
        head = start + read_exactly(file, length, path)
        plain.update(head)
        unsigned.update(head.replace(signature.encode(), UNSIGNED.encode(), 1) if len(signature) == 64 else head)
        while block := file.read(1 << 20):
            plain.update(block)
            unsigned.update(block)
    return plain.hexdigest(), unsigned.hexdigest()


def _check_tensors(path: Path, about: About, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The file holds what it says it knows, and nothing else."""
    expected: dict[str, tuple[int, ...]] = {}
    for site in about.inputs.values():
        k = shapes.get(f"inputs/{site}", (len(CHANNELS), 1))[-1]
        expected |= {f"inputs/{site}": (len(CHANNELS), k), f"range/{site}": (len(OBSERVERS), 2)}
        if about.moments:
            expected[f"moment/{site}"] = (area(k),)
    for layer in range(about.layers):
        for part in PARTS:
            name = f"cache/{layer}/{part}"
            seen = shapes.get(name, ())
            expected[name] = seen if len(seen) == 2 else (1, 1)
    for name in about.changed:
        seen = shapes.get(name, ())
        expected[name] = seen if len(seen) == 2 else (1, 1)
    expected = {name: shape for name, shape in expected.items() if name not in about.lacks}
    if wrong := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
        raise IntegrityError(f"{path}: {listed(wrong)} is missing, unknown, or of another shape than the file says; {AGAIN}")
