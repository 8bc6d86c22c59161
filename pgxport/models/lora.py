# SPDX-License-Identifier: Apache-2.0
"""An adapter in PEFT's layout, merged into the checkpoint's weights while they are read: LoRA and its kin, whole modules, tokens.

What comes out is what PEFT computes with the adapter on its base. Where an adapter changes the embedding of a tied model
and not its lm_head, or the two in two ways, that is a model with an output matrix of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from pgxport.errors import CheckpointError
from pgxport.models import low_rank
from pgxport.models.adapter_config import DERIVED_STARTS, MERGE_FIRST, AdapterConfig, LayerRules
from pgxport.models.low_rank import Matrices
from pgxport.models.safetensors import DTYPES, Stored, Tensor, listed, read_header, read_json, shown
from pgxport.models.weights import EMBEDDING, LM_HEAD, PAIR, PEFT_PREFIX, RENAMED, WRAPPERS, canonical, why_unused

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_E", "lora_magnitude_vector")
OPTIONAL = {"lora_E": "peft_type ADALORA", "lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}  # part -> what asks
TIED = ("embed_tokens", "lm_head")
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
INCOMPLETE = "give the complete adapter, and the checkpoint that it was trained on"
# The transformers whose names a model had when it was trained, the latest first.
ERAS = ("5", "4.52", "4")


@dataclass(frozen=True)
class AdaptedCheckpoint:
    """A checkpoint's tensors with an adapter's changes, the adapter's files, and which of its tensors no answer depends on."""

    tensors: dict[str, Tensor]
    files: list[Path]
    skipped: dict[str, str]


@dataclass
class AdapterFiles:
    """What an adapter's folder holds, by the names of modules and parameters in the model that was trained."""

    folder: Path
    config: AdapterConfig
    rules: LayerRules
    parts: dict[str, dict[str, Stored]] = field(default_factory=dict)  # of the LoRA of a module
    tokens: dict[str, Stored] = field(default_factory=dict)  # rows of a module's weight
    whole: dict[str, Stored] = field(default_factory=dict)  # parameters
    skipped: dict[str, str] = field(default_factory=dict)

    def fault(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / WEIGHTS}: {why}")

    def eras(self) -> list[str]:
        """The eras in which all its names are a PaliGemma's."""
        paths = [*(f"{module}.weight" for module in self.parts), *self.whole]
        return [era for era in ERAS if all(_spelled(canonical(path), era) == path for path in paths)] or list(ERAS)


def merge(tensors: Mapping[str, Tensor], folder: Path, *, tied: bool = True) -> AdaptedCheckpoint:
    """Returns a checkpoint's tensors with an adapter's changes, which are worked out in float32 as rows are read.

    Args:
        tensors: By their published names; where there is no lm_head, the embedding is that matrix too.
        tied: The base's config says that the two are one, so that what PEFT does to one may follow in the other.

    Raises:
        CheckpointError: the folder holds no adapter, or one that does not fit the checkpoint, is incomplete, asks for
            something else, or holds a tensor that would not be used.
    """
    adapter = _read(folder)
    current = dict(tensors)
    tied = tied and LM_HEAD not in current
    if not tied and EMBEDDING in current:
        current.setdefault(LM_HEAD, current[EMBEDDING])
    _replace(current, adapter, tied=tied)
    _check_targets(tensors, adapter)
    layers: dict[str, str] = {}
    for module in adapter.parts:
        name = canonical(f"{module}.weight")
        if name in layers:
            raise adapter.fault(f"{shown(layers[name])} and {shown(module)} are both for {name}")
        layers[name] = module
    if EMBEDDING in current and PAIR & layers.keys():
        current.setdefault(LM_HEAD, current[EMBEDDING])
    for name, module in layers.items():
        _adapt(current, name, module, adapter)
    _set_tokens(current, adapter, tied=tied)
    if current.get(LM_HEAD) is current.get(EMBEDDING):
        current.pop(LM_HEAD, None)
    return AdaptedCheckpoint(current, [folder / CONFIG, folder / WEIGHTS], adapter.skipped)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Returns an adapter's config.

    Raises:
        CheckpointError: the folder holds no adapter, or one of a kind that is not merged.
    """
    _check_folder(folder)
    return AdapterConfig.read(read_json(folder / CONFIG), str(folder / CONFIG))


def _read(folder: Path) -> AdapterFiles:
    """Reads an adapter's config, and sorts its tensors by what they change."""
    config = read_adapter_config(folder)
    adapter = AdapterFiles(folder, config, LayerRules(config, str(folder / CONFIG)))
    names: dict[str, str] = {}  # of the adapter in the keys -> one of the keys
    # AdaLoRA takes ranks from layers, down to none: a matrix without values, which no weight is.
    for key, tensor in read_header(
        folder / WEIGHTS, unused=_may_be_empty if config.peft_type == "ADALORA" else lambda _: False
    ).items():
        if tensor.dtype not in DTYPES.values():
            raise adapter.fault(f"{shown(key)} is stored as {tensor.dtype}; pgx reads adapters in {', '.join(DTYPES)}")
        path = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if not path.startswith(PEFT_PREFIX):
            raise adapter.fault(f"{shown(key)} does not begin with {PEFT_PREFIX}, so that PEFT would not load it")
        if (name := _sort(adapter, path.removeprefix(PEFT_PREFIX), tensor)) is not None:
            names.setdefault(name, key)
    if len(names) > 1:
        raise adapter.fault(
            f"holds tensors of several adapters, {listed(sorted(names))}; save the one that is meant with PEFT's "
            f"save_pretrained(…, selected_adapters=[NAME])"
        )
    if not (adapter.parts or adapter.tokens or adapter.whole):
        raise adapter.fault("holds no tensor")
    return adapter


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        if inside:
            raise CheckpointError(
                f"{folder}: holds {len(inside)} adapters in folders of their own, {listed(inside)}; give the one that is meant, "
                f"as {folder / inside[0]}, or several one after the other"
            )
        raise CheckpointError(f"{folder}: has no {CONFIG}; an adapter is a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        other = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise CheckpointError(
            f"{folder}: has no {WEIGHTS}" + (f", only {listed(other)}, which is not read: {MERGE_FIRST}" if other else "")
        )


