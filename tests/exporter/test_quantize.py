# SPDX-License-Identifier: Apache-2.0
"""Rounding against exhaustive search and a dense OBQ; packing against what ONNX Runtime's MatMulNBits makes of it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pgxport.errors import NumericError
from pgxport.exporter import quantize
from pgxport.exporter.packing import pack, pack_zero_points, unpack, unpack_zero_points
from pgxport.exporter.quantize import (
    SHRINK,
    Gptq,
    Grid,
    Quantized,
    hessian_error,
    nearest,
    sqnr,
)

GRIDS = [Grid(bits, group, symmetric) for bits in (4, 8) for group in (16, 32, None) for symmetric in (True, False)]
# Two roundings on the same scale may differ where a weight lies between two codes; float32 decides such a tie either way.
FLOAT32 = 1e-5


def correlated(columns: int, *, seed: int = 0, samples: int = 2048) -> np.ndarray:
    """E[x xᵀ] of inputs that have a quarter as many causes as channels, some channels ten times as strong as others."""
    random = np.random.default_rng(seed)
    causes = random.normal(size=(samples, columns // 4)) @ random.normal(size=(columns // 4, columns))
    x = (causes + 0.3 * random.normal(size=causes.shape)) * np.exp(random.normal(size=columns))
    return (x.T @ x / samples).astype(np.float32)


def weights(rows: int, columns: int, *, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(rows, columns)).astype(np.float32) * np.float32(0.02)


def lost(q: Quantized, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Squared error [N, G]"""
    squares = (q.dequantized().astype(np.float64) - w) ** 2 * (1 if importance is None else importance)
    group = q.grid.group_size or w.shape[1]
    return np.add.reduceat(squares, range(0, w.shape[1], group), axis=1)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(4, 128, False), Grid(4, 256, True)])
@pytest.mark.parametrize("columns", [512, 300, 7])
def test_each_group_has_a_scale_that_loses_least_in_float32(grid: Grid, columns: int):
    """Losses are added in the order in which numpy adds a row: which of two is less may hang on the last digit."""
    w, importance = weights(64, columns), np.random.default_rng(2).random(columns, np.float32)
    w[::3] = np.round(w[::3] * 50) / np.float32(64)  # few different values: many losses that are nearly equal
    q = nearest(w, grid, clip=True, importance=importance)
    group = grid.group_size or columns
    short = -columns % group
    padded, weight = (np.pad(x, ((0, 0), (0, short))).reshape(len(x), -1, group) for x in (w, importance[None]))
    tried = [nearest(w, grid, clip=True, shrink=SHRINK[:1] * f, importance=importance) for f in SHRINK]
    losses = []
    for t in tried:
        loss = np.pad(t.dequantized(), ((0, 0), (0, short))).reshape(padded.shape) - padded
        losses.append((loss * loss * weight).sum(-1))
    best = np.min(losses, 0)
    chosen = np.pad(q.dequantized(), ((0, 0), (0, short))).reshape(padded.shape) - padded
    assert ((chosen * chosen * weight).sum(-1) <= best).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("columns", [32, 56, 7])
