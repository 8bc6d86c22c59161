# SPDX-License-Identifier: Apache-2.0
"""Scaled and rotated checkpoints compute what the original does; the scales are those of the papers, and pay."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

from pgxport.errors import NumericError, UsageError
from pgxport.exporter.inputs.equivalent import Equivalent, EquivalentStatistics, equivalent, input_changes
from pgxport.exporter.inputs.scaling import SampledRows, ScalingSite, awq_scale, sites, smoothquant_scale
from pgxport.exporter.quantize import Grid, hessian_error, nearest
from pgxport.exporter.recipe import Scheme
from pgxport.models.eager import Eager
from pgxport.models.gemma import decoder_step
from pgxport.models.projector import projector
from pgxport.models.siglip import vision_encoder
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec, published, shrunk
from pgxport.models.weights import weight_shapes

VISION = VisionSpec(42, width=24, depth=2, heads=3, mlp=40)
SPECS = {
    # One value head for five query heads, and heads × head_dim is not the width.
    "paligemma": ModelSpec("paligemma", VISION, TextSpec(40, 2, 72, 5, 1, 16, vocab=50)),
    # Two value heads for three query heads each.
    "paligemma2": ModelSpec(
        "paligemma2", VISION,
        TextSpec(48, 3, 88, 6, 2, 16, vocab=50, post_norms=True, attn_softcap=50.0, logit_softcap=30.0, window=5, local_layers=(0, 2)),
    ),
}  # fmt: skip
FLOAT32 = 1e-5  # of the largest logit: some hundred roundings in another order
AWQ, SMOOTH = Scheme(bits=4, group_size=16, scaling="awq"), Scheme(bits=8, scaling="smoothquant", activations="dynamic")


class Arrays:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.tensors[name][start:stop]


class Observed:
    """Statistics of given inputs x [samples, K] of each linear."""

    def __init__(self, inputs: dict[str, np.ndarray], *, moments: bool = True):
        self.inputs, self.moments = inputs, moments

    def absmax(self, path: str) -> np.ndarray:
        return np.abs(self.inputs[path]).max(0)

    def mean(self, path: str) -> np.ndarray:
        return self.inputs[path].mean(0)

    def mean_abs(self, path: str) -> np.ndarray:
        return np.abs(self.inputs[path]).mean(0)

    def square(self, path: str) -> np.ndarray:
        return (self.inputs[path] ** 2).mean(0)

    def moment(self, path: str) -> np.ndarray | None:
        x = self.inputs[path]
        return x.T @ x / np.float32(len(x)) if self.moments else None

    def range(self, path: str, observer: str) -> tuple[float, float]:
        low, high = float(self.inputs[path].min()), float(self.inputs[path].max())
        return (low, high) if observer == "minmax" else (0.5 * low, 0.5 * high)

    def changed_range(self, path: str, observer: str) -> None:
        """Nobody observed the inputs as they are changed."""

    def cache(self, layer: int, part: str) -> np.ndarray:
        return np.arange(1, 33, dtype=np.float32).reshape(2, 16)

    def changed_values(self, layer: int) -> None:
        """Nor the values."""


def checkpoint(spec: ModelSpec, dtype: Any = np.float32) -> Arrays:
    """Random weights that keep activations near one; norms are not 1, and biases not 0."""
    random, tensors = np.random.default_rng(0), {}
    for name, shape in weight_shapes(spec).items():
        noise = random.normal(size=shape)
        if "norm" in name and name.endswith("weight"):
            noise = 0.3 * noise + ("vision_tower" in name)  # Gemma's norms multiply by 1 + weight
        elif len(shape) > 1:
            noise /= np.prod(shape[1:]) ** 0.5
        tensors[name] = noise.astype(dtype)
    return Arrays(tensors)


def logits(
    source: Any, spec: ModelSpec, inputs: dict[str, np.ndarray] | None = None, scheme_of: Any = None, less: tuple[str, ...] = ()
) -> np.ndarray:
    """Of an image and four tokens, by the model functions in numpy; what each linear reads goes into `inputs`.

    Where `scheme_of` is given, inputs are changed as a graph of these schemes does, but for the weights in `less`.
    """
    random = np.random.default_rng(1)
    values = {"pixel_values": random.uniform(-1, 1, (1, 3, 42, 42)).astype(np.float32)}
    tokens = random.normal(size=(1, 4, spec.text.width)).astype(np.float32)
    for model in (vision_encoder, projector, decoder_step):
        if model is decoder_step:
            values["inputs_embeds"] = np.concatenate([values["image_features"], tokens], 1) / np.float32(
                spec.text.residual_divisor
            )
        g = Listening(source, values, prefix=11)
        g.changes = {p: c for p, c in input_changes(spec, scheme_of).items() if p not in less} if scheme_of else {}
        model(g, spec)
        values |= g.outputs
        if inputs is not None:
            inputs |= g.inputs
    return values["logits"][0, 0]


class Listening(Eager):
    """Keeps what each linear is given."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.inputs: dict[str, np.ndarray] = {}
        self.changes: dict[str, Any] = {}

    def linear(self, x: np.ndarray, name: str, *, bias: bool = False, gain: float = 1.0) -> np.ndarray:
        path = f"{self.path(name)}.weight"
        if path in self.changes:
            x = x / self.source.column_factors[path] if self.changes[path].divided else x
            x = dense(x.shape[-1], self.changes[path].block, 1 / self.changes[path].block, x)
        self.inputs[path] = x.reshape(-1, x.shape[-1])
        return super().linear(x, name, bias=bias, gain=gain)

    def _product(self, x: np.ndarray, path: str, gain: float) -> np.ndarray:
        block = self.source.blocks.get(path, 1) if isinstance(self.source, Equivalent) else 1
        w = self.source.rows(path, 0, self.source.shape(path)[0])
        return x @ dense(w.shape[1], block, 1.0, w * np.float32(gain)).T


