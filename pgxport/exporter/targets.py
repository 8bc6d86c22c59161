# SPDX-License-Identifier: Apache-2.0
"""The targets: what each engine can execute. Knows no layers; `graph.py` and the files that lower read it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pgxport.bundle.manifest import CacheKind, TrtVersion
from pgxport.errors import UsageError, choose
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipes import RECIPES


@dataclass(frozen=True)
class Target:
    """An engine on a kind of device, and the operator sets its graphs are written in.

    Attributes:
        computes: The dtype a weight is stored in -> the dtype of activations it is multiplied with.
        products: Integer and mixed products that it has kernels for: bits of the weight, and what activations are.
        caches: The types a KV cache may have.
        attends: The types its attention with a cache computes in. Empty: whatever the rest does.
        biased_int8_cache: A local window may go with an int8 cache.
        decomposed_prefill: Attention over a prefix is faster decomposed than in the fused kernel.
        dialect: The operators its graphs are made of: ONNX Runtime's own beside standard ones, or standard ones alone.
        grouped: Bits whose scales may be of groups of input channels, with float activations.
        rows: Float activations are multiplied by 8 bits with a scale for each row, too.
        zero_points: Groups may have zero points.
        float8: It has FP8 products.
        wide_scales: Layouts of quantized matrices whose scales are float32 whatever the activations are.
        short_scales: Scales of 4-bit groups are stored in float16 whatever the activations are, and widened while loading.
        shortlists: The output matrix may be multiplied in two passes, a shortlist first.
        cache_kind: How the decoder's graph appends to a cache; see `bundle.Cache`.
        tensorrt: The version of TensorRT that graphs are written for.
    """

    name: str
    opsets: tuple[tuple[str, int], ...]
    ir_version: int
    computes: Mapping[str, str]
    products: frozenset[tuple[int, str]] = frozenset()
    caches: frozenset[str] = frozenset()
    attends: frozenset[str] = frozenset()
    biased_int8_cache: bool = True
    decomposed_prefill: bool = False
    dialect: Literal["onnxruntime", "standard"] = "onnxruntime"
    grouped: frozenset[int] = frozenset({4, 8})
    rows: bool = False
    zero_points: bool = True
    float8: bool = False
    wide_scales: frozenset[str] = frozenset({"columns", "rows"})
    short_scales: bool = False
    shortlists: bool = False
    cache_kind: CacheKind = "shared"
    tensorrt: TrtVersion | None = None

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return dict(self.opsets)[""]

    def recipe(self, name: str) -> Recipe:
        """The named recipe in the form of this target.

        Raises:
            UsageError: there is none of that name.
        """
        return choose("precision", name, RECIPES[self.name])

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
        # FP8 first: without its products there is no use in mending the other rules.
        for rule in sorted(recipe.rules, key=lambda rule: rule.scheme.format == "int"):
            if rule.scheme.bits is None:
                self.compute(rule.scheme.dtype)
            elif reason := self._cannot(rule.scheme, rule):
                raise UsageError(f"recipe {recipe.name!r}: target {self.name!r} {reason}")
        if recipe.cache and recipe.cache not in self.caches:
            can = ", ".join(sorted(self.caches))
            raise UsageError(f"recipe {recipe.name!r}: target {self.name!r} has no {recipe.cache} KV cache; it has {can}")
        computed = self.compute(recipe.rules[-1].scheme.dtype)
        inner = computed if recipe.cache in (None, "int8") else recipe.cache
        if self.attends and inner not in self.attends:
            can = " and ".join(sorted(self.attends))
            raise UsageError(
                f"recipe {recipe.name!r}: the attention of target {self.name!r} computes in {can}, not in {inner}; "
                f"choose --precision fp16 or bf16, or the same dtype for the recipe's last rule"
            )

    def _cannot(self, scheme: Scheme, rule: Rule) -> str | None:
        """Why there is no kernel for a quantized scheme, and what to write in its rule; None if there is one."""
        where = f"the rule for {rule.pattern!r}"
        if scheme.format == "e4m3" and not self.float8:
            return f"has no FP8 products, as {where} wants; target 'tensorrt' has, or write format = \"int\""
        if scheme.shortlist and not self.shortlists:
            return f"multiplies by the whole token table, and {where} says screen = true; take that out"
        if scheme.prefill8 and not self.decomposed_prefill:
            return f"computes prefixes and steps alike, and {where} says prefill8 = true; take that out"
        if (scheme.bits, scheme.activations) not in self.products:
            can = ", ".join(f"{bits} with {activations}" for bits, activations in sorted(self.products)) or "none"
            return (
                f"does not multiply {scheme.activations} activations by {scheme.bits}-bit weights, as {where} wants; "
                f"it multiplies by bits: {can}"
            )
        if scheme.activations != "float":
            wants = f"multiplies {scheme.activations} activations by symmetric weights, and {where} says symmetric = false"
            return None if scheme.symmetric else f"{wants}; take that out"
        if scheme.group_size is None:
            wants = f"multiplies float activations by weights in groups, and {where} has none"
            return None if self.rows else f'{wants}; write group = 128 beside its bits, or activations = "dynamic"'
        if scheme.bits not in self.grouped:
            of = f" of TensorRT {self.tensorrt}" if self.tensorrt else ""
            return f"{of} has no groups of {scheme.bits} bits, and {where} has groups of {scheme.group_size}; take group out".lstrip()
        if not scheme.symmetric and not self.zero_points:
            return f"multiplies by symmetric weights, and {where} says symmetric = false; take that out"
        return None


# GroupQueryAttention has had `causal` since ONNX Runtime 1.30:
# one node serves the bidirectional prefix and the decode step.
_ORT = (("", 23), ("com.microsoft", 1))
# On a CPU, ONNX Runtime has no bfloat16 products, and widens float16 ones to float32:
# so half precision is a way to store, and ONNX Runtime widens it once, while loading.
CPU = Target(
    "cpu", _ORT, 11, MappingProxyType(dict.fromkeys(("float32", "float16", "bfloat16"), "float32")),
    frozenset({(4, "float"), (8, "float"), (8, "dynamic"), (8, "static")}), frozenset({"float32", "float16", "int8"}),
    decomposed_prefill=True, short_scales=True, shortlists=True,
)  # fmt: skip
CUDA = Target(
    "cuda", _ORT, 11, MappingProxyType({"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}),
    frozenset({(4, "float"), (8, "float")}), frozenset({"float16", "bfloat16", "int8"}),
    # GroupQueryAttention has no float32 kernel there, and
    # refuses a bias beside an int8 cache when it runs (1.31.1).
    frozenset({"float16", "bfloat16"}), biased_int8_cache=False,
)  # fmt: skip
# What each version takes: docs/reference/tensorrt-dialect.md, with sources. 4 bits in
# blocks are of opset 21, which graphs for 10.3 ask for only where they have some.
_TENSORRT = Target(
    "tensorrt", (("", 24),), 11, MappingProxyType({name: name for name in ("float32", "float16", "bfloat16")}),
    frozenset({(4, "float"), (8, "float"), (8, "static")}), frozenset({"float32", "float16"}),
    dialect="standard", rows=True, zero_points=False, float8=True, wide_scales=frozenset(), cache_kind="update", tensorrt="11",
)  # fmt: skip
TENSORRT: dict[TrtVersion, Target] = {
    "10.3": replace(_TENSORRT, opsets=(("", 20),), ir_version=10, grouped=frozenset({4}), cache_kind="delta", tensorrt="10.3"),
    "10.16": replace(_TENSORRT, opsets=(("", 23),), cache_kind="delta", tensorrt="10.16"),
    "11": _TENSORRT,
}
TARGETS = {target.name: target for target in (CPU, CUDA, TENSORRT["11"])}


def find_target(name: str, trt: str | None = None) -> Target:
    """The target of that name, of TensorRT for the version that is asked for.

    Raises:
        UsageError: there is none, or a version was given of something else.
    """
    target = choose("target", name, TARGETS)
    if trt is None:
        return target
    if target.tensorrt is None:
        raise UsageError(
            f"--trt {trt} is a version of TensorRT, and the target is {name!r}; leave --trt away, or --target tensorrt"
        )
    return choose("trt", trt, {str(version): found for version, found in TENSORRT.items()})
