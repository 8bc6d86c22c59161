# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: its tensors by their published names, in row blocks, whatever layout they are stored in.

The only door to weights. Opening reads headers, and an lm_head if there is one, which may be the embedding.
A checkpoint remembers which tensors were read, so that an export can refuse to drop one in silence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from pgxport.errors import CheckpointError
from pgxport.models import lora, npz
from pgxport.models.config import read_config
from pgxport.models.safetensors import Stored, Tensor, listed, read_header, read_json, shown
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import EMBEDDING, LM_HEAD, PAIR, canonical, why_unused

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What transformers 5.24 does with a pair that differs (it warns); 4.57 goes by the text config's flag, and never looks.
UNTIED_BY_VALUE = (
    f"{CONFIG} does not say tie_word_embeddings is false, and the stored lm_head is not the embedding: it is used, as by "
    f"transformers 5, where transformers 4 uses the embedding"
)

# File name suffixes of other programs' weights -> why pgx does not read them, and what to do.
FOREIGN = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"): "a pickle, which can run code when it is loaded; where you trust it, "
    "convert it with transformers (from_pretrained, then save_pretrained) and export the model.safetensors it writes",
    (".gguf", ".ggml"): "a GGUF, already quantized for llama.cpp; export the safetensors checkpoint it was made from",
    (
        ".h5",
        ".keras",
    ): "a Keras checkpoint; export the same model's safetensors checkpoint (the hub's google/paligemma… repositories)",
    (".msgpack",): "a Flax checkpoint; export the same model's safetensors checkpoint, or the training code's npz",
    (
        ".tflite",
        ".task",
        ".litertlm",
        ".onnx",
        ".engine",
    ): "an exported model; export the safetensors checkpoint it was made from",
}


class TensorSource(Protocol):
    """A source of weights by name, read in row blocks; `Checkpoint` is one."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class OpenedFiles:
    """What the files of a checkpoint hold; `skipped` says of a tensor, by its stored name, why no answer depends on it."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: list[Path]
    skipped: dict[str, str]
    remarks: tuple[str, ...] = ()


class Checkpoint:
    """A checkpoint's config and its tensors by their published names. Made by `Checkpoint.open`.

    Attributes:
        skipped: Tensors that no answer depends on, by their stored names, and why.
        tied: The output matrix is the embedding; else it is a tensor of its own.
        remarks: What someone should know about how the checkpoint was read.
    """

    def __init__(self, path: Path, opened: OpenedFiles, adapters: Sequence[Path] = ()):
        self.path = path
        # What stands beside an adapter goes before what stands beside the base's weights.
        self.folders = (*reversed(adapters), path if path.is_dir() else path.parent)
        self.config = opened.config
        self.skipped = opened.skipped
        self.tied = LM_HEAD not in opened.tensors
        self.remarks = opened.remarks
        self._tensors = opened.tensors
        self._files = opened.files
        self._read: set[str] = set()

    @classmethod
    def open(cls, path: Path, adapters: Sequence[Path] = ()) -> "Checkpoint":
        """Opens a folder in the hub's layout, or a training npz alone or in a folder.

        Args:
            adapters: Folders of PEFT adapters, which are merged one after the other while weights are read.

        Raises:
            CheckpointError: the checkpoint is not complete and sound, or in a layout that pgx does not read.
        """
        path = Path(path)
        opened = _open(path)
        files, ties = opened.files, bool(opened.config.get("tie_word_embeddings", True))
        tensors, skipped = _without_copy(_with_embedding(opened, path), opened.skipped)
        remarks = (UNTIED_BY_VALUE,) if ties and LM_HEAD in tensors else ()
        for adapter in adapters:
            merged = lora.merge(tensors, adapter, tied=ties)
            tensors, skipped = _without_copy(merged.tensors, skipped | merged.skipped)
            files = [*files, *merged.files]
        return cls(path, OpenedFiles(tensors, opened.config, files, skipped, remarks), adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Returns the tensors' published names, sorted, without an lm_head that is a copy of the embedding."""
        return sorted(self._tensors)

    def spec(self, *, local_window: bool = True) -> ModelSpec:
        """Returns the spec that the config describes, `tied` by the weights; see `read_config`."""
        spec = read_config(self.config, local_window=local_window)
        return replace(spec, text=replace(spec.text, tied=self.tied))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype of `rows`: the stored one, or float32 for a weight that an adapter is merged into."""
        return self._tensor(name).dtype

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows start..stop of a tensor along axis 0, and no others.

        Raises:
            CheckpointError: a value is infinite or not a number, or the file has changed since it was opened.
        """
        tensor = self._tensor(name)
        assert 0 <= start <= stop <= tensor.shape[0], f"Bug: rows {start} to {stop} of {name}, which has {tensor.shape[0]}"
        self._read.add(name)
        return tensor.rows(start, stop)

    def unread(self) -> list[str]:
        """Returns the names of the tensors of which no row was read, sorted."""
        return sorted(self._tensors.keys() - self._read)

    def files(self) -> list[Path]:
        """Returns every file that holds weights or the config, for a digest."""
        return list(self._files)

    def file(self, name: str) -> Path | None:
        """Returns the path of a file beside the weights, such as tokenizer.json; None where there is none.

        The last adapter's folder that has it goes before the base's.
        """
        assert Path(name).name == name, f"Bug: {name!r} is not a plain file name"
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)

    def json(self, name: str, *others: str) -> dict[str, Any] | None:
        """Returns the object in a json file beside the weights; None where there is none.

        Args:
            others: Files that belong to it: the folder that is looked into is the first that has any of them all.

        Raises:
            CheckpointError: it is no sound JSON.
        """
        found = next((folder for folder in self.folders if any((folder / n).is_file() for n in (name, *others))), None)
        return read_json(found / name) if found and (found / name).is_file() else None

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            close = get_close_matches(name, self._tensors, 1)
            hint = f"; it has {close[0]!r}" if close else ""
            raise CheckpointError(
                f"{self.path}: has no {shown(name)}{hint}; give a complete checkpoint, with the config.json that belongs to it"
            )
        return self._tensors[name]


