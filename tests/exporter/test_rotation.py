# SPDX-License-Identifier: Apache-2.0
"""Rotations in blocks are scipy's Hadamard matrices, exact in float16, and leave products as they are."""

import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.linalg import hadamard as scipys

from pgxport.exporter.inputs.rotation import (
    block_size,
    hadamard,
    rotate_moment,
    rotated_columns,
    rotated_inputs,
    unrotated_columns,
)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_scipys(n):
    assert np.array_equal(hadamard(n), scipys(n))


@pytest.mark.parametrize("n", SIZES)
def test_products_stay_as_they_are_and_float16_holds_the_factors(n):
    random = np.random.default_rng(n)
    x, w = random.normal(size=(3, 5, 384)).astype(np.float32), random.normal(size=(7, 384)).astype(np.float32)
    turn = block_diag(*[scipys(n) / n] * (384 // n))
    assert np.array_equal(turn, turn.astype(np.float16))
    assert np.allclose(rotated_inputs(x, n), x @ turn, atol=1e-6)
    y = rotated_inputs(x, n) @ rotated_columns(w, n).T
    assert np.allclose(y, x @ w.T, atol=1e-6 * np.abs(x).max() * np.abs(w).sum(1).max())
    assert np.allclose(unrotated_columns(rotated_columns(w, n), n), w, atol=1e-6)
    assert np.abs(rotated_inputs(x, n)).max() <= np.abs(x).max() * (1 + 1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_a_moment_becomes_that_of_rotated_inputs(n):
    x = np.random.default_rng(n).normal(size=(50, 128)).astype(np.float32)
    moment = x.T @ x
    rotate_moment(moment, n)
    turned = rotated_inputs(x, n)
    assert np.allclose(moment, turned.T @ turned, atol=1e-3)


def test_an_outlier_is_spread_over_its_block_alone():
    x = np.zeros((1, 64), np.float32)
    x[0, 5] = 32
    assert np.abs(rotated_inputs(x, 32)).tolist() == [[1.0] * 32 + [0.0] * 32]


@pytest.mark.parametrize(
    ("columns", "most", "expected"), [(2304, 64, 64), (9216, 32, 32), (4304, 64, 16), (72, 32, 8), (5, 32, 1)]
)
def test_a_block_divides_the_columns(columns, most, expected):
    assert block_size(columns, most) == expected
    assert block_size(columns, None) == 1
