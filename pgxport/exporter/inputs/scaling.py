# SPDX-License-Identifier: Apache-2.0
"""The scale of each input channel that makes a linear easier to round, by SmoothQuant or AWQ, and the places that can be scaled.

`equivalent.py` divides by it what makes the input, and multiplies the columns that read it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pgxport.errors import UsageError
from pgxport.exporter.inputs.rotation import block_size, rotated_columns, unrotated_columns
from pgxport.exporter.quantize import Grid, hessian_error, nearest
from pgxport.exporter.recipe import PROJECTOR, Scheme
from pgxport.models.checkpoint import TensorSource, row_blocks, to_float32
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec
from pgxport.models.weights import weight_shapes

RATIOS = np.arange(20) / 20  # the grid of AWQ's own search; 0 is no scaling
SAMPLED_ROWS = 256  # of each matrix, in AWQ's search: 12 s on two cores where K is 9216 and there are second moments
# The weakest channel counts as at least this part of the
# strongest: one that calibration did not see is not scaled away.
WEAKEST = 1e-4


class InputStatistics(Protocol):
    """Statistics of the input x [K] of each linear, by the name of its weight, for those who round."""

    def mean(self, path: str) -> np.ndarray:
        """[K], E[x]."""

    def square(self, path: str) -> np.ndarray:
        """[K], E[x²]."""

    def moment(self, path: str) -> np.ndarray | None:
        """[K, K], E[x xᵀ], where it was kept."""

    def range(self, path: str, observer: str) -> tuple[float, float]:
        """The lowest and highest x that an observer keeps, over all channels."""

    def cache(self, layer: int, part: str) -> np.ndarray:
        """[K, D], the largest |x| of each channel of a decoder layer's keys after rotation, or of its values."""


class ChannelStatistics(InputStatistics, Protocol):
    """The same and what scales are worked out from; a calibration file provides them."""

    def absmax(self, path: str) -> np.ndarray:
        """[K], the largest |x|."""

    def mean_abs(self, path: str) -> np.ndarray:
        """[K], E|x|."""

    def changed_range(self, path: str, observer: str) -> tuple[float, float] | None:
        """The range of the input as a recipe scales and rotates it, where that was observed."""

    def changed_values(self, layer: int) -> np.ndarray | None:
        """[K, D], the largest |x| of each channel of a decoder layer's values as a recipe changes them, where that was observed."""


@dataclass(frozen=True)
class ScalingSite:
    """An input that some linears share, and what makes it: dividing that and multiplying their columns changes nothing.

    Attributes:
        before: The tensors whose rows are divided: a norm's, or those of the linear before. None: the graph divides.
        linears: The weights whose columns are multiplied.
        less_one: The tensors before are stored minus one, as Gemma's norms are.
        share: Query heads that read the same value head. Their columns are multiplied by the same numbers.
        head: Width of a head, where the rows before are the values of attention's heads.
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
    """Every input of a model that can be scaled. What stands before SigLIP's fc2, a GELU, cannot be divided; the projector's
    is an output of the vision encoder.
    """
    return [*_vision(spec.vision), ScalingSite((), (PROJECTOR,)), *_text(spec.text)]


def _vision(v: VisionSpec) -> Iterator[ScalingSite]:
    for i in range(v.depth):
        layer = f"vision_tower.vision_model.encoder.layers.{i}"
        for norm, linears in (("layer_norm1", _qkv(f"{layer}.self_attn")), ("layer_norm2", (f"{layer}.mlp.fc1.weight",))):
            yield ScalingSite((f"{layer}.{norm}.weight", f"{layer}.{norm}.bias"), linears)
        value = f"{layer}.self_attn.v_proj"
        yield ScalingSite((f"{value}.weight", f"{value}.bias"), (f"{layer}.self_attn.out_proj.weight",), head=v.width // v.heads)
        yield ScalingSite((), (f"{layer}.mlp.fc2.weight",))


def _text(t: TextSpec) -> Iterator[ScalingSite]:
    # The same tensor name means a different place in Gemma 1 and Gemma 2.
    before_mlp = "pre_feedforward_layernorm" if t.post_norms else "post_attention_layernorm"
    for i in range(t.depth):
        layer = f"language_model.model.layers.{i}"
        attention, (gate, up, down) = attention_of(i), (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        yield ScalingSite((f"{layer}.input_layernorm.weight",), _qkv(attention), less_one=True)
        yield ScalingSite(
            (f"{attention}.v_proj.weight",), (f"{attention}.o_proj.weight",), share=t.heads // t.kv_heads, head=t.head_dim
        )
        yield ScalingSite((f"{layer}.{before_mlp}.weight",), (gate, up), less_one=True)
        yield ScalingSite((up,), (down,))  # gelu(gate) * up is linear in up


def attention_of(layer: int) -> str:
    """The name that a decoder layer's attention weights begin with."""
    return f"language_model.model.layers.{layer}.self_attn"


def _qkv(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{part}_proj.weight" for part in "qkv")


@dataclass(frozen=True)
class SampledRows:
    """Some rows [n, K] of a linear, the grid they go to, how many rows of the linear each stands for, and the blocks of its rotation."""

    rows: np.ndarray
    grid: Grid
    stands_for: float = 1.0
    block: int = 1


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
    rounded = nearest(rotated_columns(sample.rows * scale, sample.block), sample.grid).dequantized()
    delta = unrotated_columns(rounded, sample.block)
    delta /= scale
    delta -= sample.rows
    errors = hessian_error(delta, moment) if moment.ndim == 2 else (delta * delta) @ moment
    return sample.stands_for * float(errors.sum(dtype=np.float64))


def check_sites(spec: ModelSpec, scheme_of: Callable[[str], Scheme]) -> None:
    """Every linear that asks to be scaled or rotated can be.

    Raises:
        UsageError: linears that share an input ask for different scalings, or something else than a linear asks.
    """
    places = sites(spec)
    for site in places:
        first = site.linears[0]
        for other in site.linears[1:]:
            asked, others = ((scheme_of(path).scaling, scheme_of(path).alpha) for path in (first, other))
            if asked != others:
                raise UsageError(
                    f"{first} asks for scaling {_described(*asked)} and {other} for {_described(*others)}, "
                    "and they have one input; give them the same"
                )
    served = {linear for site in places for linear in site.linears}
    for name in weight_shapes(spec):
        scheme = scheme_of(name)
        if name not in served and (scheme.scaling != "none" or scheme.rotate):
            key = f"scaling {scheme.scaling!r}" if scheme.scaling != "none" else f"rotate {scheme.rotate}"
            raise UsageError(
                f"{name} asks for {key}, which is for the linears of a layer and the projector; give it a rule without"
            )


def _described(scaling: str, alpha: float) -> str:
    return f"{scaling!r}" if alpha == Scheme.alpha else f"{scaling!r} with alpha {alpha:g}"


def input_scale(
    source: TensorSource, site: ScalingSite, scheme_of: Callable[[str], Scheme], statistics: ChannelStatistics
) -> np.ndarray:
    """What the input of a site's linears is divided by, float32 [K], as their schemes ask; reads their weights."""
    path = site.linears[0]
    if scheme_of(path).scaling == "smoothquant":
        largest = np.max([_absmax(source, linear) for linear in site.linears], 0)
        x, w = site.shared(statistics.absmax(path), np.max), site.shared(largest, np.max)
        return smoothquant_scale(x, w, scheme_of(path).alpha)
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
    grid = Grid(scheme.bits, scheme.group_size, scheme.symmetric)
    return SampledRows(block, grid, rows / len(chosen), block_size(source.shape(path)[1], scheme.rotate))
