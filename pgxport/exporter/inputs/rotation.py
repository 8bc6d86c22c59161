# SPDX-License-Identifier: Apache-2.0
"""Rotate the inputs of a product in blocks, and the columns of its matrix with them, so that no channel of a block stands out.

With a Hadamard matrix H of n rows, H Hᵀ = n, so (x H) (w H)ᵀ / n = x wᵀ exactly, and each number of x H is a sum of all numbers of
its block: an outlier is spread over its block, and one scale fits all of them (QuaRot, Ashkboos et al., 2024, arXiv 2404.00456;
SpinQuant, Liu et al., 2024, arXiv 2405.16406). The factor 1 / n is the input's: a power of two, which float16 holds exactly, and
what comes out is never larger than the largest that went in.
"""

from functools import cache

import numpy as np


def block_size(columns: int, most: int | None) -> int:
    """The largest power of two, at most `most`, that divides a matrix's columns; 1, which rotates nothing, without `most`.

    >>> block_size(2304, 32), block_size(4304, 32), block_size(4304, None)
    (32, 16, 1)
    """
    return 1 if most is None else min(most, columns & -columns)


@cache
def hadamard(n: int) -> np.ndarray:
    """float32 [n, n] of ±1, symmetric, by Sylvester's construction; n is a power of two."""
    assert n > 0, "Bug: a rotation of nothing"
    assert n & (n - 1) == 0, f"Bug: {n} is no power of two"
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    h.setflags(write=False)
    return h


def input_rotation(n: int) -> np.ndarray:
    """float32 [n, n], symmetric, what each block of n inputs is multiplied by."""
    return hadamard(n) / np.float32(n)


def rotated_inputs(x: np.ndarray, n: int) -> np.ndarray:
    """[..., K] -> [..., K], each block of n numbers times `input_rotation(n)`, in x's type."""
    return _by_blocks(x, input_rotation(n))


def rotated_columns(w: np.ndarray, n: int) -> np.ndarray:
    """[N, K] -> [N, K], of a matrix whose inputs are rotated: rotated_inputs(x, n) @ rotated_columns(w, n).T is x @ w.T."""
    return _by_blocks(w, hadamard(n))


def unrotated_columns(w: np.ndarray, n: int) -> np.ndarray:
    """[N, K] -> [N, K], the inverse of `rotated_columns`."""
    return rotated_inputs(w, n)


def rotate_moment(moment: np.ndarray, n: int) -> None:
    """E[x xᵀ] [K, K] becomes that of the rotated inputs, in its own memory, for the largest are gigabytes."""
    if n == 1:
        return
    rotation = input_rotation(n).astype(moment.dtype)
    for start in range(0, len(moment), n):
        moment[start : start + n] = rotation @ rotated_inputs(moment[start : start + n], n)


def _by_blocks(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    n = len(rotation)
    return x if n == 1 else (x.reshape(*x.shape[:-1], -1, n) @ rotation.astype(x.dtype)).reshape(x.shape)
