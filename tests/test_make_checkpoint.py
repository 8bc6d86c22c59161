# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of true shapes that every figure can be reproduced with."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")
pytest.importorskip("tools.make_checkpoint", reason="tools/ is not part of the wheel")

from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.spec import RESOLUTIONS, TEXT, ModelSpec, published
from pgxport.models.weights import weight_shapes
from pgxport.runners.saved_tokenizer import find_tokenizer
from tools import make_checkpoint as made

TOOL = Path(made.__file__)
MODELS = [(family, size, res) for family, size in TEXT for res in RESOLUTIONS]


def small(family: str) -> ModelSpec:
    """A published model of one layer and little width; the vocabulary stays, for the ids do."""
    spec = made.shallow(published(family, "3b", 224), 1)
    vision = replace(spec.vision, width=32, heads=2, mlp=48)
    return replace(spec, vision=vision, text=replace(spec.text, width=16, mlp=40, heads=4, kv_heads=2, head_dim=16))


def read(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.rows(name, 0, checkpoint.shape(name)[0]) for name in checkpoint.names()}


@pytest.mark.parametrize(("family", "size", "res"), MODELS)
def test_every_model_can_be_made_of_holes(tmp_path: Path, family: str, size: str, res: int):
    spec = published(family, size, res)
    total = made.write_checkpoint(tmp_path / "ck", spec, sparse=True)
    checkpoint = Checkpoint.open(tmp_path / "ck")
    assert read_config(checkpoint.config) == spec
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == weight_shapes(spec)
    files = list((tmp_path / "ck").glob("*.safetensors"))
    assert total <= sum(f.stat().st_size for f in files) < total + 1_000_000
    assert max(f.stat().st_size for f in files) < made.SHARD_BYTES + 1_000_000
    assert sum(512 * f.stat().st_blocks for f in (tmp_path / "ck").iterdir()) < 1_500_000
    assert not checkpoint.rows("language_model.model.embed_tokens.weight", 1000, 1002).any()


def test_shards_are_named_and_indexed_as_on_the_hub(tmp_path: Path):
    made.write_checkpoint(tmp_path / "ck", published("paligemma2", "3b", 448), sparse=True)
    index = json.loads((tmp_path / "ck" / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(p.name for p in (tmp_path / "ck").glob("*.safetensors")) == names
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == 2 * (3_032_979_696 + 64 * 2304)  # keras-hub counts no padding of the token table


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_it(tmp_path: Path, family: str, dtype: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made.write_checkpoint(tmp_path / "ck", small(family), dtype=dtype)
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "ck", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    table = model.get_input_embeddings().weight.detach().numpy()
    ours = Checkpoint.open(tmp_path / "ck").rows("language_model.model.embed_tokens.weight", 250_000, 257_216)
    assert np.array_equal(table[250_000:], ours.astype(np.float32))
    ids = torch.tensor([[257_152] * 256 + [2, 600, 108]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 224, 224)).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 30


def test_values_follow_from_seed_and_name(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made.write_checkpoint(tmp_path / name, small("paligemma2"), seed=seed)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not any(np.array_equal(a[name], c[name]) for name in a)


def test_values_are_those_that_keep_activations_near_one(tmp_path: Path):
    made.write_checkpoint(tmp_path / "ck", small("paligemma2"), dtype="float32")
    weights = read(tmp_path / "ck")
    for name, value in weights.items():
        assert np.isfinite(value).all(), name
        if value.ndim == 1:
            assert value.std() > 0.05, name
    table = weights["language_model.model.embed_tokens.weight"]
    assert len(np.unique(table[:, :4], axis=0)) == len(table)
    assert table.std() == pytest.approx(16**-0.5, rel=0.01)
    assert weights["vision_tower.vision_model.post_layernorm.weight"].mean() == pytest.approx(1, abs=0.3)


def test_the_tokenizer_has_the_published_ids(tmp_path: Path):
    made.write_checkpoint(tmp_path / "ck", published("paligemma2", "3b", 448), sparse=True)
    checkpoint = Checkpoint.open(tmp_path / "ck")
    tokenizer = find_tokenizer(checkpoint.path, checkpoint.config).words()
    ids = tokenizer.ids
    assert (ids.bos, ids.eos, ids.pad, ids.newline, ids.image) == (2, 1, 0, 108, 257_152)
    assert (ids.loc_first, ids.loc_count, ids.seg_first, ids.seg_count) == (256_000, 1024, 257_024, 128)
    for text in ("detect cat ; dog", "<loc0001><seg127> é 猫\n\nx"):
        prefix = tokenizer.prompt_ids(text, 3)
        assert prefix[:4] == [257_152] * 3 + [2]
        assert tokenizer.decode(prefix) == text + "\n"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_what_can_be_exported(tmp_path: Path):
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    done = run("--size", "3b", "--res", "224", "--depth", "1", "--sparse", str(tmp_path / "ck"))
    assert done.returncode == 0, done.stderr
    assert "pgx export --checkpoint" in done.stdout
    checkpoint = Checkpoint.open(tmp_path / "ck")
    assert read_config(checkpoint.config).text.depth == read_config(checkpoint.config).vision.depth == 1
    made.write_checkpoint(tmp_path / "small", small("paligemma2"))
    assert export(ExportOptions(checkpoint=tmp_path / "small", output=tmp_path / "b")).manifest.token_ids.image == 257_152


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size", "10b", "--res", "448", "--family", "paligemma"), "no paligemma 10b was published"),
        (("--size", "3b", "--res", "448", "--depth", "0"), "a model has a layer at least"),
        (("--size", "3b", "--res", "100"), "invalid choice"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, args: tuple[str, ...], message: str):
    done = run(*args, str(tmp_path / "ck"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "ck").exists()


def test_nothing_is_overwritten(tmp_path: Path):
    assert run("--size", "3b", "--res", "224", str(tmp_path)).returncode == 2
