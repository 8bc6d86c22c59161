# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint with outlier channels: float32 computes what it did, and what is rounded without care is lost."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
outliers = pytest.importorskip("tools.tiny.outliers", reason="tools/ is not part of the wheel")

from pgxport.bundle.manifest import Parity  # noqa: E402
from pgxport.exporter.check.parity import scene  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.inputs.scaling import sites  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.exporter.recipe import Recipe, Rule, Scheme  # noqa: E402
from pgxport.exporter.recipe_toml import to_toml  # noqa: E402
from pgxport.exporter.recipes import RECIPES  # noqa: E402
from pgxport.hub.locate import TINY  # noqa: E402
from pgxport.models.checkpoint import Checkpoint  # noqa: E402
from pgxport.models.eager import TokenizedSample, teacher_forced_logits  # noqa: E402
from pgxport.models.spec import TINY_RESOLUTIONS  # noqa: E402
from pgxport.models.tiny.scenes import draw  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402
from pgxport.runners.saved_tokenizer import find_tokenizer  # noqa: E402

Made = Callable[[int], Path]
FLOAT32 = 1e-4  # of the largest logit: a large channel's roundings are as much larger
TOKEN = Scheme(bits=8, activations="dynamic")
MATRICES = ("*.embed_tokens.weight", "language_model.*_proj.weight", "vision_tower.*.layers.*.weight", "multi_modal_projector.linear.weight")  # fmt: skip
PLAIN = Recipe("plain", (Rule("*norm*", Scheme()), *(Rule(pattern, TOKEN) for pattern in MATRICES), Rule("*", Scheme("float16"))))


def samples(folder: Path, count: int) -> list[TokenizedSample]:
    checkpoint = Checkpoint.open(folder)
    words = find_tokenizer(checkpoint.path, checkpoint.config).words()
    return [scene(i, checkpoint.spec(), words) for i in range(count)]


def lost(checkpoint: Path, folder: Path, recipe: Recipe) -> Parity:
    """What a recipe loses on six scenes."""
    file = folder / f"{recipe.name}.toml"
    file.write_text(to_toml(recipe))
    output = folder / f"{checkpoint.name}-{recipe.name}"
    parity = export(ExportOptions(output=output, checkpoint=checkpoint, recipe=file, parity=6, answer=False)).manifest.parity
    assert parity is not None
    return parity


@pytest.mark.parametrize("res", TINY_RESOLUTIONS)
def test_float32_answers_are_those_of_the_original_in_transformers(tiny_outliers: Made, tmp_path: Path, res: int):
    golden = json.loads((Path(__file__).parent / "goldens" / f"tiny-{res}-answers.json").read_text())["answers"]
    asked = golden[:: len(golden) // 15]
    assert len({prompt.split()[0] for _, prompt, _ in asked}) == 5, "some of every task"
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=tiny_outliers(res), answer=False)).path
    with Runner.from_pretrained(bundle, threads=1) as runner:
        assert [runner.answer(draw("test", i).image, prompt).text for i, prompt, _ in asked] == [text for *_, text in asked]


def test_transformers_reads_it_and_its_logits_are_those_of_the_original(tiny_outliers: Made):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    @torch.no_grad()
    def logits(model: Any, given: TokenizedSample) -> np.ndarray:
        prefix = [model.config.image_token_id] * model.config.text_config.num_image_tokens + given.prompt
        ids = torch.tensor([[*prefix, *given.answer]])
        kinds = torch.tensor([[0] * len(prefix) + [1] * len(given.answer)])
        pixels = torch.from_numpy(given.pixels)
        of = model(input_ids=ids, pixel_values=pixels, token_type_ids=kinds, attention_mask=torch.ones_like(ids))
        return of.logits[0, len(prefix) - 1 :].numpy()

    folders = (TINY / "tiny-112", tiny_outliers(112))
    load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
    before, after = (load(folder, dtype=torch.float32, attn_implementation="eager").eval() for folder in folders)
    assert load(folders[1]).dtype == torch.float32
    for given in samples(folders[1], 4):
        exact, same = logits(before, given), logits(after, given)
        assert np.abs(same - exact).max() < FLOAT32 * np.abs(exact).max()
        assert np.array_equal(same.argmax(-1), exact.argmax(-1))