def test_nearest_stays_on_the_grid_and_within_half_a_step(grid, columns):
    w = weights(9, columns)
    q = nearest(w, grid)
    groups = -(-columns // (grid.group_size or columns))
    assert (q.values.shape, q.scales.shape, q.zero_points.shape) == (w.shape, (9, groups), (9, groups))
    assert (q.values.dtype, q.scales.dtype, q.zero_points.dtype) == (np.uint8, np.float32, np.uint8)
    assert q.values.max() < 2**grid.bits
    assert (q.scales > 0).all()
    if grid.symmetric:
        assert (q.zero_points == 2 ** (grid.bits - 1)).all()
    if grid == Grid(8, grid.group_size):
        assert q.values.min() >= 1  # -127, not -128
    steps = np.repeat(q.scales, grid.group_size or columns, 1)[:, :columns]
    # Half a step, and a whole one where the only code beyond the largest value is left out of a symmetric grid of 4 bits, or
    # where the zero point was rounded.
    allowed = 0.5 if grid.symmetric and grid.bits == 8 else 1.0
    assert (np.abs(q.dequantized() - w) <= allowed * steps * (1 + FLOAT32)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_what_lies_on_the_grid_is_kept_exactly(grid):
    random = np.random.default_rng(2)
    values = random.integers(-7, 8, (5, 64))
    values[:, ::16], values[:, 1::16] = -7, 7
    if not grid.symmetric:
        values = (values + 7) * 15 // 14 - 5
    step = (2.0 ** -random.integers(3, 9, (5, 1))).astype(np.float32)
    if grid.bits == 8:
        values, step = values * 127 // 7 if grid.symmetric else values * 17, step / 64
    assert np.array_equal(nearest((values * step).astype(np.float32), grid).dequantized(), values * step)


def test_a_bfloat16_or_float64_block_is_rounded_as_its_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w = weights(3, 64).astype(ml_dtypes.bfloat16)
    expected = nearest(w.astype(np.float32), Grid(4, 32)).dequantized()
    assert np.array_equal(nearest(w, Grid(4, 32)).dequantized(), expected)
    assert np.array_equal(nearest(w.astype(np.float64), Grid(4, 32)).dequantized(), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, -3e38])
def test_groups_of_zeros_and_of_extreme_numbers_have_finite_scales(grid, value):
    w = np.full((2, 48), value, np.float32)
    with np.errstate(over="ignore"):  # of squared errors
        q = nearest(w, grid, clip=True, importance=np.ones(48, np.float32))
        assert np.isfinite(q.scales).all()
        assert (q.scales > 0).all()
    # float32 has too few digits left for the steps of 1e-42.
    assert np.abs(q.dequantized() - w).max() <= 0.51 * abs(value) if abs(value) > 1 else not q.dequantized().any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    w = weights(2, 32)
    w[1, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        nearest(w, Grid(4, 32))
    with pytest.raises(ValueError, match="not finite"):
        Gptq(np.eye(32, dtype=np.float32), Grid(4, 32)).quantize(w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_finds_what_an_exhaustive_search_of_its_scales_finds(symmetric):
    """Two weights, every pair of codes, every scale and zero point that the search may try."""
    random = np.random.default_rng(3)
    for w in random.normal(size=(25, 1, 2)).astype(np.float32):
        low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
        if symmetric:
            largest = max(-low, high)
            scales = {max(-low / 8, high / 7) * float(f) for f in SHRINK} | {largest / 8, largest / 7}
            grids = [(scale, 8) for scale in scales]
        else:
            steps = [(high - low) / 15 * float(f) for f in SHRINK]
            grids = [(step, round(-low * float(f) / step)) for step, f in zip(steps, SHRINK, strict=True)]
        values = list(itertools.product(range(16), repeat=2))
        best = min((((np.array(pair) - zero) * scale - w) ** 2).sum() for scale, zero in grids for pair in values)
        got = lost(nearest(w, Grid(4, None, symmetric), clip=True), w).sum()
        assert got == pytest.approx(best, rel=1e-3, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    w=arrays(np.float32, (3, 40), elements=st.floats(-100, 100, width=32)),
    importance=arrays(np.float32, 40, elements=st.floats(0, 64, width=32)),
    grid=st.sampled_from(GRIDS),
)
def test_clipping_never_loses_more_than_not_clipping(w, importance, grid):
    for weight in (None, importance):
        clipped, plain = (lost(nearest(w, grid, clip=c, importance=weight), w, weight) for c in (True, False))
        # The choice is made in float32.
        assert (clipped <= plain * (1 + 1e-4) + 1e-9).all()


def test_importance_moves_the_error_to_the_columns_that_do_not_matter():
    w, importance = weights(64, 128), np.where(np.arange(128) % 8, 1, 1000).astype(np.float32)
    heard, deaf = (nearest(w, Grid(4, 32), clip=True, importance=i) for i in (importance, None))
    assert lost(heard, w, importance).sum() < 0.9 * lost(deaf, w, importance).sum()


def test_clipping_wins_on_heavy_tails():
    w = weights(64, 1024)
    for grid in (Grid(4, 128), Grid(4, 128, False)):
        assert lost(nearest(w, grid, clip=True), w).sum() < 0.95 * lost(nearest(w, grid), w).sum()


# GPTQ.


def obq(w: np.ndarray, moment: np.ndarray, start: Quantized, order: np.ndarray, damping: float) -> np.ndarray:
    """Dequantized rows by Optimal Brain Quantization in a given order (Frantar et al., 2022, equations 2 and 3), in float64.

    One column after another; the others are moved by the explicit inverse Hessian, from which the column is then eliminated.
    """
    w, h = w.astype(np.float64).copy(), moment.astype(np.float64)
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h)))
    group = start.grid.group_size or len(h)
    for j in order:
        scale, zero = start.scales[:, j // group].astype(np.float64), start.zero_points[:, j // group].astype(np.float64)
        code = np.clip(np.round(w[:, j] / scale) + zero, start.grid.lowest, start.grid.highest)
        rounded = (code - zero) * scale
        w -= np.outer((w[:, j] - rounded) / inverse[j, j], inverse[j])
        w[:, j] = rounded
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1  # it moves nothing any more
    return w


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, 32, False), Grid(8), Grid(4, None, False)])
@pytest.mark.parametrize("block", [128, 24])
def test_gptq_in_activation_order_is_obq_in_that_order(grid, block, monkeypatch):
    monkeypatch.setattr(quantize, "FACTOR_BLOCK", 20)  # blocks that do not divide the matrix
    w, moment = weights(16, 72), correlated(72)
    prepared = Gptq(moment, grid, block=block)
    start = nearest(w, grid, clip=True, importance=np.diagonal(moment))
    expected = obq(w, moment, start, np.argsort(-np.diagonal(moment), kind="stable"), 0.01)
    got = prepared._solve(w, start, clip=True).dequantized()
    # A near tie that float32 decides otherwise changes the rest of its row, and few rows have one.
    same = np.isclose(got, expected, atol=1e-6).all(1)
    assert same.mean() >= 0.85


