# SPDX-License-Identifier: Apache-2.0
"""How each weight is stored and multiplied by, as data: ordered rules of pattern and scheme, the first match wins.

Knows no operators and no engine; `targets.py` says what an
engine can run, and the files that lower are where the two meet.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from pgxport.errors import UsageError
from pgxport.models.weights import EMBEDDING, LM_HEAD

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
        bits: 8 or 4: integers, and a scale for each group of them. None: floats.
        format: What the 8 bits are: integers, or "e4m3", FP8 with four bits of exponent, which TensorRT multiplies from Ada on.
        group_size: Input channels that share a scale, a power of two from 16 on; the last group of a row may be shorter. None: a row.
        symmetric: The grid is symmetric around zero; else each group has a zero point.
        method: How weights are rounded: "nearest"; "clip", nearest on the clipped range that loses least; "gptq", which
            needs second moments of the inputs.
        scaling: How input channels are rescaled before rounding: "awq", or "smoothquant" where activations are rounded too.
        activations: What the products are made of: "float", or numbers like the weights' (int8, or FP8) with a scale measured at
            run time ("dynamic") or in calibration ("static").
        observer: How calibration's numbers become the range of static activations.
        compensate: Add what rounding takes from the mean output to the bias of the layer, where it has one.
        shortlist: Of the output matrix: find the likeliest tokens with a copy of it in `SHORTLIST`, and then these tokens' logits with
            the matrix itself, whose other rows are not read.
        prefill8: Of the decoder's linears: multiply a prefix by a copy in `PREFILL`, which takes less time where processors have
            integer products; a new token, for which reading the weights
            is what takes time, by what the rest of the scheme says.
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
        return self._rule(weight).scheme

    def _rule(self, weight: str) -> Rule:
        for rule in self.rules:
            if fnmatchcase(weight, rule.pattern):
                return rule
        raise UsageError(f"recipe {self.name!r} has no rule for {weight!r}; end it with a rule for '*'")

    def fitted(self, weights: Collection[str]) -> "Recipe":
        """Returns the recipe with a rule for an output matrix of its own where the weights have one, and without where not.

        The token table's rule is for the output matrix too: if nothing but the last rule is for an untied one, that gets
        the table's scheme, and the table, which then is looked up alone, what of it there is for lookups.
        """
        table = self._rule(EMBEDDING)
        if LM_HEAD not in weights:
            only = {
                r for r in self.rules if fnmatchcase(LM_HEAD, r.pattern) and not any(fnmatchcase(w, r.pattern) for w in weights)
            }
            return replace(self, rules=tuple(rule for rule in self.rules if rule not in only))
        if table is self.rules[-1] or self._rule(LM_HEAD) is not self.rules[-1]:
            return self
        method: Method = "nearest" if table.scheme.method == "gptq" else table.scheme.method
        looked_up = replace(table.scheme, shortlist=False, compensate=False, method=method)
        i = self.rules.index(table)
        pair = Rule(table.pattern, looked_up), Rule(OUTPUT, table.scheme)
        return replace(self, rules=(*self.rules[:i], *pair, *self.rules[i + 1 :]))

    def check(self, weights: Collection[str]) -> None:
        """Every weight has a rule, and every rule a weight.

        Raises:
            UsageError: one has not.
        """
        names = list(weights)
        output = OUTPUT if LM_HEAD in names else TABLE
        unmatched = set(names)
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                raise UsageError(f"recipe {self.name!r}: the rule for {rule.pattern!r} matches no weight; mend it or take it out")
            matched = {name for name in unmatched if fnmatchcase(name, rule.pattern)}
            if not matched and rule is not self.rules[-1]:
                raise UsageError(f"recipe {self.name!r}: the rule for {rule.pattern!r} comes after others that match all it does")
            if rule.scheme.shortlist and (others := [name for name in matched if not fnmatchcase(name, output)]):
                raise UsageError(
                    f"recipe {self.name!r}: screen is of the output matrix alone, and the rule for {rule.pattern!r} decides for "
                    f"{min(others)}; give {output!r} a rule of its own"
                )
            if rule.scheme.prefill8 and (others := [name for name in matched if not fnmatchcase(name, DECODER)]):
                raise UsageError(
                    f"recipe {self.name!r}: prefill8 is of the decoder's linears, and the rule for {rule.pattern!r} decides for "
                    f"{min(others)}; give {DECODER!r} a rule of its own"
                )
            unmatched -= matched
        if unmatched:
            self.scheme(min(unmatched))
        if output == OUTPUT:
            self._check_looked_up(self._rule(EMBEDDING))
        linears = {name: self.scheme(name).prefill8 for name in names if fnmatchcase(name, DECODER)}
        if len({*linears.values()}) > 1:
            raise UsageError(
                f"recipe {self.name!r}: prefill8 is for all of the decoder's linears or none, for a layer is written twice; and "
                f"{min(name for name, twice in linears.items() if not twice)} is without"
            )

    def _check_looked_up(self, rule: Rule) -> None:
        """A token table that nothing is multiplied by is stored in what runners look up, by what can be known without its inputs."""
        scheme = rule.scheme
        wrong = {
            'method = "gptq"': scheme.method == "gptq", "compensate": scheme.compensate, 'format = "e4m3"': scheme.format != "int",
            "symmetric = false": not scheme.symmetric,
        }  # fmt: skip
        for key in (key for key, holds in wrong.items() if scheme.bits is not None and holds):
            raise UsageError(
                f"recipe {self.name!r}: {EMBEDDING} is looked up and not multiplied by, for which the rule for {rule.pattern!r} "
                f"says {key}; take that out, and give {OUTPUT!r} a rule of its own"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it cannot be written without a calibration file."""
        return self.cache == "int8" or any(rule.scheme.calibrated for rule in self.rules)

    @property
    def lossy(self) -> bool:
        """Whether it quantizes anything."""
        return self.cache == "int8" or any(rule.scheme.bits for rule in self.rules)