def _sort(adapter: AdapterFiles, path: str, tensor: Stored) -> str | None:
    """Files a tensor under what it changes, by its name in the trained model; returns the adapter's name, where it has one.

    PEFT takes the adapter's name out of the keys that it saves: lora_A.weight is lora_A.NAME.weight in the model.
    """
    steps = path.split(".")
    at = next((i for i, step in enumerate(steps) if step in (*PARTS, "token_adapter", "modules_to_save")), None)
    if at is None:
        _put(adapter.whole, path, tensor, adapter)
        return None
    module, part, rest = ".".join(steps[:at]), steps[at], steps[at + 1 :]
    if part == "modules_to_save":  # a module's own parameters follow
        _put(adapter.whole, ".".join([module, *rest[1:]]), tensor, adapter)
        return rest[0] if rest else None
    if part == "token_adapter" and rest == ["weight"]:  # of the base, saved with a resized embedding
        _put(adapter.whole, f"{module}.weight", tensor, adapter)
        return None
    if part == "token_adapter" and rest[:1] == ["trainable_tokens_original"]:
        adapter.skipped[tensor.name] = "the rows of tokens before training"
        return None
    if part == "token_adapter":
        known, rest, into = rest[:1] == ["trainable_tokens_delta"], rest[1:], adapter.tokens
    else:
        end = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
        known, into = end == "weight" or part == "lora_B", adapter.parts.setdefault(module, {})
        part += ".bias" if end == "bias" else ""
    if not known or len(rest) > 1:
        raise adapter.fault(f"{shown(tensor.name)} is no part of an adapter that pgx merges; {MERGE_FIRST}")
    _put(into, module if into is adapter.tokens else part, tensor, adapter)
    return rest[0] if rest else None


def _put(by_name: dict[str, Stored], name: str, tensor: Stored, adapter: AdapterFiles) -> None:
    if other := by_name.get(name):
        raise adapter.fault(f"{shown(other.name)} and {shown(tensor.name)} are both for {shown(name)}")
    by_name[name] = tensor


