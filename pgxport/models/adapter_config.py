# SPDX-License-Identifier: Apache-2.0
"""The reader of an adapter_config.json: which layers an adapter changes, and by what rank and scale, as PEFT reads it."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pgxport.errors import CheckpointError
from pgxport.models.name_pattern import Budget, matcher
from pgxport.models.safetensors import shown
from pgxport.models.schema import FileSchema, TokenId

MERGE_FIRST = "merge it where it was trained (PEFT's merge_and_unload, then save_pretrained) and export the result"
CONVERT = (
    "save it as a plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion), or merge it where it was "
    "trained and export the result"
)
# Initializations of A and B that leave the base weights alone, and those whose change follows from the base weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
DERIVED_STARTS = ("pissa", "olora")
# Fields of PEFT's configs that a PaliGemma's merged weights do not depend on.
IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(("auto_mapping", "peft_version", "task_type", "inference_mode", "runtime_config"), "of how PEFT loads it"),
    **dict.fromkeys(("lora_dropout", "eva_config", "corda_config", "loftq_config", "lora_ga_config"), "of training alone"),
    **dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
                    "of AdaLoRA's training alone"),
    "fan_in_fan_out": "of another kind of layer: PEFT sets it to false for a linear one",
    "megatron_core": "of megatron_config", "qalora_group_size": "of use_qalora",
}  # fmt: skip
# Fields that change the arithmetic when they are set.
REFUSED: dict[str, str] = {
    "layer_replication": "which repeats layers of the base model", "target_parameters": "which adapts parameters in place of layers",
    "use_qalora": "which is of GPTQ weights", "use_bdlora": "which trains blocks of matrices", "kasa_config": "which truncates the base",
    "arrow_config": "which chooses among adapters at each token", "megatron_config": "which is of Megatron's layers",
    "alora_invocation_tokens": "which adapts only the tokens after an invocation", "velora_config": "which has tensors of its own",
    "monteclora_config": "which has tensors of its own",
}  # fmt: skip

Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Alpha = Annotated[float, Field(ge=-1e12, le=1e12)]
Names = Annotated[list[str], Field(max_length=10_000)]
Tokens = Annotated[list[TokenId], Field(max_length=1 << 20)]
Layers = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=10_000)]


class AdapterConfig(FileSchema):
    """adapter_config.json. The defaults are those of PEFT's LoraConfig and AdaLoraConfig."""

    peft_type: Literal["LORA", "ADALORA"]
    r: Rank = 8
    init_r: Rank = 12
    lora_alpha: Alpha = 8.0
    rank_pattern: dict[str, Rank | Annotated[list[bool], Field(max_length=1 << 16)]] | None = None  # AdaLoRA: a mask of ranks
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    layers_to_transform: Layers | Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    layers_pattern: Names | str | None = None
    modules_to_save: Names | None = None
    trainable_token_indices: Tokens | dict[str, Tokens] | None = None
    ensure_weight_tying: bool | None = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    no_effect: ClassVar[Mapping[str, str]] = IRRELEVANT

    @classmethod
    def read(cls, values: object, where: str) -> Self:
        if isinstance(values, Mapping):
            _refuse(values, where, {*cls.model_fields, *IRRELEVANT})
        return super().read(values, where)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        masks = any(isinstance(rank, list) for rank in (self.rank_pattern or {}).values())
        if masks != (self.peft_type == "ADALORA" and bool(self.rank_pattern)):
            raise ValueError(f"rank_pattern is not one of {self.peft_type}; give the file that was saved with the adapter")
        if self.use_dora and (self.lora_bias or self.peft_type == "ADALORA"):
            raise ValueError("use_dora stands beside lora_bias or AdaLoRA, which PEFT does not train")
        return self

    def saves(self, module: str) -> bool:
        """Whether modules_to_save lists a module, or one that it is part of: by the end of the name, as PEFT does."""
        parts = module.split(".")
        holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(holder.endswith(end) for end in self.modules_to_save or () for holder in holders)


