# SPDX-License-Identifier: Apache-2.0
"""The choices of a search: groups of linears, schemes for each, and the recipe of one scheme for every group.

Knows no measurements.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pgxport.errors import choose
from pgxport.exporter.recipe import OUTPUT, PROJECTOR, TABLE, Recipe, Rule, Scheme
from pgxport.exporter.recipes import NORMS, REST, easier
from pgxport.models.spec import ModelSpec

FLOAT = "float16"
_W4 = {size: Scheme(bits=4, group_size=size, symmetric=False, method="trim") for size in (128, 64, 32)}
_GPTQ = {size: replace(scheme, method="gptq") for size, scheme in _W4.items()}
# The schemes of the named recipes are among them, so that each of those is a point of the space that is
# searched.
CANDIDATES = {
    FLOAT: REST.scheme,
    "w8-dynamic": easier(Scheme(bits=8, activations="dynamic")),
    "w8-static": easier(Scheme(bits=8, activations="static")),
    "w8-g128": easier(Scheme(bits=8, group_size=128)),
    "w8-g128-screened": easier(Scheme(bits=8, group_size=128, shortlist=True)),
    "w8-g128-gptq": easier(Scheme(bits=8, group_size=128, method="gptq")),
    "w4-g128": easier(_W4[128]),
    "w4-g64": easier(_W4[64]),
    "w4-g32": easier(_W4[32]),
    "w4-g32-clip": easier(replace(_W4[32], method="clip")),
    "w4-g128-gptq": easier(_GPTQ[128]),
    "w4-g64-gptq": easier(_GPTQ[64]),
    "w4-g32-gptq": easier(_GPTQ[32]),
}
MOST_ALONE = 4  # layers of a stack that are still groups of their own


@dataclass(frozen=True)
class Group:
    """Linears that get one scheme.

    Attributes:
        patterns: Of the weights' names; {} stands for a layer.
        layers: None where the group belongs to no layer.
        fixed: The patterns of what is no linear of a layer: it is never scaled or rotated (scaling.py).
        output: It is the output matrix, which alone can have a shortlist.
    """

    name: str
    patterns: tuple[str, ...]
    layers: tuple[int, ...] = ()
    fixed: tuple[str, ...] = ()
    output: bool = False

    def scheme(self, pattern: str, candidate: str) -> Scheme:
        scheme = CANDIDATES[candidate]
        if pattern in self.fixed:
            scheme = replace(scheme, scaling="none", alpha=Scheme.alpha, rotate=None)
        if not self.output:
            scheme = replace(scheme, shortlist=False)
        if pattern in (TABLE, OUTPUT):  # rows of the table are looked up, for which a grid has to be symmetric (graphs.py)
            scheme = replace(scheme, symmetric=True)
        if pattern == TABLE and not self.output and scheme.method == "gptq":  # nothing is multiplied by it
            scheme = replace(scheme, method="nearest")
        return scheme


def groups(spec: ModelSpec) -> list[Group]:
    """Return the groups of a model: a place of a layer, for each layer or, in a deep stack, each third.

    Linears that share an input stay together: AWQ scales that input once, and integer products round it once.
    Of the decoder, where nearly all bytes are, every place is a group; of the vision encoder, attention and
    MLP. Thirds, because it is the first and the last layers that differ from the others (executorch keeps
    those quarters at 8 bits for the same reason), and a probe of every layer of 3B would be 160 groups.
    """
    vision, text = "vision_tower.vision_model.encoder.layers.{}.", "language_model.model.layers.{}."
    made = [Group("token table", (TABLE,), fixed=(TABLE,), output=spec.text.tied)]
    if not spec.text.tied:
        made.append(Group("output matrix", (OUTPUT,), fixed=(OUTPUT,), output=True))
    made.append(Group("projector", (PROJECTOR,)))
    for layers in runs(spec.vision.depth):
        attention = (f"{vision}self_attn.[qkv]_proj.weight", f"{vision}self_attn.out_proj.weight")
        fc1, fc2 = f"{vision}mlp.fc1.weight", f"{vision}mlp.fc2.weight"
        made.append(Group(f"vision {_span(layers)} attention", attention, layers))
        made.append(Group(f"vision {_span(layers)} mlp", (fc1, fc2), layers))
    for layers in runs(spec.text.depth):
        for place, pattern in (
            ("q,k,v", "self_attn.[qkv]_proj"),
            ("o", "self_attn.o_proj"),
            ("gate,up", "mlp.[gu]*_proj"),
            ("down", "mlp.down_proj"),
        ):
            made.append(Group(f"decoder {_span(layers)} {place}", (f"{text}{pattern}.weight",), layers))
    return made


def runs(depth: int) -> list[tuple[int, ...]]:
    """Divide layers one by one where they are few, else in thirds.

    >>> runs(2), runs(7)
    ([(0,), (1,)], [(0, 1), (2, 3), (4, 5, 6)])
    """
    parts = depth if depth <= MOST_ALONE else 3
    return [tuple(range(depth * i // parts, depth * (i + 1) // parts)) for i in range(parts)]


def chosen(names: Sequence[str], *, calibrated: bool) -> list[str]:
    """Return the candidates of these names, or all; the float one is always among them.

    Args:
        calibrated: There is a calibration. Without, GPTQ is left out, whose second moments each export would gather anew.

    Raises:
        UsageError: no candidate has one of the names.
    """
    for name in names:
        choose("candidates", name, CANDIDATES)
    able = [name for name, scheme in CANDIDATES.items() if calibrated or scheme.method != "gptq"]
    return [name for name in CANDIDATES if name == FLOAT or name in (names or able)]


def options(group: Group, candidates: Sequence[str]) -> list[str]:
    """Return the candidates that differ for a group: some keys change nothing of a table."""
    different = {tuple(group.scheme(pattern, name) for pattern in group.patterns): name for name in reversed(candidates)}
    return [name for name in candidates if name in different.values()]


def recipe(name: str, all_groups: Sequence[Group], choice: Mapping[str, str]) -> Recipe:
    """Return the recipe of a choice, group name -> candidate; groups that are not in it stay floats.

    A pattern's most frequent scheme stands last, for all layers, after those of the layers that differ.
    """
    by_pattern: dict[str, dict[int | None, Scheme]] = {}
    for group in all_groups:
        for pattern in group.patterns:
            scheme = group.scheme(pattern, choice.get(group.name, FLOAT))
            by_pattern.setdefault(pattern, {}).update(dict.fromkeys(group.layers or (None,), scheme))
    rules = [NORMS]
    for pattern, schemes in by_pattern.items():
        ((most, _),) = Counter(schemes.values()).most_common(1)
        rules += [Rule(pattern.format(layer), scheme) for layer, scheme in schemes.items() if scheme != most]
        if most != REST.scheme or pattern == OUTPUT:  # without a rule it would have the token table's scheme
            rules.append(Rule(pattern.format("*"), most))
    return Recipe(name, (*rules, REST))


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
