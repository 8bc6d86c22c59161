# SPDX-License-Identifier: Apache-2.0
"""A runner of little memory gives the same answers, and holds either the vision encoder or the decoder."""

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from pgxport.errors import UsageError
from pgxport.runners import pipeline as pipeline_module
from pgxport.runners.runner import Runner


def test_vision_and_decoder_are_never_loaded_together(a_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    image = Image.new("RGB", (40, 30), "green")
    held: list[set[str]] = []
    opened = pipeline_module.open_session

    def watched(engine, graph, **options):
        held.append({*runner.loaded, graph.stem})
        return opened(engine, graph, **options)

    with Runner.from_pretrained(a_bundle) as whole:
        expected = [whole.answer(image, prompt, max_new_tokens=8).token_ids for prompt in ("caption en", "detect ring")]
    monkeypatch.setattr(pipeline_module, "open_session", watched)
    with Runner.from_pretrained(a_bundle, low_memory=True) as runner:
        answers = [runner.answer(image, prompt, max_new_tokens=8).token_ids for prompt in ("caption en", "detect ring")]
    assert answers == expected
    assert held
    assert not any({"vision_encoder", "decoder_step"} <= names for names in held)


def test_a_closed_runner_loads_nothing(a_bundle: Path):
    runner = Runner.from_pretrained(a_bundle, low_memory=True)
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.answer(Image.new("RGB", (4, 4)), "caption en")
    assert not runner.loaded
