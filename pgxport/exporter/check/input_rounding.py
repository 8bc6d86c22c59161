# SPDX-License-Identifier: Apache-2.0
"""What an engine rounds while it runs, in numpy: the inputs of quantized matrices, and the KV cache."""

from dataclasses import dataclass

import numpy as np

from pgxport.exporter.inputs.scaling import InputStatistics
from pgxport.exporter.lower_onnxruntime import uint8_grid
from pgxport.exporter.lower_standard import activation_scale
from pgxport.exporter.quantize import to_float8
from pgxport.exporter.recipe import Recipe, Scheme
from pgxport.exporter.targets import Target


@dataclass(frozen=True)
class InputRounding:
    """How a target's engine rounds the inputs of a recipe's matrices.

    Attributes:
        statistics: Of the inputs, where activations are static or the cache is int8.
    """

    recipe: Recipe
    target: Target
    statistics: InputStatistics | None = None

    def rounded(self, x: np.ndarray, scheme: Scheme, path: str) -> np.ndarray:
        """The input x [..., K] of the matrix `path` as the engine multiplies it, in floats; x itself where it is not rounded."""
        if scheme.bits is None:
            return x
        if self.target.dialect == "standard":
            return self._around_zero(x, scheme, path)
        if scheme.activations == "static":
            scale, zero = uint8_grid(*self._known(path).range(path, scheme.observer))
            return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        if scheme.activations == "dynamic":
            return symmetric(x, np.abs(x).max(-1, keepdims=True))
        # MatMulNBits rounds activations too, with a scale for each group of them.
        assert scheme.group_size is not None, f"Bug: {path} has no group"
        groups = np.split(x, range(scheme.group_size, x.shape[-1], scheme.group_size), -1)
        return np.concatenate([symmetric(g, np.abs(g).max(-1, keepdims=True)) for g in groups], -1)

    def _around_zero(self, x: np.ndarray, scheme: Scheme, path: str) -> np.ndarray:
        """x after QuantizeLinear and DequantizeLinear."""
        if scheme.activations == "float":
            return x
        low, high = self._known(path).range(path, scheme.observer)
        computed = np.dtype(self.target.compute(self.recipe.rules[-1].scheme.dtype))
        scale = np.float32(activation_scale(low, high, scheme, computed))
        if scheme.format == "e4m3":
            return to_float8(x, scale).astype(np.float32) * scale
        return np.clip(np.rint(x / scale), -128, 127) * scale

    def cached(self, x: np.ndarray, part: str, layer: int) -> np.ndarray:
        """A layer's keys or values [B, K, T, D] as the cache holds them, in floats."""
        if self.recipe.cache == "int8":
            return symmetric(x, self._known(f"the cache of layer {layer}").cache(layer, part)[None, :, None])
        return x.astype(self.recipe.cache or x.dtype).astype(x.dtype)

    def _known(self, what: str) -> InputStatistics:
        assert self.statistics is not None, f"Bug: nothing is known about the range of {what}"
        return self.statistics


def symmetric(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """x in int8 and back, on a grid of 127 steps up to `largest`, which is of x's shape or 1 where a scale is shared."""
    scale = np.maximum(largest, np.float32(1e-30)) / np.float32(127)
    return np.clip(np.rint(x / scale), -128, 127) * scale
