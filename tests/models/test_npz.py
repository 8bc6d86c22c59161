# SPDX-License-Identifier: Apache-2.0
import io
import json
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("ml_dtypes")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import ml_dtypes
import torch
import transformers
from reference import random_paligemma

from pgxport.errors import CheckpointError
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.npz import config_of, read_npz
from pgxport.models.spec import RESOLUTIONS, TEXT, published

Arrays = dict[str, np.ndarray]
FAMILIES = ("paligemma", "paligemma2")
BLOCK = "params/img/Transformer/encoderblock"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"


def training_arrays(model: Any) -> Arrays:
    """What the training code holds where transformers holds this model: written from the einsums of big_vision's layers."""
    vision, text = model.config.vision_config, model.config.text_config
    tower, gemma = model.model.vision_tower, model.model.language_model
    d, n, h = vision.hidden_size, vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    width, heads, kv, dim = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim

    def stack(layers: Any, take: Callable[[Any], Any]) -> np.ndarray:
        return np.stack([np.ascontiguousarray(take(layer).detach().numpy()) for layer in layers])

    def of(parameter: Any) -> np.ndarray:
        return parameter.detach().numpy()

    blocks, layers = tower.encoder.layers, gemma.layers
    arrays = {
        "params/img/embedding/kernel": np.einsum("ocyx->yxco", of(tower.embeddings.patch_embedding.weight)),
        "params/img/embedding/bias": of(tower.embeddings.patch_embedding.bias),
        "params/img/pos_embedding": of(tower.embeddings.position_embedding.weight)[None],
        "params/img/Transformer/encoder_norm/scale": of(tower.post_layernorm.weight),
        "params/img/Transformer/encoder_norm/bias": of(tower.post_layernorm.bias),
        "params/img/head/kernel": of(model.model.multi_modal_projector.linear.weight).T,
        "params/img/head/bias": of(model.model.multi_modal_projector.linear.bias),
        f"{BLOCK}/LayerNorm_0/scale": stack(blocks, lambda b: b.layer_norm1.weight),
        f"{BLOCK}/LayerNorm_0/bias": stack(blocks, lambda b: b.layer_norm1.bias),
        f"{BLOCK}/LayerNorm_1/scale": stack(blocks, lambda b: b.layer_norm2.weight),
        f"{BLOCK}/LayerNorm_1/bias": stack(blocks, lambda b: b.layer_norm2.bias),
        f"{BLOCK}/MlpBlock_0/Dense_0/kernel": stack(blocks, lambda b: b.mlp.fc1.weight.T),
        f"{BLOCK}/MlpBlock_0/Dense_0/bias": stack(blocks, lambda b: b.mlp.fc1.bias),
        f"{BLOCK}/MlpBlock_0/Dense_1/kernel": stack(blocks, lambda b: b.mlp.fc2.weight.T),
        f"{BLOCK}/MlpBlock_0/Dense_1/bias": stack(blocks, lambda b: b.mlp.fc2.bias),
        f"{ATTENTION}/out/kernel": stack(blocks, lambda b: b.self_attn.out_proj.weight.T.reshape(n, h, d)),
        f"{ATTENTION}/out/bias": stack(blocks, lambda b: b.self_attn.out_proj.bias),
        "params/llm/embedder/input_embedding": of(gemma.embed_tokens.weight),
        "params/llm/final_norm/scale": of(gemma.norm.weight),
        "params/llm/layers/attn/q_einsum/w": stack(
            layers, lambda b: b.self_attn.q_proj.weight.reshape(heads, dim, width).permute(0, 2, 1)
        ),
        "params/llm/layers/attn/kv_einsum/w": stack(
            layers,
            lambda b: torch.stack(
                [p.weight.reshape(kv, dim, width).permute(0, 2, 1) for p in (b.self_attn.k_proj, b.self_attn.v_proj)]
            ),
        ),
        "params/llm/layers/attn/attn_vec_einsum/w": stack(
            layers, lambda b: b.self_attn.o_proj.weight.reshape(width, heads, dim).permute(1, 2, 0)
        ),
        "params/llm/layers/mlp/gating_einsum": stack(
            layers, lambda b: torch.stack([b.mlp.gate_proj.weight.T, b.mlp.up_proj.weight.T])
        ),
        "params/llm/layers/mlp/linear": stack(layers, lambda b: b.mlp.down_proj.weight.T),
        "params/llm/layers/pre_attention_norm/scale": stack(layers, lambda b: b.input_layernorm.weight),
    }
    for short, word in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        arrays |= {
            f"{ATTENTION}/{word}/kernel": stack(blocks, lambda b, s=short: getattr(b.self_attn, s).weight.T.reshape(d, n, h)),
            f"{ATTENTION}/{word}/bias": stack(blocks, lambda b, s=short: getattr(b.self_attn, s).bias.reshape(n, h)),
        }
    norms = {"pre_ffw_norm": "post_attention_layernorm"}
    if text.model_type == "gemma2":
        norms = {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    arrays |= {
        f"params/llm/layers/{ours}/scale": stack(layers, lambda b, t=theirs: getattr(b, t).weight)
        for ours, theirs in norms.items()
    }
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Arrays]:
    """A hub folder, its model, and the arrays of a training npz of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_paligemma(folder, family=request.param, seed=5)
    return folder, model, training_arrays(model)


@pytest.fixture(scope="module")
def gemma1(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    return training_arrays(random_paligemma(tmp_path_factory.mktemp("g"), seed=6))


def same(ours: Checkpoint, hub: Checkpoint, *, dtype: Any = np.float32, block: int = 5) -> bool:
    assert ours.names() == hub.names()
    for name in hub.names():
        rows = hub.shape(name)[0]
        assert ours.shape(name) == hub.shape(name), name
        assert ours.dtype(name) == dtype
        blocks = np.concatenate([ours.rows(name, i, min(i + block, rows)) for i in range(0, rows, block)])
        assert blocks.dtype == dtype
        assert np.array_equal(blocks, hub.rows(name, 0, rows).astype(dtype)), name
    return not ours.unread()


def refused(file: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as info:
        read_all(file)
    for text in (str(file), *expected):
        assert text in str(info.value)


def read_all(file: Path) -> None:
    checkpoint = Checkpoint.open(file)
    for name in checkpoint.names():
        checkpoint.rows(name, 0, checkpoint.shape(name)[0])


@pytest.mark.parametrize("block", [1, 5, 16, 1000])
def test_the_npz_of_both_generations_is_the_hub_checkpoint(trained: tuple[Path, Any, Arrays], tmp_path: Path, block: int):
    folder, _, arrays = trained
    np.savez(tmp_path / "pt_42.npz", **arrays)
    shutil.copy(folder / "config.json", tmp_path)
    assert same(Checkpoint.open(tmp_path), Checkpoint.open(folder), block=block)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(trained: tuple[Path, Any, Arrays], tmp_path: Path, dtype: Any):
    folder, _, arrays = trained
    np.savez(tmp_path / "a.npz", **{name: value.astype(dtype) for name, value in arrays.items()})
    shutil.copy(folder / "config.json", tmp_path)
    assert same(Checkpoint.open(tmp_path), Checkpoint.open(folder), dtype=dtype)


def test_fortran_order_and_the_notebook_s_names_and_optimizer_state(trained: tuple[Path, Any, Arrays], tmp_path: Path):
    folder, _, arrays = trained
    notebook = {name.removeprefix("params/"): np.asfortranarray(value) for name, value in arrays.items()}
    np.savez(tmp_path / "a.npz", **notebook, **{"opt/0/mu/llm/final_norm/scale": np.zeros(3, np.float32)})
    shutil.copy(folder / "config.json", tmp_path)
    assert same(Checkpoint.open(tmp_path), Checkpoint.open(folder))


def test_its_config_and_tensors_give_the_logits_of_the_original(tmp_path: Path):
    model = random_paligemma(tmp_path / "hub", seed=7)
    np.savez(tmp_path / "a.npz", **training_arrays(model))
    checkpoint = Checkpoint.open(tmp_path / "a.npz")
    assert checkpoint.files() == [tmp_path / "a.npz"]
    assert checkpoint.file("tokenizer.json") is None
    # The vocabulary is not the published one, and `<image>` the first id after it; 310 is what this model was made with.
    assert checkpoint.config["image_token_index"] == 320
    config = transformers.PaliGemmaConfig.from_dict({**checkpoint.config, "image_token_index": 310})
    again = transformers.PaliGemmaForConditionalGeneration(config).eval()
    names = {n.replace("language_model.model.", "language_model."): n for n in checkpoint.names()}
    state = {
        f"model.{short.replace('vision_model.', '')}": torch.from_numpy(checkpoint.rows(name, 0, checkpoint.shape(name)[0]))
        for short, name in names.items()
    }
    assert again.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    again.tie_weights()
    ids = torch.tensor([[310] * 9 + [2, 17, 44, 108]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [m(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids)).logits for m in (model, again)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("family", "size"), list(TEXT))
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_config_of_published_shapes_is_that_of_the_published_model(family: str, size: str, resolution: int):
    spec = published(family, size, resolution)
    t, v = spec.text, spec.vision
    layer = f"{BLOCK}/MlpBlock_0".removeprefix("params/")
    shapes = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/pos_embedding": (1, v.image_tokens, 1152),
        f"{layer}/Dense_0/kernel": (27, 1152, 4304),
        f"{ATTENTION.removeprefix('params/')}/query/kernel": (27, 1152, 16, 72),
        "llm/embedder/input_embedding": (257152, t.width),
        "llm/layers/attn/q_einsum/w": (t.depth, t.heads, t.width, t.head_dim),
        "llm/layers/attn/kv_einsum/w": (t.depth, 2, t.kv_heads, t.width, t.head_dim),
        "llm/layers/mlp/linear": (t.depth, t.mlp, t.width),
    }
    if family == "paligemma2":
        shapes["llm/layers/post_attention_norm/scale"] = (t.depth, t.width)
    config = config_of(shapes, Path("pt.npz"))
    ours = read_config(config)
    assert ours.vision == v
    # The training code's table has no row for <image> and no padding.
    assert vars(ours.text) == {**vars(t), "vocab": 257152}
    assert config["image_token_index"] == 257152


def test_a_gemma_2_of_unknown_size_needs_a_config(trained: tuple[Path, Any, Arrays], tmp_path: Path):
    folder, _, arrays = trained
    np.savez(tmp_path / "a.npz", **arrays)
    if "params/llm/layers/post_ffw_norm/scale" in arrays:
        refused(tmp_path / "a.npz", "query_pre_attn_scalar", "config.json")
    else:
        assert read_config(Checkpoint.open(tmp_path / "a.npz").config).text == read_config(Checkpoint.open(folder).config).text


def test_memory_stays_at_a_row_block(tmp_path: Path):
    shapes = {name: value.shape for name, value in training_arrays(random_paligemma(tmp_path / "hub", seed=8)).items()}
    big = {"params/llm/layers/mlp/gating_einsum": (2, 2, 40, 200_000), "params/llm/layers/mlp/linear": (2, 200_000, 40)}
    np.savez(tmp_path / "a.npz", **{name: np.zeros(shape, np.float32) for name, shape in {**shapes, **big}.items()})
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(tmp_path / "a.npz")
        for i in range(0, 200_000, 5000):
            checkpoint.rows("language_model.model.layers.1.mlp.up_proj.weight", i, i + 5000)  # 0.8 MB of 32
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# --- what is not a training checkpoint


@pytest.mark.parametrize("name", range(0, 33, 3))
def test_a_parameter_that_is_missing_is_named(gemma1: Arrays, tmp_path: Path, name: int):
    key = sorted(gemma1)[name % len(gemma1)]
    np.savez(tmp_path / "a.npz", **{k: v for k, v in gemma1.items() if k != key})
    refused(tmp_path / "a.npz", key.removeprefix("params/"), "missing")


@pytest.mark.parametrize(
    "key", ["params/img/MAPHead_0/probe", "params/llm/layers/attn/qkv_einsum/w", "ema/llm/final_norm/scale", "x"]
)
def test_a_parameter_that_would_not_be_used_is_named(gemma1: Arrays, tmp_path: Path, key: str):
    np.savez(tmp_path / "a.npz", **gemma1, **{key: np.ones(3, np.float32)})
    refused(tmp_path / "a.npz", key.removeprefix("params/"), "would not use it")


@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x[None], lambda x: x[:-1], lambda x: x.astype(np.float64)])
@pytest.mark.parametrize(
    "key", ["params/llm/layers/mlp/gating_einsum", "params/llm/layers/attn/kv_einsum/w", f"{ATTENTION}/key/kernel"]
)
def test_a_parameter_of_another_shape_or_dtype_is_named(gemma1: Arrays, tmp_path: Path, key: str, change: Callable[..., Any]):
    np.savez(tmp_path / "a.npz", **{**gemma1, key: change(gemma1[key])})
    refused(tmp_path / "a.npz", key.removeprefix("params/") if change(gemma1[key]).ndim != gemma1[key].ndim else "")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32, np.complex64, ">f4", "S4", "V4", np.bool_, "M8[s]", "<U1"])
def test_a_dtype_that_is_no_float_weight_is_named(gemma1: Arrays, tmp_path: Path, dtype: Any):
    key = "params/llm/final_norm/scale"
    np.savez(tmp_path / "a.npz", **{**gemma1, key: np.zeros(40, dtype)})
    refused(tmp_path / "a.npz", key, "float32, float16 and bfloat16")


def test_a_pickle_inside_is_refused_unopened(gemma1: Arrays, tmp_path: Path):
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "trace",)

    np.savez(tmp_path / "a.npz", **{**gemma1, "params/llm/final_norm/scale": np.array([Trap()], object)})
    refused(tmp_path / "a.npz", "params/llm/final_norm/scale")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "key", ["params/llm/layers/attn/q_einsum/w", "params/img/embedding/kernel", "params/llm/embedder/input_embedding"]
)
def test_a_planted_nan_is_named(gemma1: Arrays, tmp_path: Path, key: str, value: float):
    damaged = gemma1[key].copy()
    damaged.reshape(-1)[-1] = value
    np.savez(tmp_path / "a.npz", **{**gemma1, key: damaged})
    refused(tmp_path / "a.npz", key, "weights are finite")


def test_compressed_members_are_refused_with_what_to_do(gemma1: Arrays, tmp_path: Path):
    np.savez_compressed(tmp_path / "a.npz", **gemma1)
    refused(tmp_path / "a.npz", "compressed", "numpy.savez")


def test_another_npz_is_none(tmp_path: Path):
    np.savez(tmp_path / "vae-oid.npz", **{"decoder.0.weight": np.ones((2, 2), np.float32)})
    refused(tmp_path / "vae-oid.npz", "decoder.0.weight", "params/llm")
    refused(tmp_path, "decoder.0.weight", "params/llm")
    np.savez(tmp_path / "b.npz", a=np.ones((2, 2), np.float32))
    with pytest.raises(CheckpointError, match=r"'b\.npz', 'vae-oid\.npz'; give the one"):
        Checkpoint.open(tmp_path)


def test_a_member_twice_and_with_and_without_prefix(gemma1: Arrays, tmp_path: Path):
    np.savez(tmp_path / "a.npz", **gemma1, **{"llm/final_norm/scale": gemma1["params/llm/final_norm/scale"]})
    refused(tmp_path / "a.npz", "'llm/final_norm/scale' twice, with and without params")
    np.savez(tmp_path / "b.npz", **gemma1)
    array = io.BytesIO()
    np.save(array, np.ones(40, np.float32))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "b.npz", "a") as archive:
        archive.writestr("params/llm/final_norm/scale.npy", array.getvalue())
    refused(tmp_path / "b.npz", "'params/llm/final_norm/scale' stands twice in the file")


@pytest.fixture(scope="module")
def sound(gemma1: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **gemma1)
    return file.getvalue()


@pytest.mark.parametrize("part", range(40))
def test_a_truncated_npz(sound: bytes, tmp_path: Path, part: int):
    (tmp_path / "a.npz").write_bytes(sound[: len(sound) * part // 40])
    refused(tmp_path / "a.npz", "copy of the file")


def test_a_truncation_of_one_byte(sound: bytes, tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(sound[:-1])
    refused(tmp_path / "a.npz", "copy of the file")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (41,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (39,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-40,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 40), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 40, }",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (40,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (20,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (40,), }",
        "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (20,), }",
        "{'descr': '<f9', 'fortran_order': False, 'shape': (40,), }",
        "{'descr': __import__('os'), 'fortran_order': False, 'shape': (40,), }",
        "{'descr': '<f4', 'shape': (40,), }",
        "[]",
        "",
        "(" * 70,
        "{" * 70,
        "\0" * 70,
        "é" * 35,
    ],
)
def test_an_array_header_that_lies_is_named(gemma1: Arrays, tmp_path: Path, header: str):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in gemma1.items() if k != "params/llm/final_norm/scale"})
    text = header.encode("latin-1").ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr(
            "params/llm/final_norm/scale.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(160)
        )
    refused(tmp_path / "a.npz", "params/llm/final_norm/scale")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(edits=st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_of_the_directory_never_raise_anything_else(sound: bytes, tmp_path: Path, edits: list[tuple[int, int]]):
    data = bytearray(sound)
    for back, value in edits:
        data[-back] = value
    (tmp_path / "a.npz").write_bytes(data)
    try:
        read_all(tmp_path / "a.npz")
    except CheckpointError as error:
        fault = str(error)
    else:
        return
    assert str(tmp_path / "a.npz") in fault


def test_a_config_beside_the_npz_goes_before_its_shapes(gemma1: Arrays, tmp_path: Path):
    np.savez(tmp_path / "a.npz", **gemma1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == {"model_type": "mine"}
    assert checkpoint.files() == [tmp_path / "config.json", tmp_path / "a.npz"]
    # A file given by itself may lie in a folder with another model's config.json; a PaliGemma's is taken for its own.
    assert Checkpoint.open(tmp_path / "a.npz").config["model_type"] == "paligemma"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", "image_token_index": 7}))
    assert Checkpoint.open(tmp_path / "a.npz").config["image_token_index"] == 7


def test_the_state_of_a_training_beside_the_weights_is_skipped_whatever_it_is(gemma1: Arrays, tmp_path: Path):
    state = {
        "opt/0/mu/img/embedding/bias": np.zeros(3), "opt/1/count": np.int32(7), "opt/params/llm/x": np.zeros((0, 4), bool),
        "chrono/accum_train_time": np.float64(3.5), "chrono/note": np.array("a word"), "chrono/start": np.array(["2024"], "S4"),
    }  # fmt: skip
    np.savez(tmp_path / "state.npz", **state, **gemma1)
    np.savez(tmp_path / "weights.npz", **gemma1)
    ours, weights = (read_npz(tmp_path / name) for name in ("state.npz", "weights.npz"))
    assert ours[0].keys() == weights[0].keys()
    assert all(np.array_equal(t.rows(0, 1), weights[0][name].rows(0, 1)) for name, t in ours[0].items())
    assert (ours[2].keys(), weights[2]) == (state.keys(), {})


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_a_folder_with_the_npz_and_a_tokenizer_exports_the_bytes_of_the_hub_checkpoint(tmp_path: Path, family: str):
    """As in the published npz, the table has no row for `<image>`, whose id is the first beyond it."""
    pytest.importorskip("onnx_ir")
    from gemma_tokenizer import build_tokenizer
    from tokenizers import Tokenizer

    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    hub, npz = tmp_path / "hub", tmp_path / "npz"
    build_tokenizer(hub)
    image = Tokenizer.from_file(str(hub / "tokenizer.json")).token_to_id("<image>")
    model = random_paligemma(hub, family=family, text={"vocab_size": image}, image_token_index=image)
    npz.mkdir()
    np.savez(npz / "model.npz", **training_arrays(model))
    for name in ("tokenizer.json", *(["config.json"] if family == "paligemma2" else [])):  # Gemma 2's query scale has no shape
        (npz / name).write_bytes((hub / name).read_bytes())
    ours, alone, theirs = (
        export(ExportOptions(output=tmp_path / f"b-{c.name}", checkpoint=c)).manifest for c in (npz, npz / "model.npz", hub)
    )
    assert ours.token_ids == alone.token_ids == theirs.token_ids
    weights = {name: info.sha256 for name, info in theirs.files.items() if name != "README.md"}
    for manifest in (ours, alone):
        assert {name: info.sha256 for name, info in manifest.files.items() if name != "README.md"} == weights
