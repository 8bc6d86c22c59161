# SPDX-License-Identifier: Apache-2.0
"""A fine-tune with all that people bring at once: new tokens, an output matrix trained apart, and DoRA, written by PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_tokenizer import build_tokenizer
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from reference import random_paligemma  # noqa: E402

from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.metrics.fidelity import kl_divergence  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

PICTURE = Image.fromarray(np.random.default_rng(8).integers(0, 255, (50, 70, 3), np.uint8))
PROMPT = "parse <s_total><sep/>"


@dataclass(frozen=True)
class FineTune:
    """The adapter's folder, which names its base, and the model and the processor that it was made from."""

    adapter: Path
    model: Any
    processor: Any


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def fine_tune(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FineTune:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    folder = tmp_path_factory.mktemp("fine-tune")
    build_tokenizer(base := folder / "base")
    images = SiglipImageProcessorPil(size={"height": 42, "width": 42}, image_mean=[0.4, 0.5, 0.6], resample=2)
    images.image_seq_length = 9
    processor = transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(base))
    words = processor.tokenizer
    image = words.convert_tokens_to_ids("<image>")
    random_paligemma(base, family=request.param, text={"vocab_size": len(words) + 6}, image_token_index=image)
    words.add_tokens(["<s_total>", "</s_total>"])
    words.add_special_tokens({"additional_special_tokens": ["<sep/>"]})
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, use_dora=True, target_modules=["q_proj", "down_proj", "fc1"], modules_to_save=["embed_tokens", "lm_head"]
    )
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    tuned = peft.get_peft_model(model, config).eval()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (p for p in tuned.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=random) * 0.05)
    tuned.save_pretrained(folder / "adapter")
    words.save_pretrained(folder / "adapter")
    images.save_pretrained(folder / "adapter")
    return FineTune(folder / "adapter", tuned, processor)


def inputs(fine_tune: FineTune) -> Any:
    return fine_tune.processor(images=[PICTURE], text=f"<image>{PROMPT}", return_tensors="pt")


def test_24_greedy_tokens_are_those_of_transformers(fine_tune: FineTune, tmp_path: Path):
    bundle = export(ExportOptions(adapter=fine_tune.adapter, output=tmp_path / "b"))
    asked = inputs(fine_tune)
    with torch.no_grad():
        out = fine_tune.model.generate(**asked, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None)
    expected = out[0, asked["input_ids"].shape[1] :].tolist()
    with Runner.from_pretrained(bundle.path) as runner:
        ids = runner.prompt_ids(PROMPT, special_tokens=True)
        assert ids == asked["input_ids"][0].tolist()
        assert np.abs(runner.pixels([PICTURE]) - asked["pixel_values"].numpy()).max() < 1e-5
        decoder, prefix = runner.decoder(len(ids) + 24), runner.prefix(runner.encode([PICTURE]), ids)
        ours = [decoder.next_token(prefix)]
        while len(ours) < 24:
            ours.append(decoder.next_token(runner.embed([ours[-1]])))
    assert ours == expected


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_it_loses_what_the_export_says(fine_tune: FineTune, tmp_path: Path, precision: str):
    bundle = export(ExportOptions(adapter=fine_tune.adapter, output=tmp_path / "b", precision=precision))
    parity = bundle.manifest.parity
    assert parity is not None
    assert "language_model.lm_head.weight" in parity.sqnr
    with torch.no_grad():
        exact = fine_tune.model(**inputs(fine_tune)).logits[0, -1].double().numpy()
    with Runner.from_pretrained(bundle.path) as runner:
        prefix = runner.prefix(runner.encode([PICTURE]), runner.prompt_ids(PROMPT, special_tokens=True))
        (rounded,) = runner.teacher_forced(prefix, [])
        lost = float(kl_divergence(rounded.astype(np.float64)[None], exact[None])[0])
    assert lost < 2 * parity.kl_worst