def _open(path: Path) -> OpenedFiles:
    if path.is_file():
        if path.suffix == ".npz":
            return _training(path, alone=True)
        raise CheckpointError(f"{path}: {_why_not(path) or 'is a file; give the folder that holds config.json and the weights'}")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such folder; give the one that holds config.json and {WHOLE}, or a training npz"
        )
    whole, index = path / WHOLE, path / INDEX
    arrays = sorted(path.glob("*.npz"))
    if whole.is_file() and index.is_file():
        raise CheckpointError(f"{path}: holds both {WHOLE} and {INDEX}; move away the one that is not meant")
    if whole.is_file() or index.is_file():
        return _published(path, _sharded(index) if index.is_file() else [whole])
    if (path / lora.CONFIG).is_file():
        raise CheckpointError(
            f"{path}: looks like a LoRA adapter ({lora.CONFIG}, no {WHOLE}); give its base checkpoint, and this as the adapter"
        )
    if len(arrays) == 1:
        return _training(arrays[0])
    if arrays:
        raise CheckpointError(f"{path}: holds {listed([a.name for a in arrays])}; give the one that is meant, not the folder")
    raise CheckpointError(f"{path}: {_why_no_weights(path)}")


def _training(file: Path, *, alone: bool = False) -> OpenedFiles:
    """Opens a training npz. A config.json beside it overrides what the shapes say, for they do not say everything.

    Args:
        alone: The file was named, and may lie in a folder with anything: a config.json of another model is not its own.
    """
    config = file.with_name(CONFIG)
    tensors, shapes, skipped = npz.read_npz(file)
    if config.is_file() and (not alone or read_json(config).get("model_type") == "paligemma"):
        return OpenedFiles(tensors, read_json(config), [config, file], skipped)
    return OpenedFiles(tensors, npz.config_of(shapes, file), [file], skipped)


def _published(folder: Path, files: list[Path]) -> OpenedFiles:
    """Opens safetensors files, the first of which may be an index, under their published names."""
    config = folder / CONFIG
    if not config.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; put the one that belongs to the weights there")
    tensors: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    by_name: dict[str, Stored] = {}
    for file in files:
        if file.name == INDEX:
            continue
        for tensor in read_header(file, unused=_is_unused).values():
            name = canonical(tensor.name)
            if why := why_unused(name):
                skipped[tensor.name] = why
                continue
            if other := by_name.get(name):
                raise CheckpointError(
                    f"{tensor.file}: {shown(tensor.name)} and {shown(other.name)} ({other.file.name}) are both {name}; "
                    f"take one of them out"
                )
            tensors[name] = by_name[name] = tensor
    return OpenedFiles(tensors, read_json(config), [config, *files], skipped)


