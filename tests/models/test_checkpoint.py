# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("torch")

import torch
from reference import random_paligemma, transformers
from safetensors.torch import load_file, save_file

from pgxport.errors import CheckpointError
from pgxport.models.checkpoint import Checkpoint, to_float32
from pgxport.models.config import read_config
from pgxport.models.safetensors import Stored
from pgxport.models.weights import weight_shapes

FAMILIES = ("paligemma", "paligemma2")
EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"


def published(model: Any) -> dict[str, Any]:
    """The parameters of a transformers model by the names Google published; not by the reader's own table."""
    names = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        name = re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model.", name)
        names[re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)] = value
    names.pop("lm_head.weight")
    return names


def equal(checkpoint: Checkpoint, expected: dict[str, Any], *, block: int = 7) -> bool:
    """Whether the checkpoint holds these tensors and no others, bit for bit, read in blocks of some rows."""
    assert checkpoint.names() == sorted(expected)
    for name, value in expected.items():
        assert checkpoint.shape(name) == tuple(value.shape)
        blocks = [checkpoint.rows(name, i, min(i + block, len(value))) for i in range(0, len(value), block)]
        whole = np.concatenate(blocks)
        assert {whole.dtype} == {b.dtype for b in blocks} == {checkpoint.dtype(name)}
        bits = torch.int32 if value.dtype == torch.float32 else torch.int16
        assert np.array_equal(whole.view(f"i{whole.itemsize}"), value.contiguous().view(bits).numpy()), name
    return not checkpoint.unread()


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return random_paligemma(folder, family=request.param, seed=3), folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_paligemma(folder, seed=4)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A sound checkpoint that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(base: Path, tmp_path: Path) -> Path:
    """The same in four shards, the last of them of vision alone."""
    tensors = load_file(base / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    names = sorted(tensors)
    where = {}
    for i in range(4):
        part = names[i * len(names) // 4 : (i + 1) * len(names) // 4]
        file = f"model-0000{i + 1}-of-00004.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    write_index(folder, {"metadata": {"total_size": 1}, "weight_map": where})
    return folder


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> Any:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def read_all(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    for name in checkpoint.names():
        checkpoint.rows(name, 0, checkpoint.shape(name)[0])


def refused(path: Path, *expected: str) -> None:
    """Opening or reading raises a CheckpointError that holds these texts, and nothing else."""
    with pytest.raises(CheckpointError) as info:
        read_all(path)
    for text in expected:
        assert text in str(info.value)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): value.clone() for name, value in tensors.items()}, folder / "model.safetensors")


def test_what_transformers_saves_is_what_is_read(saved: tuple[Any, Path]):
    model, folder = saved
    assert equal(Checkpoint.open(folder), published(model))


def test_its_names_and_shapes_are_those_its_config_promises(saved: tuple[Any, Path]):
    checkpoint = Checkpoint.open(saved[1])
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == weight_shapes(read_config(checkpoint.config))


def test_names_of_transformers_5_in_memory(saved: tuple[Any, Path], tmp_path: Path):
    model, _ = saved
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.startswith("model.language_model.layers.") for name in load_file(tmp_path / "model.safetensors"))
    assert equal(Checkpoint.open(tmp_path), published(model))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("tower", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower."])
def test_names_of_transformers_4(saved: tuple[Any, Path], tmp_path: Path, prefix: str, tower: str):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "c")
    rename(tmp_path / "c", lambda n: n.replace("language_model.model.", prefix).replace("vision_tower.", tower))
    assert equal(Checkpoint.open(tmp_path / "c"), published(model))


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "base_model.model.{}",
        "_fsdp_wrapped_module.{}", "base_model.model.module.{}",
    ],
)  # fmt: skip
def test_names_that_a_wrapper_put_a_part_before(saved: tuple[Any, Path], tmp_path: Path, wrapped: str):
    model, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rename(tmp_path, wrapped.format)
    assert equal(Checkpoint.open(tmp_path), published(model))


@pytest.mark.parametrize("part", ["_orig_mod", "base_layer", "_checkpoint_wrapped_module", "module"])
def test_names_that_a_wrapper_put_a_part_into(saved: tuple[Any, Path], tmp_path: Path, part: str):
    model, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rename(tmp_path, lambda name: re.sub(r"(\w+\.(?:weight|bias))$", rf"{part}.\1" if part != "base_layer" else r"\1", name))
    rename(tmp_path, lambda name: re.sub(r"(_proj)\.(\w+)$", rf"\1.{part}.\2", name))
    assert equal(Checkpoint.open(tmp_path), published(model))


