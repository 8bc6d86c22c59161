# SPDX-License-Identifier: Apache-2.0
"""How each weight is stored, as data: ordered rules of pattern and scheme, the first match wins.

Knows no operators and no engine; `targets.py` says what an engine can run, and `lower.py` is where the two meet.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from pgxport.errors import UsageError


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight. `dtype` is numpy's name of the type (bfloat16: that of ml_dtypes)."""

    dtype: str = "float32"


@dataclass(frozen=True)
class Rule:
    pattern: str
    scheme: Scheme


@dataclass(frozen=True)
class Recipe:
    name: str
    rules: tuple[Rule, ...]

    def scheme(self, weight: str) -> Scheme:
        """The scheme of a weight, by its name in the checkpoint.

        Raises:
            UsageError: no rule matches; a recipe ends with a rule for everything else.
        """
        for rule in self.rules:
            if fnmatchcase(weight, rule.pattern):
                return rule.scheme
        raise UsageError(f"recipe {self.name!r} has no rule for {weight!r}; end it with a rule for '*'")


FP32 = Recipe("fp32", (Rule("*", Scheme()),))
# Gemma's norms multiply by 1 + weight, of which half precision keeps too few digits. They are a few kilobytes a layer.
NORMS = Rule("*norm*", Scheme())
FP16 = Recipe("fp16", (NORMS, Rule("*", Scheme("float16"))))
BF16 = Recipe("bf16", (NORMS, Rule("*", Scheme("bfloat16"))))
RECIPES = {recipe.name: recipe for recipe in (FP32, FP16, BF16)}