def _sharded(index: Path) -> list[Path]:
    """Returns the index and its shards. The index and the shards' own headers have to agree, tensor by tensor.

    They may differ about tensors that no answer depends on, and about the embedding and the lm_head, which may be two
    names of one matrix: the index may name both and the shards hold either.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{index}: weight_map is not a table from tensor to file; give the index that was saved with the shards"
        )
    needed = {name: shard for name, shard in weight_map.items() if not _is_unused(name)}
    files = []
    for shard in sorted(set(weight_map.values())):
        # The shard may be a link: the hub's local cache is made of links out of the folder.
        if not shard.endswith(".safetensors") or set("/\\\0") & set(shard) or len(shard.encode()) > 255:
            raise CheckpointError(
                f"{index}: {shown(shard)} is not the plain name of a safetensors file in the same folder; refused"
            )
        file = index.with_name(shard)
        named = {name for name, at in needed.items() if at == shard}
        if not file.is_file():
            if not named:
                continue
            raise CheckpointError(f"{file}: this shard is missing, which {index.name} names; put it there")
        header = {name for name in read_header(file, unused=_is_unused) if not _is_unused(name)}
        if missing := sorted(name for name in named - header if canonical(name) not in PAIR):
            raise CheckpointError(f"{file}: has no {listed(missing)}, which {index.name} says it holds")
        if extra := sorted(name for name in header - named if canonical(name) not in PAIR):
            raise CheckpointError(f"{file}: holds {listed(extra)}, which {index.name} places elsewhere or nowhere")
        files.append(file)
    return [index, *files]


def _is_unused(name: str) -> bool:
    return why_unused(canonical(name)) is not None


def _with_embedding(opened: OpenedFiles, path: Path) -> dict[str, Tensor]:
    """Returns the tensors; an lm_head stored alone is the embedding, of whose two names safetensors' save_model keeps one.

    Raises:
        CheckpointError: one of the two is stored, and the config says that they are not one.
    """
    tensors = dict(opened.tensors)
    pair = PAIR & tensors.keys()
    if len(pair) == 1 and not opened.config.get("tie_word_embeddings", True):
        (missing,) = PAIR - pair
        raise CheckpointError(
            f"{path}: has no {missing}, and {CONFIG} says tie_word_embeddings is false, so that {min(pair)} is not that "
            f"matrix too; give the complete checkpoint, or write true there if it was trained with the two tied"
        )
    if pair == {LM_HEAD}:
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
    return tensors


def _without_copy(tensors: dict[str, Tensor], skipped: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Takes an lm_head that is the embedding out of the tensors, and names it among what is skipped."""
    lm_head = tensors.get(LM_HEAD)
    if lm_head is None or EMBEDDING not in tensors or not _equal(tensors[EMBEDDING], lm_head):
        return tensors, skipped
    rest = {name: tensor for name, tensor in tensors.items() if name != LM_HEAD}
    return rest, skipped | {lm_head.name if isinstance(lm_head, Stored) else LM_HEAD: "a copy of the embedding"}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold equal values, be it in two dtypes; reads no further than the first block that differs."""
    return (
        a.shape == b.shape
        and len(a.shape) == 2
        and all(
            np.array_equal(to_float32(a.rows(start, stop)), to_float32(b.rows(start, stop)))
            for start, stop in row_blocks(a.shape[0], 4 * a.shape[1])
        )
    )


def _why_not(file: Path) -> str | None:
    return next((f"is {why}" for suffixes, why in FOREIGN.items() if file.suffix.lower() in suffixes), None)


def _why_no_weights(folder: Path) -> str:
    present = sorted(p for p in folder.iterdir() if p.suffix != ".json")
    if any(p.suffix == ".safetensors" for p in present):
        names = [p.name for p in present if p.suffix == ".safetensors"]
        return f"holds {listed(names)}, and neither {WHOLE} nor {INDEX}, which lists the tensors of shards; fetch that file"
    for file in present:
        if why := _why_not(file):
            return f"{file.name} {why}"
    if (folder / "snapshots").is_dir():
        return "is a whole repository of the hub's cache; give one of the folders under snapshots/"
    return f"holds no weights; expected {WHOLE}, {INDEX} with its shards, or a training npz"


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# Size of a row block in float32. The export holds a few;
# larger ones leave the processor's cache, at half the speed.
BLOCK_BYTES = 4 << 20


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of row blocks of at most `BLOCK_BYTES`, or of one row where a row is larger.

    >>> list(row_blocks(5, BLOCK_BYTES // 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def to_float32(block: np.ndarray) -> np.ndarray:
    """Widens floats to float32 exactly. A bfloat16 is the upper half of a float32, and shifting bits is the faster way."""
    if block.dtype == BFLOAT16:
        return (block.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.astype(np.float32, copy=False)