def dense(columns: int, block: int, factor: float, x: np.ndarray) -> np.ndarray:
    """x [..., columns] times the whole block-diagonal matrix, by scipy's Hadamard matrix."""
    from scipy.linalg import block_diag, hadamard

    whole = block_diag(*[hadamard(block) * factor] * (columns // block)).astype(np.float32)
    return x if block == 1 else x @ whole


def served(spec: ModelSpec) -> set[str]:
    return {linear for site in sites(spec) for linear in site.linears}


def asking(spec: ModelSpec, scheme: Scheme):
    """`scheme` for all that can be rescaled, floats for the rest."""
    names = served(spec)
    return lambda name: scheme if name in names else Scheme()


@pytest.fixture(scope="module", params=SPECS)
def model(request):
    spec = SPECS[request.param]
    source, inputs = checkpoint(spec), {}
    expected = logits(source, spec, inputs)
    return spec, source, expected, inputs


def random_scales(spec: ModelSpec, source: Arrays) -> Equivalent:
    random, rows, columns, less_one = np.random.default_rng(2), {}, {}, set()
    for site in sites(spec):
        free = np.exp(random.normal(size=len(site.rows(np.ones(source.shape(site.linears[0])[1]))))).astype(np.float32)
        shared = np.repeat(free.reshape(-1, 1, site.head), site.share, 1).reshape(-1)
        rows |= dict.fromkeys(site.before, 1 / free)
        columns |= dict.fromkeys(site.linears, shared)
        less_one |= set(site.before) if site.less_one else set()
    return Equivalent(source, rows, columns, less_one)


def test_every_linear_is_at_one_site_and_nothing_is_divided_twice():
    for spec in (*SPECS.values(), published("paligemma2", "3b", 224), published("paligemma", "3b", 224)):
        found = sites(spec)
        linears = [linear for site in found for linear in site.linears]
        matrices = {n for n, s in weight_shapes(spec).items() if len(s) == 2 and "embed" not in n}
        assert sorted(linears) == sorted(matrices)
        divided = [name for site in found for name in site.before]
        assert len(set(divided)) == len(divided)
        assert set(divided) <= weight_shapes(spec).keys()
        left = {linear for site in found if not site.before for linear in site.linears}
        assert left == {n for n in matrices if n.endswith("fc2.weight") or "projector" in n}


def test_random_scales_at_every_site_leave_the_logits_as_they_are(model):
    spec, source, expected, _ = model
    got = logits(random_scales(spec, source), spec, scheme_of=asking(spec, SMOOTH))
    assert np.abs(got - expected).max() < FLOAT32 * np.abs(expected).max()


def test_a_divided_residual_stream_can_be_rescaled_too(model):
    spec, source, _, _ = model
    spec = shrunk(spec, 64.0)
    expected = logits(source, spec)
    assert (
        np.abs(logits(random_scales(spec, source), spec, scheme_of=asking(spec, SMOOTH)) - expected).max()
        < FLOAT32 * np.abs(expected).max()
    )


def test_each_site_matters_and_each_half_of_a_site_alone_changes_the_logits(model):
    """Or the test above would pass where nothing is read."""
    spec, source, expected, _ = model
    whole = random_scales(spec, source)
    for site in sites(spec):
        rows = {name: whole.row_factors[name] for name in site.before}
        columns = {name: whole.column_factors[name] for name in site.linears}
        less_one = site.before if site.less_one else ()
        if not site.before:
            continue
        both = logits(Equivalent(source, rows, columns, less_one), spec)
        assert np.abs(both - expected).max() < FLOAT32 * np.abs(expected).max(), site
        for half in (Equivalent(source, rows, {}, less_one), Equivalent(source, {}, columns)):
            assert np.abs(logits(half, spec) - expected).max() > 10 * FLOAT32 * np.abs(expected).max(), site


def test_what_is_multiplied_becomes_float32_and_the_rest_stays_as_stored():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = SPECS["paligemma2"]
    source = checkpoint(spec, ml_dtypes.bfloat16)
    folded = random_scales(spec, source)
    for name, shape in weight_shapes(spec).items():
        block = folded.rows(name, 1, 3)
        assert block.shape == (min(2, shape[0] - 1), *shape[1:])
        assert block.dtype == folded.dtype(name)
        assert folded.shape(name) == shape
        touched = name in folded.row_factors or name in folded.column_factors
        assert folded.dtype(name) == (np.float32 if touched else ml_dtypes.bfloat16)
        if not touched:
            assert np.array_equal(block, source.rows(name, 1, 3))


@pytest.mark.parametrize("scheme", [AWQ, SMOOTH, replace(AWQ, symmetric=False, method="gptq")])
@pytest.mark.parametrize("moments", [True, False])
def test_a_rescaled_checkpoint_computes_the_same(model, scheme, moments):
    spec, source, expected, inputs = model
    folded = equivalent(source, spec, asking(spec, scheme), Observed(inputs, moments=moments))
    assert isinstance(folded, Equivalent)
    assert folded.column_factors.keys() == served(spec)
    assert any(np.ptp(scale) > 0.1 for scale in folded.column_factors.values())
    scheme_of = asking(spec, scheme)
    assert np.abs(logits(folded, spec, scheme_of=scheme_of) - expected).max() < FLOAT32 * np.abs(expected).max()
    for path in input_changes(spec, scheme_of):
        wrong = logits(folded, spec, scheme_of=scheme_of, less=(path,))
        assert np.abs(wrong - expected).max() > 10 * FLOAT32 * np.abs(expected).max(), path


ROTATED = [
    Scheme(bits=8, rotate=16),
    Scheme(bits=4, group_size=16, rotate=8),
    Scheme(bits=4, group_size=16, scaling="smoothquant", alpha=0.7, rotate=32),
    Scheme(bits=4, group_size=16, scaling="awq", rotate=4),
]


@pytest.mark.parametrize("scheme", ROTATED, ids=lambda s: f"{s.scaling}-{s.rotate}")
def test_a_scaled_and_rotated_checkpoint_computes_the_same(model, scheme):
    spec, source, expected, inputs = model
    scheme_of = asking(spec, scheme)
    changed = equivalent(source, spec, scheme_of, Observed(inputs))
    assert isinstance(changed, Equivalent)
    assert changed.blocks.keys() == served(spec)
    assert {changed.blocks[path] for path in served(spec)} <= {4, 8, 16, 32}
    seen: dict[str, np.ndarray] = {}
    assert np.abs(logits(changed, spec, seen, scheme_of) - expected).max() < FLOAT32 * np.abs(expected).max()
    for path, x in inputs.items():
        got = changed.changed_input(path, x)
        assert np.allclose(seen[path], got, rtol=1e-3, atol=2e-5 * np.abs(got).max()), path


@pytest.mark.parametrize("scheme", ROTATED[:2], ids=lambda s: f"{s.rotate}")
def test_a_rotation_dropped_on_one_side_changes_the_logits(model, scheme):
    spec, source, expected, _ = model
    scheme_of = asking(spec, scheme)
    changed = equivalent(source, spec, scheme_of)
    assert isinstance(changed, Equivalent)
    limit = 10 * FLOAT32 * np.abs(expected).max()
    changes = input_changes(spec, scheme_of)
    for path in changes:
        assert np.abs(logits(changed, spec, scheme_of=scheme_of, less=(path,)) - expected).max() > limit, path
    values = {name: n for name, n in changed.row_blocks.items() if name.endswith("v_proj.weight")}
    assert values.keys() == {p.replace("o_proj", "v_proj").replace("out_proj", "v_proj") for p in served(spec) - changes.keys()}
    for name in changed.row_blocks:
        rest = {other: n for other, n in changed.row_blocks.items() if other != name}
        wrong = Equivalent(source, {}, {}, row_blocks=rest, blocks=changed.blocks)
        assert np.abs(logits(wrong, spec, scheme_of=scheme_of) - expected).max() > limit, name


def test_the_rotation_before_the_output_of_attention_is_that_of_the_values_where_blocks_divide_a_head():
    spec = published("paligemma2", "3b", 448)  # heads of 256 channels, and of 72
    changes = input_changes(spec, asking(spec, Scheme(bits=8, rotate=32)))
    assert not any(path.endswith("o_proj.weight") for path in changes)
    assert {changes[p].block for p in changes if "out_proj" in p} == {32}
    assert {changes[p].block for p in changes if "fc2" in p} == {16}
    changes = input_changes(spec, asking(spec, Scheme(bits=8, rotate=8)))
    assert not any(path.endswith("out_proj.weight") for path in changes)


def test_rows_of_rotated_values_are_the_same_in_any_blocks(model):
    spec, source, _, _ = model
    changed = equivalent(source, spec, asking(spec, Scheme(bits=8, rotate=16)))
    name = "language_model.model.layers.0.self_attn.v_proj.weight"
    whole = changed.rows(name, 0, source.shape(name)[0])
    expected = dense(len(whole), 16, 1 / 16, np.ascontiguousarray(source.tensors[name].T)).T
    assert np.allclose(whole, expected, atol=1e-6)
    for start, stop in ((0, 1), (3, 9), (15, 16)):
        assert np.allclose(changed.rows(name, start, stop), whole[start:stop], atol=1e-6)


def test_where_nothing_asks_the_source_itself_comes_back_and_statistics_are_not_read():
    spec = SPECS["paligemma"]
    source = checkpoint(spec)
    assert equivalent(source, spec, lambda name: Scheme(bits=4, group_size=32), Observed({})) is source


def test_statistics_of_the_rescaled_checkpoint_are_what_its_linears_are_given(model):
    spec, source, _, inputs = model
    folded = random_scales(spec, source)
    ours, after = EquivalentStatistics(Observed(inputs), folded), {}
    logits(folded, spec, after, asking(spec, SMOOTH))
    measured = Observed(after)
    for path in inputs:
        for kind in ("mean", "square", "moment"):
            got, expected = getattr(ours, kind)(path), getattr(measured, kind)(path)
            assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()), (kind, path)
        low, high = ours.range(path, "minmax")
        assert max(-low, high) == pytest.approx(float(measured.absmax(path).max()), rel=1e-3)
        assert ours.range(path, "mse") == pytest.approx((0.5 * low, 0.5 * high))


def test_statistics_of_rotated_inputs_are_what_linears_are_given(model):
    spec, source, _, inputs = model
    scheme_of = asking(spec, ROTATED[2])
    changed, after = equivalent(source, spec, scheme_of, Observed(inputs)), {}
    assert isinstance(changed, Equivalent)
    logits(changed, spec, after, scheme_of)
    ours, blind, measured = EquivalentStatistics(Observed(inputs), changed), Observed(inputs, moments=False), Observed(after)
    for path in inputs:
        for kind in ("mean", "square", "moment"):
            got, expected = getattr(ours, kind)(path), getattr(measured, kind)(path)
            assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()), (kind, path)
        # Without second moments a block's sum is right, and not what each channel has of it.
        block, square = changed.blocks[path], EquivalentStatistics(blind, changed).square(path)
        assert np.allclose(square.reshape(-1, block).sum(1), measured.square(path).reshape(-1, block).sum(1), rtol=1e-3)
        with pytest.raises(UsageError, match="rotated"):
            ours.range(path, "minmax")


