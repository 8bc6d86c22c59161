# SPDX-License-Identifier: Apache-2.0
"""How each weight is stored and multiplied by, as data: ordered rules of pattern and scheme, the first match wins.

Knows no operators and no engine; `targets.py` says what an engine can run, and `lower.py` is where the two meet.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from pgxport.errors import UsageError

Method = Literal["nearest", "clip", "gptq"]
Scaling = Literal["none", "awq", "smoothquant"]
Activations = Literal["float", "dynamic", "static"]
Observer = Literal["minmax", "percentile", "entropy", "mse"]
Format = Literal["int", "e4m3"]


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight, and to multiply by it.

    Attributes:
        dtype: numpy's name of the type of a float (bfloat16: that of ml_dtypes). Not used where `bits` is given.
        bits: 8 or 4: whole numbers, and a scale for each group of them. None: floats.
        format: What the 8 bits are: whole numbers, or "e4m3", FP8 with four bits of exponent, which TensorRT multiplies from Ada on.
        group_size: Input channels that share a scale, a power of two from 16 on; the last group of a row may be shorter. None: a row.
        symmetric: The grid is symmetric around zero; else each group has a zero point.
        method: How weights are rounded: "nearest"; "clip", nearest on the clipped range that loses least; "gptq", which
            needs second moments of the inputs.
        scaling: How input channels are rescaled before rounding: "awq", or "smoothquant" where activations are rounded too.
        activations: What the products are made of: "float", or numbers like the weights' (int8, or FP8) with a scale measured at
            run time ("dynamic") or in calibration ("static").
        observer: How calibration's numbers become the range of static activations.
        compensate: Add what rounding takes from the mean output to the bias of the layer, where it has one.
        shortlist: Of the token table: find the likeliest tokens with a copy of it in `SHORTLIST`, and then these tokens' logits with the
            table itself, whose other rows are not read.
        prefill8: Of the decoder's linears: multiply a prefix by a copy in `PREFILL`, which takes less time where processors have
            integer products; a new token, for which reading the weights is what takes time, by what the rest of the scheme says.
    """

    dtype: str = "float32"
    bits: int | None = None
    format: Format = "int"
    group_size: int | None = None
    symmetric: bool = True
    method: Method = "nearest"
    scaling: Scaling = "none"
    activations: Activations = "float"
    observer: Observer = "minmax"
    compensate: bool = False
    shortlist: bool = False
    prefill8: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it cannot be written without a calibration file."""
        return self.bits is not None and (
            self.method == "gptq" or self.scaling != "none" or self.activations == "static" or self.compensate
        )


@dataclass(frozen=True)
class Rule:
    pattern: str
    scheme: Scheme


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, and how the KV cache is kept: a float type, "int8" (a scale for each channel), or None: as activations are."""

    name: str
    rules: tuple[Rule, ...]
    cache: str | None = None

    def scheme(self, weight: str) -> Scheme:
        """The scheme of a weight, by its name in the checkpoint.

        Raises:
            UsageError: no rule matches; a recipe ends with a rule for everything else.
        """
        for rule in self.rules:
            if fnmatchcase(weight, rule.pattern):
                return rule.scheme
        raise UsageError(f"recipe {self.name!r} has no rule for {weight!r}; end it with a rule for '*'")

    def check(self, weights: Iterable[str]) -> None:
        """Every weight has a rule, and every rule a weight.

        Raises:
            UsageError: one has not.
        """
        names = list(weights)
        left = set(names)
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                raise UsageError(f"recipe {self.name!r}: the rule for {rule.pattern!r} matches no weight; mend it or take it out")
            matched = {name for name in left if fnmatchcase(name, rule.pattern)}
            if not matched and rule is not self.rules[-1]:
                raise UsageError(f"recipe {self.name!r}: the rule for {rule.pattern!r} comes after others that match all it does")
            if rule.scheme.shortlist and (others := [name for name in matched if not fnmatchcase(name, TABLE)]):
                raise UsageError(
                    f"recipe {self.name!r}: screen is of the token table alone, and the rule for {rule.pattern!r} decides for "
                    f"{min(others)}; give {TABLE!r} a rule of its own"
                )
            if rule.scheme.prefill8 and (others := [name for name in matched if not fnmatchcase(name, DECODER)]):
                raise UsageError(
                    f"recipe {self.name!r}: prefill8 is of the decoder's linears, and the rule for {rule.pattern!r} decides for "
                    f"{min(others)}; give {DECODER!r} a rule of its own"
                )
            left -= matched
        if left:
            self.scheme(min(left))
        linears = {name: self.scheme(name).prefill8 for name in names if fnmatchcase(name, DECODER)}
        if len({*linears.values()}) > 1:
            raise UsageError(
                f"recipe {self.name!r}: prefill8 is for all of the decoder's linears or none, for a layer is written twice; and "
                f"{min(name for name, twice in linears.items() if not twice)} is without"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it cannot be written without a calibration file."""
        return self.cache == "int8" or any(rule.scheme.calibrated for rule in self.rules)

    @property
    def lossy(self) -> bool:
        """Whether it stores anything in whole numbers."""
        return self.cache == "int8" or any(rule.scheme.bits for rule in self.rules)


# Gemma's norms multiply by 1 + weight, of which half precision keeps too few digits. They are a few kilobytes a layer.
NORMS = Rule("*norm*", Scheme())
REST = Rule("*", Scheme("float16"))
# Patterns of the matrices, in the order of their use; norms come first, for the third would match them.
TABLE, DECODER = "*.embed_tokens.weight", "language_model.*_proj.weight"
VISION, PROJECTOR = "vision_tower.*.layers.*.weight", "multi_modal_projector.linear.weight"
# The copy of the token table that finds the likeliest tokens. With groups of 128 a step takes least; the candidates are computed anew.
SHORTLIST = Scheme(bits=4, group_size=128)
# And the copies that prefixes are multiplied by.
PREFILL = Scheme(bits=8, activations="dynamic")
VISION_FC2 = "vision_tower.*.fc2.weight"
FP32 = Recipe("fp32", (Rule("*", Scheme()),))
FP16 = Recipe("fp16", (NORMS, REST))
BF16 = Recipe("bf16", (NORMS, Rule("*", Scheme("bfloat16"))))
# Activations in int8 too, with a scale for each token; and with scales from calibration, which want outliers moved to the weights.
TOKEN = Scheme(bits=8, activations="dynamic")
STATIC = Scheme(bits=8, activations="static")
SMOOTH = Scheme(bits=8, activations="static", scaling="smoothquant")
INT8 = Recipe("int8", (NORMS, *(Rule(p, Scheme(bits=8, group_size=128)) for p in (TABLE, DECODER, VISION, PROJECTOR)), REST))
W8A8 = Recipe("w8a8", (NORMS, *(Rule(p, TOKEN) for p in (TABLE, DECODER, VISION, PROJECTOR)), REST))
W8A8_STATIC = Recipe(
    "w8a8-static",
    # What GELU gives cannot be rescaled by what comes before it.
    (
        NORMS,
        Rule(TABLE, TOKEN),
        Rule(DECODER, SMOOTH),
        Rule(VISION_FC2, STATIC),
        Rule(VISION, SMOOTH),
        Rule(PROJECTOR, STATIC),
        REST,
    ),
)
TABLE_8 = Rule(TABLE, Scheme(bits=8, group_size=128))  # the output matrix too, where 4 bits change every logit
INT4 = Recipe("int4", (NORMS, TABLE_8, Rule(DECODER, Scheme(bits=4, group_size=32, symmetric=False)), REST))
# Where integer products are fast, the vision encoder has them.
FAST_VISION = (Rule(VISION, TOKEN), Rule(PROJECTOR, TOKEN), REST)
INT4_CPU = Recipe("int4", (*INT4.rules[:-1], *FAST_VISION))
INT4_GPTQ = Recipe(
    "int4-gptq",
    (
        NORMS,
        Rule(TABLE, Scheme(bits=8, group_size=128, method="gptq")),
        Rule(DECODER, Scheme(bits=4, group_size=32, symmetric=False, method="gptq")),
        *FAST_VISION,
    ),
)
# Groups of 128 decode fastest.
TABLE_8_SHORTLIST = Rule(TABLE, replace(TABLE_8.scheme, shortlist=True))
INT4_FAST = Recipe(
    "int4-fast", (NORMS, TABLE_8_SHORTLIST, Rule(DECODER, Scheme(bits=4, group_size=128, symmetric=False)), *FAST_VISION)
)
# The fastest: a long answer's steps read the cache as often as the weights, here a quarter of it.
INT4_FAST_KV8 = replace(INT4_FAST, name="int4-fast-kv8", cache="int8")
# The first token as soon as w8a8 has it, the others as fast as int4-fast, for twice the memory.
MIXED = Recipe(
    "mixed",
    (NORMS, TABLE_8_SHORTLIST, Rule(DECODER, Scheme(bits=4, group_size=128, symmetric=False, prefill8=True)), *FAST_VISION),
)
# The smallest: the table and the vision encoder in 4 bits too. The table alone costs a KL of 0.0047 rounded to nearest, 0.0033
# clipped, and 0.0050 by GPTQ (tiny-112), which minimises a norm of all logits, not of those that are likely.
_SMALL_TABLE = Rule(TABLE, Scheme(bits=4, group_size=32, method="clip"))
_SMALL = Scheme(bits=4, group_size=64, symmetric=False)
_SMALL_VISION = Scheme(bits=4, group_size=32, symmetric=False)
_SMALL_REST = (Rule(PROJECTOR, Scheme(bits=8, group_size=128)), REST)
INT4_SMALL = Recipe("int4-small", (NORMS, _SMALL_TABLE, Rule(DECODER, _SMALL), Rule(VISION, _SMALL_VISION), *_SMALL_REST))
INT4_SMALL_GPTQ = Recipe(
    "int4-small-gptq",
    (
        NORMS,
        _SMALL_TABLE,
        Rule(DECODER, replace(_SMALL, method="gptq", scaling="awq")),
        Rule(VISION, replace(_SMALL_VISION, method="gptq")),
        *_SMALL_REST,
    ),
)
# TensorRT multiplies by symmetric weights: of 8 bits with a scale for each row, of 4 in groups; and activations in int8 have the
# scale of their calibration. The table's rows are looked up by the runner, so they are whole numbers in every one.
ROWS, ROWS_8 = Scheme(bits=8), Rule(TABLE, Scheme(bits=8))
FLOAT8 = Scheme(bits=8, format="e4m3", activations="static")
FP8 = Recipe("fp8", (NORMS, ROWS_8, *(Rule(p, FLOAT8) for p in (DECODER, VISION, PROJECTOR)), REST))
_STATIC_RULES = tuple(ROWS_8 if rule.pattern == TABLE else rule for rule in W8A8_STATIC.rules)
_GROUPS = Scheme(bits=4, group_size=128)
TENSORRT_RECIPES = (
    Recipe("int8", (NORMS, *(Rule(p, ROWS) for p in (TABLE, DECODER, VISION, PROJECTOR)), REST)),
    Recipe("w8a8", _STATIC_RULES),
    Recipe("w8a8-static", _STATIC_RULES),
    Recipe("int4", (NORMS, ROWS_8, Rule(DECODER, _GROUPS), REST)),
    Recipe("int4-gptq", (NORMS, ROWS_8, Rule(DECODER, replace(_GROUPS, method="gptq")), REST)),
)
_NAMED = (
    FP32,
    FP16,
    BF16,
    INT8,
    INT4,
    W8A8,
    W8A8_STATIC,
    INT4_GPTQ,
    INT4_FAST,
    INT4_FAST_KV8,
    MIXED,
    INT4_SMALL,
    INT4_SMALL_GPTQ,
    FP8,
)
RECIPES = {recipe.name: recipe for recipe in _NAMED}
