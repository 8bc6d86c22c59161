# SPDX-License-Identifier: Apache-2.0
"""The statistics that a recipe needs of a model's activations, and whether a calibration has them."""

import hashlib
import json
from collections.abc import Iterator

from pgxport.activations.calibration_file import Calibration
from pgxport.activations.observe import NOTHING, Needs
from pgxport.activations.statistics import PARTS
from pgxport.activations.steps import linears
from pgxport.errors import UsageError
from pgxport.exporter.recipe import Recipe, Scheme
from pgxport.models.spec import ModelSpec
from pgxport.text import listed


def needs_of(recipe: Recipe, spec: ModelSpec) -> Needs:
    """What has to be gathered for the recipe, and nothing else."""
    if not recipe.calibrated:
        return NOTHING
    schemes = _rounded(recipe, spec)
    static = {path: scheme for path, scheme in schemes.items() if scheme.activations == "static"}
    changed = frozenset(path for path, scheme in static.items() if _changes(scheme))
    return Needs(
        channels=frozenset(schemes),  # where any is known, an error weighs as much as its input channel's mean square
        ranges=frozenset(static) - changed,
        moments=frozenset(path for path, scheme in schemes.items() if scheme.method == "gptq" or scheme.scaling == "awq"),
        observers=tuple(sorted({scheme.observer for scheme in static.values()})),
        caches=recipe.cache == "int8",
        changed=changed,
        changed_values=recipe.cache == "int8"
        and any(_changes(s) for path, s in schemes.items() if path.endswith("o_proj.weight")),
    )


def changes_sha256(recipe: Recipe, spec: ModelSpec) -> str:
    """A digest of what the recipe does to inputs before they are rounded."""
    changes = {path: (s.scaling, s.alpha, s.rotate) for path, s in _rounded(recipe, spec).items() if _changes(s)}
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()


def check_gathered(calibration: Calibration, recipe: Recipe, spec: ModelSpec, named: str) -> None:
    """The calibration has what the recipe cannot do without.

    Args:
        named: The recipe as `pgx calibrate --for` takes it.

    Raises:
        UsageError: it has not.
    """
    needs = needs_of(recipe, spec)
    if not needs or not set(needs.channels or ()) & calibration.inputs.keys():
        return  # a calibration of another model is refused by its digest
    missing = calibration.lacking(_tensors(recipe, spec, needs))
    # Of what is only scaled, a range is scaled with it.
    scaled = (path for path in sorted(needs.changed) if not recipe.scheme(path).rotate)
    missing += [f"range/{p}" for p in scaled if len(calibration.lacking((f"range/{p}", f"changed/{p}"))) == 2]
    if calibration.about.changes_sha256 not in (None, changes_sha256(recipe, spec)):  # of inputs that are changed otherwise
        missing += [f"changed/{path}" for path in sorted(needs.changed)]
        missing += [f"changed/{layer}/value" for layer in range(spec.text.depth) if needs.changed_values]
    if missing:
        raise UsageError(
            f"{calibration.path} was made without {listed(dict.fromkeys(missing))}, which the recipe {recipe.name!r} needs; "
            f"`pgx calibrate --for {named}` makes a file that has it"
        )


def _tensors(recipe: Recipe, spec: ModelSpec, needs: Needs) -> Iterator[str]:
    """The tensors of the calibration file that the recipe cannot do without."""
    yield from (f"inputs/{path}" for path in sorted(needs.channels or ()))
    yield from (f"range/{path}" for path in sorted(needs.ranges or ()))
    # AWQ does with mean squares where it has to.
    yield from (f"moment/{path}" for path in sorted(needs.moments or ()) if recipe.scheme(path).method == "gptq")
    if needs.caches:
        yield from (f"cache/{layer}/{part}" for layer in range(spec.text.depth) for part in PARTS)
    yield from _changed(recipe, spec, needs)


def _changed(recipe: Recipe, spec: ModelSpec, needs: Needs) -> Iterator[str]:
    """The tensors of changed inputs that nothing else tells."""
    yield from (f"changed/{path}" for path in sorted(needs.changed) if recipe.scheme(path).rotate)
    if needs.changed_values:
        rotated = (
            recipe.scheme(f"language_model.model.layers.{i}.self_attn.o_proj.weight").rotate for i in range(spec.text.depth)
        )
        yield from (f"changed/{layer}/value" for layer, block in enumerate(rotated) if block)


def _rounded(recipe: Recipe, spec: ModelSpec) -> dict[str, Scheme]:
    """The schemes of the linears that are rounded to integers, by weight."""
    return {path: scheme for path in linears(spec) if (scheme := recipe.scheme(path)).bits is not None}


def _changes(scheme: Scheme) -> bool:
    return scheme.scaling != "none" or scheme.rotate is not None