def test_gptq_without_order_sets_a_groups_scale_when_its_turn_comes():
    """The first group is that of the weights as they are; each later one fits the weights that its predecessors left."""
    w, moment, grid = weights(16, 64), correlated(64), Grid(4, 16, False)
    got = Gptq(moment, grid, order=False)._solve(w, nearest(w, grid), clip=False)
    h = moment.astype(np.float64) + 0.01 * np.mean(np.diag(moment)) * np.eye(64)
    done = got.dequantized().astype(np.float64)
    for end in (0, 16, 32, 48):
        # What minimises the Hessian error, given the columns that are rounded.
        delta = done[:, :end] - w[:, :end]
        rest = w[:, end:] - np.linalg.solve(h[end:, end:], h[end:, :end] @ delta.T).T
        part = nearest(rest[:, :16], Grid(4, None, False))
        assert np.allclose(got.scales[:, end // 16], part.scales[:, 0], rtol=1e-3)
        assert (got.zero_points[:, end // 16] == part.zero_points[:, 0]).mean() > 0.9


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 32, False), Grid(8)])
def test_gptq_recovers_most_of_what_rounding_loses_on_correlated_inputs(grid, order):
    w, moment = weights(64, 256), correlated(256)
    plain, clipped = (
        hessian_error(q.dequantized() - w, moment).sum()
        for q in (nearest(w, grid), nearest(w, grid, clip=True, importance=np.diagonal(moment)))
    )
    error = hessian_error(Gptq(moment, grid, order=order).quantize(w).dequantized() - w, moment).sum()
    assert error < 0.5 * min(plain, clipped)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000), columns=st.integers(4, 70), grid=st.sampled_from(GRIDS), order=st.booleans(), clip=st.booleans(),
    samples=st.sampled_from([1, 5, 200]),
)  # fmt: skip
def test_no_row_of_gptq_is_worse_than_rounding_in_the_hessians_norm(seed, columns, grid, order, clip, samples):
    """Whatever the inputs were: fewer than channels, and some of them silent."""
    moment = correlated(columns, seed=seed, samples=samples)
    silent = np.arange(columns) % 7 == 3
    moment[silent], moment[:, silent] = 0, 0
    w = weights(8, columns, seed=seed)
    got = Gptq(moment, grid, order=order).quantize(w, clip=clip)
    live = np.where(silent, np.float32(0), w)  # a weight that multiplies zeros does not widen its group
    exact = moment.astype(np.float64)
    error = hessian_error(got.dequantized().astype(np.float64) - w, exact)
    for other in (nearest(live, grid), *([nearest(live, grid, clip=True, importance=np.diagonal(moment))] if clip else [])):
        rounding = hessian_error(other.dequantized().astype(np.float64) - w, exact)
        assert (error <= rounding * (1 + 1e-3) + 1e-7 * hessian_error(w, exact)).all()


def test_rows_do_not_depend_on_the_block_they_come_in():
    w, moment = weights(40, 96), correlated(96)
    prepared = Gptq(moment, Grid(4, 32))
    whole = prepared.quantize(w).dequantized()
    parts = np.concatenate([prepared.quantize(w[i : i + 13]).dequantized() for i in range(0, 40, 13)])
    # The library may add in another order, which may decide a tie.
    assert np.isclose(whole, parts, atol=1e-6).all(1).mean() >= 0.95


def test_a_dead_input_multiplies_zeros_as_in_the_papers_code():
    w, moment = weights(8, 64), correlated(64)
    moment[[5, 40]], moment[:, [5, 40]] = 0, 0
    w[:, 5] = 100.0  # would leave its group two codes
    q = Gptq(moment, Grid(4, 32)).quantize(w)
    assert not q.dequantized()[:, [5, 40]].any()
    assert q.scales.max() < 0.1


def test_the_second_moment_is_not_changed():
    moment = correlated(48)
    before = moment.copy()
    Gptq(moment, Grid(4, 16)).quantize(weights(4, 48))
    assert np.array_equal(moment, before)


