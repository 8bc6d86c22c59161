# SPDX-License-Identifier: Apache-2.0
"""Divide a linear's inputs and multiply its columns before rounding, by SmoothQuant or AWQ, as a checkpoint that computes the same.

The division is folded into what makes the input, so that no operator is added.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pgxport.errors import NumericError, UsageError
from pgxport.exporter.quantize import Grid, hessian_error, nearest
from pgxport.exporter.recipe import Scheme
from pgxport.models.checkpoint import TensorSource, row_blocks, to_float32
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec
from pgxport.models.weights import weight_shapes

RATIOS = np.arange(20) / 20  # the grid of AWQ's own search; 0 is no scaling
SAMPLED_ROWS = 256  # of each matrix, in AWQ's search: 12 s on two cores where K is 9216 and there are second moments
# The weakest channel counts as at least this part of the
# strongest: one that calibration did not see is not scaled away.
WEAKEST = 1e-4


class InputStatistics(Protocol):
    """Statistics of the input x [K] of each linear, by the name of its weight; a calibration file provides them."""

    def absmax(self, path: str) -> np.ndarray:
        """[K], the largest |x|."""

    def mean(self, path: str) -> np.ndarray:
        """[K], E[x]."""

    def mean_abs(self, path: str) -> np.ndarray:
        """[K], E|x|."""

    def square(self, path: str) -> np.ndarray:
        """[K], E[x²]."""

    def moment(self, path: str) -> np.ndarray | None:
        """[K, K], E[x xᵀ], where it was kept."""

    def range(self, path: str, observer: str) -> tuple[float, float]:
        """The lowest and highest x that an observer keeps, over all channels."""

    def cache(self, layer: int, part: str) -> np.ndarray:
        """[K, D], the largest |x| of each channel of a decoder layer's keys after rotation, or of its values."""


@dataclass(frozen=True)
class ScalingSite:
    """An input that some linears share, and what makes it: dividing that and multiplying their columns changes nothing.

    Attributes:
        before: The tensors whose rows are divided: a norm's, or those of the linear before.
        linears: The weights whose columns are multiplied.
        less_one: The tensors before are stored minus one, as Gemma's norms are.
        share: Query heads that read the same value head. Their columns are multiplied by the same numbers.
        head: Width of a head, where heads share.
    """

    before: tuple[str, ...]
    linears: tuple[str, ...]
    less_one: bool = False
    share: int = 1
    head: int = 1

    def shared(self, x: np.ndarray, combine: Callable[..., np.ndarray]) -> np.ndarray:
        """[K] -> [K], a number for each column, combined over the heads that share."""
        heads = x.reshape(-1, self.share, self.head)
        return np.broadcast_to(combine(heads, axis=1, keepdims=True), heads.shape).reshape(-1)

    def rows(self, scale: np.ndarray) -> np.ndarray:
        """[K] -> [rows before], of a scale that is the same for the heads that share."""
        return scale.reshape(-1, self.share, self.head)[:, 0].reshape(-1)


def sites(spec: ModelSpec) -> list[ScalingSite]:
    """Every place of a model that can be rescaled. SigLIP's fc2 has none: a GELU stands before it."""
    return [*_vision(spec.vision), *_text(spec.text)]


def _vision(v: VisionSpec) -> Iterator[ScalingSite]:
    for i in range(v.depth):
        layer = f"vision_tower.vision_model.encoder.layers.{i}"
        for norm, linears in (("layer_norm1", _qkv(f"{layer}.self_attn")), ("layer_norm2", (f"{layer}.mlp.fc1.weight",))):
            yield ScalingSite((f"{layer}.{norm}.weight", f"{layer}.{norm}.bias"), linears)
        value = f"{layer}.self_attn.v_proj"
        yield ScalingSite((f"{value}.weight", f"{value}.bias"), (f"{layer}.self_attn.out_proj.weight",))


