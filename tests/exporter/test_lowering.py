# SPDX-License-Identifier: Apache-2.0
"""Every kernel of whole numbers multiplies by what its bytes say: ONNX Runtime against the dequantized product.

Kernels round activations too. Whole numbers up to 127, with 127 itself in every group, lose nothing by that, so that products
have to agree as floats do.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from in_memory import Observed, Tensors, dequantized, run

from pgxport.bundle.manifest import TokenTable
from pgxport.bundle.token_table import Embedding
from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.graphs import TABLE_FILE, stored, token_table
from pgxport.exporter.lower_onnxruntime import CANDIDATES, SHORTLIST_TABLE, uint8_grid
from pgxport.exporter.recipe import DECODER, SHORTLIST, Recipe, Rule, Scheme
from pgxport.exporter.stream import DataLayout
from pgxport.exporter.targets import TARGETS
from pgxport.machine.cpu import overflows_in_16_bits
from pgxport.models.spec import TextSpec, published
from pgxport.models.weights import EMBEDDING

# Of the largest product. Worst seen: 5e-7, some hundred additions in another order; and 4.4e-4, half of float16's last bit.
FLOAT32, FLOAT16 = 2e-6, 5e-4
NAME, ROWS = "layer.weight", 24
GAIN = 0.37
FLOATS = {"cpu": Scheme(), "cuda": Scheme("float16")}  # what a graph computes in
INTEGERS = [Scheme(bits=8, activations=a) for a in ("dynamic", "static")]
GROUPS = (16, 32, 64, 128, 256)


def whole_numbers(tokens: int, columns: int, group: int | None) -> np.ndarray:
    """Activations [tokens, columns] that int8 holds exactly, token by token and group by group."""
    x = np.random.default_rng(1).integers(-127, 128, (tokens, columns)).astype(np.float32)
    x[:, :: group or columns] = 127
    return x


def weights(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0.2, 1, (rows, columns)).astype(np.float32)  # off zero: some groups have one sign


def builder(scheme: Scheme, w: np.ndarray, target: str = "cpu", name: str = NAME) -> GraphBuilder:
    recipe = Recipe("test", (Rule(name, scheme), Rule("*", FLOATS[target])))
    # Static activations from -127 to 128 have steps of one.
    seen = Observed(np.tile(np.array([[-127], [128]], np.float32), w.shape[1]))
    return GraphBuilder("g", Tensors({name: w}), recipe, TARGETS[target], statistics=seen)


def apart(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def product(scheme: Scheme, w: np.ndarray, x: np.ndarray, target: str = "cpu", gain: float = GAIN):
    """What the engine makes of x times w times the gain, and what it should, of the stored numbers."""
    g = builder(scheme, w, target)
    y = g.linear(g.input("x", ["tokens", w.shape[1]]), "layer", gain=gain)
    g.output(y, "y", ["tokens", len(w)])
    outputs, parts = run(g, {"x": x})
    stored = dequantized(scheme, "blocks" if scheme.activations == "float" else "columns", w.shape, NAME, parts)
    return outputs["y"], x.astype(np.float64) @ stored.T, stored


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_grouped_products_equal_the_dequantized_product(bits, group, symmetric, target):
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for columns in (256, 72, 300, 24):  # whole groups, and groups that do not divide; shorter than a group
        for tokens in (1, 7):  # decode step and prefill have kernels of their own
            w = weights(ROWS, columns)
            got, expected, stored = product(scheme, w, whole_numbers(tokens, columns, group), target)
            assert apart(got, expected) < (FLOAT32 if target == "cpu" else FLOAT16), (columns, tokens)
            # And what was stored is the matrix times its gain, within half a step of a range that may be clipped by a step.
            assert apart(stored, w * np.float32(GAIN)) < (0.01 if bits == 8 else 0.14)


@pytest.mark.parametrize("scheme", INTEGERS, ids=lambda s: s.activations)
@pytest.mark.parametrize("columns", [256, 72, 33])
@pytest.mark.parametrize("gain", [1.0, GAIN])
def test_integer_products_equal_the_dequantized_product(scheme, columns, gain):
    for tokens in (1, 7):
        w = weights(ROWS, columns)
        got, expected, stored = product(scheme, w, whole_numbers(tokens, columns, None), gain=gain)
        assert apart(got, expected) < FLOAT32, tokens
        assert apart(stored, w * np.float32(gain)) < 0.01


LARGEST = np.where(np.arange(ROWS)[:, None] % 2, -1, 1) * np.ones((1, 512), np.float32)


@pytest.mark.parametrize("scheme", INTEGERS, ids=lambda s: s.activations)
def test_no_sum_of_integer_products_saturates(scheme):
    """All codes at their largest, where kernels that add pairs in 16 bits stop: 255 * 127 * 2 is beyond them."""
    got, expected, _ = product(scheme, LARGEST, np.full((3, 512), 127, np.float32))
    assert apart(got, expected) < FLOAT32


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scheme", INTEGERS, ids=lambda s: s.activations)
def test_the_setting_for_exact_products_is_needed_where_pgx_sets_it_and_only_there(scheme, exact, monkeypatch):
    monkeypatch.setattr("pgxport.runners.ort.overflows_in_16_bits", lambda: exact)
    got, expected, _ = product(scheme, LARGEST, np.full((3, 512), 127, np.float32))
    right = exact or not overflows_in_16_bits()
    assert (apart(got, expected) < FLOAT32) is right


def test_no_logit_of_integer_products_saturates():
    g = builder(INTEGERS[0], LARGEST, "cpu", EMBEDDING)
    g.output(g.lm_head(g.input("x", ["batch", 1, 512]), EMBEDDING), "logits", ["batch", 1, ROWS])
    outputs, parts = run(g, {"x": np.full((1, 1, 512), 127, np.float32)})
    stored = dequantized(INTEGERS[0], "rows", LARGEST.shape, EMBEDDING, parts)
    assert apart(outputs["logits"][0, 0], 127 * stored.sum(-1, dtype=np.float64)) < FLOAT32


def test_dynamic_activations_have_a_scale_for_each_token_and_a_token_of_zeros_is_zeros():
    x = whole_numbers(3, 64, None) * np.array([[1e-4], [1e4], [0]], np.float32)
    got, expected, _ = product(Scheme(bits=8, activations="dynamic"), weights(ROWS, 64), x)
    for one, other in zip(got[:2], expected[:2], strict=True):
        assert apart(one, other) < FLOAT32
    assert not got[2].any()


def test_static_activations_beyond_their_range_are_cut_off():
    x = np.full((1, 64), 1e6, np.float32)
    w = weights(ROWS, 64)
    got, expected, _ = product(Scheme(bits=8, activations="static"), w, x)
    assert apart(got, expected * np.float32(128 / 1e6)) < FLOAT32


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.5, 2.0), (-2.0, -0.5), (-1.0, 0.0), (0.0, 0.0), (-1e-20, 1e-20)])
def test_a_static_grid_has_zero_on_it_and_ends_within_half_a_step_of_its_range(low, high):
    scale, zero = uint8_grid(low, high)
    assert scale > 0
    ends = (np.array([0, 255]) - float(zero)) * float(scale)
    if low < high:
        assert ends == pytest.approx([min(low, 0), max(high, 0)], abs=0.51 * float(scale))


def test_products_that_read_one_input_round_it_once():
    w = {f"{part}.weight": weights(ROWS, 48) for part in "abc"}
    dynamic, static = INTEGERS
    recipe = Recipe("test", (Rule("c.weight", static), Rule("*.weight", dynamic), Rule("*", Scheme())))
    g = GraphBuilder("g", Tensors(w), recipe, TARGETS["cpu"], statistics=Observed(weights(2, 48)))
    x = g.input("x", ["tokens", 48])
    for part in "abc":
        g.output(g.linear(x, part), part, ["tokens", ROWS])
    assert sum(node.op_type == "QuantizeLinear" for node in g.graph) == 2


# The token table -----------------------------------------------------------------------------------------------------

TABLES = {
    "float32": Scheme(), "float16": Scheme("float16"), "rows of int8": INTEGERS[0], "rows of int8, static": INTEGERS[1],
    "int8 in 128": Scheme(bits=8, group_size=128), "int8 in 16": Scheme(bits=8, group_size=16), "int4 in 32": Scheme(bits=4, group_size=32),
    "int4 in 16, clipped": Scheme(bits=4, group_size=16, method="clip"), "int4 in 256": Scheme(bits=4, group_size=256),
}  # fmt: skip
VOCAB = 37


@pytest.mark.parametrize("columns", [64, 48, 33])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("scheme", TABLES.values(), ids=TABLES)
def test_rows_that_are_looked_up_are_those_that_the_output_multiplies_by(scheme, target, columns, tmp_path):
    """From the same bytes: numpy looks rows up, and ONNX Runtime multiplies the identity by all of them."""
    if scheme.activations != "float" and target == "cuda":
        pytest.skip("has no integer products")
    w = weights(VOCAB, columns)
    g = builder(scheme, w, target, EMBEDDING)
    g.output(g.lm_head(g.input("x", ["batch", 1, columns]), EMBEDDING), "logits", ["batch", 1, VOCAB])
    outputs, parts = run(g, {"x": 127 * np.eye(columns, dtype=np.float32)[:, None]})

    layout = DataLayout([p for name, p in g.lazy_tensors.items() if name.startswith(EMBEDDING)])
    (tmp_path / "table").write_bytes(b"".join(layout.bytes()))
    described = token_table({"decoder_step": g}, {TABLE_FILE: layout}, spec(columns))
    assert (tmp_path / "table").stat().st_size == described.nbytes
    rows = Embedding(tmp_path / "table", described).rows(range(VOCAB))
    assert apart(outputs["logits"][:, 0].T / 127, rows) < (FLOAT32 if target == "cpu" else FLOAT16)
    if scheme.bits:
        assert described.dtype == f"int{scheme.bits}"
        kind = "blocks" if scheme.activations == "float" else "rows"
        assert np.array_equal(rows, dequantized(scheme, kind, w.shape, EMBEDDING, parts))
        assert described.scales_dtype == ("float16" if target == "cuda" or scheme.bits == 4 else "float32")


def spec(columns: int):
    whole = published("paligemma2", "3b", 224)
    return replace(whole, text=replace(whole.text, vocab=VOCAB, width=columns))


def test_rows_come_in_any_order_and_again(tmp_path):
    table = TokenTable(file="t", dtype="int4", shape=(3, 20), scale=1, group=16, scales_offset=64, scales_dtype="float16")
    quantized, scales = np.arange(48, dtype=np.uint8), np.array([[1, 2], [0.5, 3], [4, 0.25]], np.float16)
    (tmp_path / "t").write_bytes(quantized.tobytes().ljust(64, b"\0") + scales.tobytes())
    halves = [
        [(b & 15) - 8 if i % 2 == 0 else (b >> 4) - 8 for b in range(16 * n, 16 * n + 16) for i in (0, 1)] for n in range(3)
    ]
    expected = np.array([[c * scales[n, k // 16] for k, c in enumerate(row[:20])] for n, row in enumerate(halves)])
    assert np.array_equal(Embedding(tmp_path / "t", table).rows([2, 0, 2, 1]), expected[[2, 0, 2, 1]])


def test_rows_of_bfloat16_are_those_of_ml_dtypes(tmp_path):
    w = weights(VOCAB, 33).astype(ml_dtypes.bfloat16)
    (tmp_path / "t").write_bytes(w.tobytes())
    table = TokenTable(file="t", dtype="bfloat16", shape=w.shape, scale=1)
    assert np.array_equal(Embedding(tmp_path / "t", table).rows(range(VOCAB)), w.astype(np.float32))


MANY = 300  # tokens, of which `CANDIDATES` are computed from the table


def two_pass(scheme: Scheme, w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a screened output matrix; and those of the dequantized table and of the dequantized copy."""
    g = builder(scheme, w, name=EMBEDDING)
    g.output(g.lm_head(g.input("x", ["batch", 1, w.shape[1]]), EMBEDDING), "logits", ["batch", 1, len(w)])
    outputs, parts = run(g, {"x": x[:, None]})
    kind = "blocks" if scheme.activations == "float" else "rows"
    table = dequantized(scheme, kind, w.shape, EMBEDDING, parts)
    return outputs["logits"][:, 0], *(x @ m.T for m in (table, dequantized(SHORTLIST, "blocks", w.shape, SHORTLIST_TABLE, parts)))


