# SPDX-License-Identifier: Apache-2.0
"""What an engine can execute. Knows no layers; `lower.py` and `graph.py` read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pgxport.errors import UsageError, choose
from pgxport.exporter.recipe import INT4_CPU, RECIPES, Recipe


@dataclass(frozen=True)
class Target:
    """An engine on a kind of device, and the operator sets its graphs are written in.

    Attributes:
        computes: The dtype a weight is stored in -> the dtype of activations it is multiplied with.
        products: The products by whole numbers that it has kernels for: bits of the weight, what activations are.
        caches: The types a KV cache may have.
        recipes: Named recipes that are better here in another form.
        spelled_prefill: Attention over a prefix is faster operator by operator than in the fused kernel.
    """

    name: str
    opsets: tuple[tuple[str, int], ...]
    ir_version: int
    computes: Mapping[str, str]
    products: frozenset[tuple[int, str]] = frozenset()
    caches: frozenset[str] = frozenset()
    recipes: tuple[Recipe, ...] = ()
    spelled_prefill: bool = False

    def recipe(self, name: str) -> Recipe:
        """The named recipe, as it is best on this engine.

        Raises:
            UsageError: there is none of that name.
        """
        return choose("precision", name, RECIPES | {recipe.name: recipe for recipe in self.recipes})

    def compute(self, stored: str) -> str:
        """The dtype of activations for weights stored as `stored`.

        Raises:
            UsageError: the engine has no kernels for it.
        """
        if stored not in self.computes:
            can = ", ".join(self.computes)
            raise UsageError(f"target {self.name!r} does not compute with {stored} weights; it does with {can}")
        return self.computes[stored]

    def check(self, recipe: Recipe) -> None:
        """The engine can run all that the recipe writes.

        Raises:
            UsageError: it has no kernels for something.
        """
        for rule in recipe.rules:
            scheme = rule.scheme
            if scheme.bits is None:
                self.compute(scheme.dtype)
            elif (scheme.bits, scheme.activations) not in self.products:
                can = ", ".join(f"{bits} with {activations}" for bits, activations in sorted(self.products)) or "none"
                raise UsageError(
                    f"recipe {recipe.name!r}: target {self.name!r} does not multiply {scheme.activations} activations by "
                    f"{scheme.bits}-bit weights, as the rule for {rule.pattern!r} wants; it multiplies by bits: {can}"
                )
            elif scheme.activations == "float" and scheme.group is None:
                raise UsageError(
                    f"recipe {recipe.name!r}: target {self.name!r} multiplies float activations by weights in groups, and the rule "
                    f'for {rule.pattern!r} has none; write group = 128 beside its bits, or activations = "dynamic"'
                )
            elif scheme.activations != "float" and not scheme.symmetric:
                raise UsageError(
                    f"recipe {recipe.name!r}: target {self.name!r} multiplies {scheme.activations} activations by symmetric weights, "
                    f"and the rule for {rule.pattern!r} says symmetric = false; take that out"
                )
        if recipe.cache and recipe.cache not in self.caches:
            can = ", ".join(sorted(self.caches))
            raise UsageError(f"recipe {recipe.name!r}: target {self.name!r} has no {recipe.cache} KV cache; it has {can}")


# GroupQueryAttention has had `causal` since ONNX Runtime 1.30: one node serves the bidirectional prefix and the decode step.
_ORT = (("", 23), ("com.microsoft", 1))
# On a CPU, ONNX Runtime has no bfloat16 products, and widens float16 ones to float32: so half precision is a way to store.
CPU = Target(
    "cpu", _ORT, 11, MappingProxyType({"float32": "float32", "float16": "float32"}),
    frozenset({(4, "float"), (8, "float"), (8, "dynamic"), (8, "static")}), frozenset({"float32", "float16", "int8"}),
    (INT4_CPU,), spelled_prefill=True,
)  # fmt: skip
CUDA = Target(
    "cuda", _ORT, 11, MappingProxyType({"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}),
    frozenset({(4, "float"), (8, "float")}), frozenset({"float16", "bfloat16", "int8"}),
)  # fmt: skip
TARGETS = {target.name: target for target in (CPU, CUDA)}
