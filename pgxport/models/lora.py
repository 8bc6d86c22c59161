# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter in PEFT's layout (Hu et al., 2021), merged into the checkpoint's weights while they are read.

A row block is W[a:b] + scale * B[a:b] @ A in float32: neither the merged matrix nor B @ A ever exists whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgxport.errors import CheckpointError
from pgxport.models.safetensors import DTYPES, Stored, Tensor, listed, read_header, read_json, refuse_non_finite, shown
from pgxport.models.weights import EMBEDDING, LM_HEAD, canonical

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGE_FIRST = "merge it where it was trained (PEFT's merge_and_unload, then save_pretrained) and export the result"

# The fields that change the arithmetic and that this file obeys.
HONOURED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "ensure_weight_tying", "peft_type", "bias", "init_lora_weights",
)  # fmt: skip
# The fields that matter in training alone, or that only a method reads which is refused by its own switch.
IRRELEVANT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
)  # fmt: skip
# The initializations of A and B that leave the base weights
# alone; pissa, olora, loftq, corda and lora_ga change them.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# rank_pattern and alpha_pattern are regular expressions for
# PEFT. A stranger's are not run here: one can take for ever.
REGEX = frozenset("\\^$*+?{}[]|()")


@dataclass(frozen=True)
class Merged:
    """A weight with its adapter added, in float32: rounding to the base's dtype would lose what the adapter learned."""

    base: Tensor
    a: Stored  # [r, in]
    b: Stored  # [out, r]
    scale: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES["F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows = self.b.rows(start, stop).astype(np.float32) @ self.a.rows(0, self.a.shape[0]).astype(np.float32)
        rows *= np.float32(self.scale)
        rows += self.base.rows(start, stop).astype(np.float32)
        refuse_non_finite(rows, start, self.b.name, self.b.file)
        return rows


def merge(tensors: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Returns the checkpoint's tensors with an adapter's changes, and the adapter's files.

    Raises:
        CheckpointError: the folder holds no LoRA adapter, or one that does not fit the checkpoint, is incomplete, or
            holds a tensor that would not be used.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; an adapter is a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        other = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise CheckpointError(
            f"{folder}: has no {WEIGHTS}" + (f", only {listed(other)}, which is not read: {MERGE_FIRST}" if other else "")
        )
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    pairs: dict[str, dict[str, Stored]] = {}
    saved: dict[str, Stored] = {}
    for key, tensor in read_header(folder / WEIGHTS).items():
        path = key.removeprefix("base_model.model.")
        module, dot, matrix = path.rpartition(".lora_")
        if path == key or (dot and matrix not in ("A.weight", "B.weight")):
            raise CheckpointError(f"{folder / WEIGHTS}: {shown(key)} is no plain LoRA matrix of a linear layer; {MERGE_FIRST}")
        if dot:
            pairs.setdefault(module, {})[matrix[0]] = tensor
        elif any(f".{replaced}." in f".{path}" for replaced in config.get("modules_to_save") or ()):
            _put(saved, canonical(path), tensor, folder)
        else:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {shown(key)} is neither a LoRA matrix nor in modules_to_save; {MERGE_FIRST}"
            )
    if not pairs and not saved:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no tensor")
    merged = dict(_merged(tensors, pairs, config, folder))
    _check_saved(tensors, saved, config, folder)
    if both := sorted(merged.keys() & saved.keys()):
        raise CheckpointError(f"{folder / WEIGHTS}: {listed(both)}: both replaced (modules_to_save) and adapted; {MERGE_FIRST}")
    _check_complete(tensors, {*merged, *saved}, config, folder)
    if EMBEDDING in saved and LM_HEAD not in saved:
        # The adapter ties lm_head to its own embedding, so the stored copy of the old one has to go.
        tensors = {name: tensor for name, tensor in tensors.items() if name != LM_HEAD}
    return {**tensors, **merged, **saved}, [folder / CONFIG, folder / WEIGHTS]


def _merged(
    tensors: Mapping[str, Tensor], pairs: Mapping[str, Mapping[str, Stored]], config: Mapping[str, Any], folder: Path
) -> Iterator[tuple[str, Merged]]:
    by_name: dict[str, Stored] = {}
    for module, pair in pairs.items():
        name = canonical(f"{module}.weight")
        half = next(iter(pair.values()))
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{half.file}: {shown(half.name)} has no other half; the adapter is incomplete")
        if name in (EMBEDDING, LM_HEAD):
            raise CheckpointError(f"{half.file}: {shown(half.name)} would untie the lm_head from the embedding; {MERGE_FIRST}")
        if name not in tensors:
            raise CheckpointError(f"{half.file}: {shown(half.name)} adapts {shown(name)}, which the checkpoint does not have")
        _put(by_name, name, half, folder)
        a, b, base = pair["A"], pair["B"], tensors[name]
        rank = _by_module(config.get("rank_pattern"), module, config["r"], folder)
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{folder / CONFIG}: the rank of {shown(module)} is {rank!r}, not a positive integer")
        alpha = _by_module(config.get("alpha_pattern"), module, config["lora_alpha"], folder)
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise CheckpointError(f"{folder / CONFIG}: the alpha of {shown(module)} is {alpha!r}, not a number")
        if len(base.shape) != 2 or a.shape != (rank, base.shape[1]) or b.shape != (base.shape[0], rank):
            raise CheckpointError(
                f"{a.file}: {shown(a.name)} {list(a.shape)} and lora_B {list(b.shape)} of rank {rank} do not fit {name} "
                f"{list(base.shape)}; give the adapter with the checkpoint that it was trained on, not another model"
            )
        yield name, Merged(base, a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _put(by_name: dict[str, Stored], name: str, tensor: Stored, folder: Path) -> None:
    if name in by_name:
        raise CheckpointError(f"{folder / WEIGHTS}: {shown(by_name[name].name)} and {shown(tensor.name)} are both for {name}")
    by_name[name] = tensor


def _check_saved(tensors: Mapping[str, Tensor], saved: Mapping[str, Stored], config: Mapping[str, Any], folder: Path) -> None:
    for name, tensor in saved.items():
        # The lm_head may be stored nowhere, for it was the embedding until now.
        base = tensors.get(EMBEDDING if name == LM_HEAD else name)
        if base is None or base.shape != tensor.shape:
            fault = f"is {list(base.shape)} there" if base else "is not there"
            raise CheckpointError(
                f"{tensor.file}: {shown(tensor.name)} {list(tensor.shape)} does not fit the checkpoint: {shown(name)} {fault}"
            )
    if EMBEDDING in saved and LM_HEAD not in saved and not config.get("ensure_weight_tying"):
        raise CheckpointError(
            f"{folder}: replaces the embedding and not the lm_head, which unties them, and pgx exports tied ones only"
        )
    for module in config.get("modules_to_save") or ():
        if not any(f".{module}." in f".{tensor.name}" for tensor in saved.values()):
            raise CheckpointError(
                f"{folder / WEIGHTS}: has nothing of {shown(module)}, which modules_to_save lists; it is incomplete"
            )


def _check_complete(tensors: Mapping[str, Tensor], changed: set[str], config: Mapping[str, Any], folder: Path) -> None:
    """Raises if a layer has no LoRA matrices though its name ends with a target: PEFT adapts every such layer."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return
    ends = tuple(f".{target}.weight" for target in targets)
    missing = sorted(name for name in tensors.keys() - changed - {EMBEDDING, LM_HEAD} if f".{name}".endswith(ends))
    if missing:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(missing)} of the layers that target_modules names have no LoRA matrices: "
            f"{listed(missing)}; give the complete adapter, and the checkpoint that it was trained on"
        )


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}; pgx merges 'LORA' only. {MERGE_FIRST}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {config['bias']!r}; pgx merges LoRA with bias 'none' only. {MERGE_FIRST}")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights too; {MERGE_FIRST}"
        )
    # Any other field that is switched on may change the
    # arithmetic: DoRA, QALoRA, lora_bias, layer_replication, …
    if unknown := sorted(k for k, v in config.items() if v and k not in HONOURED and k not in IRRELEVANT):
        raise CheckpointError(
            f"{file}: {unknown[0]} is {shown(str(config[unknown[0]]))}, which pgx does not merge; {MERGE_FIRST}"
        )
    for key, kinds in {
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
        "target_modules": (list, str, type(None)),
        "modules_to_save": (list, type(None)),
        "use_rslora": (bool, type(None)),
        "ensure_weight_tying": (bool, type(None)),
    }.items():
        value = config.get(key)
        if not isinstance(value, kinds) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            raise CheckpointError(f"{file}: {key} is {shown(str(value))}, and PEFT writes no such value")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"{file}: has no {key}, without which the adapter's scale is unknown")


def _by_module(pattern: Mapping[str, Any] | None, module: str, default: object, folder: Path) -> Any:
    """Returns a module's entry: that of the first key that is its name, or the end of its name after a dot."""
    for key, value in (pattern or {}).items():
        name = key.removeprefix("^")
        if REGEX & set(name):
            raise CheckpointError(f"{folder / CONFIG}: {shown(key)} is a regular expression, and pgx reads names; {MERGE_FIRST}")
        if module == name or (name == key and module.endswith(f".{name}")):
            return value
    return default