@pytest.mark.parametrize("columns", [256, 72, 300])
@pytest.mark.parametrize(
    "scheme", [*(Scheme(bits=8, group_size=g, shortlist=True) for g in (16, 128)), replace(INTEGERS[0], shortlist=True)]
)
def test_the_likeliest_tokens_have_the_tables_logits_and_the_others_the_shortlists(scheme, columns):
    x = whole_numbers(3, columns, 128)
    got, table, rough = two_pass(scheme, weights(MANY, columns), x)
    for logits, exact, shortlist in zip(got, table, rough, strict=True):
        likely = np.argsort(shortlist)[-CANDIDATES:]
        expected = shortlist.copy()
        expected[likely] = exact[likely]
        assert apart(logits, expected) < FLOAT32
    assert apart(rough, table) > 0.01  # four bits show


def test_a_screen_does_not_decide_between_the_likeliest_tokens():
    """The second token is likelier by less than four bits can tell; rounded, its copy is the same as the first's."""
    w = np.full((MANY, 128), -1, np.float32)
    w[:2] = weights(1, 128)
    w[1] += np.float32(0.02) * np.sign(w[1])
    got, table, rough = two_pass(Scheme(bits=8, group_size=128, shortlist=True), w, np.rint(127 * w[:1] / np.abs(w[0]).max()))
    assert table[0].argmax() == got[0].argmax() == 1
    assert np.ptp(rough[0, :2]) < np.ptp(table[0, :2])


