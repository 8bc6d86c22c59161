# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that computes the same and is easier to round: channels scaled, then rotated in blocks (scaling.py, rotation.py).

What is done to the input of a linear is folded into what makes it where that is possible, and else is left to the graph:
`input_changes` says which. The columns of the matrix take the inverse: its scale here, its rotation where it is quantized.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgxport.errors import NumericError, UsageError
from pgxport.exporter.inputs.rotation import block_size, rotate_moment, rotated_inputs
from pgxport.exporter.inputs.scaling import ChannelStatistics, ScalingSite, attention_of, check_sites, input_scale, sites
from pgxport.exporter.recipe import Scheme
from pgxport.models.checkpoint import TensorSource, to_float32
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import weight_shapes

SchemeOf = Callable[[str], Scheme]


@dataclass(frozen=True)
class InputChange:
    """What a graph does to the input of a linear: divides it by a scale of its own, then rotates it in blocks of so many (1: not)."""

    divided: bool
    block: int


def input_changes(spec: ModelSpec, scheme_of: SchemeOf) -> dict[str, InputChange]:
    """The changes of every input that is changed in the graph, by weight: what stands before a linear takes the others."""
    changes: dict[str, InputChange] = {}
    for site in sites(spec):
        for path in site.linears:
            scheme = scheme_of(path)
            divided = scheme.scaling != "none" and not site.before
            block = 1 if _folds(site, _block(spec, path, scheme)) else _block(spec, path, scheme)
            if divided or block > 1:
                changes[path] = InputChange(divided, block)
    return changes


def _block(spec: ModelSpec, path: str, scheme: Scheme) -> int:
    return block_size(weight_shapes(spec)[path][1], scheme.rotate if scheme.bits else None)


def _folds(site: ScalingSite, block: int) -> bool:
    """Whether the rotation is taken by the values that attention sums up: it is linear in them, head by head."""
    return site.head % block == 0


class Equivalent:
    """A checkpoint whose weights are multiplied, row by row and column by column, and rows rotated; with `input_changes` it computes the same.

    Attributes:
        row_factors: Name -> [rows], what the rows of a tensor, and so the outputs of a linear, are multiplied by.
        column_factors: Name -> [columns], what the columns are multiplied by, and so the inputs of a linear divided.
        row_blocks: Name -> the blocks that rows are rotated in after that.
        blocks: Name -> the blocks that the inputs of a linear are rotated in, by the graph or by the rows before.
    """

    def __init__(
        self,
        source: TensorSource,
        rows: Mapping[str, np.ndarray],
        columns: Mapping[str, np.ndarray],
        less_one: Collection[str] = (),
        *,
        row_blocks: Mapping[str, int] | None = None,
        blocks: Mapping[str, int] | None = None,
    ):
        """
        Args:
            less_one: The tensors among `rows` that are stored minus one.
        """
        self._source, self._less_one = source, frozenset(less_one)
        self.row_factors, self.column_factors = dict(rows), dict(columns)
        self.row_blocks, self.blocks = dict(row_blocks or {}), dict(blocks or {})

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """float32 for what is changed."""
        changed = self.row_factors.keys() | self.column_factors.keys() | self.row_blocks.keys()
        return np.dtype(np.float32) if name in changed else self._source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        block = self.row_blocks.get(name, 1)
        first, last = start // block * block, -(-stop // block) * block  # whole blocks of rows
        rows = self._source.rows(name, first, last)
        if name in self.row_factors:
            factor = self.row_factors[name][first:last].reshape(-1, *[1] * (rows.ndim - 1))
            offset = float(name in self._less_one)
            # In float64 in between: 1 + w and the 1 taken off again would each cost digits.
            rows = ((rows.astype(np.float64) + offset) * factor - offset).astype(np.float32)
        if name in self.column_factors:
            rows = to_float32(rows) * self.column_factors[name].astype(np.float32)
        if block > 1:
            rows = rotated_inputs(np.ascontiguousarray(to_float32(rows).T), block).T
        return rows[start - first : stop - first]

    def changed_input(self, path: str, x: np.ndarray) -> np.ndarray:
        """The input [..., K] of a linear of the checkpoint as it is here: divided and rotated, whatever takes that."""
        x = x / self.column_factors[path] if path in self.column_factors else x
        return rotated_inputs(x, self.blocks.get(path, 1))

    def changed_values(self, layer: int, v: np.ndarray) -> np.ndarray:
        """A decoder layer's values [B, K, S, D] as they are here."""
        name = f"{attention_of(layer)}.v_proj.weight"
        v = v * self.row_factors[name].reshape(v.shape[1], 1, v.shape[3]) if name in self.row_factors else v
        return rotated_inputs(v, self.row_blocks.get(name, 1)).astype(np.float32)