def _refuse(values: Mapping[str, Any], where: str, known: set[str]) -> None:
    kind = values.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise CheckpointError(f"{where}: peft_type is {shown(str(kind))}; pgx merges 'LORA' and 'ADALORA'. {MERGE_FIRST}")
    for key, why in REFUSED.items():
        if values.get(key) not in (None, False, []):
            raise CheckpointError(f"{where}: {key} is {shown(str(values[key]))}, {why}, and is not merged; {MERGE_FIRST}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in (*PLAIN_STARTS, *DERIVED_STARTS):
        raise CheckpointError(
            f"{where}: init_lora_weights is {shown(start)}, which changed the base weights in a way that these files do not "
            f"tell; {CONVERT}"
        )
    # A field of a later PEFT that is switched on may change the arithmetic.
    if unknown := sorted(k for k, v in values.items() if v and k not in known and k not in REFUSED):
        key = unknown[0]
        raise CheckpointError(f"{where}: {shown(key)} is {shown(str(values[key]))}, which pgx does not know; {MERGE_FIRST}")


class LayerRules:
    """What an adapter's config says of a layer, by its name in the model that was trained."""

    def __init__(self, config: AdapterConfig, where: str):
        self.config = config
        self._where = where
        self._budget = Budget()
        self._ranks = self._compiled("rank_pattern", {} if config.peft_type == "ADALORA" else config.rank_pattern)
        self._alphas = self._compiled("alpha_pattern", config.alpha_pattern)
        self._targets = self._listed("target_modules", config.target_modules)
        self._excluded = self._listed("exclude_modules", config.exclude_modules)

    def rank(self, module: str) -> int:
        """The rank of a layer's matrices, r; of AdaLoRA, that which its training left."""
        c = self.config
        if c.peft_type == "ADALORA":
            mask = (c.rank_pattern or {}).get(f"{module}.lora_E")
            return sum(mask) if isinstance(mask, list) else c.init_r
        return int(next((rank for matches, rank in self._ranks if matches(module)), c.r))

    def scale(self, module: str) -> float:
        """The factor of B @ A: alpha / r, or what the variants have in its place."""
        c, rank = self.config, self.rank(module)
        if c.peft_type == "ADALORA":
            return (c.lora_alpha if c.lora_alpha > 0 else rank) / (c.init_r + 1e-5)
        alpha = next((alpha for matches, alpha in self._alphas if matches(module)), c.lora_alpha)
        return float(alpha) / (math.sqrt(rank) if c.use_rslora else rank)

    def targets(self, module: str, *, linear: bool) -> bool:
        """Whether the config names a layer as one to adapt (PEFT's check_target_module_exists).

        Args:
            linear: It is a linear layer, and not the output matrix; "all-linear" names these.
        """
        c = self.config
        if self._excluded(module) or c.saves(module):
            return False
        if isinstance(c.target_modules, str) and c.target_modules.lower() == "all-linear":
            return linear
        if isinstance(c.target_modules, str) or module in (c.target_modules or ()):
            return self._targets(module)
        return self._targets(module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == []:
            return True
        parts, pattern = module.split("."), self.config.layers_pattern
        patterns = [pattern] if isinstance(pattern, str) else pattern or []
        for i in range(1, len(parts) - 1):
            before = ".".join(parts[:i])
            named = any(self._end(p, "layers_pattern")(before) for p in patterns) if patterns and patterns != [""] else i >= 2
            if parts[i].isdecimal() and named:
                return int(parts[i]) in (wanted if isinstance(wanted, list) else [wanted])
        return False

    def _listed(self, key: str, names: list[str] | str | None) -> Callable[[str], bool]:
        if isinstance(names, str) and names.lower() != "all-linear":
            return matcher(names, f"{self._where}: {key}", self._budget)
        exact, ends = frozenset(names or ()), tuple(f".{name}" for name in names or ())
        return lambda module: module in exact or module.endswith(ends)

    def _compiled(self, key: str, patterns: Mapping[str, Any] | None) -> list[tuple[Callable[[str], bool], Any]]:
        return [(self._end(pattern, key), value) for pattern, value in (patterns or {}).items()]

    def _end(self, pattern: str, key: str) -> Callable[[str], bool]:
        """Whether a pattern matches the end of a name after a dot (PEFT's get_pattern_key)."""
        return matcher(rf"(.*\.)?({pattern})$", f"{self._where}: {key}", self._budget)
