# SPDX-License-Identifier: Apache-2.0
"""A bundle of a base and PEFT adapters answers as PEFT does, and says what it was made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import peft  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from gemma_tokenizer import build_tokenizer  # noqa: E402
from reference import random_paligemma, transformers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from pgxport.cli import cli  # noqa: E402
from pgxport.errors import CheckpointError, UsageError  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions, prepare  # noqa: E402
from pgxport.models.tiny.scenes import draw  # noqa: E402
from pgxport.runners.image import pixel_values  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

STEPS = 24


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    build_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<{name}>") for name in ("bos", "eos", "pad")}
    random_paligemma(
        folder,
        family=request.param,
        text={"vocab_size": tokenizer.get_vocab_size() + 3},
        image_token_index=tokenizer.token_to_id("<image>"),
        **ids,
    )
    return folder


@pytest.fixture
def one(base: Path) -> Path:
    if base.name == "paligemma":
        pytest.skip("one family says it all")
    return base


def fresh(base: Path) -> Any:
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Saves an adapter of random weights with PEFT."""
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    model = peft.get_peft_model(fresh(base), peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **config}))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=noise))
    model.save_pretrained(folder)
    return folder


def peft_model(base: Path, *folders: Path) -> Any:
    model = fresh(base)
    for folder in folders:
        model = peft.PeftModel.from_pretrained(model, folder)
        model = model if folder == folders[-1] else model.merge_and_unload()
    return model.eval()


def logits_of(runner: Runner, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [1 + STEPS, V] of a bundle and of PEFT's model, after the same prompt and random tokens."""
    ids, pixels = runner.prompt_ids("caption en"), pixel_values(draw("test", 0).image, runner.manifest.resolution)[None]
    suffix = np.random.default_rng(0).integers(3, runner.manifest.token_ids.image, STEPS)
    decoder = runner.decoder(len(ids) + STEPS)
    ours = [decoder.feed(runner.prefix(runner.encode_pixels(pixels), np.array(ids))).copy()]
    ours += [decoder.feed(runner.embed([token])).copy() for token in suffix]
    whole, kinds = torch.tensor([[*ids, *suffix]]), torch.from_numpy(np.repeat([0, 1], [len(ids), STEPS]))[None]
    with torch.no_grad():
        out = model(
            input_ids=whole, pixel_values=torch.from_numpy(pixels), token_type_ids=kinds, attention_mask=torch.ones_like(whole)
        )
    return np.stack(ours), out.logits[0, len(ids) - 1 :].numpy()


ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "dora and tokens": [{"use_dora": True, "trainable_token_indices": [3, 40, 41, 60]}],
    "tokens of the output alone": [{"trainable_token_indices": {"lm_head": [3, 40, 41, 60]}}],
    "an embedding that leaves its lm_head": [{"modules_to_save": ["embed_tokens"]}],
    "one after the other": [{"use_rslora": True, "bias": "all"}, {"target_modules": ["q_proj", "linear"], "lora_alpha": 5}],
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_and_likeliest_tokens_are_those_of_peft(base: Path, tmp_path: Path, kind: str):
    folders = [trained(base, tmp_path / f"a{i}", i, **config) for i, config in enumerate(ADAPTERS[kind])]
    bundle = export(ExportOptions(checkpoint=base, adapter=folders, output=tmp_path / "b", answer=False))
    with Runner(bundle, threads=1) as runner:
        ours, theirs = logits_of(runner, peft_model(base, *folders))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert ours.argmax(1).tolist() == theirs.argmax(1).tolist()
    assert bundle.manifest.provenance.adapters == tuple(folder.name for folder in folders)
    assert "| adapters | " + ", ".join(folder.name for folder in folders) in (bundle.path / "README.md").read_text()
    assert bundle.notes == ()


def test_the_base_of_an_adapter_alone_is_what_it_names(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = trained(one, tmp_path / "a")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(one)
    job = prepare(ExportOptions(adapter=str(adapter), output=tmp_path / "b"))
    assert (job.found.path, job.found.notes) == (one, ())
    monkeypatch.chdir(one.parent)
    edit(adapter, base_model_name_or_path=one.name)  # from the working directory on
    assert prepare(ExportOptions(adapter=[adapter], output=tmp_path / "b")).found.name == one.name
    for named in ("paligemma-of-mine", "a/b/c", "\0", "x" * 5000):
        edit(adapter, base_model_name_or_path=named)
        with pytest.raises(UsageError, match=r"was trained on .* --checkpoint"):
            prepare(ExportOptions(adapter=adapter))
    for named in (None, ""):
        edit(adapter, base_model_name_or_path=named)
        with pytest.raises(UsageError, match="does not name the model"):
            prepare(ExportOptions(adapter=adapter))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("named", "noted"),
    [
        ("google/paligemma2-3b-pt-224", True),
        ("/home/someone/other", True),
        ("\0", True),
        (None, False),
        ("someone/paligemma2", False),
    ],
)
def test_another_base_than_an_adapter_names_is_noted_with_both(one: Path, tmp_path: Path, named: str | None, noted: bool):
    adapter = trained(one, tmp_path / "a")
    edit(adapter, base_model_name_or_path=named)
    notes = prepare(ExportOptions(checkpoint=one, adapter=adapter, output=tmp_path / "b")).found.notes
    assert len(notes) == noted
    assert not noted or (repr(named) in notes[0] and str(one) in notes[0] and str(adapter) in notes[0])


def test_the_command_takes_several_adapters_and_notes_another_base(one: Path, tmp_path: Path):
    a, b = trained(one, tmp_path / "a"), trained(one, tmp_path / "b", 1)
    edit(b, base_model_name_or_path="someone/else")
    given = ["--adapter", str(a), "--adapter", str(b), "--no-answer", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["export", *given])
    assert done.exit_code == 0, done.output
    assert "was trained on 'someone/else'" in done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["provenance"]["adapters"] == ["a", "b"]


def test_a_folder_of_adapters_names_them(one: Path, tmp_path: Path):
    for name in ("left", "right"):
        trained(one, tmp_path / "all" / name)
    with pytest.raises(CheckpointError, match="holds 2 adapters in folders of their own, 'left', 'right'"):
        prepare(ExportOptions(checkpoint=one, adapter=tmp_path / "all"))
