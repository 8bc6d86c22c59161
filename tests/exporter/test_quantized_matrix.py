# SPDX-License-Identifier: Apache-2.0
"""A matrix in whole numbers is the same whether it is read at once or in row blocks, and its parts are written in order."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from in_memory import Observed, Tensors, dequantized

from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.quantized_matrix import QuantizedMatrix
from pgxport.exporter.recipe import Scheme
from pgxport.models import checkpoint

NAME, ROWS, COLUMNS = "layer.weight", 70, 72
GROUPED, WHOLE_ROWS = Scheme(bits=4, group_size=32), Scheme(bits=8, activations="dynamic")
KINDS = {
    "4 bits": (GROUPED, "blocks"),
    "8 bits": (Scheme(bits=8, group_size=16), "blocks"),
    "4 bits with zero points": (Scheme(bits=4, group_size=16, symmetric=False), "blocks"),
    "8 bits with zero points": (Scheme(bits=8, group_size=32, symmetric=False), "blocks"),
    "clipped": (Scheme(bits=4, group_size=32, method="clip"), "blocks"),
    "gptq": (Scheme(bits=4, group_size=32, method="gptq"), "blocks"),
    "gptq of rows": (Scheme(bits=8, method="gptq", activations="dynamic"), "columns"),
    "columns": (WHOLE_ROWS, "columns"),
    "rows": (WHOLE_ROWS, "rows"),
    "compensated": (Scheme(bits=4, group_size=32, compensate=True), "blocks"),
}


@pytest.fixture
def w() -> np.ndarray:
    return np.random.default_rng(0).normal(0.1, 1, (ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture
def x() -> np.ndarray:
    """Inputs that are correlated, of unlike strength, and not zero in the mean."""
    random = np.random.default_rng(1)
    mixed = random.normal(size=(400, COLUMNS)) @ random.normal(size=(COLUMNS, COLUMNS)) / 8
    return (mixed * np.linspace(0.2, 3, COLUMNS) + 0.5).astype(np.float32)


def matrix(w: np.ndarray, scheme: Scheme, layout: str, **options) -> tuple[QuantizedMatrix, Tensors]:
    source = Tensors({NAME: w})
    return QuantizedMatrix(NAME, source, scheme, layout, **options), source


def written(c: QuantizedMatrix) -> dict[str, np.ndarray]:
    """The parts as they would be read back from their bytes."""
    return {p.name: np.frombuffer(b"".join(p.bytes()), p.dtype).reshape(p.shape) for p in c.lazy_tensors}


@pytest.mark.parametrize(("scheme", "layout"), KINDS.values(), ids=KINDS)
def test_blocks_of_rows_equal_the_whole(monkeypatch, w, x, scheme, layout):
    made = []
    for rows in (ROWS, 1, 16, 33):
        # GPTQ takes sixteen times as many rows at once.
        monkeypatch.setattr(
            checkpoint, "BLOCK_BYTES", rows * COLUMNS * 4 // (16 if scheme.method == "gptq" and rows < ROWS else 1)
        )
        c, source = matrix(w, scheme, layout, gain=0.7, statistics=Observed(x))
        parts = written(c)
        made.append((parts, c.sqnr, c.compensation))
        if scheme.method != "gptq":
            assert len(source.read) == math.ceil(ROWS / rows)
        assert [start for _, start, _ in source.read] == [0, *(stop for *_, stop in source.read[:-1])]
    for parts, sqnr, compensation in made[1:]:
        assert parts.keys() == made[0][0].keys()
        for name, array in parts.items():
            assert np.array_equal(array, made[0][0][name]), name
        assert sqnr == pytest.approx(made[0][1], abs=1e-4)
        if compensation is not None:
            assert compensation == pytest.approx(made[0][2], abs=1e-5)


@pytest.mark.parametrize(("scheme", "layout"), KINDS.values(), ids=KINDS)
def test_what_is_read_back_is_what_the_bytes_say_without_the_gain(w, x, scheme, layout):
    c, _ = matrix(w, scheme, layout, gain=0.25, statistics=Observed(x))
    parts = written(c)
    by_hand = dequantized(scheme, layout, w.shape, NAME, parts)
    for start, stop in ((0, ROWS), (3, 4), (17, 50)):
        assert c.dequantized(parts, start, stop) == pytest.approx(by_hand[start:stop] / 0.25, rel=1e-6, abs=0)
    if scheme.method != "gptq":  # which moves single weights far
        assert np.abs(by_hand / 0.25 - w).max() < (0.6 if scheme.bits == 4 else 0.03)


@pytest.mark.parametrize(("scheme", "layout"), KINDS.values(), ids=KINDS)
def test_a_gain_goes_into_the_scales_alone(w, x, scheme, layout):
    plain, gained = (written(matrix(w, scheme, layout, gain=gain, statistics=Observed(x))[0]) for gain in (1.0, 0.125))
    for name, array in plain.items():
        assert np.array_equal(gained[name], array / 8 if name.endswith(".scales") else array), name


@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_columns_are_the_rows_turned_over(w, layout):
    c, _ = matrix(w, WHOLE_ROWS, layout)
    parts = written(c)
    assert (c.quantized.shape, c.quantized.dtype) == ((COLUMNS, ROWS) if layout == "columns" else (ROWS, COLUMNS), np.int8)
    assert c.zero_points is None
    quantized = parts[f"{NAME}.codes"].T if layout == "columns" else parts[f"{NAME}.codes"]
    # Each row by itself: the largest of it at 127, or one step beyond.
    assert (np.abs(quantized.astype(int)).max(1) >= 127).all()
    assert quantized.min() >= -127
    steps = w / parts[f"{NAME}.scales"][:, None]
    assert np.abs(np.clip(steps, -127, 127) - quantized).max() <= 0.5001


def test_scales_may_be_float16_and_bfloat16_weights_are_their_float32(w):
    half = w.astype(ml_dtypes.bfloat16)
    exact, narrow = matrix(half.astype(np.float32), GROUPED, "blocks")[0], matrix(half, GROUPED, "blocks", dtype=np.float16)[0]
    exact_parts, parts = written(exact), written(narrow)
    assert parts[f"{NAME}.scales"].dtype == np.float16
    assert np.array_equal(parts[f"{NAME}.scales"], exact_parts[f"{NAME}.scales"].astype(np.float16))
    assert np.array_equal(parts[f"{NAME}.codes"], exact_parts[f"{NAME}.codes"])


@pytest.mark.parametrize("gain", [1.0, -0.5])
@pytest.mark.parametrize(("scheme", "layout"), [(GROUPED, "blocks"), (WHOLE_ROWS, "columns")], ids=["blocks", "columns"])
def test_compensation_restores_the_mean_output(w, x, scheme, layout, gain):
    c, _ = matrix(w, replace(scheme, compensate=True), layout, gain=gain, statistics=Observed(x))
    stored = dequantized(scheme, layout, w.shape, NAME, written(c))
    mean = x.mean(0, dtype=np.float64)
    wanted, got = w @ mean * gain, stored @ mean
    assert np.abs(got - wanted).max() > 1e-3
    assert got + c.compensation == pytest.approx(wanted, abs=2e-6)


def test_without_being_asked_nothing_is_compensated(w, x):
    c, _ = matrix(w, GROUPED, "blocks", statistics=Observed(x))
    written(c)
    assert c.compensation is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("scheme", "layout"), [KINDS["4 bits"], KINDS["columns"], KINDS["gptq"]], ids=["4 bits", "columns", "gptq"]
)
def test_a_number_that_is_not_finite_is_named_with_its_place(monkeypatch, w, x, value, scheme, layout):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 10 * COLUMNS * 4)
    w[43, 7] = value
    with pytest.raises(CheckpointError, match=rf"layer\.weight holds {value} at \[43, 7\]"):
        written(matrix(w, scheme, layout, statistics=Observed(x))[0])


def test_scales_are_not_written_before_their_codes(w):
    c, _ = matrix(w, GROUPED, "blocks")
    with pytest.raises(AssertionError, match=r"Bug: the values of layer\.weight were not written"):
        list(c.scales.bytes())
    assert [p.name for p in c.lazy_tensors] == [f"{NAME}.codes", f"{NAME}.scales"]


def test_a_matrix_may_be_written_twice(w):
    c, _ = matrix(w, Scheme(bits=4, group_size=16, symmetric=False), "blocks")
    once, again = written(c), written(c)
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert list(once) == [f"{NAME}.codes", f"{NAME}.scales", f"{NAME}.zeros"]


def test_gptq_without_second_moments_says_what_to_do(w, x):
    for statistics in (None, Observed(x, moments=False)):
        with pytest.raises(UsageError, match=r"layer\.weight is to be rounded by gptq.*--moments.*clip"):
            written(matrix(w, KINDS["gptq"][0], "blocks", statistics=statistics)[0])


def test_gptq_loses_less_of_the_outputs_than_rounding(w, x):
    lost = {}
    for method in ("nearest", "gptq"):
        scheme = Scheme(bits=4, group_size=32, method=method)
        parts = written(matrix(w, scheme, "blocks", statistics=Observed(x))[0])
        lost[method] = float(((x @ (dequantized(scheme, "blocks", w.shape, NAME, parts) - w).T) ** 2).mean())
    assert lost["gptq"] < 0.5 * lost["nearest"]


@pytest.mark.parametrize("observed", [False, True])
def test_sqnr_is_signal_over_noise_weighted_by_the_inputs_where_they_are_known(w, x, observed):
    c, _ = matrix(w, GROUPED, "blocks", gain=3.0, statistics=Observed(x) if observed else None)
    error = dequantized(GROUPED, "blocks", w.shape, NAME, written(c)) / 3 - w
    weight = (x.astype(np.float64) ** 2).mean(0) if observed else np.ones(COLUMNS)
    expected = 10 * np.log10((w.astype(np.float64) ** 2 @ weight).sum() / (error.astype(np.float64) ** 2 @ weight).sum())
    assert c.sqnr == pytest.approx(expected, abs=1e-3)
    assert 15 < c.sqnr < 25  # four bits; 6 dB a bit
