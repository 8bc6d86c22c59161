# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from reference import random_paligemma
from safetensors.torch import load_file, save_file

from pgxport.errors import CheckpointError
from pgxport.models.checkpoint import Checkpoint

Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"
PREFIX = "base_model.model.model.language_model.layers"
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "bias": "none"}


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    random_paligemma(folder, family=request.param, seed=9)
    return folder


@pytest.fixture(scope="module")
def gemma1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma1")
    random_paligemma(folder, seed=10, vision={"num_hidden_layers": 1})
    return folder


def all_rows(checkpoint: Checkpoint, name: str, block: int = 7) -> np.ndarray:
    rows = checkpoint.shape(name)[0]
    return np.concatenate([checkpoint.rows(name, i, min(i + block, rows)) for i in range(0, rows, block)])


def test_files_of_the_adapter_are_part_of_the_checkpoint(gemma1: Path, tmp_path: Path):
    write(tmp_path, gemma1)
    checkpoint = Checkpoint.open(gemma1, [tmp_path])
    assert [f.name for f in checkpoint.files()] == [
        "config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


# --- adapters written by hand: what PEFT would not write, and other writers might


def lora_tensors(base: Path, rank: int = 3) -> dict[str, Any]:
    """An adapter for q_proj (of the text and the vision tower) and down_proj, in PEFT's names under transformers 5."""
    random = torch.Generator().manual_seed(12)
    tensors = {}
    for name, value in load_file(base / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            key = "base_model.model.model." + name.replace("language_model.model.", "language_model.").removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, value.shape[1], generator=random)
            tensors[f"{key}.lora_B.weight"] = torch.randn(value.shape[0], rank, generator=random)
    return tensors


def write(folder: Path, base: Path, change: Callable[[dict[str, Any]], object] = len, **config: Any) -> None:
    tensors = lora_tensors(base)
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))


def refused(base: Path, adapter: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as info:
        read_all(base, adapter)
    for text in expected:
        assert text in str(info.value)


def read_all(base: Path, adapter: Path) -> None:
    checkpoint = Checkpoint.open(base, [adapter])
    for name in checkpoint.names():
        all_rows(checkpoint, name)


def expected_q0(base: Path, scale: float) -> Any:
    tensors = lora_tensors(base)
    a, b = (tensors[f"{PREFIX}.0.self_attn.q_proj.lora_{x}.weight"].double() for x in "AB")
    return load_file(base / "model.safetensors")[Q0].double() + scale * (b @ a)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 7 / 3),
        ({"use_rslora": True}, 7 / 3**0.5),
        ({"lora_alpha": 0.5}, 0.5 / 3),
        ({"lora_alpha": 0}, 0.0),
        ({"alpha_pattern": {"q_proj": 5}}, 5 / 3),
        ({"alpha_pattern": {"proj": 5}}, 7 / 3),
        ({"alpha_pattern": {"^q_proj": 5}}, 7 / 3),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 6}}, 5 / 3),
        ({"alpha_pattern": {"q_proj": 6, "layers.0.self_attn.q_proj": 5}}, 6 / 3),
        ({"r": 8, "rank_pattern": {"q_proj": 3, "down_proj": 3}}, 7 / 3),
    ],
)
def test_the_scale(gemma1: Path, tmp_path: Path, config: dict[str, Any], scale: float):
    write(tmp_path, gemma1, **config)
    ours = all_rows(Checkpoint.open(gemma1, [tmp_path]), Q0)
    np.testing.assert_allclose(ours, expected_q0(gemma1, scale), rtol=0, atol=5e-6)