def test_a_vocabulary_smaller_than_the_candidates_is_computed_whole():
    x = whole_numbers(1, 64, 128)
    got, table, _ = two_pass(Scheme(bits=8, group_size=32, shortlist=True), weights(VOCAB, 64), x)
    assert apart(got, table) < FLOAT32


def test_a_screen_leaves_the_table_as_it_is():
    """The same bytes are looked up, and counted once."""
    plain, other = (builder(Scheme(bits=8, group_size=32, shortlist=s), weights(MANY, 48), name=EMBEDDING) for s in (False, True))
    written = []
    for g in (plain, other):
        g.output(g.lm_head(g.input("x", ["batch", 1, 48]), EMBEDDING), "logits", ["batch", 1, MANY])
        table = [p for name, p in g.lazy_tensors.items() if name.startswith(EMBEDDING)]
        written.append((b"".join(DataLayout(table).bytes()), stored({"decoder_step": g}, {})))
    assert written[0] == written[1]
    assert written[1][1]["token_table"] == {"int8": MANY * 48}


# The cache -----------------------------------------------------------------------------------------------------------

TEXT = TextSpec(width=64, depth=1, mlp=64, heads=4, kv_heads=2, head_dim=16, vocab=VOCAB, query_scale=0.3, attn_softcap=5.0)
PREFIX, STEPS, CAPACITY = 6, 3, 12