def test_the_cache_of_values_is_rescaled_with_them_and_that_of_keys_is_not():
    spec = SPECS["paligemma2"]
    folded = random_scales(spec, checkpoint(spec))
    before, after = Observed({}), EquivalentStatistics(Observed({}), folded)
    assert np.array_equal(after.cache(1, "key"), before.cache(1, "key"))
    factor = folded.row_factors["language_model.model.layers.1.self_attn.v_proj.weight"]
    assert np.allclose(after.cache(1, "value"), before.cache(1, "value") * factor.reshape(2, 16))


def test_linears_of_one_input_that_ask_for_different_scalings_are_named(model):
    spec, source, _, inputs = model

    def scheme_of(name: str) -> Scheme:
        return asking(spec, replace(AWQ, scaling="none") if "up_proj" in name else AWQ)(name)

    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate_proj.*'awq'.*layers\.0\.mlp\.up_proj.*'none'"):
        equivalent(source, spec, scheme_of, Observed(inputs))


@pytest.mark.parametrize("scheme", [AWQ, Scheme(bits=8, rotate=32)])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "input_layernorm.weight", "patch_embedding.weight"])
def test_what_is_no_linear_of_a_layer_may_not_ask(name, scheme):
    spec = SPECS["paligemma"]
    asked = "scaling 'awq'" if scheme is AWQ else "rotate 32"
    with pytest.raises(UsageError, match=rf"{name} asks for {asked}"):
        equivalent(checkpoint(spec), spec, lambda weight: scheme if weight.endswith(name) else Scheme(), Observed({}))