def test_names_of_transformers_4(gemma1: Path, tmp_path: Path):
    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            old = name.replace("model.model.language_model.", "model.language_model.model.")
            tensors[old.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")] = tensors.pop(name)

    write(tmp_path, gemma1, rename)
    np.testing.assert_allclose(all_rows(Checkpoint.open(gemma1, [tmp_path]), Q0), expected_q0(gemma1, 7 / 3), rtol=0, atol=5e-6)


def test_half_precision_is_merged_in_float32(gemma1: Path, tmp_path: Path):
    half = {name: value.bfloat16() for name, value in load_file(gemma1 / "model.safetensors").items()}
    (tmp_path / "base").mkdir()
    save_file(half, tmp_path / "base" / "model.safetensors")
    shutil.copy(gemma1 / "config.json", tmp_path / "base")
    write(tmp_path / "adapter", gemma1, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    checkpoint = Checkpoint.open(tmp_path / "base", [tmp_path / "adapter"])
    assert checkpoint.dtype(Q0) == np.float32
    assert checkpoint.dtype("language_model.model.norm.weight").itemsize == 2
    a, b = (
        load_file(tmp_path / "adapter/adapter_model.safetensors")[f"{PREFIX}.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB"
    )
    expected = half[Q0].double() + 7 / 3 * (b.double() @ a.double())
    np.testing.assert_allclose(all_rows(checkpoint, Q0), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 1}, "lora_E"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"peft_type": ["LORA"]}, "LORA"),
        ({"peft_type": None}, "None"),
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "some"}, "'some'"),
        ({"bias": None}, "bias"),
        ({"use_bdlora": {}}, "use_bdlora"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"arrow_config": {}}, "arrow_config"),
        ({"velora_config": {"scale": 1}}, "velora_config"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"invented_next_year": 1}, "invented_next_year"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"r": 0}, "r is '0'"),
        ({"r": "3"}, "r is '3'"),
        ({"r": True}, "r is 'True'"),
        ({"r": None}, "r is 'None'"),
        ({"rank_pattern": {"q_proj": [True]}}, "rank_pattern"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"r": 4}, "of rank 4 do not fit"),
        ({"rank_pattern": {"q_proj": 4}}, "of rank 4 do not fit"),
        ({"lora_alpha": "7"}, "alpha"),
        ({"lora_alpha": None}, "alpha"),
        ({"lora_alpha": 1e999}, "Infinity"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+": 2}}, "regular expression"),
        ({"alpha_pattern": {"(?<=a)b": 2}}, "regular expression"),
        ({"rank_pattern": {"^(.*)*q_proj": 4}}, "of rank 4 do not fit"),
        ({"target_modules": "q_proj"}, "target_modules does not name"),
        ({"target_modules": ["q_proj"]}, "target_modules does not name"),
        ({"exclude_modules": ["down_proj"]}, "target_modules does not name"),
        ({"target_modules": {"a": 1}}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"modules_to_save": "linear"}, "modules_to_save"),
        ({"modules_to_save": ["linear"]}, "multi_modal_projector.linear.bias"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "k_proj.weight"),
    ],
)
def test_an_adapter_that_asks_for_something_else_is_refused_by_name(
    gemma1: Path, tmp_path: Path, config: dict[str, Any], expected: str
):
    write(tmp_path, gemma1, **config)
    refused(gemma1, tmp_path, "adapter_", expected)