def test_damping_is_raised_until_the_factor_exists_and_no_further_than_a_thousandfold():
    moment = correlated(48)
    # One direction has a negative square, as rounding of a long sum may leave it.
    direction = np.ones(48) / 48**0.5
    mean = float(np.diagonal(moment).mean())
    smallest = direction @ moment @ direction
    broken = (moment - (smallest + 0.5 * mean) * np.outer(direction, direction)).astype(np.float32)
    assert np.isfinite(Gptq(broken, Grid(4, 16)).quantize(weights(4, 48)).dequantized()).all()
    with pytest.raises(NumericError, match=r"not positive definite, though 10 times their mean"):
        Gptq((moment - 1e3 * mean * np.outer(direction, direction) + 25 * mean * np.eye(48)).astype(np.float32), Grid(4, 16))


def test_moments_that_are_not_finite_are_refused():
    moment = correlated(16)
    moment[3, 3] = np.inf
    with pytest.raises(NumericError, match="not finite"):
        Gptq(moment, Grid(4, 16))


def test_the_blocked_factor_is_the_cholesky_factor_of_the_reversed_matrix(monkeypatch):
    monkeypatch.setattr(quantize, "FACTOR_BLOCK", 20)
    h = correlated(72) + np.eye(72, dtype=np.float32)
    expected = np.linalg.cholesky(h[::-1, ::-1].astype(np.float64))[::-1, ::-1]
    quantize._factor(h)
    assert np.allclose(np.triu(h), expected, rtol=1e-4, atol=1e-4)


def test_the_hessian_error_is_the_mean_square_of_the_outputs_error():
    random = np.random.default_rng(4)
    x, delta = random.normal(size=(500, 24)), random.normal(size=(6, 24))
    assert np.allclose(hessian_error(delta, x.T @ x / 500), ((x @ delta.T) ** 2).mean(0))


# Packing.


@settings(deadline=None)
@given(
    values=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.integers(0, 15)),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([2, 16, 32]),
)
def test_unpacking_gives_back_what_was_packed(values, bits, group):
    values = values if bits == 4 else values * np.uint8(17)
    packed = pack(values, bits, group)
    assert packed.shape == (len(values), -(-values.shape[1] // group), group * bits // 8)
    assert np.array_equal(unpack(packed, bits, values.shape[1]), values)
    padding = unpack(packed, bits, packed.shape[1] * group)[:, values.shape[1] :]
    assert (padding == 2 ** (bits - 1)).all()
    zero_points = pack_zero_points(values, bits)
    assert zero_points.shape == (len(values), -(-values.shape[1] * bits // 8))
    assert np.array_equal(unpack_zero_points(zero_points, bits, values.shape[1]), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group", "columns"), [(16, 64), (16, 40), (32, 96), (32, 56), (64, 192), (64, 72), (128, 384), (128, 200), (32, 4304), (128, 4304)]
)  # fmt: skip
def test_onnxruntimes_product_is_that_of_the_dequantized_matrix(bits, symmetric, group, columns):
    """MatMulNBits with float32 activations; odd numbers of groups, and last groups that are cut short."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    q = nearest(weights(24, columns) + np.float32(0 if symmetric else 0.02), Grid(bits, group, symmetric), clip=True)
    x = np.random.default_rng(5).normal(size=(3, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ q.dequantized().astype(np.float64).T
    assert np.abs(matmul_nbits(x, q) - expected).max() < 1e-5 * np.abs(expected).max()


def test_onnxruntime_reads_the_codes_of_gptq():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    w, moment = weights(32, 96), correlated(96)
    q = Gptq(moment, Grid(4, 32, False)).quantize(w)
    x = np.random.default_rng(5).normal(size=(3, 96)).astype(np.float32)
    expected = x.astype(np.float64) @ q.dequantized().astype(np.float64).T
    assert np.abs(matmul_nbits(x, q) - expected).max() < 1e-5 * np.abs(expected).max()


def matmul_nbits(x: np.ndarray, q: Quantized) -> np.ndarray:
    """x times the transposed matrix, by ONNX Runtime's own operator."""
    import onnx
    import onnxruntime as ort

    grid, (rows, columns) = q.grid, q.values.shape
    assert grid.group_size is not None
    tensors = {"b": pack(q.values, grid.bits, grid.group_size), "scales": q.scales}
    if not grid.symmetric:
        tensors["zeros"] = pack_zero_points(q.zero_points, grid.bits)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=grid.bits, block_size=grid.group_size, accuracy_level=0,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), rows])],
        [onnx.numpy_helper.from_array(t, name) for name, t in tensors.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_decibels_of_no_noise_and_of_no_signal():
    assert sqnr(1.0, 0.0) == math.inf
    assert sqnr(0.0, 1.0) == -math.inf
    assert sqnr(1.0, 0.1) == pytest.approx(10.0)