def test_as_many_channels_as_asked_are_as_much_larger_wherever_a_scale_is_free(tiny_outliers: Made):
    def largest(folder: Path) -> dict[str, np.ndarray]:
        """Weight -> [K], the largest |x| of its inputs."""
        checkpoint, found = Checkpoint.open(folder), {}

        def observe(kind: str, where: str, x: np.ndarray) -> None:
            if kind == "linear input":
                found[where] = np.maximum(found.get(where, 0), np.abs(x).reshape(-1, x.shape[-1]).max(0))

        for given in samples(folder, 2):
            teacher_forced_logits(checkpoint, checkpoint.spec(), given, observe=observe)
        return found

    before, after = largest(TINY / "tiny-112"), largest(tiny_outliers(112))
    factor, spec = outliers.FACTOR, Checkpoint.open(TINY / "tiny-112").spec()
    assert 20 <= factor <= 100
    expected = {linear: outliers.CHANNELS * site.share for site in sites(spec) if site.before for linear in site.linears}
    assert len(expected) == 5 * spec.vision.depth + 7 * spec.text.depth  # all but SigLIP's fc2, projector and table
    for path, values in before.items():
        ratio = after[path] / values
        assert (ratio > factor / 2).sum() == expected.get(path, 0), path
        # An input that is large in float32 is as exact as it is large.
        assert np.abs(np.where(ratio > factor / 2, ratio / factor, ratio) - 1).max() < 1e-2, path


def test_plain_integer_products_lose_what_they_keep_of_the_original(tiny_outliers: Made, tmp_path: Path):
    before, after = (lost(checkpoint, tmp_path, PLAIN) for checkpoint in (TINY / "tiny-112", tiny_outliers(112)))
    assert before.kl < 0.002
    assert after.kl > 20 * before.kl
    assert after.agreement < before.agreement - 0.05


@pytest.mark.parametrize("name", ["int8", "w8a8", "int4", "mixed"])
def test_named_recipes_lose_about_as_much_as_of_the_original(tiny_outliers: Made, tmp_path: Path, name: str):
    """Plain products lose 80 times as much (w8a8), and 14 times (int4)."""
    recipe = RECIPES["cpu"][name]
    before, after = (lost(checkpoint, tmp_path, recipe) for checkpoint in (TINY / "tiny-112", tiny_outliers(112)))
    assert after.kl < 3 * before.kl


def test_the_channels_follow_from_the_seed(tmp_path: Path):
    checkpoint = Checkpoint.open(TINY / "tiny-112")
    a, b, c = (outliers.with_outliers(checkpoint, checkpoint.spec(), seed=seed).row_factors for seed in (0, 0, 1))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not all(np.array_equal(a[name], c[name]) for name in a)


def test_the_command_writes_it_and_overwrites_nothing(tmp_path: Path):
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, outliers.__file__, "--res", "112", "-o", str(tmp_path / "ck"), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    refused = run("--factor", "1")
    assert refused.returncode == 2
    assert "--channels 3 --factor 1" in refused.stderr
    done = run("--channels", "2", "--factor", "64")
    assert done.returncode == 0, done.stderr
    assert "2 channels of each place x 64" in done.stdout
    assert {f.name for f in (tmp_path / "ck").iterdir()} == {f.name for f in (TINY / "tiny-112").iterdir()}
    name = "language_model.model.layers.0.input_layernorm.weight"
    before, after = (Checkpoint.open(folder) for folder in (TINY / "tiny-112", tmp_path / "ck"))
    gains = (1 + c.rows(name, 0, c.shape(name)[0]).astype(np.float64) for c in (after, before))
    assert sorted(np.divide(*gains).round(4))[-3:] == [1, 64, 64]
    assert "exists" in run().stderr