def test_linears_of_one_input_with_different_exponents_are_named(model):
    spec, source, _, inputs = model
    other = replace(SMOOTH, alpha=0.7)
    with pytest.raises(UsageError, match=r"gate_proj.*'smoothquant' and .*up_proj.* 'smoothquant' with alpha 0.7"):
        equivalent(source, spec, lambda n: asking(spec, other if "up_proj" in n else SMOOTH)(n), Observed(inputs))


def test_statistics_that_are_not_finite_are_refused(model):
    spec, source, _, inputs = model
    broken = {path: np.full_like(x, np.inf) for path, x in inputs.items()}
    with pytest.raises(NumericError, match=r"layers\.0\.self_attn\.q_proj"):
        equivalent(source, spec, asking(spec, SMOOTH), Observed(broken))


# Scales.


def test_smoothquant_gives_inputs_and_weights_the_same_largest_values_at_one_half():
    """Equation 4 of the paper, α = 0.5: max|x / s| = max|w s| = √(max|x| max|w|)"""
    random = np.random.default_rng(3)
    x, w = np.exp(random.normal(size=(2, 64)))
    scale = smoothquant_scale(x, w)
    assert np.allclose(x / scale, w * scale)
    assert np.allclose(x / scale, np.sqrt(x * w))
    assert np.allclose(smoothquant_scale(x, w, 1.0), x)
    assert np.allclose(smoothquant_scale(x, w, 0.0), 1 / w)


