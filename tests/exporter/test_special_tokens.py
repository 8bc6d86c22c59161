# SPDX-License-Identifier: Apache-2.0
"""A fine-tune with tokens of its own answers as in transformers; what a prompt spells is said once."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_tokenizer import build_tokenizer
from PIL import Image

from pgxport import cli
from pgxport.errors import CheckpointError, PgxWarning
from pgxport.runners.many import PictureQuestion, ask_each

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("onnxruntime")

from reference import random_paligemma  # noqa: E402

from pgxport.exporter.export import ExportedBundle, export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 255, (50, 70, 3), np.uint8))
PROMPTS = ("parse <s_total>", "<sep/>read<s_total>12</s_total>", "a <sep/> b <loc0003>")
ADAPTER_NOTE = "the tokenizer is that of adapter adapter: adds 3 tokens to the checkpoint's ('<s_total>', '</s_total>', '<sep/>')"


@dataclass(frozen=True)
class FineTune:
    """A bundle, and the model and the processor that it was made from."""

    bundle: ExportedBundle
    model: Any
    processor: Any


def tuned(folder: Path, family: str, *, adapter: bool) -> FineTune:
    """A random PaliGemma with words and a special token of its own, which an adapter's folder brings or the checkpoint's has."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    build_tokenizer(checkpoint := folder / "checkpoint")
    images = SiglipImageProcessorPil(size={"height": 42, "width": 42})
    images.image_seq_length = 9
    processor = transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(checkpoint))
    words = processor.tokenizer
    model = random_paligemma(
        checkpoint, family=family, text={"vocab_size": len(words) + 6}, image_token_index=words.convert_tokens_to_ids("<image>")
    )
    words.add_tokens(["<s_total>", "</s_total>"])
    words.add_special_tokens({"additional_special_tokens": ["<sep/>"]})
    if not adapter:
        words.save_pretrained(checkpoint)
        return FineTune(export(ExportOptions(checkpoint=checkpoint, output=folder / "b")), model, processor)
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(folder / "adapter")
    words.save_pretrained(folder / "adapter")
    bundle = export(ExportOptions(checkpoint=checkpoint, adapter=folder / "adapter", output=folder / "b"))
    return FineTune(bundle, lora, processor)


@pytest.fixture(
    scope="module", params=[("paligemma", False), ("paligemma2", True)], ids=["paligemma", "paligemma2 with an adapter"]
)
def fine_tune(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FineTune:
    family, adapter = request.param
    return tuned(tmp_path_factory.mktemp("tuned"), family, adapter=adapter)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("tuned"), "paligemma2", adapter=True).bundle.path


def test_24_greedy_tokens_are_those_of_transformers(fine_tune: FineTune):
    with Runner.from_pretrained(fine_tune.bundle.path) as runner:
        for prompt in PROMPTS:
            inputs = fine_tune.processor(images=[PICTURE], text=f"<image>{prompt}", return_tensors="pt")
            with torch.no_grad():
                out = fine_tune.model.generate(**inputs, max_new_tokens=24, do_sample=False)
            expected = out[0, inputs["input_ids"].shape[1] :].tolist()
            if 1 in expected:
                expected = expected[: expected.index(1)]
            answer = runner.answer(PICTURE, prompt, max_new_tokens=24, special_tokens=True)
            assert list(answer.token_ids) == expected
            assert len(expected) > 5


def test_an_export_says_whose_tokenizer_it_took(fine_tune: FineTune):
    with_adapter = fine_tune.bundle.manifest.family == "paligemma2"
    assert fine_tune.bundle.notes == ((ADAPTER_NOTE,) if with_adapter else ())
    assert (fine_tune.bundle.manifest.provenance.tokenizer is not None) == with_adapter
    assert len(fine_tune.bundle.manifest.token_ids.special) == 1


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_before_weights_are_read(tmp_path: Path):
    build_tokenizer(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    image = words.convert_tokens_to_ids("<image>")
    random_paligemma(tmp_path, text={"vocab_size": len(words) + 1}, image_token_index=image)
    words.add_tokens(["<one>", "<two>"])
    words.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"'<two>' has the id {image + 2}, and the token table {image + 2} rows.*resize_token"
    ):
        export(ExportOptions(checkpoint=tmp_path, output=tmp_path / "b"))


def test_a_prompt_uses_special_tokens_only_where_that_is_asked_for(bundle: Path):
    with Runner.from_pretrained(bundle) as runner:
        (special,) = runner.manifest.token_ids.special
        with pytest.warns(PgxWarning, match=r"'<sep/>' as 6 letters.*pgx run --special-tokens"):
            plain = runner.prompt_ids("a <sep/>")
        assert special not in plain
        assert special in runner.prompt_ids("a <sep/>", special_tokens=True)
        pieces = "".join(runner.stream(PICTURE, "a <sep/>", max_new_tokens=3, special_tokens=True))
        assert pieces == runner.answer(PICTURE, "a <sep/>", max_new_tokens=3, special_tokens=True).text


def test_each_token_that_prompts_spell_is_named_once(bundle: Path, tmp_path: Path):
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for picture in pictures:
        PICTURE.save(picture)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        rows = list(ask_each(str(bundle), pictures, PictureQuestion("<image>a <sep/><image>", max_new_tokens=1)))
    assert [row.error for row in rows] == [None] * 3
    assert [str(warning.message).split("'")[1] for warning in caught] == ["<image>", "<sep/>"]


@pytest.mark.parametrize("many", [False, True], ids=["--image", "--images"])
def test_run_gives_hints_on_stderr_and_takes_special_tokens(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], many: bool
):
    PICTURE.save(tmp_path / "a.png")
    picture = ["--images" if many else "--image", str(tmp_path / "a.png")]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pgx", "run", str(bundle), *picture, "--max-new-tokens", "2", *more])
        cli.main()
        return capsys.readouterr().err

    hint = "the prompt has '<image>' as 7 letters, not as a token; pgx puts the image before the prompt itself, so leave it out"
    assert hint in run("--prompt", "<image>detect cat").splitlines()
    assert "--special-tokens" in run("--prompt", "a <sep/>")
    assert "letters" not in run("--prompt", "a <sep/>", "--special-tokens")
    assert "letters" not in run("--prompt", "<image>detect cat", "--quiet")
