# SPDX-License-Identifier: Apache-2.0
"""Quantized values as engines read them, and back. N rows, K columns, G groups of columns that share a scale."""

import numpy as np


def pack(values: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """[N, K] -> uint8 [N, G, group * bits / 8], as MatMulNBits has it: the low nibble first, the last group filled with middles.

    >>> pack(np.array([[1, 2, 3]], np.uint8), 4, 4)
    array([[[ 33, 131]]], dtype=uint8)
    """
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % group_size)), constant_values=1 << (bits - 1))
    return _nibbles(filled.reshape(len(values), -1, group_size), bits)


def unpack(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """[N, G, group * bits / 8] -> uint8 [N, K], what `pack` was given."""
    return _unpacked(packed, bits).reshape(len(packed), -1)[:, :k]


def pack_zero_points(zero_points: np.ndarray, bits: int) -> np.ndarray:
    """[N, G] -> uint8 [N, ceil(G * bits / 8)], the low nibble first; of an odd number, the last high nibble is 0."""
    return _nibbles(np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2 if bits == 4 else 0))), bits)


def unpack_zero_points(packed: np.ndarray, bits: int, groups: int) -> np.ndarray:
    """[N, ceil(G * bits / 8)] -> uint8 [N, G], what `pack_zero_points` was given."""
    return _unpacked(packed, bits)[:, :groups]


def _nibbles(values: np.ndarray, bits: int) -> np.ndarray:
    values = values.astype(np.uint8, copy=False)
    return values if bits == 8 else values[..., ::2] | values[..., 1::2] << 4


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
