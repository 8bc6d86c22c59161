# SPDX-License-Identifier: Apache-2.0
"""What `pgx inspect` says is what the headers and the manifest say, and it reads no weight."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.errors import CheckpointError, InputError, IntegrityError
from pgxport.inspection import describe, render


def test_a_bundle_is_described_as_its_manifest_has_it(a_bundle: Path):
    facts, manifest = describe(a_bundle), Bundle.open(a_bundle).manifest
    assert facts["kind"] == "bundle"
    for name in (
        "name",
        "family",
        "resolution",
        "image_tokens",
        "context_length",
        "local_window",
        "recipe",
        "target",
        "parameters",
    ):
        assert facts[name] == getattr(manifest, name)
    assert facts["bytes"] == sum(p.stat().st_size for p in a_bundle.iterdir() if p.name != MANIFEST)
    assert facts["files"] == {p.name: p.stat().st_size for p in a_bundle.iterdir() if p.name != MANIFEST}
    for name, graph in facts["graphs"].items():
        assert graph["bytes"] == sum(p.stat().st_size for p in a_bundle.glob(f"{name}.*"))
    for name, graph in json.loads(json.dumps(facts))["graphs"].items():  # plain data
        assert [tuple(t["shape"]) for t in graph["inputs"]] == [t.shape for t in manifest.graphs[name].inputs]


def test_a_bundles_parts_are_told_by_dtype_and_add_up_to_its_parameters(a_bundle: Path):
    facts = describe(a_bundle)
    parts = facts["parts"]
    without_masks = sum(row["parameters"] for part, row in parts.items() if part != "mask_decoder")
    assert without_masks == facts["parameters"]
    assert {row["dtypes"] for row in parts.values()} == {"float32"}
    table = Bundle.open(a_bundle).manifest.token_table
    assert parts["token_table"]["bytes"] == 4 * table.shape[0] * table.shape[1] == facts["files"][table.file]
    for name in ("vision_encoder", "projector", "decoder_step", "mask_decoder"):
        # The data file holds little else: padding to pages, and the decoder's rotation.
        assert 0 <= parts[name]["bytes"] - 4 * parts[name]["parameters"] < 4096 * 400
    assert f"{parts['projector']['parameters']:,} parameters" in render(facts)


@pytest.mark.parametrize("precision", ["fp16", "int4", "mixed"])
def test_a_bundle_of_any_precision_is_described(tmp_path: Path, precision: str):
    """Whole numbers of 4 bits have no item size, and a weight that stands twice counts once."""
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    export(ExportOptions(size="tiny", res=112, precision=precision, output=tmp_path / "b", parity=0))
    facts = describe(tmp_path / "b")
    assert sum(row["parameters"] for part, row in facts["parts"].items() if part != "mask_decoder") == facts["parameters"]
    assert facts["parts"]["decoder_step"]["bytes"] == (tmp_path / "b" / "decoder_step.data").stat().st_size
    assert facts["recipe"] in render(facts)


def test_the_cache_is_one_line_for_all_layers(a_bundle: Path):
    shown, layers = render(describe(a_bundle)), Bundle.open(a_bundle).manifest.cache.layers
    for stem, part in (("past_key_values", "key"), ("present", "value")):
        assert shown.count(f"{stem}.0…{layers - 1}.{part} float32") == 1
    assert "logits float32" in shown
    assert f"pgx run {a_bundle}" in shown


def test_a_checkpoint_is_described_from_its_headers(random_checkpoint: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(random_checkpoint)
    facts = describe(random_checkpoint)
    assert (facts["kind"], facts["family"], facts["resolution"]) == ("checkpoint", "paligemma2", 42)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["bytes"] == 4 * facts["parameters"]
    counts = {part: row["parameters"] for part, row in facts["parts"].items()}
    assert counts["vision encoder"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert counts["projector"] == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert counts["token table"] == model.get_input_embeddings().weight.numel()
    assert sum(counts.values()) == facts["parameters"]
    assert f"--checkpoint {random_checkpoint}" in render(facts)


def test_what_is_neither_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="neither"):
            describe(path)
    pytest.importorskip("ml_dtypes")
    with pytest.raises(CheckpointError):
        describe(tmp_path)


def test_a_bundle_that_is_not_sound_is_not_described(a_bundle: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(a_bundle, tmp_path / "b"))
    os.truncate(bundle / "tokenizer.json", 100)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        describe(bundle)