def test_smoothquant_of_a_model_takes_the_largest_weight_of_all_linears_and_query_heads(model):
    spec, source, _, inputs = model
    observed = Observed(inputs)
    folded = equivalent(source, spec, asking(spec, SMOOTH), observed)
    assert isinstance(folded, Equivalent)
    layer = "language_model.model.layers.1.self_attn"
    path = f"{layer}.q_proj.weight"
    largest = np.abs(np.concatenate([source.tensors[f"{layer}.{p}_proj.weight"] for p in "qkv"])).max(0)
    assert np.allclose(folded.column_factors[path], np.sqrt(observed.absmax(path) / largest), rtol=1e-5)
    path, t = f"{layer}.o_proj.weight", spec.text
    heads = (t.kv_heads, t.heads // t.kv_heads, t.head_dim)
    x, w = (a.reshape(heads).max(1) for a in (observed.absmax(path), np.abs(source.tensors[path]).max(0)))
    assert np.allclose(1 / folded.row_factors[f"{layer}.v_proj.weight"], np.sqrt(x / w).reshape(-1), rtol=1e-5)


def loud(samples: int = 400, columns: int = 128) -> np.ndarray:
    """Inputs of which one channel in sixteen is thirty times as strong, as transformers' are."""
    x = np.random.default_rng(4).normal(size=(samples, columns)).astype(np.float32)
    x[:, ::16] *= 30
    return x


def cost(scale: np.ndarray, w: np.ndarray, x: np.ndarray, grid: Grid) -> float:
    """Mean square of the outputs' error, from the inputs themselves."""
    return float((((nearest(w * scale, grid).dequantized() / scale - w) @ x.T) ** 2).mean())


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 64, False)])
def test_awq_halves_the_error_of_outputs_where_few_inputs_are_strong(grid):
    x, w = loud(), np.random.default_rng(5).normal(size=(64, 128)).astype(np.float32)
    for moment in (x.T @ x / np.float32(len(x)), (x * x).mean(0)):
        scale = awq_scale(np.abs(x).mean(0), [SampledRows(w, grid)], moment)
        assert cost(scale, w, x, grid) < 0.5 * cost(np.ones_like(scale), w, x, grid)