def attention_by_hand(q, k, v, keep) -> np.ndarray:
    """[T, N*D]: rotation by complex numbers, head by head and token by token; `keep` is what the cache does with keys and values."""
    tokens, d = len(q), TEXT.head_dim
    # Half-split: number i turns with number i + D/2; positions count from one.
    turn = np.exp(1j * np.arange(1, tokens + 1)[:, None] * TEXT.rope_theta ** (-np.arange(0, d, 2) / d))

    def rotated(x):
        z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def heads(x, count):
        return x.astype(np.float64).reshape(tokens, count, d).swapaxes(0, 1)

    q, k, v = rotated(heads(q, TEXT.heads)), keep("key", rotated(heads(k, TEXT.kv_heads))), keep("value", heads(v, TEXT.kv_heads))
    out = np.zeros((tokens, TEXT.heads, d))
    for t in range(tokens):
        seen = max(PREFIX, t + 1)
        for n in range(TEXT.heads):
            group = n // (TEXT.heads // TEXT.kv_heads)
            scores = TEXT.attn_softcap * np.tanh(k[group, :seen] @ q[n, t] * TEXT.query_scale / TEXT.attn_softcap)
            chance = np.exp(scores - scores.max())
            out[t, n] = chance / chance.sum() @ v[group, :seen]
    return out.reshape(tokens, -1)


