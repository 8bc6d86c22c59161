# SPDX-License-Identifier: Apache-2.0
"""The named recipes, in the form that each target has kernels for."""

from collections.abc import Mapping
from dataclasses import replace

from pgxport.exporter.recipe import DECODER, PROJECTOR, TABLE, VISION, Method, Recipe, Rule, Scheme

# Gemma's norms multiply by 1 + weight, of which half precision
# keeps too few digits. They are a few kilobytes a layer.
NORMS = Rule("*norm*", Scheme())
REST = Rule("*", Scheme("float16"))
# The table is the output matrix too, where 4 bits would change every logit. Its rows are looked up, so that they stay as they are.
GROUPS_8 = Scheme(bits=8, group_size=128)
TABLE_8 = Rule(TABLE, GROUPS_8)
TABLE_8_SHORTLIST = Rule(TABLE, replace(GROUPS_8, shortlist=True))
TABLE_TOKEN = Rule(TABLE, Scheme(bits=8, activations="dynamic"))
# The table alone in 4 bits costs a KL of 0.0047 rounded to nearest, 0.0033 clipped, and 0.0050
# by GPTQ (tiny-112), which minimises a norm of all logits, not of those that are likely.
SMALL_TABLE = Rule(TABLE, Scheme(bits=4, group_size=32, method="clip"))


def easier(scheme: Scheme) -> Scheme:
    """The scheme with inputs and columns scaled and rotated first: real models have channels that stand out (docs/decisions/0031)."""
    if scheme.method == "gptq":  # whose second moments know most of the scales
        return replace(scheme, scaling="smoothquant", alpha=0.3, rotate=64)
    return replace(scheme, scaling="smoothquant", alpha=0.7, rotate=32)


# Activations in int8 too: with a scale for each token, or with scales from calibration.
TOKEN = easier(Scheme(bits=8, activations="dynamic"))
STATIC = easier(Scheme(bits=8, activations="static"))
EIGHT = easier(GROUPS_8)
GROUPS_32 = Scheme(bits=4, group_size=32, symmetric=False)
GROUPS_64 = replace(GROUPS_32, group_size=64)
GROUPS_128 = replace(GROUPS_32, group_size=128)  # these decode fastest
# Where integer products are fast, the vision encoder has them.
FAST_VISION = (Rule(VISION, TOKEN), Rule(PROJECTOR, TOKEN), REST)
SMALL_REST = (Rule(PROJECTOR, EIGHT), REST)


def _recipe(name: str, *rules: Rule, cache: str | None = None) -> Recipe:
    """A recipe whose norms stay in float32."""
    return Recipe(name, (NORMS, *rules), cache)


def _linears(scheme: Scheme) -> tuple[Rule, ...]:
    """One scheme for every linear, and float16 for the rest."""
    return (*(Rule(pattern, scheme) for pattern in (DECODER, VISION, PROJECTOR)), REST)


def _decoder(scheme: Scheme, method: Method = "trim") -> Rule:
    return Rule(DECODER, easier(replace(scheme, method=method)))


FP32 = Recipe("fp32", (Rule("*", Scheme()),))
FLOATS = (FP32, _recipe("fp16", REST), _recipe("bf16", Rule("*", Scheme("bfloat16"))))
INT8 = _recipe("int8", TABLE_8, *_linears(EIGHT))
W8A8 = _recipe("w8a8", TABLE_TOKEN, *_linears(TOKEN))
W8A8_STATIC = _recipe("w8a8-static", TABLE_TOKEN, *_linears(STATIC))
INT4_GPTQ = _recipe("int4-gptq", Rule(TABLE, replace(GROUPS_8, method="gptq")), _decoder(GROUPS_32, "gptq"), *FAST_VISION)
INT4_FAST = _recipe("int4-fast", TABLE_8_SHORTLIST, _decoder(GROUPS_128), *FAST_VISION)
INT4_FAST_GPTQ = _recipe("int4-fast-gptq", TABLE_8_SHORTLIST, _decoder(GROUPS_128, "gptq"), *FAST_VISION)
# The fastest: a long answer's steps read the cache as often as the weights, here a quarter of it.
INT4_FAST_KV8 = replace(INT4_FAST, name="int4-fast-kv8", cache="int8")
INT4_FAST_KV8_GPTQ = replace(INT4_FAST_GPTQ, name="int4-fast-kv8-gptq", cache="int8")
# The first token as soon as w8a8 has it, the others as fast as int4-fast, for twice the memory.
MIXED = _recipe("mixed", TABLE_8_SHORTLIST, _decoder(replace(GROUPS_128, prefill8=True)), *FAST_VISION)
# The smallest: the table and the vision encoder in 4 bits too.
INT4_SMALL = _recipe(
    "int4-small", SMALL_TABLE, _decoder(GROUPS_64), Rule(VISION, easier(replace(GROUPS_32, method="trim"))), *SMALL_REST
)
INT4_SMALL_GPTQ = _recipe(
    "int4-small-gptq",
    SMALL_TABLE,
    _decoder(GROUPS_64, "gptq"),
    Rule(VISION, easier(replace(GROUPS_32, method="gptq"))),
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
_STATIC_LINEARS = _linears(STATIC)


def _by_name(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


_COMMON = (
    W8A8, W8A8_STATIC, INT4_GPTQ, INT4_FAST, INT4_FAST_GPTQ, INT4_FAST_KV8, INT4_FAST_KV8_GPTQ, MIXED, INT4_SMALL,
    INT4_SMALL_GPTQ, FP8,
)  # fmt: skip
# Target -> name -> recipe. Every target knows every name: a target
# that cannot run a recipe says which rule it has no kernels for.
RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "cpu": _by_name(*FLOATS, INT8, _recipe("int4", TABLE_8, _decoder(GROUPS_32), *FAST_VISION), *_COMMON),
    "cuda": _by_name(*FLOATS, INT8, _recipe("int4", TABLE_8, _decoder(GROUPS_32), REST), *_COMMON),
    "tensorrt": _by_name(
        *FLOATS,
        _recipe("int8", ROWS_8, *_linears(easier(ROWS))),
        _recipe("int4", ROWS_8, _decoder(_SYMMETRIC), REST),
        _recipe("w8a8", ROWS_8, *_STATIC_LINEARS),
        _recipe("w8a8-static", ROWS_8, *_STATIC_LINEARS),
        _recipe("int4-gptq", ROWS_8, _decoder(_SYMMETRIC, "gptq"), REST),
        *_COMMON[3:],
    ),
}
RECIPE_NAMES = tuple(RECIPES["cpu"])
