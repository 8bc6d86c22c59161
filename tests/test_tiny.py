# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint: answers of its bundles are transformers' own, and as good as docs/tiny.md says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pgxport.models.spec import TINY_RESOLUTIONS
from pgxport.models.tiny import scenes
from pgxport.runners.runner import Runner

TINY = Path(scenes.__file__).parent
GOLDENS = Path(__file__).parent / "goldens"
QUESTIONS = 40  # of each task, at each resolution
ASKED_AGAIN = 3  # of them, of transformers as it is installed here; all of them in a nightly run


@pytest.fixture(scope="module")
def evaluate():
    """tools/tiny/evaluate.py, which the figures in docs/tiny.md come from."""
    pytest.importorskip("transformers")
    import importlib.util

    file = Path(__file__).parent.parent / "tools" / "tiny" / "evaluate.py"
    if not file.exists():
        pytest.skip("the wheel is tested without tools/")
    spec = importlib.util.spec_from_file_location("evaluate", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=TINY_RESOLUTIONS)
def answered(request, evaluate):
    """Held-out questions with transformers' answers and those of our bundle."""
    bundle = request.getfixturevalue(f"tiny_{request.param}")
    items, golden = evaluate.held_out(QUESTIONS), json.loads((GOLDENS / f"tiny-{request.param}-answers.json").read_text())
    weights = (TINY / f"tiny-{request.param}" / "model.safetensors").read_bytes()
    assert golden["checkpoint_sha256"] == hashlib.sha256(weights).hexdigest(), "the answers are another checkpoint's"
    assert [(index, q.prompt) for index, q in items] == [(index, prompt) for index, prompt, _ in golden["answers"]]
    theirs = [text for _, _, text in golden["answers"]]
    with Runner.from_pretrained(bundle, threads=1) as runner:
        ours = [runner.answer(scenes.draw("test", index).image, question.prompt).text for index, question in items]
    return request.param, items, ours, theirs


def test_answers_are_those_of_transformers_greedy_decoding(answered):
    _, items, ours, theirs = answered
    different = [(q.prompt, o, t) for (_, q), o, t in zip(items, ours, theirs, strict=True) if o != t]
    assert len(items) == 5 * QUESTIONS
    assert not different, different


@pytest.mark.parametrize("questions", [ASKED_AGAIN, pytest.param(QUESTIONS, marks=pytest.mark.nightly)])
def test_transformers_still_answers_as_it_did(answered, evaluate, questions):
    resolution, items, _, theirs = answered
    chosen = [k for k in range(len(items)) if k % QUESTIONS < questions]
    again = evaluate.answers(evaluate.Reference(TINY / f"tiny-{resolution}"), [items[k] for k in chosen])
    assert again == [theirs[k] for k in chosen]


def test_answers_are_right_as_often_as_the_published_figures_say(answered, evaluate):
    """The figures are on 500 questions a task, of which these are the first: within four standard errors of so few."""
    resolution, items, ours, _ = answered
    measured = evaluate.score(items, ours, evaluate.mask_decoder(TINY / "vae-oid.npz"))
    results = Path(__file__).parent.parent / "benchmarks" / "results" / f"tiny-{resolution}.json"
    for name, row in json.loads(results.read_text())["metrics"].items():
        if name != "faults":
            p = row["mean"]
            assert abs(measured[name]["mean"] - p) < 4 * (p * (1 - p) / QUESTIONS) ** 0.5, name


def test_a_malformed_or_missing_object_is_never_invented(tiny_112):
    with Runner.from_pretrained(tiny_112, threads=1) as runner:
        answer = runner.answer(np.zeros((50, 80, 3), np.uint8), "detect red circle")
    for box in answer.boxes:
        assert 0 <= box.y1 < box.y2 <= 50
        assert 0 <= box.x1 < box.x2 <= 80


@pytest.mark.parametrize("resolution", TINY_RESOLUTIONS)
def test_the_embedded_checkpoint_is_complete_and_small(resolution):
    folder = TINY / f"tiny-{resolution}"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8_000_000
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert text["sliding_window"] < (224 // 14) ** 2
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["attn_logit_softcapping"]
    assert text["final_logit_softcapping"]