BESIDE: dict[str, torch.Tensor] = {
    "vision_tower.vision_model.embeddings.position_ids": torch.arange(16)[None],
    "model.vision_tower.embeddings.position_ids": torch.arange(16, dtype=torch.int32)[None],
    "_orig_mod.vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 16, dtype=torch.uint8),
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "language_model.model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
    "model.language_model.rotary_emb.original_inv_freq": torch.ones(8, dtype=torch.bfloat16),
    "vision_tower.vision_model.head.probe": torch.ones(1, 1, 32),
    "vision_tower.head.attention.in_proj_weight": torch.full((96, 32), float("nan")),
    "vision_tower.vision_model.head.mlp.fc1.weight": torch.ones(3, 3, dtype=torch.int8),
    "vision_tower.vision_model.head.scale": torch.tensor(3),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_tensor_that_no_answer_depends_on_is_skipped_and_named(saved: tuple[Any, Path], tmp_path: Path, name: str):
    model, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_file({**load_file(folder / "model.safetensors"), name: BESIDE[name]}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert equal(checkpoint, published(model))
    assert list(checkpoint.skipped) == [name]


def test_shards_and_an_index_may_differ_about_a_tensor_that_no_answer_depends_on(sharded: Path, base: Path):
    index, name = read_index(sharded), "vision_tower.vision_model.embeddings.position_ids"
    index["weight_map"][name] = "model-00001-of-00004.safetensors"  # stored nowhere
    write_index(sharded, index)
    assert Checkpoint.open(sharded).names() == Checkpoint.open(base).names()
    shard = sharded / "model-00003-of-00004.safetensors"
    save_file({**load_file(shard), name: torch.arange(4)}, shard)  # in another shard than the index says
    checkpoint = Checkpoint.open(sharded)
    assert (checkpoint.names(), list(checkpoint.skipped)) == (Checkpoint.open(base).names(), [name])


def test_an_lm_head_that_only_the_index_names_is_tied(sharded: Path, base: Path):
    index = read_index(sharded)
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00004.safetensors"
    write_index(sharded, index)
    assert Checkpoint.open(sharded).names() == Checkpoint.open(base).names()


def test_a_missing_shard_that_should_hold_the_lm_head_is_named(sharded: Path):
    """It may be another matrix than the embedding; transformers does not open such a checkpoint either."""
    index = read_index(sharded)
    index["weight_map"]["lm_head.weight"] = "model-00005-of-00005.safetensors"
    write_index(sharded, index)
    refused(sharded, "model-00005-of-00005.safetensors", "this shard is missing")
    with pytest.raises(OSError, match="model-00005-of-00005"):
        transformers.PaliGemmaForConditionalGeneration.from_pretrained(sharded)


@pytest.mark.parametrize("name", ["vision_tower.vision_model.headstone.weight", "language_model.model.rotary_emb.scale", "extra"])
def test_a_tensor_of_no_known_place_is_not_skipped(folder: Path, name: str):
    save_file({**load_file(folder / "model.safetensors"), name: torch.ones(3)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.skipped
    assert name in checkpoint.names()


@pytest.mark.parametrize("size", ["20KB", "60KB"])
def test_shards_that_transformers_saves(saved: tuple[Any, Path], tmp_path: Path, size: str):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.files()) > 3
    assert {f.name for f in checkpoint.files()} == {f.name for f in tmp_path.iterdir()} - {"generation_config.json"}
    assert equal(checkpoint, published(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_given_as_it_is_stored(saved: tuple[Any, Path], tmp_path: Path, dtype: Any):
    model, folder = saved
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert equal(Checkpoint.open(tmp_path), {name: value.to(dtype) for name, value in published(model).items()})


def test_a_hub_cache_of_links_is_read(sharded: Path, tmp_path: Path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    assert len(Checkpoint.open(snapshot).names()) > 50
    refused(tmp_path, "snapshots/")


def test_opening_reads_no_weight(folder: Path):
    checkpoint = Checkpoint.open(folder)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("rb+") as f:
        f.seek(0, os.SEEK_END)
        f.seek(size - 4)
        f.write(b"\xff" * 4)
    # The change is seen, so the bytes come from the file now, not from a copy.
    refused(folder, "model.safetensors", "vision_tower.post_layernorm.weight", "nan")
    assert checkpoint.unread() == checkpoint.names()


def test_the_unread_are_named(folder: Path):
    checkpoint = Checkpoint.open(folder)
    checkpoint.rows(EMBEDDING, 0, 1)
    assert EMBEDDING not in checkpoint.unread()
    assert len(checkpoint.unread()) == len(checkpoint.names()) - 1
    assert EMBEDDING in checkpoint
    assert "lm_head.weight" not in checkpoint


def test_a_tensor_that_is_not_there_is_an_error_with_the_nearest_name(folder: Path):
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"has no 'multi_modal_projector\.weight'; it has 'multi_modal_projector\."):
        checkpoint.shape("multi_modal_projector.weight")


def test_files_beside_the_weights(folder: Path):
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.file("generation_config.json") == folder / "generation_config.json"
    assert checkpoint.file("tokenizer.json") is None
    assert [f.name for f in checkpoint.files()] == ["config.json", "model.safetensors"]


def test_memory_stays_at_a_row_block(tmp_path: Path, base: Path):
    save_file({"x": torch.zeros(4096, 4096)}, tmp_path / "model.safetensors")  # 64 MB
    shutil.copy(base / "config.json", tmp_path)
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(tmp_path)
        for i in range(0, 4096, 64):  # 1 MB
            checkpoint.rows("x", i, i + 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


# --- the lm_head


def with_pair(saved: tuple[Any, Path], folder: Path, *, flag: bool | None = None, **pair: Any) -> Path:
    """A saved model whose embedding and lm_head are these tensors; `flag` is the config's tie_word_embeddings, if it has one."""
    names = {"embedding": EMBEDDING, "lm_head": "lm_head.weight", "old_lm_head": LM_HEAD}
    rest = {name: tensor for name, tensor in load_file(saved[1] / "model.safetensors").items() if name not in names.values()}
    save_file(
        {**rest, **{names[name]: tensor.contiguous() for name, tensor in pair.items()}},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((saved[1] / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config if flag is None else config | {"tie_word_embeddings": flag}))
    return folder


def all_rows(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return to_float32(checkpoint.rows(name, 0, checkpoint.shape(name)[0]))


def table_of(saved: tuple[Any, Path]) -> torch.Tensor:
    return saved[0].get_input_embeddings().weight.detach().clone()


def as_transformers_reads(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and the output matrix."""
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


COPIES = {
    "the same": lambda x: x,
    "in half precision": lambda x: x.bfloat16(),
    "with other zeros": lambda x: torch.where(x == 0, -0.0, x),
}


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["lm_head", "old_lm_head"])
def test_an_lm_head_that_is_the_embedding_is_no_tensor_of_its_own(saved: tuple[Any, Path], tmp_path: Path, name: str, copy, flag):
    table = table_of(saved).bfloat16().float()  # values that half precision holds
    table[7, ::2] = 0
    folder = with_pair(saved, tmp_path, flag=flag, embedding=table, **{name: copy(table).clone()})
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.tied, checkpoint.spec().text.tied, LM_HEAD in checkpoint, checkpoint.remarks) == (True, True, False, ())
    assert list(checkpoint.skipped) == ["lm_head.weight" if name == "lm_head" else LM_HEAD]
    embedding, output = as_transformers_reads(folder)
    assert torch.equal(embedding, output)
    assert np.array_equal(all_rows(checkpoint, EMBEDDING), embedding.numpy())


CHANGES = {
    "one number of the last row": lambda x: x.index_put((torch.tensor(len(x) - 1), torch.tensor(3)), torch.tensor(0.5)),
    "a row": lambda x: x.index_fill(0, torch.tensor(300), 0.5),
    "the sign": lambda x: -x,
    "what half precision keeps": lambda x: x.bfloat16(),
    "all": lambda x: x * 2,
}


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_lm_head_of_its_own_is_used_as_transformers_uses_it(saved: tuple[Any, Path], tmp_path: Path, change, flag):
    folder = with_pair(saved, tmp_path, flag=flag, embedding=table_of(saved), lm_head=change(table_of(saved)))
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.tied, checkpoint.spec().text.tied) == (False, False)
    assert bool(checkpoint.remarks) == (flag is not False)  # transformers 4 would have tied them
    embedding, output = as_transformers_reads(folder)
    assert np.array_equal(all_rows(checkpoint, EMBEDDING), embedding.numpy())
    assert np.array_equal(all_rows(checkpoint, LM_HEAD), output.numpy())


@pytest.mark.parametrize("name", ["embedding", "lm_head", "old_lm_head"])
def test_one_of_the_two_stored_is_both(saved: tuple[Any, Path], tmp_path: Path, name: str):
    """safetensors' save_model keeps one name of two that are one tensor; for PaliGemma that is lm_head."""
    folder = with_pair(saved, tmp_path, **{name: table_of(saved)})
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.tied, checkpoint.skipped) == (True, {})
    assert equal(checkpoint, published(saved[0]))
    assert torch.equal(*as_transformers_reads(folder))


@pytest.mark.parametrize(("name", "missing"), [("embedding", LM_HEAD), ("lm_head", EMBEDDING)])
def test_one_of_two_that_the_config_says_are_two_is_refused(saved: tuple[Any, Path], tmp_path: Path, name: str, missing: str):
    """transformers fills the other with random numbers."""
    folder = with_pair(saved, tmp_path, flag=False, **{name: table_of(saved)})
    refused(folder, f"has no {missing}", "tie_word_embeddings is false")


def test_an_lm_head_of_another_shape_is_a_tensor_of_its_own(saved: tuple[Any, Path], tmp_path: Path):
    folder = with_pair(saved, tmp_path, embedding=table_of(saved), lm_head=table_of(saved)[:-1])
    assert Checkpoint.open(folder).shape(LM_HEAD)[0] == 319


def test_the_comparison_ends_at_the_first_block_that_differs(saved: tuple[Any, Path], tmp_path: Path, monkeypatch):
    read: list[tuple[str, int]] = []
    rows = Stored.rows
    monkeypatch.setattr("pgxport.models.checkpoint.BLOCK_BYTES", 32 * 4 * table_of(saved).shape[1])
    monkeypatch.setattr(Stored, "rows", lambda self, start, stop: read.append((self.name, start)) or rows(self, start, stop))
    Checkpoint.open(with_pair(saved, tmp_path, embedding=table_of(saved), lm_head=CHANGES["a row"](table_of(saved))))
    assert max(start for _, start in read) == 288  # of rows 288 to 320, where 300 is
    read.clear()
    Checkpoint.open(with_pair(saved, tmp_path, embedding=table_of(saved), lm_head=-table_of(saved)))
    assert {start for _, start in read} == {0}


@pytest.mark.parametrize("kept", ["embedding", "lm_head"])
def test_an_index_may_name_both_of_the_two_where_the_shards_hold_one(sharded: Path, base: Path, kept: str):
    index = read_index(sharded)
    shard = index["weight_map"][EMBEDDING]
    write_index(sharded, {"weight_map": {**index["weight_map"], LM_HEAD: shard}})
    if kept == "lm_head":
        tensors = load_file(sharded / shard)
        tensors[LM_HEAD] = tensors.pop(EMBEDDING)
        save_file(tensors, sharded / shard)
    checkpoint = Checkpoint.open(sharded)
    assert (checkpoint.tied, checkpoint.names()) == (True, Checkpoint.open(base).names())


def test_two_names_for_one_tensor_are_refused(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"model.{LM_HEAD}".replace("lm_head", "norm"): torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, "model.language_model.norm.weight", "language_model.model.norm.weight", "are both")


# --- what is not a checkpoint


def test_a_folder_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder", "config.json")


def test_an_empty_folder(tmp_path: Path):
    refused(tmp_path, "holds no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_in_place_of_the_folder(folder: Path, name: str):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder / name, name, "give the folder")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model-00001-of-00002.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model.pth", "pickle"),
        ("last.ckpt", "pickle"),
        ("model.PKL", "pickle"),
        ("paligemma-3b-q4_k_m.gguf", "GGUF"),
        ("model.weights.h5", "Keras"),
        ("model.keras", "Keras"),
        ("flax_model.msgpack", "Flax"),
        ("model.tflite", "exported"),
        ("decoder.onnx", "exported"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_another_format_is_refused_unopened_with_what_to_do(tmp_path: Path, base: Path, name: str, expected: str, alone: bool):
    # Loading it would leave a trace.
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "trace").encode() + b"'\ntR.")
    shutil.copy(base / "config.json", tmp_path)
    refused(tmp_path / name if alone else tmp_path, name, expected, "export the" if expected != "pickle" else "save_pretrained")
    assert not (tmp_path / "trace").exists()


def test_an_adapter_in_place_of_a_checkpoint(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "LoRA adapter", "base checkpoint")


def test_a_shard_without_its_index(sharded: Path):
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "model-00001-of-00004.safetensors", "model.safetensors.index.json")


def test_both_one_file_and_shards(sharded: Path, base: Path):
    shutil.copy(base / "model.safetensors", sharded)
    refused(sharded, "holds both", "move away")


def test_a_fifo_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "holds", "model.safetensors")


# --- config.json


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"x"',
        "{'a': 1}",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        "{} {}",
        "\x00",
        "[" * 9999,
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    refused(folder, str(folder / "config.json"))


def test_a_config_that_is_not_utf_8(folder: Path):
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(folder, "config.json", "not sound JSON")


def test_a_config_that_is_missing(folder: Path):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_a_config_of_gigabytes_is_not_read(folder: Path):
    with (folder / "config.json").open("wb") as f:
        f.truncate(1 << 34)
    refused(folder, "config.json", "bytes of JSON")


# --- damaged weights: the file and the tensor are named


@pytest.mark.parametrize("tensor", range(0, 57, 4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_planted_nan_is_named(folder: Path, tensor: int, value: float):
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[tensor % len(tensors)]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    refused(folder, str(folder / "model.safetensors"), repr(name), "or another checkpoint")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_is_no_float_weight_is_named(folder: Path, dtype: Any):
    tensors = load_file(folder / "model.safetensors")
    tensors["multi_modal_projector.linear.bias"] = tensors["multi_modal_projector.linear.bias"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "model.safetensors", "'multi_modal_projector.linear.bias'", "F32, F16, BF16")


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_checkpoint(folder: Path, part: int):
    file = folder / "model.safetensors"
    with file.open("rb+") as f:
        f.truncate(file.stat().st_size * part // 20)
    refused(folder, str(file))


# --- shards


@pytest.mark.parametrize("i", range(1, 5))
def test_a_missing_shard_is_named(sharded: Path, i: int):
    (sharded / f"model-0000{i}-of-00004.safetensors").unlink()
    refused(sharded, f"model-0000{i}-of-00004.safetensors", "this shard is missing")


@pytest.mark.parametrize("i", range(1, 5))
def test_a_truncated_shard_is_named(sharded: Path, i: int):
    file = sharded / f"model-0000{i}-of-00004.safetensors"
    with file.open("rb+") as f:
        f.truncate(file.stat().st_size - 1)
    refused(sharded, str(file), "1 bytes are missing")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "a/../../outside.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..\\outside.safetensors",
        "C:\\x.safetensors",
        "",
        ".",
        "..",
        "x.bin",
        "x.safetensors\0",
        "\0.safetensors",
        "~/x",
        "x" * 300 + ".safetensors",
        "\ud800.safetensors",
    ],
)
def test_a_shard_path_that_is_no_plain_name_is_refused_before_it_is_opened(sharded: Path, shard: str):
    tensors = load_file(sharded / "model-00001-of-00004.safetensors")
    save_file(tensors, sharded.parent / "outside.safetensors")
    index = read_index(sharded)
    moved = {n: shard if file == "model-00001-of-00004.safetensors" else file for n, file in index["weight_map"].items()}
    write_index(sharded, {"weight_map": moved})
    refused(sharded, "model.safetensors.index.json")


NO_INDEX = (
    [], {}, None, 3, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}},
    {"weight_map": {"a": None}}, {"weight_map": "model.safetensors"}, {"weight_map": {"a": ["x.safetensors"]}},
    {"weight": {"a": "x.safetensors"}},
)  # fmt: skip


@pytest.mark.parametrize("index", NO_INDEX)
def test_an_index_that_is_none_is_refused(sharded: Path, index: object):
    write_index(sharded, index)
    refused(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize("i", range(0, 60, 5))
def test_an_index_and_headers_that_disagree_are_refused(sharded: Path, i: int):
    index = read_index(sharded)
    name = sorted(index["weight_map"].keys() - {EMBEDDING})[i % (len(index["weight_map"]) - 1)]
    right = index["weight_map"][name]
    wrong = next(f for f in sorted(set(index["weight_map"].values())) if f != right)
    write_index(sharded, {"weight_map": {**index["weight_map"], name: wrong}})
    refused(sharded, repr(name), wrong if wrong < right else right)
    left = {n: f for n, f in index["weight_map"].items() if n != name}
    write_index(sharded, {"weight_map": left})
    refused(sharded, repr(name), right, "elsewhere or nowhere")
    write_index(sharded, {"weight_map": {**index["weight_map"], "ghost": right}})
    refused(sharded, "'ghost'", right)


def test_a_tensor_in_two_shards_is_refused(sharded: Path):
    second = load_file(sharded / "model-00002-of-00004.safetensors")
    save_file({**second, EMBEDDING: torch.zeros(3, 4)}, sharded / "model-00002-of-00004.safetensors")
    refused(sharded, repr(EMBEDDING), "are both")