# Gemma's norms multiply by 1 + weight, of which half precision
# keeps too few digits. They are a few kilobytes a layer.
NORMS = Rule("*norm*", Scheme())
REST = Rule("*", Scheme("float16"))
# Patterns of the matrices, in the order of their use; norms come first, for the third would match them.
TABLE, DECODER = "*.embed_tokens.weight", "language_model.*_proj.weight"
OUTPUT = "*.lm_head.weight"  # where it is not the table; a recipe without a rule for it has the table's
VISION, PROJECTOR = "vision_tower.*.layers.*.weight", "multi_modal_projector.linear.weight"
# The copy of the token table that finds the likeliest tokens. With
# groups of 128 a step takes least; the candidates are computed anew.
SHORTLIST = Scheme(bits=4, group_size=128)
# And the copies that prefixes are multiplied by.
PREFILL = Scheme(bits=8, activations="dynamic")
VISION_FC2 = "vision_tower.*.fc2.weight"
# Activations in int8 too: with a scale for each token, or with
# scales from calibration, which want outliers moved to the weights.
TOKEN = Scheme(bits=8, activations="dynamic")
STATIC = Scheme(bits=8, activations="static")
SMOOTH = replace(STATIC, scaling="smoothquant")
# The table is the output matrix too, where 4 bits would change every logit.
GROUPS_8 = Scheme(bits=8, group_size=128)
TABLE_8 = Rule(TABLE, GROUPS_8)
TABLE_8_SHORTLIST = Rule(TABLE, replace(GROUPS_8, shortlist=True))
GROUPS_32 = Scheme(bits=4, group_size=32, symmetric=False)
GROUPS_128 = replace(GROUPS_32, group_size=128)  # these decode fastest
# Where integer products are fast, the vision encoder has them.
FAST_VISION = (Rule(VISION, TOKEN), Rule(PROJECTOR, TOKEN), REST)
# The table alone in 4 bits costs a KL of 0.0047 rounded to nearest, 0.0033 clipped, and 0.0050
# by GPTQ (tiny-112), which minimises a norm of all logits, not of those that are likely.
SMALL_TABLE = Rule(TABLE, Scheme(bits=4, group_size=32, method="clip"))
SMALL = replace(GROUPS_32, group_size=64)
SMALL_REST = (Rule(PROJECTOR, GROUPS_8), REST)


def _recipe(name: str, *rules: Rule, cache: str | None = None) -> Recipe:
    """A recipe whose norms stay in float32."""
    return Recipe(name, (NORMS, *rules), cache)


