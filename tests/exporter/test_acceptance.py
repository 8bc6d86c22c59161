# SPDX-License-Identifier: Apache-2.0
"""The last step of an export: what ends with 0 can be opened, and was asked where the machine could be."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from gemma_tokenizer import build_tokenizer
from PIL import Image
from reference import random_paligemma
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, GateError, IntegrityError, NumericError
from pgxport.exporter import acceptance
from pgxport.exporter import export as export_module
from pgxport.exporter.export import ExportedBundle, export
from pgxport.exporter.prepare import ExportOptions
from pgxport.runners.runner import Runner

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (50, 70, 3), np.uint8))


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_a_table_that_ends_before_the_image_token_answers_as_transformers(family: str, tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    build_tokenizer(checkpoint)
    image = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id("<image>")
    model = random_paligemma(checkpoint, family=family, text={"vocab_size": image}, image_token_index=image)
    bundle = export(ExportOptions(checkpoint=checkpoint, output=tmp_path / "b"))
    assert bundle.not_answered is None
    with Runner.from_pretrained(bundle.path) as runner:
        ids, pixels = runner.prompt_ids("caption en"), runner.pixels([PICTURE])
        (logits,) = runner.teacher_forced(runner.prefix(runner.encode_pixels(pixels), ids), [])
        types = torch.zeros(1, len(ids), dtype=torch.long)
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.tensor(pixels), "token_type_ids": types}
            expected = model(**inputs).logits[0, -1].numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_a_reader_refuses_gets_no_name(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    true = export_module._manifest

    def wrong(*args: Any) -> Any:
        manifest = true(*args)
        return manifest.model_copy(update={"token_ids": manifest.token_ids.model_copy(update={"eos": 1 << 20})})

    monkeypatch.setattr(export_module, "_manifest", wrong)
    with pytest.raises(IntegrityError, match="1048576"):
        export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [NumericError("nan at decoder_step"), EngineError("refuses the graph")])
def test_what_cannot_answer_gets_no_name(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(acceptance.Pipeline, "generate", fail)
    with pytest.raises(type(error)):
        export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b"))
    assert os.listdir(tmp_path) == []
    export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b", answer=False))
    assert os.listdir(tmp_path) == ["b"]


def test_the_decoder_reads_a_subset_of_a_large_picture(tiny_224: Path, monkeypatch: pytest.MonkeyPatch):
    prefixes = []
    true = acceptance.Pipeline.generate

    def generate(self: acceptance.Pipeline, prefix: np.ndarray, limit: int) -> Any:
        prefixes.append(prefix.shape[1])
        return true(self, prefix, limit)

    monkeypatch.setattr(acceptance.Pipeline, "generate", generate)
    bundle = Bundle.open(tiny_224)
    assert acceptance.answer_scene(bundle, 0) is None
    with Runner(bundle) as runner:
        assert prefixes == [len(runner.prompt_ids("caption en")) - 256 + 64]


def test_a_machine_without_the_memory_is_not_asked(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(acceptance, "available_memory", lambda: 1_000_000)
    bundle = export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b"))
    assert bundle.not_answered is not None
    assert bundle.not_answered.endswith("of memory, and 1 MB are free")
    assert bundle.path.is_dir()


def test_a_machine_without_the_engine_is_not_asked(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(acceptance, "why_not_here", lambda engine: f"{engine} needs ONNX Runtime")
    bundle = export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b"))
    assert bundle.not_answered == "cpu needs ONNX Runtime"


@pytest.mark.parametrize(("target", "precision"), [("cuda", "bf16"), ("tensorrt", "fp32")])
def test_a_target_of_another_machine_is_opened_and_not_asked(
    random_checkpoint: Path, tmp_path: Path, target: str, precision: str
):
    bundle = export(ExportOptions(checkpoint=random_checkpoint, output=tmp_path / "b", target=target, precision=precision))
    assert bundle.not_answered


# Weights that rounding does not change -------------------------------------------------------------------------------


def signs(value: torch.Tensor) -> torch.Tensor:
    """One magnitude, which is the end of an 8-bit grid around zero."""
    return torch.sign(value) * 0.125


def sixteenths(value: torch.Tensor) -> torch.Tensor:
    """The steps of a 4-bit grid with a zero point, from one end to the other in each sixteen."""
    return ((torch.arange(value.numel()) % 16) - 8).reshape(value.shape) / 128


@pytest.mark.parametrize(
    ("change", "precision"), [(torch.zeros_like, "int8"), (torch.zeros_like, "int4"), (signs, "int8"), (sixteenths, "int4")]
)
def test_weights_that_rounding_does_not_change_are_said_to_be_exact(
    random_checkpoint: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], precision: str
):
    from pgxport.cli.export import export_json, render_export
    from pgxport.terminal import Cost

    unchanged = Path(shutil.copytree(random_checkpoint, tmp_path / "unchanged"))
    tensors = load_file(unchanged / "model.safetensors")
    tensors |= {name: change(value) for name, value in tensors.items() if "down_proj" in name}
    save_file(tensors, unchanged / "model.safetensors", {"format": "pt"})
    bundle = export(ExportOptions(checkpoint=unchanged, output=tmp_path / "b", precision=precision, answer=False))
    parity = bundle.manifest.parity
    assert parity is not None
    exact = {path for path, decibels in parity.sqnr.items() if decibels is None}
    assert exact == {path for path in parity.sqnr if "down_proj" in path}
    assert {path for path, _ in parity.losses} == parity.sqnr.keys() - exact
    assert "down_proj" not in render_export(bundle, "b", Cost(0.1, 1))
    assert export_json(bundle, Cost(0.1, 1))["parity"]["sqnr"].keys() == parity.sqnr.keys()


# The gate of a recipe of floats ----------------------------------------------------------------------------------------


def made(random_checkpoint: Path, output: Path, precision: str, **options: Any) -> ExportedBundle:
    return export(ExportOptions(checkpoint=random_checkpoint, output=output, precision=precision, answer=False, **options))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gate_judges_floats_too(random_checkpoint: Path, tmp_path: Path, precision: str):
    assert made(random_checkpoint, tmp_path / "not", precision).manifest.parity is None
    parity = made(random_checkpoint, tmp_path / "b", precision, gate=0.0).manifest.parity
    assert parity is not None
    assert parity.positions > 0
    assert parity.sqnr == {}
    assert (parity.kl == 0) == (precision == "fp32")


def test_a_gate_refuses_floats_that_agree_on_too_little(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    true = export_module.parity
    monkeypatch.setattr(export_module, "parity", lambda *a, **k: true(*a, **k).model_copy(update={"agreement": 0.5}))
    with pytest.raises(GateError, match=r"nothing was written\. Take a --precision with more bits"):
        made(random_checkpoint, tmp_path / "b", "bf16", gate=0.9)
    assert os.listdir(tmp_path) == []
