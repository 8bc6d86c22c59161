# SPDX-License-Identifier: Apache-2.0
"""How each weight is stored and multiplied by, as data: ordered rules of pattern and scheme, the first match wins.

Knows no operators and no engine; `targets.py` says what an
engine can run, and the files that lower are where the two meet.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from pgxport.errors import UsageError
from pgxport.models.weights import EMBEDDING, LM_HEAD

# Patterns of the matrices, in the order of their use; norms come first, for the third would match them.
TABLE, DECODER = "*.embed_tokens.weight", "language_model.*_proj.weight"
OUTPUT = "*.lm_head.weight"  # where it is not the table; a recipe without a rule for it has the table's
VISION, PROJECTOR = "vision_tower.*.layers.*.weight", "multi_modal_projector.linear.weight"

Method = Literal["nearest", "trim", "clip", "gptq"]
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
        method: How weights are rounded: "nearest"; "trim" and "clip", nearest on the range that loses least of a few and of many; "gptq", which
            needs second moments of the inputs.
        scaling: How input channels are rescaled before rounding: "awq" or "smoothquant", one scale for all linears that share an input.
        alpha: The exponent of SmoothQuant: how much of what makes activations hard to round moves to the weights, 0 to 1.
        rotate: The largest block that inputs, and columns with them, are rotated in after that, a power of two; of columns that it
            does not divide, the largest power of two that does. None: they are not.
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
    alpha: float = 0.5
    rotate: int | None = None
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


# The copy of the token table that finds the likeliest tokens. With
# groups of 128 a step takes least; the candidates are computed anew.
SHORTLIST = Scheme(bits=4, group_size=128)
# And the copies that prefixes are multiplied by.
PREFILL = Scheme(bits=8, activations="dynamic")