class EquivalentStatistics:
    """Statistics of the inputs of an equivalent checkpoint's linears, from those of the checkpoint that it is equivalent to."""

    def __init__(self, statistics: ChannelStatistics, equivalent: Equivalent):
        self._statistics, self._equivalent = statistics, equivalent
        self._squares: dict[str, np.ndarray] = {}  # of second moments, which take a while to read and to rotate

    def mean(self, path: str) -> np.ndarray:
        return self._equivalent.changed_input(path, self._statistics.mean(path))

    def square(self, path: str) -> np.ndarray:
        """[K]; where inputs are rotated and no second moment is known, a block's mean square, as if channels were not correlated."""
        block = self._block(path)
        if block > 1 and path not in self._squares and (moment := self.moment(path)) is not None:
            self._squares[path] = np.diagonal(moment).copy()
        if path in self._squares:
            return self._squares[path]
        square = self._statistics.square(path) / self._scale(path) ** 2
        return square if block == 1 else np.repeat(square.reshape(-1, block).mean(1) / np.float32(block), block)

    def moment(self, path: str) -> np.ndarray | None:
        moment, scale = self._statistics.moment(path), self._equivalent.column_factors.get(path)
        if moment is None or (scale is None and self._block(path) == 1):
            return moment
        moment = moment.copy() if scale is None else moment / scale[:, None]
        if scale is not None:
            moment /= scale
        rotate_moment(moment, self._block(path))
        return moment

    def range(self, path: str, observer: str) -> tuple[float, float]:
        """The range of the changed input where that was observed; else the one of the input, times what its largest |x| changes by.

        That keeps the part of the range that the observer cut off, and how much
        of it is below zero. It is exact for no observer: a range says nothing
        about single channels.

        Raises:
            UsageError: the input is rotated, of which a range says nothing, and the changed one was not observed.
        """
        if (observed := self._statistics.changed_range(path, observer)) is not None:
            return observed
        if self._block(path) > 1:
            raise UsageError(f"{path} has static activations that are rotated, whose range was not measured")
        low, high = self._statistics.range(path, observer)
        largest = self._statistics.absmax(path)
        before = float(largest.max())
        factor = float((largest / self._scale(path)).max()) / before if before else 1.0
        return low * factor, high * factor

    def cache(self, layer: int, part: str) -> np.ndarray:
        largest, name = self._statistics.cache(layer, part), f"{attention_of(layer)}.v_proj.weight"
        if part != "value":
            return largest
        if (observed := self._statistics.changed_values(layer)) is not None:
            return observed
        if name in self._equivalent.row_blocks:
            raise UsageError(f"layer {layer} caches values that are rotated, whose range was not measured")
        return np.abs(self._equivalent.changed_values(layer, largest[None, :, None])[0, :, 0])

    def _scale(self, path: str) -> Any:
        return self._equivalent.column_factors.get(path, np.float32(1))

    def _block(self, path: str) -> int:
        return self._equivalent.blocks.get(path, 1)


def equivalent(
    source: TensorSource, spec: ModelSpec, scheme_of: SchemeOf, statistics: ChannelStatistics | None = None
) -> TensorSource:
    """The checkpoint with every site scaled and rotated as the schemes of its linears ask; the source itself where none asks.

    A search reads weights, which `Checkpoint.unread` counts as read.

    Args:
        statistics: What scales are worked out from; they have to be known where a scheme asks for scales.

    Raises:
        UsageError: linears that share an input ask for different scalings, or one asks that has none.
        NumericError: a scale is not a finite, positive number.
    """
    check_sites(spec, scheme_of)
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    less_one: set[str] = set()
    row_blocks: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for site in sites(spec):
        first = site.linears[0]
        blocks |= {path: n for path in site.linears if (n := _block(spec, path, scheme_of(path))) > 1}
        if first in blocks and _folds(site, blocks[first]):
            row_blocks |= dict.fromkeys(site.before, blocks[first])
        if scheme_of(first).scaling == "none":
            continue
        assert statistics is not None, f"Bug: {first} is to be scaled, and nothing is known of its inputs"
        scale = input_scale(source, site, scheme_of, statistics)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise NumericError(f"{first}: its inputs cannot be rescaled, for what calibration measured is not finite")
        columns |= dict.fromkeys(site.linears, scale)
        rows |= dict.fromkeys(site.before, 1 / site.rows(scale).astype(np.float64))
        less_one |= set(site.before) if site.less_one else set()
    return Equivalent(source, rows, columns, less_one, row_blocks=row_blocks, blocks=blocks) if columns or blocks else source