def test_awq_takes_the_best_of_its_ratios():
    x, grid = loud(), Grid(4, 32)
    a, b = np.random.default_rng(6).normal(size=(2, 32, 128)).astype(np.float32)
    mean_abs = np.abs(x).mean(0)

    def both(ratio: float) -> float:
        scale = mean_abs**ratio
        scale = scale / np.sqrt(scale.max() * scale.min())
        return cost(scale, a, x, grid) + 3 * cost(scale, b, x, grid)

    scale = awq_scale(mean_abs, [SampledRows(a, grid), SampledRows(b, grid, 3)], x.T @ x / np.float32(len(x)))
    assert cost(scale, a, x, grid) + 3 * cost(scale, b, x, grid) == pytest.approx(min(both(i / 20) for i in range(20)), rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_awq_is_never_worse_than_no_scaling_on_what_it_measured(seed):
    random = np.random.default_rng(seed)
    x = (random.normal(size=(200, 64)) * np.exp(2 * random.normal(size=64))).astype(np.float32)
    w, moment = random.standard_t(4, size=(16, 64)).astype(np.float32), x.T @ x / np.float32(200)
    scale = awq_scale(np.abs(x).mean(0), [SampledRows(w, Grid(4, 16))], moment)
    plain, scaled = (hessian_error(nearest(w * s, Grid(4, 16)).dequantized() / s - w, moment).sum() for s in (1, scale))
    assert scaled <= plain * (1 + 1e-6)


def test_channels_that_calibration_did_not_see_are_not_scaled_away():
    silent = np.arange(32) % 5 == 0
    x = np.where(silent, 0, np.random.default_rng(7).normal(size=(100, 32))).astype(np.float32)
    w = np.random.default_rng(8).normal(size=(16, 32)).astype(np.float32)
    moment = x.T @ x / np.float32(100)
    for scale in (
        smoothquant_scale(np.abs(x).max(0), np.abs(w).max(0)),
        awq_scale(np.abs(x).mean(0), [SampledRows(w, Grid(4, 16))], moment),
        awq_scale(np.zeros(32), [SampledRows(w, Grid(4, 16))], np.zeros(32)),
    ):
        assert np.isfinite(scale).all()
        assert scale.min() > 1e-4 * scale.max() * 0.99
    assert (smoothquant_scale(np.abs(x).max(0), np.abs(w).max(0))[silent] == 1).all()


def test_columns_of_query_heads_that_share_a_value_head_are_combined():
    site = ScalingSite(("v",), ("o",), share=3, head=2)
    x = np.arange(12.0)  # two value heads, three query heads each, two channels
    shared = site.shared(x, np.max)
    assert shared.tolist() == [4, 5] * 3 + [10, 11] * 3
    assert site.rows(shared).tolist() == [4, 5, 10, 11]
