# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 (Micikevicius et al., 2022, arXiv 2209.05433): eight bits with an exponent, as Ada, Hopper and Blackwell multiply them."""

import numpy as np

from pgxport.exporter.stream import FLOAT8

LARGEST = np.float32(448)


def row_scales(w: np.ndarray) -> np.ndarray:
    """[N, K] -> float32 [N, 1], by which the largest number of each row becomes the largest of E4M3; 1 for a row of zeros."""
    scales = np.abs(w).max(-1, keepdims=True).astype(np.float32) / LARGEST
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def to_float8(x: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """x / scale in E4M3, to the nearest, ties to even; what lies beyond its range is cut off.

    >>> to_float8(np.array([1.0, 1.06, 1e9], np.float32), np.float32(1)).astype(np.float32)
    array([  1.,   1., 448.], dtype=float32)
    """
    return np.clip(x / scale, -LARGEST, LARGEST).astype(FLOAT8)