def _text(t: TextSpec) -> Iterator[ScalingSite]:
    # The same tensor name means a different place in Gemma 1 and Gemma 2.
    before_mlp = "pre_feedforward_layernorm" if t.post_norms else "post_attention_layernorm"
    for i in range(t.depth):
        layer = f"language_model.model.layers.{i}"
        attention, (gate, up, down) = _attention(i), (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        yield ScalingSite((f"{layer}.input_layernorm.weight",), _qkv(attention), less_one=True)
        yield ScalingSite(
            (f"{attention}.v_proj.weight",), (f"{attention}.o_proj.weight",), share=t.heads // t.kv_heads, head=t.head_dim
        )
        yield ScalingSite((f"{layer}.{before_mlp}.weight",), (gate, up), less_one=True)
        yield ScalingSite((up,), (down,))  # gelu(gate) * up is linear in up


def _attention(layer: int) -> str:
    return f"language_model.model.layers.{layer}.self_attn"


def _qkv(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{part}_proj.weight" for part in "qkv")


class Rescaled:
    """A checkpoint whose weights are multiplied, row by row and column by column, so that the model computes the same.

    Attributes:
        row_factors: Name -> [rows], what the rows of a tensor, and so the outputs of a linear, are multiplied by.
        column_factors: Name -> [columns], what the columns are multiplied by, and so the inputs of a linear divided.
    """

    def __init__(
        self,
        source: TensorSource,
        rows: Mapping[str, np.ndarray],
        columns: Mapping[str, np.ndarray],
        less_one: Collection[str] = (),
    ):
        """
        Args:
            less_one: The tensors among `rows` that are stored minus one.
        """
        self._source, self._less_one = source, frozenset(less_one)
        self.row_factors, self.column_factors = dict(rows), dict(columns)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """float32 for what is multiplied."""
        return np.dtype(np.float32) if name in self.row_factors or name in self.column_factors else self._source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        block = self._source.rows(name, start, stop)
        if name in self.row_factors:
            factor = self.row_factors[name][start:stop].reshape(-1, *[1] * (block.ndim - 1))
            offset = float(name in self._less_one)
            # In float64 in between: 1 + w and the 1 taken off again would each cost digits.
            block = ((block.astype(np.float64) + offset) * factor - offset).astype(np.float32)
        if name in self.column_factors:
            block = to_float32(block) * self.column_factors[name].astype(np.float32)
        return block


class RescaledStatistics:
    """Statistics of a rescaled checkpoint: those of x / s, from those measured of x."""

    def __init__(self, statistics: InputStatistics, rescaled: Rescaled):
        self._statistics, self._rescaled = statistics, rescaled

    def scale_of(self, path: str) -> np.ndarray | None:
        """[K], what the input of that linear is divided by; None where it is as it was."""
        return self._rescaled.column_factors.get(path)

    def absmax(self, path: str) -> np.ndarray:
        return self._statistics.absmax(path) / self._scale(path)

    def mean(self, path: str) -> np.ndarray:
        return self._statistics.mean(path) / self._scale(path)

    def mean_abs(self, path: str) -> np.ndarray:
        return self._statistics.mean_abs(path) / self._scale(path)

    def square(self, path: str) -> np.ndarray:
        return self._statistics.square(path) / self._scale(path) ** 2

    def moment(self, path: str) -> np.ndarray | None:
        moment, scale = self._statistics.moment(path), self.scale_of(path)
        if moment is None or scale is None:
            return moment
        moment = moment / scale[:, None]
        moment /= scale
        return moment

    def range(self, path: str, observer: str) -> tuple[float, float]:
        """The range that was measured, times what the largest |x| of all channels changes by.

        That keeps the part of the range that the observer cut off, and how much
        of it is below zero. It is exact for no observer: a range says nothing
        about single channels. Calibrating the rescaled checkpoint again does.
        """
        low, high = self._statistics.range(path, observer)
        before = float(self._statistics.absmax(path).max())
        factor = float(self.absmax(path).max()) / before if before else 1.0
        return low * factor, high * factor

    def cache(self, layer: int, part: str) -> np.ndarray:
        largest = self._statistics.cache(layer, part)
        factor = self._rescaled.row_factors.get(f"{_attention(layer)}.v_proj.weight") if part == "value" else None
        return largest if factor is None else (largest * factor.reshape(largest.shape)).astype(np.float32)

    def _scale(self, path: str) -> Any:
        return self._rescaled.column_factors.get(path, np.float32(1))


@dataclass(frozen=True)
class SampledRows:
    """Some rows [n, K] of a linear, the grid they go to, and how many rows of the linear each stands for."""

    rows: np.ndarray
    grid: Grid
    stands_for: float = 1.0


def smoothquant_scale(input_absmax: np.ndarray, weight_absmax: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """s [K] = max|x|^α / max|w|^(1-α) (Xiao et al., 2023, arXiv 2211.10438, equation 4): what makes x hard to round goes to w.

    Channels without an input or without a weight, of which there is nothing to say, stay as they are.

    >>> smoothquant_scale(np.array([16.0, 0.0]), np.array([0.25, 1.0]))
    array([8., 1.], dtype=float32)
    """
    known = (input_absmax > 0) & (weight_absmax > 0)
    x, w = (np.where(known, a, 1).astype(np.float64) for a in (input_absmax, weight_absmax))
    return (x**alpha / w ** (1 - alpha)).astype(np.float32)


def awq_scale(mean_abs: np.ndarray, samples: Sequence[SampledRows], moment: np.ndarray) -> np.ndarray:
    """s [K] = E|x|^ratio, of the ratio that loses least (Lin et al., 2024, arXiv 2306.00978, section 3.2): strong inputs get finer steps.

    No scaling is one of the ratios, so on the rows it is given it is never worse than that.

    Args:
        mean_abs: [K]
        moment: E[x xᵀ] [K, K], which gives the expected squared error of the outputs; or E[x²] [K], which gives it as far as
            inputs are not correlated.
    """
    strength = np.maximum(mean_abs.astype(np.float64), WEAKEST * mean_abs.max())
    best, least = np.ones(len(mean_abs), np.float32), np.inf
    for ratio in RATIOS if strength.any() else RATIOS[:1]:
        scale = strength**ratio
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        loss = sum(_loss(sample, scale, moment) for sample in samples)
        if loss < least:
            best, least = scale, loss
    return best


def _loss(sample: SampledRows, scale: np.ndarray, moment: np.ndarray) -> float:
    """Returns the error that rounding w * s causes in the outputs for x / s."""
    delta = nearest(sample.rows * scale, sample.grid).dequantized()
    delta /= scale
    delta -= sample.rows
    errors = hessian_error(delta, moment) if moment.ndim == 2 else (delta * delta) @ moment
    return sample.stands_for * float(errors.sum(dtype=np.float64))


def rescaled(
    source: TensorSource, spec: ModelSpec, scheme_of: Callable[[str], Scheme], statistics: InputStatistics
) -> TensorSource:
    """The checkpoint with every site rescaled as the schemes of its linears ask; the source itself where none asks.

    A search reads weights, which `Checkpoint.unread` counts as read.

    Raises:
        UsageError: linears that share an input ask for different scalings, or one asks that has nothing before it to divide.
        NumericError: a scale is not a finite, positive number.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    less_one: set[str] = set()
    check_sites(spec, scheme_of)
    for site in sites(spec):
        if scheme_of(site.linears[0]).scaling == "none":
            continue
        scale = _scale(source, site, scheme_of, statistics)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise NumericError(f"{site.linears[0]}: its inputs cannot be rescaled, for what calibration measured is not finite")
        columns |= dict.fromkeys(site.linears, scale)
        rows |= dict.fromkeys(site.before, 1 / site.rows(scale).astype(np.float64))
        less_one |= set(site.before) if site.less_one else set()
    return Rescaled(source, rows, columns, less_one) if columns else source


def check_sites(spec: ModelSpec, scheme_of: Callable[[str], Scheme]) -> None:
    """Every linear that asks to be rescaled can be.

    Raises:
        UsageError: linears that share an input ask for different scalings, or one asks that has nothing before it to divide.
    """
    places = sites(spec)
    for site in places:
        first = site.linears[0]
        for other in site.linears[1:]:
            if scheme_of(other).scaling != scheme_of(first).scaling:
                raise UsageError(
                    f"{first} asks for scaling {scheme_of(first).scaling!r} and {other} for {scheme_of(other).scaling!r}, "
                    "and they have one input; give them the same"
                )
    served = {linear for site in places for linear in site.linears}
    for name in weight_shapes(spec):
        if name not in served and scheme_of(name).scaling != "none":
            raise UsageError(
                f"{name} asks for scaling {scheme_of(name).scaling!r}, and what makes its input cannot be divided; "
                "give it a rule with scaling 'none'"
            )


def _scale(
    source: TensorSource, site: ScalingSite, scheme_of: Callable[[str], Scheme], statistics: InputStatistics
) -> np.ndarray:
    """[K], float32"""
    path = site.linears[0]
    if scheme_of(path).scaling == "smoothquant":
        largest = np.max([_absmax(source, linear) for linear in site.linears], 0)
        return smoothquant_scale(site.shared(statistics.absmax(path), np.max), site.shared(largest, np.max))
    samples = [_sample(source, linear, scheme_of(linear)) for linear in site.linears]
    moment = statistics.moment(path)
    moment = statistics.square(path) if moment is None else moment
    return awq_scale(site.shared(statistics.mean_abs(path), np.mean), samples, moment)


def _absmax(source: TensorSource, path: str) -> np.ndarray:
    """[K], the largest |w| of each column."""
    rows, columns = source.shape(path)
    largest = np.zeros(columns, np.float32)
    for start, stop in row_blocks(rows, 4 * columns):
        np.maximum(largest, np.abs(to_float32(source.rows(path, start, stop))).max(0), out=largest)
    return largest


def _sample(source: TensorSource, path: str, scheme: Scheme) -> SampledRows:
    """Evenly spaced rows of a linear."""
    assert scheme.bits is not None, f"Bug: {path} asks to be rescaled for a rounding that does not come"
    rows = source.shape(path)[0]
    chosen = np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(int)
    block = np.concatenate([to_float32(source.rows(path, row, row + 1)) for row in chosen.tolist()])
    return SampledRows(block, Grid(scheme.bits, scheme.group_size, scheme.symmetric), rows / len(chosen))
