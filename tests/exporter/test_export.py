# SPDX-License-Identifier: Apache-2.0
"""The pipeline of an export: every model's graphs, dry runs, adapters, and what it refuses before it writes."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from pgxport.bundle.reader import Bundle
from pgxport.errors import CheckpointError, UsageError
from pgxport.exporter.export import dry_run, export
from pgxport.exporter.graphs import NoStatistics, SpecSource, write_graphs
from pgxport.exporter.plan import runs_on
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.targets import TARGETS
from pgxport.models.spec import RESOLUTIONS, TEXT, published
from pgxport.models.weights import weight_shapes

WRITABLE = [(t.recipe(name), t) for name in RECIPE_NAMES for t in TARGETS.values() if runs_on(t.recipe(name), t)]


@pytest.mark.parametrize(("family", "size"), TEXT)
@pytest.mark.parametrize("res", RESOLUTIONS)
def test_the_graphs_of_every_model_are_written_without_its_weights(family, size, res):
    """Every weight is in exactly one graph, and reaches it in its own shape."""
    spec = published(family, size, res)
    assert len(WRITABLE) >= 5
    # Recipes know no depth and no resolution: all of them for the smallest model of a family, and one a target for the others.
    of_each = (
        WRITABLE if (size, res) == ("3b", RESOLUTIONS[0]) else list({target.name: (r, target) for r, target in WRITABLE}.values())
    )
    for recipe, target in of_each:
        graphs, shared = write_graphs(SpecSource(spec), spec, None, recipe, target, spec.image_tokens + 512, NoStatistics())
        shapes = {p.name: p.shape for layout in shared.values() for p in layout.lazy_tensors}
        for g in graphs.values():
            copies = {
                part.name for name in g.copies for part in g.matrices[name].lazy_tensors
            }  # of weights that are there as well
            others = {n: p.shape for n, p in g.lazy_tensors.items() if n not in copies}
            weights = {n: shape for n, shape in others.items() if not n.startswith(("rotary.", "lm_head.", "cache.", "input."))}
            assert not shapes.keys() & weights.keys()
            shapes |= weights
        for g in graphs.values():
            for path in g.matrices.keys() - g.copies:
                for part in g.matrices[path].lazy_tensors:
                    del shapes[part.name]
                shapes[path] = g.matrices[path].shape
        assert shapes == weight_shapes(spec)
        window = any(i.name in ("local_bias", "local_visible") for i in graphs["decoder_step"].graph.inputs)
        assert window == (res == 896 and family == "paligemma2")


def test_a_dry_run_writes_nothing_and_its_sizes_are_the_exports(random_checkpoint, tmp_path):
    options = ExportOptions(output=tmp_path / "b", checkpoint=random_checkpoint)
    sizes = dry_run(options)
    assert not list(tmp_path.iterdir())
    files = {name: info.size for name, info in export(options).manifest.files.items()}
    assert sizes == {name: n for name, n in files.items() if name not in ("README.md", "recipe.toml")}


def test_a_dry_run_refuses_what_an_export_refuses(random_checkpoint, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="already exists"):
        dry_run(ExportOptions(output=tmp_path / "b", checkpoint=random_checkpoint))
    with pytest.raises(UsageError, match="no FP8 products"):
        dry_run(ExportOptions(output=tmp_path / "c", checkpoint=random_checkpoint, precision="fp8"))
    with pytest.raises(UsageError, match="--context 1"):
        dry_run(ExportOptions(output=tmp_path / "c", checkpoint=random_checkpoint, context=1))
    with pytest.raises(CheckpointError, match=r"no such folder|does not exist|cannot"):
        dry_run(ExportOptions(output=tmp_path / "c", checkpoint=tmp_path / "nowhere" / "x"))


def test_a_missing_strange_or_misshapen_weight_is_named_before_anything_is_written(random_checkpoint, tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    import shutil

    whole = numpy_io.load_file(random_checkpoint / "model.safetensors")
    name = next(n for n in whole if n.endswith("layers.0.mlp.up_proj.weight"))

    def attempt(tensors: dict[str, np.ndarray], folder: Path) -> None:
        shutil.copytree(random_checkpoint, folder)
        numpy_io.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        export(ExportOptions(output=tmp_path / "b", checkpoint=folder))

    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight is missing"):
        attempt({n: t for n, t in whole.items() if n != name}, tmp_path / "missing")
    with pytest.raises(CheckpointError, match="extra"):
        attempt({**whole, "language_model.model.extra.weight": np.zeros(3, np.float32)}, tmp_path / "strange")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \["):
        attempt({**whole, name: np.ascontiguousarray(whole[name].T)}, tmp_path / "misshapen")
    assert not (tmp_path / "b").exists()


def test_an_adapter_is_merged_into_the_bundle(random_checkpoint, tmp_path):
    """The merged weight in the bundle's bytes is the base plus scale × B × A, worked out here."""
    numpy_io = pytest.importorskip("safetensors.numpy")
    import json

    whole = numpy_io.load_file(random_checkpoint / "model.safetensors")
    name = next(n for n in whole if n.endswith("layers.0.self_attn.q_proj.weight") and "language" in n)
    rows, cols = whole[name].shape
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, cols)).astype(np.float32), rng.normal(size=(rows, 3)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    numpy_io.save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [name.removesuffix(".weight")], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=random_checkpoint, adapter=adapter))
    plain = export(ExportOptions(output=tmp_path / "p", checkpoint=random_checkpoint))
    merged, base = ((x.path / "decoder_step.data").read_bytes() for x in (bundle, plain))
    expected = (whole[name] + 2.0 * (b @ a)).astype(np.float32)
    changed = np.nonzero(np.frombuffer(merged, np.uint8) != np.frombuffer(base, np.uint8))[0]
    start = base.index(whole[name].tobytes())
    assert start <= changed.min()
    assert changed.max() < start + expected.nbytes
    assert np.allclose(
        np.frombuffer(merged[start : start + expected.nbytes], np.float32).reshape(rows, cols), expected, atol=1e-5
    )
    assert Bundle.open(tmp_path / "b").manifest.files["vision_encoder.data"] == plain.manifest.files["vision_encoder.data"]