def _all(scheme: Scheme) -> tuple[Rule, ...]:
    """One scheme for every matrix, and float16 for the rest."""
    return (*(Rule(pattern, scheme) for pattern in (TABLE, DECODER, VISION, PROJECTOR)), REST)


FP32 = Recipe("fp32", (Rule("*", Scheme()),))
FLOATS = (FP32, _recipe("fp16", REST), _recipe("bf16", Rule("*", Scheme("bfloat16"))))
INT8 = _recipe("int8", *_all(GROUPS_8))
# FC2 reads what GELU gives, which nothing before it can rescale.
_STATIC_LINEARS = (Rule(DECODER, SMOOTH), Rule(VISION_FC2, STATIC), Rule(VISION, SMOOTH), Rule(PROJECTOR, STATIC), REST)
W8A8 = _recipe("w8a8", *_all(TOKEN))
W8A8_STATIC = _recipe("w8a8-static", Rule(TABLE, TOKEN), *_STATIC_LINEARS)
INT4_GPTQ = _recipe(
    "int4-gptq", Rule(TABLE, replace(GROUPS_8, method="gptq")), Rule(DECODER, replace(GROUPS_32, method="gptq")), *FAST_VISION
)
INT4_FAST = _recipe("int4-fast", TABLE_8_SHORTLIST, Rule(DECODER, GROUPS_128), *FAST_VISION)
# The fastest: a long answer's steps read the cache as often as the weights, here a quarter of it.
INT4_FAST_KV8 = replace(INT4_FAST, name="int4-fast-kv8", cache="int8")
# The first token as soon as w8a8 has it, the others as fast as int4-fast, for twice the memory.
MIXED = _recipe("mixed", TABLE_8_SHORTLIST, Rule(DECODER, replace(GROUPS_128, prefill8=True)), *FAST_VISION)
# The smallest: the table and the vision encoder in 4 bits too.
INT4_SMALL = _recipe("int4-small", SMALL_TABLE, Rule(DECODER, SMALL), Rule(VISION, GROUPS_32), *SMALL_REST)
INT4_SMALL_GPTQ = _recipe(
    "int4-small-gptq",
    SMALL_TABLE,
    Rule(DECODER, replace(SMALL, method="gptq", scaling="awq")),
    Rule(VISION, replace(GROUPS_32, method="gptq")),
    *SMALL_REST,
)
# TensorRT multiplies by symmetric weights: of 8 bits with a scale for each row,
# of 4 in groups; and activations in int8 have the scale of their calibration. The
# runner looks the table's rows up, so that they are integers in every recipe.
ROWS = Scheme(bits=8)
ROWS_8 = Rule(TABLE, ROWS)
FLOAT8 = Scheme(bits=8, format="e4m3", activations="static")
FP8 = _recipe("fp8", ROWS_8, *(Rule(pattern, FLOAT8) for pattern in (DECODER, VISION, PROJECTOR)), REST)
_SYMMETRIC = Scheme(bits=4, group_size=128)


def _by_name(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


_COMMON = (W8A8, W8A8_STATIC, INT4_GPTQ, INT4_FAST, INT4_FAST_KV8, MIXED, INT4_SMALL, INT4_SMALL_GPTQ, FP8)
# Target -> name -> recipe. Every target knows every name: a target
# that cannot run a recipe says which rule it has no kernels for.
RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "cpu": _by_name(*FLOATS, INT8, _recipe("int4", TABLE_8, Rule(DECODER, GROUPS_32), *FAST_VISION), *_COMMON),
    "cuda": _by_name(*FLOATS, INT8, _recipe("int4", TABLE_8, Rule(DECODER, GROUPS_32), REST), *_COMMON),
    "tensorrt": _by_name(
        *FLOATS,
        _recipe("int8", *_all(ROWS)),
        _recipe("int4", ROWS_8, Rule(DECODER, _SYMMETRIC), REST),
        _recipe("w8a8", ROWS_8, *_STATIC_LINEARS),
        _recipe("w8a8-static", ROWS_8, *_STATIC_LINEARS),
        _recipe("int4-gptq", ROWS_8, Rule(DECODER, replace(_SYMMETRIC, method="gptq")), REST),
        *_COMMON[3:],
    ),
}
RECIPE_NAMES = tuple(RECIPES["cpu"])