def key(part: str) -> str:
    return f"{PREFIX}.0.self_attn.q_proj.{part}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(key("lora_B.weight")), key("lora_A.weight")),
        (lambda t: t.pop(key("lora_A.weight")), key("lora_B.weight")),
        (lambda t: [t.pop(key(f"lora_{x}.weight")) for x in "AB"], Q0),
        (lambda t: t.update({key("lora_A.weight"): t[key("lora_A.weight")].T}), key("lora_A.weight")),
        (lambda t: t.update({key("lora_A.weight"): t[key("lora_A.weight")][:, :-1]}), "another model"),
        (lambda t: t.update({key("lora_B.weight"): t[key("lora_B.weight")][:-1]}), "another model"),
        (lambda t: t.update({key("lora_B.weight"): t[key("lora_B.weight")] * torch.nan}), "nan"),
        (lambda t: t.update({key("lora_A.weight"): t[key("lora_A.weight")] / 0}), "inf"),
        (lambda t: t.update({key("lora_A.weight"): t[key("lora_A.weight")].double()}), "'F64'"),
        (lambda t: t.update({key("lora_magnitude_vector"): torch.ones(3)}), key("lora_magnitude_vector")),
        (lambda t: t.update({key("lora_B.bias"): torch.ones(3)}), key("lora_B.bias")),
        (lambda t: t.update({key("lora_A.default.weight"): torch.ones(3)}), key("lora_A.default.weight")),
        (lambda t: t.update({f"{PREFIX}.7.self_attn.q_proj.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}), "layers.7."),
        (lambda t: t.update({"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.ones(3, 3)}), "embed_tokens"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 40)}), "lm_head"),
        (lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}), "lm_head"),
        (lambda t: t.update({"base_model.model.model.language_model.norm.weight": torch.ones(41)}), "norm.weight"),
        (lambda t: t.update({"base_model.model.model.language_model.gate.weight": torch.ones(41)}), "is not there"),
        (lambda t: t.update({key("lora_C.weight"): torch.ones(3)}), key("lora_C.weight")),
        (lambda t: t.update({key("lora_A.second.weight"): t[key("lora_A.weight")], key("lora_B.third.weight"): torch.ones(3)}), "are both for"),
        (lambda t: [t.update({n.replace(".weight", f".{a}.weight"): t.pop(n)}) for a, n in zip("ab" * 99, list(t), strict=False)], "'a', 'b'"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.ones(40)}), "norm.weight"),
        (lambda t: t.update({k.replace("model.model.language_model.", "model.language_model.model."): v for k, v in list(t.items())}),
         "are both for"),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)  # fmt: skip
def test_an_adapter_tensor_that_does_not_fit_is_named(
    gemma1: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
):
    write(tmp_path, gemma1, change)
    refused(gemma1, tmp_path, expected)


EMBEDDING = "base_model.model.model.language_model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"


def test_a_saved_lm_head_is_an_output_matrix_of_its_own(gemma1: Path, tmp_path: Path):
    table = torch.randn(320, 40, generator=torch.Generator().manual_seed(1))
    both = ["embed_tokens", "lm_head"]
    write(tmp_path / "b", gemma1, lambda t: t.update({EMBEDDING: table, HEAD: table + 1}), modules_to_save=both)
    write(tmp_path / "c", gemma1, lambda t: t.update({HEAD: table + 1}), modules_to_save=["lm_head"])
    for folder in "bc":
        checkpoint = Checkpoint.open(gemma1, [tmp_path / folder])
        assert (checkpoint.tied, checkpoint.remarks) == (False, ())
        assert np.array_equal(all_rows(checkpoint, "language_model.lm_head.weight"), (table + 1).numpy())


def test_a_saved_embedding_is_the_lm_head_too_where_both_are_equal_or_tied(gemma1: Path, tmp_path: Path):
    table = torch.randn(320, 40, generator=torch.Generator().manual_seed(1))
    for folder, tensors, config in (
        ("d", {EMBEDDING: table, HEAD: table.clone()}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("e", {EMBEDDING: table}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ):
        write(tmp_path / folder, gemma1, lambda t, new=tensors: t.update(new), **config)
        checkpoint = Checkpoint.open(gemma1, [tmp_path / folder])
        assert np.array_equal(all_rows(checkpoint, "language_model.model.embed_tokens.weight"), table.numpy())


def test_an_adapter_that_keeps_the_tie_replaces_a_stored_copy_too(gemma1: Path, tmp_path: Path):
    tensors = load_file(gemma1 / "model.safetensors")
    (tmp_path / "base").mkdir()
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "base" / "model.safetensors")
    shutil.copy(gemma1 / "config.json", tmp_path / "base")
    config = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    write(tmp_path / "a", gemma1, lambda t: t.update({EMBEDDING: head + 1}), **config)
    checkpoint = Checkpoint.open(tmp_path / "base", [tmp_path / "a"])
    assert np.array_equal(all_rows(checkpoint, "language_model.model.embed_tokens.weight"), head + 1)


def test_a_saved_module_of_another_shape_is_named(gemma1: Path, tmp_path: Path):
    name = "base_model.model.model.multi_modal_projector.linear.bias"
    write(tmp_path, gemma1, lambda t: t.update({name: torch.ones(41)}), modules_to_save=["multi_modal_projector"])
    refused(gemma1, tmp_path, name, "[41]", "[40]")


def test_folders_that_are_no_adapter(gemma1: Path, tmp_path: Path):
    refused(gemma1, tmp_path / "nowhere", "adapter_config.json")
    refused(gemma1, gemma1, "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    refused(gemma1, tmp_path, "has no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused(gemma1, tmp_path, "'adapter_model.bin'", "merge_and_unload")
    write(tmp_path, gemma1)
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(gemma1, tmp_path, "adapter_config.json")


@pytest.mark.parametrize("part", range(10))
def test_a_truncated_adapter(gemma1: Path, tmp_path: Path, part: int):
    write(tmp_path, gemma1)
    file = tmp_path / "adapter_model.safetensors"
    with file.open("rb+") as f:
        f.truncate(file.stat().st_size * part // 10)
    refused(gemma1, tmp_path, str(file))
