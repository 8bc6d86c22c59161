# SPDX-License-Identifier: Apache-2.0
"""Quantize a matrix, a block of rows at a time: nearest, clipped, or GPTQ.

Knows arrays only: no checkpoint, no recipe, no operators. Axis letters: N rows
(output channels), K columns (input channels), G groups of columns that share a scale.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pgxport.errors import NumericError
from pgxport.exporter.stream import FLOAT8
from pgxport.machine.threads import in_order

# Below half of its range a group loses more to the values that
# are cut off than it wins for the others. AWQ searches the same.
SHRINK = 1 - np.linspace(0, 0.5, 20, endpoint=False, dtype=np.float32)
# What is scaled and rotated has no outliers left, so that these find
# most of what all of them find, in a quarter of the time.
TRIM = 1 - np.arange(5, dtype=np.float32) / 20
CHUNK = 1 << 18  # numbers that are rounded at once: they stay in a core's cache
TINY = np.finfo(np.float32).tiny
FACTOR_BLOCK = 512
DAMPING_TRIES = 4
# FP8 E4M3 (Micikevicius et al., 2022, arXiv 2209.05433): eight bits
# with an exponent, as Ada, Hopper and Blackwell multiply them.
FLOAT8_LARGEST = np.float32(448)


@dataclass(frozen=True)
class Grid:
    """The integers a weight may take: bits (8 or 4), group_size (input channels a scale; None: the whole row), symmetric."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def middle(self) -> int:
        """The quantized value of zero where the grid is symmetric."""
        return 1 << (self.bits - 1)

    @property
    def lowest(self) -> int:
        # Kernels that multiply int8 by int8 count on -127 to 127.
        # Of 4 bits the lowest is a sixteenth of all values.
        return 1 if self.symmetric and self.bits == 8 else 0

    @property
    def highest(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Quantized:
    """A block of rows on a grid: (values - zero_points) * scales.

    Attributes:
        values: uint8 [N, K], 0 to 2**bits - 1.
        scales: float32 [N, G], positive.
        zero_points: uint8 [N, G]; 2**(bits - 1) where the grid is symmetric.
    """

    grid: Grid
    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def dequantized(self) -> np.ndarray:
        """float32 [N, K]"""
        (rows, columns), groups = self.values.shape, self.scales.shape[1]
        group_size = self.grid.group_size or columns
        whole = np.zeros((rows, groups * group_size), np.float32)
        whole[:, :columns] = self.values
        w = whole.reshape(rows, groups, group_size)
        w -= self.zero_points[..., None]
        w *= self.scales[..., None]
        return whole[:, :columns]


def nearest(
    w: np.ndarray,
    grid: Grid,
    *,
    clip: bool = False,
    shrink: np.ndarray = SHRINK,
    importance: np.ndarray | None = None,
    threads: int | None = 1,
) -> Quantized:
    """Round every weight to its nearest quantized value, on the scale that loses least among a few for each group.

    Args:
        w: [N, K]
        clip: Try ranges that cut off a group's largest values too.
        shrink: The parts of the whole range that are tried then; the first is 1.
        importance: [K], E[x²] of each input channel: what a squared error in that column weighs. None: all the same.
        threads: How many round; None: one for each core.

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    if not np.isfinite(w).all():
        raise ValueError("not finite")
    weight = None if importance is None else importance.astype(np.float32)[None]
    rows = max(1, CHUNK // w.shape[1])
    blocks = [w[start : start + rows].astype(np.float32, copy=False) for start in range(0, max(len(w), 1), rows)]
    parts = list(in_order(lambda block: _nearest(block, grid, shrink if clip else shrink[:1], weight), blocks, threads))
    return Quantized(grid, *(np.concatenate(part) for part in zip(*parts, strict=True)))


@np.errstate(over="ignore")  # of errors that are beyond float32
def _nearest(
    w: np.ndarray, grid: Grid, shrink: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales and zero points of some rows; weight [1, K]."""
    groups, axis = _grouped(w, grid.group_size)
    weight = None if weight is None else _grouped(weight, grid.group_size)[0]
    candidates = list(_candidates(groups, axis, grid, shrink))
    scales, zero_points = candidates[0]
    least = np.full_like(scales, np.inf)
    for scale, zero in candidates if len(candidates) > 1 else ():
        loss = _rounded(groups, scale, zero, grid)
        loss *= scale
        loss -= groups
        loss *= loss
        if weight is not None:
            loss *= weight
        total = loss.sum(axis, keepdims=True) if axis else _pairwise_sum(loss)[None]
        # The first always counts, though its error may be beyond float32.
        better = (total < least) | (least == np.inf)
        least, scales, zero_points = (
            np.where(better, new, old) for new, old in ((total, least), (scale, scales), (zero, zero_points))
        )
    values = _rounded(groups, scales, zero_points, grid)
    values += zero_points
    values = np.moveaxis(values.astype(np.uint8), axis, -1).reshape(len(w), -1)[:, : w.shape[1]]
    return values, scales.reshape(len(w), -1), zero_points.reshape(len(w), -1).astype(np.uint8)


def _grouped(w: np.ndarray, group_size: int | None) -> tuple[np.ndarray, int]:
    """[N, K] -> [group, N, G], or [N, 1, K] where the group is the row; and the axis of the group.

    What is done to all groups at once is several times as fast as what is done to each of them. Zeros, which every grid
    has, fill up the last group.
    """
    if group_size is None:
        return w[:, None], -1
    if short := -w.shape[1] % group_size:
        w = np.pad(w, ((0, 0), (0, short)))
    return np.ascontiguousarray(np.moveaxis(w.reshape(len(w), -1, group_size), -1, 0)), 0


def _pairwise_sum(x: np.ndarray) -> np.ndarray:
    """[group, N, G] -> [N, G], added in the order in which numpy adds numbers side by side, so that what is equally near stays it."""
    if len(x) > 128:
        half = len(x) // 16 * 8
        return _pairwise_sum(x[:half]) + _pairwise_sum(x[half:])
    a, b, c, d, e, f, g, h = x.reshape(-1, 8, *x.shape[1:]).sum(0)
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


def _candidates(groups: np.ndarray, axis: int, grid: Grid, shrink: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points, each of the shape of groups with 1 along the axis, to choose among for each group."""
    # Zero is a weight's most frequent value, and exact on every grid.
    low, high = np.minimum(groups.min(axis, keepdims=True), 0), np.maximum(groups.max(axis, keepdims=True), 0)
    if not grid.symmetric:
        for factor in shrink:
            scale = _safe((high / grid.highest - low / grid.highest) * factor)
            yield scale, np.clip(np.rint(-low * factor / scale), 0, grid.highest)
        return
    middle = np.full_like(low, grid.middle)
    below, above = grid.middle - grid.lowest, grid.highest - grid.middle
    whole = np.maximum(-low / below, high / above)  # the finest scale that cuts nothing off
    for factor in shrink:
        yield _safe(whole * factor), middle
    if below != above:
        # The finer one cuts off the largest value by a step if it is positive, the
        # coarser one leaves a value unused. On normal weights in groups of 32 the
        # three keep 20.7, 20.6 and 20.3 dB, and the best of them for each group 20.9.
        largest = np.maximum(-low, high)
        yield _safe(largest / below), middle
        yield _safe(largest / above), middle


def _safe(scale: np.ndarray) -> np.ndarray:
    """A group of zeros, or of numbers that float32 can hardly tell from zero, is stored as zeros, on any scale."""
    return np.where(scale < TINY, np.float32(1), scale)


def _rounded(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes less the zero point, as float32 of w's shape."""
    q = w / scale
    np.rint(q, out=q)
    np.maximum(q, grid.lowest - zero, out=q)
    np.minimum(q, grid.highest - zero, out=q)
    return q


class Gptq:
    """GPTQ (Frantar et al., 2023, arXiv 2210.17323): columns are rounded one after another, and those left make up for it.

    Prepared once for a matrix, from its inputs' second moment; then
    quantizes any block of its rows, for rows are independent.

    The paper gives what is left its update from a Cholesky factor of the inverse Hessian. The same update
    follows from a factor of the Hessian itself (Chee et al., 2023, arXiv 2307.13304): with H = R Rᵀ, R upper
    triangular, and δ what rounding changed, δ H δᵀ = Σ_j (R_jj δ_j + Σ_{i<j} R_ij δ_i)², so column j aims at
    w_j - Σ_{i<j} δ_i R_ij / R_jj. That needs no inverse, which is the part that is delicate in float32.
    """

    def __init__(self, moment: np.ndarray, grid: Grid, *, damping: float = 0.01, order: bool = True, block: int = 128):
        """
        Args:
                    moment: H [K, K], E[x xᵀ] of the inputs or any multiple of it. Kept, and not changed; a float32 copy is made of it.
                    damping: What is added to its diagonal, as a part of the diagonal's mean; ten times that where H is not positive
                        definite, up to three times.
                    order: Round the columns with the largest H_jj first. Groups stay those of neighbouring columns, with scales set
                        beforehand; without it a group's scales are set when its first column's turn comes.
                    block: Columns between updates of the others.

                Raises:
                    NumericError: H is not finite, or no damping makes it positive definite.
        """
        self._moment, self._grid, self._block = moment, grid, block
        diagonal = np.diagonal(moment).astype(np.float64)
        self._importance = diagonal.astype(np.float32)
        self._dead = diagonal == 0
        self._order = np.argsort(-diagonal, kind="stable") if order else np.arange(len(diagonal))
        self._static = order or grid.group_size is None
        self._feedback = self._factored(damping)

    def _factored(self, damping: float) -> np.ndarray:
        """R [K, K], each column divided by its diagonal, in the order of rounding. Below the diagonal it holds anything."""
        mean = float(np.diagonal(self._moment).mean(dtype=np.float64))
        if not math.isfinite(mean):
            raise NumericError("GPTQ: the second moments of the inputs are not finite; calibrate again with other images")
        for attempt in range(DAMPING_TRIES):
            h = self._moment[np.ix_(self._order, self._order)].astype(np.float32, copy=False)
            diagonal = h.reshape(-1)[:: len(h) + 1]
            diagonal += self._dead[self._order]
            diagonal += damping * 10**attempt * mean
            try:
                _factor(h)
            except np.linalg.LinAlgError:
                continue
            h /= diagonal.copy()
            return h
        raise NumericError(
            f"GPTQ: the second moments of the inputs are not positive definite, though {damping * 10**attempt:g} times their "
            "mean was added to the diagonal; calibrate again with more images"
        )

    def quantize(self, w: np.ndarray, *, clip: bool = True) -> Quantized:
        """Quantize rows [N, K]. In the Hessian's norm, each row is as near to w as `nearest` brings it, clipped or not, or nearer.

        A few hundred rows at a time are quicker than a few; it takes about seven times their size.

        Args:
            clip: Look for the range of each group that loses least, as `nearest` does.

        Raises:
            ValueError: a weight is infinite or not a number.
        """
        # As the paper's code does: an input that is always zero
        # multiplies nothing, and should not widen its group's range.
        w = np.where(self._dead, np.float32(0), w.astype(np.float32, copy=False))
        roundings = [nearest(w, self._grid, clip=True, importance=self._importance, threads=None)] if clip else []
        roundings.append(nearest(w, self._grid, threads=None))
        best = self._solve(w, roundings[0], clip=clip)
        for rounding in roundings:
            best = self._better(w, best, rounding)
        return best

    def _solve(self, w: np.ndarray, rounding: Quantized, *, clip: bool) -> Quantized:
        grid, f, order = self._grid, self._feedback, self._order
        columns = len(order)
        group_size = grid.group_size or columns
        # Columns as rows from here on, [K, N], in the order of rounding.
        target = w.T[order]
        lost = np.zeros_like(target)  # w - (codes - zeros) * scales
        values = np.empty(target.shape, np.uint8)
        scales, zero_points = rounding.scales.T.copy(), rounding.zero_points.T.astype(np.float32)
        for start in range(0, columns, self._block):
            stop = min(columns, start + self._block)
            goal = target[start:stop] + f[:start, start:stop].T @ lost[:start]
            inner = np.ascontiguousarray(f[start:stop, start:stop].T)
            for j in range(start, stop):
                i, g = j - start, order[j] // group_size
                if not self._static and j % group_size == 0:
                    end = min(columns, j + group_size)
                    # What the group's weights are by now, if all that is left may still move.
                    moved = np.linalg.solve(np.triu(f[j:end, j:end]).T, f[:j, j:end].T @ lost[:j])
                    entered = target[j:end] + moved
                    fresh = nearest(
                        entered.T, Grid(grid.bits, None, grid.symmetric), clip=clip, importance=self._importance[j:end]
                    )
                    scales[g], zero_points[g] = fresh.scales[:, 0], fresh.zero_points[:, 0]
                q = _rounded(goal[i] + inner[i, :i] @ lost[start:j], scales[g], zero_points[g], grid)
                values[order[j]] = q + zero_points[g]
                lost[j] = target[j] - q * scales[g]
        return Quantized(
            grid,
            np.ascontiguousarray(values.T),
            np.ascontiguousarray(scales.T),
            np.ascontiguousarray(zero_points.T.astype(np.uint8)),
        )

    def _better(self, w: np.ndarray, a: Quantized, b: Quantized) -> Quantized:
        """Returns, for each row, the candidate with the smaller Hessian error."""
        p, q = a.dequantized() - w, b.dequantized() - w
        # p H pᵀ - q H qᵀ, with one product where two differences would take two.
        worse = np.einsum("nk,nk->n", (p - q) @ self._moment, p + q) > 0
        if not worse.any():
            return a
        values, scales, zero_points = (
            np.where(worse[:, None], y, x)
            for x, y in ((a.values, b.values), (a.scales, b.scales), (a.zero_points, b.zero_points))
        )
        return Quantized(a.grid, values, scales, zero_points)


def _factor(h: np.ndarray) -> None:
    """Put R, upper triangular with R Rᵀ = h [K, K], into h's upper triangle.

    numpy's Cholesky would hold three matrices at once, which of the widest MLPs are gigabytes
    each. This holds h, multiplies in float32 and factors the blocks on the diagonal in float64.
    """
    for stop in range(len(h), 0, -FACTOR_BLOCK):
        start = max(0, stop - FACTOR_BLOCK)
        h[:stop, start:stop] -= h[:stop, stop:] @ h[start:stop, stop:].T
        square = h[start:stop, start:stop].astype(np.float64)
        r = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        h[start:stop, start:stop] = r
        h[:start, start:stop] = h[:start, start:stop] @ np.linalg.inv(r).T.astype(np.float32)


def hessian_error(delta: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """diag(Δ H Δᵀ) [N] of Δ [N, K] and H [K, K]: the expected squared error of each output, where H is E[x xᵀ]."""
    return np.maximum(np.einsum("nk,nk->n", delta @ moment, delta, dtype=np.float64), 0)


def row_scales(w: np.ndarray) -> np.ndarray:
    """[N, K] -> float32 [N, 1], by which the largest number of each row becomes the largest of E4M3; 1 for a row of zeros."""
    scales = np.abs(w).max(-1, keepdims=True).astype(np.float32) / FLOAT8_LARGEST
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def to_float8(x: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """x / scale in E4M3, to the nearest, ties to even; what lies beyond its range is cut off.

    >>> to_float8(np.array([1.0, 1.06, 1e9], np.float32), np.float32(1)).astype(np.float32)
    array([  1.,   1., 448.], dtype=float32)
    """
    return np.clip(x / scale, -FLOAT8_LARGEST, FLOAT8_LARGEST).astype(FLOAT8)


def sqnr(signal: float, noise: float) -> float:
    """The ratio of two mean squares in decibels; inf where nothing was lost.

    >>> sqnr(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