def _replace(current: dict[str, Tensor], adapter: AdapterFiles, *, tied: bool) -> None:
    """Puts whole parameters in place of the base's: those of modules_to_save, and whatever else PEFT would load."""
    config, by_name, paths = adapter.config, dict[str, Stored](), dict[str, str]()
    for path, tensor in adapter.whole.items():
        name = canonical(path)
        if why := why_unused(name):
            adapter.skipped[tensor.name] = why
            continue
        base = current.get(EMBEDDING if name == LM_HEAD and LM_HEAD not in current else name)
        if base is None or base.shape != tensor.shape:
            fault = f"is {list(base.shape)} there" if base else "is not there"
            raise adapter.fault(
                f"{shown(tensor.name)} {list(tensor.shape)} does not fit the checkpoint: {shown(name)} {fault}; if tokens were "
                f"added in training, add them to the base too (resize_token_embeddings, then save_pretrained), else {MERGE_FIRST}"
            )
        _put(by_name, name, tensor, adapter)
        paths[name] = path
    # PEFT ties what modules_to_save lists by these last names, and no other.
    follows = tied and bool(config.ensure_weight_tying) and any(m.split(".")[-1] in TIED for m in config.modules_to_save or ())
    for name in sorted({*current, LM_HEAD} - by_name.keys()):
        if all(config.saves(_module(_spelled(name, era))) for era in adapter.eras()) and not (name == LM_HEAD and follows):
            raise adapter.fault(f"has nothing of {shown(name)}, which modules_to_save lists; {INCOMPLETE}")
    if EMBEDDING in by_name and config.saves(_module(paths[EMBEDDING])) and not follows:
        current.setdefault(LM_HEAD, current[EMBEDDING])  # PEFT trains a copy of the embedding, and the lm_head stays
    elif tied and PAIR & by_name.keys() == {LM_HEAD} and not config.saves(_module(paths[LM_HEAD])):
        by_name[EMBEDDING] = by_name.pop(LM_HEAD)  # PEFT loads it into the one matrix
    current.update(by_name)


def _check_targets(tensors: Mapping[str, Tensor], adapter: AdapterFiles) -> None:
    """Raises unless the layers with LoRA matrices are those that the config names; PEFT adapts these, and leaves others out."""
    if adapter.config.target_modules is None:
        return
    layers = {name for name, tensor in tensors.items() if name.endswith(".weight") and len(tensor.shape) > 1} | {LM_HEAD}
    ties = bool(adapter.config.ensure_weight_tying)
    adapted = {canonical(f"{module}.weight") for module in adapter.parts}
    for module, parts in adapter.parts.items():
        name = canonical(f"{module}.weight")
        named = {module, *(_module(_spelled(name, era)) for era in ERAS)}
        if name in layers and not (name == LM_HEAD and ties) and not any(_targets(adapter, m, name) for m in named):
            key = next(iter(parts.values())).name
            raise adapter.fault(f"{shown(key)} is of a layer that target_modules does not name, so that PEFT would not load it")
    missing = [
        sorted(n for n in layers - adapted if not (n == LM_HEAD and ties) and _targets(adapter, _module(_spelled(n, era)), n))
        for era in adapter.eras()
    ]
    if all(missing):
        raise adapter.fault(
            f"{len(missing[0])} of the layers that target_modules names have no LoRA matrices: {listed(missing[0])}; {INCOMPLETE}"
        )


def _targets(adapter: AdapterFiles, module: str, name: str) -> bool:
    return adapter.rules.targets(module, linear=name not in (*PAIR, POSITIONS) and "patch_embedding" not in name)


def _adapt(current: dict[str, Tensor], name: str, module: str, adapter: AdapterFiles) -> None:
    """Changes one layer by its LoRA matrices."""
    parts, base, config = adapter.parts[module], current.get(name), adapter.config
    some = next(iter(parts.values()))
    if base is None:
        raise adapter.fault(f"{shown(some.name)} adapts {shown(name)}, which the checkpoint does not have; {INCOMPLETE}")
    embeds = name in (EMBEDDING, POSITIONS)
    a, b = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    asked = {"peft_type ADALORA": config.peft_type == "ADALORA", "lora_bias": config.lora_bias, "use_dora": config.use_dora}
    needed = {a: "a LoRA", b: "a LoRA"} | {part: key for part, key in OPTIONAL.items() if asked[key]}
    if missing := [part for part in needed if part not in parts]:
        raise adapter.fault(f"{shown(some.name)} stands without {missing[0]}, which {needed[missing[0]]} has; {INCOMPLETE}")
    if extra := sorted(parts.keys() - needed.keys()):
        why = f"{CONFIG} does not say {OPTIONAL[extra[0]]}" if extra[0] in OPTIONAL else f"it is no part of a LoRA of {name}"
        raise adapter.fault(f"{shown(parts[extra[0]].name)} would not be used, for {why}; {INCOMPLETE}")
    start = config.init_lora_weights if len(base.shape) == 2 and not embeds and config.peft_type == "LORA" else None
    matrices = Matrices(
        parts[a],
        parts[b],
        adapter.rules.scale(module),
        e=parts.get("lora_E"),
        magnitude=parts.get("lora_magnitude_vector"),
        start=str(start) if start in DERIVED_STARTS else None,
    )
    _check_shapes(base, matrices, name, adapter, rank=adapter.rules.rank(module), embeds=embeds)
    if not matrices.a.shape[0]:
        return
    current[name] = (low_rank.embedding if embeds else low_rank.linear)(base, matrices)
    if bias := parts.get("lora_B.bias"):
        of = f"{name.removesuffix('weight')}bias"
        if of not in current or current[of].shape != bias.shape:
            raise adapter.fault(f"{shown(bias.name)} is added to a layer that has no bias of its shape, which cannot be merged")
        current[of] = low_rank.shifted(current[of], bias, matrices.scale)