def attention_by_engine(q, k, v, cache: str | None, largest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same by a graph: the prefix at once, then token by token; and what the cache holds in the end."""
    recipe = Recipe("test", (Rule("*", Scheme()),), cache)
    seen = Observed(np.zeros((1, 1), np.float32), {(0, part): x for part, x in largest.items()})
    outs, past = [], {}
    for start, stop in [(0, PREFIX), *((t, t + 1) for t in range(PREFIX, PREFIX + STEPS))]:
        g = GraphBuilder("g", Tensors({}), recipe, TARGETS["cpu"], context_length=CAPACITY, statistics=seen)
        values = {name: g.input(name, ["batch", "tokens", x.shape[-1]]) for name, x in (("q", q), ("k", k), ("v", v))}
        g.output(g.cached_attention(*values.values(), layer=0, text=TEXT), "y", ["batch", "tokens", q.shape[-1]])
        kept = np.dtype(cache or "float32")
        assert g.cache_dtype == kept
        shape = (1, TEXT.kv_heads, CAPACITY, TEXT.head_dim)
        past = past or {f"past_key_values.0.{part}": np.zeros(shape, kept) for part in ("key", "value")}
        feeds = {name: x[None, start:stop] for name, x in (("q", q), ("k", k), ("v", v))}
        lengths = {"seqlens_k": np.array([stop - 1], np.int32), "total_sequence_length": np.array(stop, np.int32)}
        outputs, _ = run(g, feeds | lengths | past)
        outs.append(outputs.pop("y")[0])
        past = {name.replace("present", "past_key_values"): x for name, x in outputs.items()}
    return np.concatenate(outs), past


# Of the largest output. Worst seen: 1e-7, and 5e-4 where the node computes in float16.
CACHES = {None: 2e-6, "float32": 2e-6, "float16": 2e-3, "int8": 2e-6}


@pytest.mark.parametrize("cache", CACHES)
def test_attention_through_a_cache_is_that_of_numpy(cache):
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(PREFIX + STEPS, n * TEXT.head_dim)).astype(np.float32) for n in (4, 2, 2))
    v[:, 3] *= 40  # a channel that would leave the others no codes, if they shared a scale
    largest = {"key": np.full((2, 16), 1.5, np.float32), "value": np.abs(v).max(0).reshape(2, 16)}
    largest["value"] *= np.where(np.arange(16) % 4 == 0, np.float32(0.5), np.float32(1))  # some numbers are beyond their range

    def keep(part: str, x: np.ndarray) -> np.ndarray:
        if cache != "int8":
            return x.astype(cache or "float32").astype(np.float64)
        step = largest[part][:, None] / 127
        return np.clip(np.rint(x / step), -128, 127) * step

    got, past = attention_by_engine(q, k, v, cache, largest)
    assert apart(got, attention_by_hand(q, k, v, keep)) < CACHES[cache]
    if cache == "int8":
        step, quantized = largest["value"][:, None] / 127, past["past_key_values.0.value"][0]
        assert np.array_equal(quantized[:, : len(v)], np.rint(keep("value", v.reshape(-1, 2, 16).swapaxes(0, 1)) / step))
        assert (quantized.min(), quantized.max()) == (-128, 127)
        assert not quantized[:, len(v) :].any()


def test_a_prefix_by_the_fused_node_comes_to_the_same_numbers(monkeypatch):
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], decomposed_prefill=False))
    random = np.random.default_rng(1)
    q, k, v = (random.normal(size=(PREFIX + STEPS, n * TEXT.head_dim)).astype(np.float32) for n in (4, 2, 2))
    got, _ = attention_by_engine(q, k, v, None, {})
    assert apart(got, attention_by_hand(q, k, v, lambda part, x: x.astype(np.float64))) < CACHES[None]


def test_a_cache_of_int8_without_calibration_is_refused():
    g = GraphBuilder("g", Tensors({}), Recipe("test", (Rule("*", Scheme()),), "int8"), TARGETS["cpu"], context_length=CAPACITY)
    g.output(g.cached_attention(*(g.input(n, ["b", "t", 64]) for n in "qkv"), layer=0, text=TEXT), "y", ["b", "t", 64])
    with pytest.raises(UsageError, match=r"needs calibration for cache\.0\.key"):
        run(g, {})


# What no kernel multiplies by ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme(bits=8), "has none; write group = 128"),
        (Scheme(bits=8, activations="dynamic", symmetric=False), "symmetric = false; take that out"),
        (Scheme(bits=8, activations="static", symmetric=False), "symmetric = false; take that out"),
        (Scheme(bits=4, group_size=32, activations="dynamic"), "does not multiply dynamic activations by 4-bit"),
    ],
)
def test_a_product_without_a_kernel_is_refused_with_its_rule(scheme, says):
    """Zero points of a column would be dropped, and a row is no block of MatMulNBits."""
    with pytest.raises(UsageError, match=says) as error:
        TARGETS["cpu"].check(Recipe("test", (Rule("*_proj.weight", scheme), Rule("*", Scheme()))))
    assert "'*_proj.weight'" in str(error.value)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize(
    ("pattern", "scheme", "says"),
    [
        (
            DECODER,
            Scheme(bits=4, group_size=128, prefill8=True),
            r"computes prefixes and steps alike, and the rule for 'language_model.*",
        ),
        (EMBEDDING, Scheme(bits=8, group_size=128, shortlist=True), r"embed_tokens\.weight' says screen = true; "),
    ],
)
def test_copies_are_refused_where_no_graph_reads_them(target, pattern, scheme, says):
    with pytest.raises(UsageError, match=f"{says}take that out"):
        TARGETS[target].check(Recipe("test", (Rule(pattern, scheme), Rule("*", Scheme("float16")))))


def test_weights_for_prefixes_are_of_all_linears_of_the_decoder_and_of_nothing_else():
    twice, once = Scheme(bits=4, group_size=32, prefill8=True), Scheme(bits=4, group_size=32)
    up, down = (f"language_model.model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))
    recipe = Recipe("test", (Rule("*up_proj.weight", twice), Rule("*down_proj.weight", once), Rule("*", Scheme())))
    with pytest.raises(UsageError, match=r"prefill8 is for all .*down_proj\.weight is without"):
        recipe.check([up, down, "x"])
    recipe = Recipe("test", (Rule("*fc1.weight", twice), Rule("*", Scheme())))
    with pytest.raises(UsageError, match=r"prefill8 is of the decoder's linears.*decides for vision_tower\.fc1\.weight"):
        recipe.check(["vision_tower.fc1.weight", up])


def test_a_screen_for_another_matrix_is_refused():
    recipe = Recipe("test", (Rule("*.weight", Scheme(bits=8, group_size=128, shortlist=True)), Rule("*", Scheme("float16"))))
    with pytest.raises(
        UsageError, match=r"screen is of the output matrix alone, and the rule for '\*\.weight' decides for a\.weight"
    ):
        recipe.check(["a.weight", EMBEDDING, "a.bias"])


@pytest.mark.parametrize(
    "scheme", [Scheme(bits=4, group_size=32, symmetric=False), Scheme(bits=8, group_size=32, symmetric=False)]
)
def test_a_token_table_with_zero_points_is_refused_before_it_is_written(scheme):
    g = builder(scheme, weights(VOCAB, 48), name=EMBEDDING)
    with pytest.raises(UsageError, match=r"embed_tokens\.weight is looked up by rows.*symmetric = true"):
        g.lm_head(g.input("x", ["batch", 1, 48]), EMBEDDING)


def test_a_scale_beyond_float16_is_refused_and_not_stored_as_infinity():
    g = builder(Scheme(bits=8, group_size=16), weights(ROWS, 48) * np.float32(1e9), "cuda")
    g.output(g.linear(g.input("x", ["tokens", 48]), "layer"), "y", ["tokens", ROWS])
    with pytest.raises(CheckpointError, match=r"scales of layer\.weight.*float16 ends at 65504"):
        run(g, {})