def _check_shapes(base: Tensor, m: Matrices, name: str, adapter: AdapterFiles, *, rank: int, embeds: bool) -> None:
    out, size = (base.shape[1], base.shape[0]) if embeds else (base.shape[0], prod(base.shape[1:]))
    fit = m.a.shape[0] == rank and prod(m.a.shape[1:]) == size and m.b.shape[:2] == (out, rank) and prod(m.b.shape[2:]) == 1
    if len(base.shape) < 2 or not fit:
        raise adapter.fault(
            f"{shown(m.a.name)} {list(m.a.shape)} and {shown(m.b.name)} {list(m.b.shape)} of rank {rank} do not fit {name} "
            f"{list(base.shape)}; give the adapter with the checkpoint that it was trained on, not another model"
        )
    for stored, values in ((m.e, rank), (m.magnitude, out)):
        if stored and prod(stored.shape) != values:
            raise adapter.fault(f"{shown(stored.name)} {list(stored.shape)} has not the {values} values that fit {name}")


def _set_tokens(current: dict[str, Tensor], adapter: AdapterFiles, *, tied: bool) -> None:
    """Puts the rows of trained tokens into the embedding, and into the lm_head where PEFT ties it."""
    indices = adapter.config.trainable_token_indices
    wanted = {"embed_tokens": indices} if isinstance(indices, list) else indices or {}
    rows: dict[str, tuple[list[int], Stored]] = {}
    others = {canonical(path) for path in adapter.whole if adapter.config.saves(_module(path))}
    others |= {canonical(f"{module}.weight") for module in adapter.parts}
    for module, values in adapter.tokens.items():
        name = canonical(f"{module}.weight")
        listed_as = next((layer for layer in wanted if module.endswith(layer)), None)
        if tied and wanted and name == LM_HEAD and listed_as is None:
            adapter.skipped[values.name] = "PEFT ties the lm_head's tokens to the embedding's"
            continue
        if listed_as is None or name not in PAIR or EMBEDDING not in current:
            raise adapter.fault(
                f"{shown(values.name)} is not of the embedding or lm_head by trainable_token_indices; {MERGE_FIRST}"
            )
        if name in rows:
            raise adapter.fault(f"{shown(rows[name][1].name)} and {shown(values.name)} are both for {name}")
        if PAIR & others:
            raise adapter.fault(f"{shown(values.name)}: the embedding is changed in another way too; {MERGE_FIRST}")
        chosen, shape = wanted[listed_as], current[EMBEDDING].shape
        if len(set(chosen)) != len(chosen) or max(chosen, default=0) >= shape[0] or values.shape != (len(chosen), shape[1]):
            raise adapter.fault(
                f"{shown(values.name)} {list(values.shape)} does not fit {len(chosen)} different tokens of {name} {list(shape)}"
            )
        rows[name] = (chosen, values)
    for layer, chosen in wanted.items():
        found = any(module.endswith(layer) for module in adapter.tokens)
        if not found and not (tied and "lm_head".endswith(layer) and rows.get(EMBEDDING, (None,))[0] == chosen):
            raise adapter.fault(f"has no rows of {shown(layer)}, which trainable_token_indices lists; {INCOMPLETE}")
    if LM_HEAD in rows:
        current.setdefault(LM_HEAD, current[EMBEDDING])
    for name, (chosen, values) in rows.items():
        current[name] = low_rank.with_rows(current[name], chosen, values)


def _may_be_empty(key: str) -> bool:
    return key.removesuffix(".weight").endswith(("lora_A", "lora_B", "lora_E"))


def _spelled(name: str, era: str) -> str:
    """Returns what a transformers of an era calls the tensor of a published name; `canonical` is the way back."""
    if era == "4":
        return name
    later = next((new + name.removeprefix(old) for new, old in RENAMED if name.startswith(old)), name)
    return later.replace(".vision_model.", ".", 1) if era == "5" else later


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
