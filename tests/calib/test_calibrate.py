# SPDX-License-Identifier: Apache-2.0
"""What `pgx calibrate` finds is what transformers' own linears are given, and what ONNX Runtime's are; it survives a kill."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from activation_ranges import ranges_of_whole_runs
from click.testing import CliRunner

from pgxport.activations import steps
from pgxport.activations.calibration_file import Calibration, checkpoint_sha256
from pgxport.activations.observe import NOTHING
from pgxport.activations.statistics import OBSERVERS
from pgxport.bundle.reader import Bundle
from pgxport.calib import bundle_pass
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.cli import cli
from pgxport.errors import InputError, NumericError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipes import RECIPES
from pgxport.files import file_sha256
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.tiny.scenes import caption, draw
from pgxport.models.weights import canonical
from pgxport.runners.image import pixel_values
from pgxport.runners.saved_tokenizer import find_tokenizer

# Both compute in float32 with other orders of addition; the worst seen is 2e-6 of a statistic's largest number.
TOLERANCE = 3e-5
FAMILIES = ("paligemma", "paligemma2")


class Killed(BaseException):
    """An exception that no handler catches."""


def data(folder: Path, *samples: tuple[str, str | None]) -> Path:
    """A list of scenes with these prompts and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (prompt, answer) in enumerate(samples):
        draw("calibration", i).image.save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": prompt, "answer": answer}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder / "samples.jsonl"


# An answer longer than the window of the random PaliGemma 2, a short one, and none.
SAMPLES = (("answer en what is it ?", "a small red thing"), ("ocr", "B7"), ("caption en", None))


@pytest.fixture(scope="module", params=[*FAMILIES, "paligemma2, untied"])
def random(request, tmp_path_factory) -> tuple[Path, Any]:
    """A random checkpoint, and the same model in transformers."""
    reference = pytest.importorskip("reference", reason="needs torch and transformers")
    from gemma_tokenizer import build_tokenizer
    from tokenizers import Tokenizer

    family, _, untied = request.param.partition(", ")
    folder = tmp_path_factory.mktemp("calibrate") / family
    build_tokenizer(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = reference.random_paligemma(
        folder, family=family, seed=5, text={"vocab_size": words.get_vocab_size() + 3}, tie_word_embeddings=not untied,
        image_token_index=words.token_to_id("<image>"), **{f"{n}_token_id": words.token_to_id(f"<{n}>") for n in ("bos", "eos", "pad")},
    )  # fmt: skip
    model.set_attn_implementation("eager")
    return folder, model


def hooked(
    folder: Path, model: Any, samples: tuple[tuple[str, str | None], ...]
) -> tuple[dict[str, np.ndarray], list[Any], np.ndarray]:
    """The inputs of transformers' linears, [tokens, K], by the weight's published name; the caches of each
    sample; and which tokens an answer is read from."""
    import torch

    config = Checkpoint.open(folder).config
    spec = read_config(config)
    words = find_tokenizer(folder, config).words()
    seen: dict[str, list[np.ndarray]] = {}
    first = [0]  # of the positions whose logits are asked for

    def hook(name: str) -> Any:
        def take(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().numpy()
            x = x[:, first[0] :] if name == "lm_head" else x
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return take

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    caches, read = [], []
    for i, (prompt, answer) in enumerate(samples):
        prefix = words.prompt_ids(prompt, spec.image_tokens)
        suffix = words.prompt_ids(answer, 0)[1:-1] if answer else []
        ids, first[0] = torch.tensor([prefix + suffix]), len(prefix) - 1
        pixels = torch.from_numpy(pixel_values(draw("calibration", i).image, spec.resolution)[None])
        kinds = torch.tensor([[0] * len(prefix) + [1] * len(suffix)])
        with torch.no_grad():
            out = model(
                input_ids=ids, pixel_values=pixels, token_type_ids=kinds, attention_mask=torch.ones_like(ids), use_cache=True
            )
        caches.append(out.past_key_values)
        read.append(np.arange(ids.shape[1]) >= first[0])
    for handle in handles:
        handle.remove()
    tied = "language_model.model.embed_tokens.weight" if model.config.tie_word_embeddings else "language_model.lm_head.weight"
    names = {n: tied if n == "lm_head" else canonical(f"{n}.weight") for n in linears}
    return {names[n]: np.concatenate(x) for n, x in seen.items()}, caches, np.concatenate(read)


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.usefixtures("no_entropy_search")
def test_statistics_are_those_of_transformers_linears(random, tmp_path):
    folder, model = random
    made = calibrate(CalibrateOptions(tmp_path / "c", checkpoint=folder, data=data(tmp_path / "data", *SAMPLES)))
    expected, caches, read = hooked(folder, model, SAMPLES)
    assert made.about.inputs.keys() == expected.keys()
    assert made.about.suffix_tokens > 5
    assert made.tokens == len(expected["language_model.model.layers.0.mlp.down_proj.weight"])
    for path, x in expected.items():
        x = x.astype(np.float64)
        # In the decoder, the tokens that an answer is read from weigh as much together as all others.
        layer = ".layers." in path and not path.startswith("vision")
        w = np.where(read, 0.5 / read.sum(), 0.5 / (~read).sum()) if layer else np.full(len(x), 1 / len(x))
        assert apart(made.absmax(path), np.abs(x).max(0)) < TOLERANCE, path
        # Of the spread, for a mean may be near zero.
        assert np.abs(made.mean(path) - w @ x).max() < TOLERANCE * np.abs(x).max(), path
        assert apart(made.mean_abs(path), w @ np.abs(x)) < TOLERANCE, path
        assert apart(made.square(path), w @ (x * x)) < TOLERANCE, path
        assert apart(made.moment(path), (x * w[:, None]).T @ x) < TOLERANCE, path
        assert apart(made.range(path, "minmax"), (x.min(), x.max())) < TOLERANCE, path
    for layer in range(made.about.layers):
        # transformers' own cache drops what lies behind the window.
        whole = [c.layers[layer] for c in caches]
        if sum(entry.keys.shape[2] for entry in whole) == made.tokens:
            for part in ("key", "value"):
                top = np.max([np.abs(getattr(entry, f"{part}s").numpy()).max((0, 2)) for entry in whole], 0)
                assert apart(made.cache(layer, part), top) < TOLERANCE, (layer, part)


@pytest.mark.usefixtures("no_entropy_search")
def test_what_shares_an_input_is_stored_once(random, tmp_path):
    made = calibrate(CalibrateOptions(tmp_path / "c", checkpoint=random[0], samples=1, moments=False))
    groups: dict[str, set[str]] = {}
    for path, site in made.about.inputs.items():
        groups.setdefault(site, set()).add(path.split(".")[-2])
    assert {"q_proj", "k_proj", "v_proj"} in groups.values()
    assert {"gate_proj", "up_proj"} in groups.values()
    assert made.moment("language_model.model.layers.0.mlp.up_proj.weight") is None


@pytest.mark.usefixtures("no_entropy_search")
def test_the_ranges_are_those_of_an_export_on_the_same_scenes(random, tmp_path):
    folder, _ = random
    scenes = [("caption en", caption(draw("calibration", i))) for i in range(2)]
    made = calibrate(CalibrateOptions(tmp_path / "c", checkpoint=folder, data=data(tmp_path / "data", *scenes)))
    expected = ranges_of_whole_runs(folder)
    assert made.ranges is not None
    assert made.ranges.largest.keys() == expected.largest.keys()
    for kind, top in expected.largest.items():
        assert made.ranges.largest[kind] == pytest.approx(top, rel=1e-5), kind
        assert made.ranges.where[kind] == expected.where[kind]


def test_a_checkpoint_in_numpy_and_its_bundle_in_onnxruntime_give_the_same_statistics(tiny_112, tmp_path):
    by_layer = calibrate(CalibrateOptions(tmp_path / "a", size="tiny", res=112, samples=5))
    whole = calibrate(CalibrateOptions(tmp_path / "b", checkpoint=tiny_112, samples=5))
    assert by_layer.about.inputs == whole.about.inputs
    assert (by_layer.tokens, by_layer.about.samples_sha256) == (whole.tokens, whole.about.samples_sha256)
    assert (by_layer.about.engine, whole.about.engine) == ("numpy", "onnxruntime")
    assert whole.ranges is None
    whole.check(by_layer.model_sha256, "tiny-112")
    for path in sorted(set(whole.about.inputs.values())):
        for what in ("absmax", "mean", "mean_abs", "square", "moment"):
            assert apart(getattr(by_layer, what)(path), getattr(whole, what)(path)) < TOLERANCE, (path, what)
        for observer in OBSERVERS:
            # A number at the edge of a bin may fall into the next; what is searched for may then be another bin.
            tolerance = TOLERANCE if observer == "minmax" else 0.05
            assert apart(by_layer.range(path, observer), whole.range(path, observer)) < tolerance, (path, observer)
    for layer in range(whole.about.layers):
        for part in ("key", "value"):
            assert apart(by_layer.cache(layer, part), whole.cache(layer, part)) < TOLERANCE


@pytest.mark.usefixtures("no_entropy_search")
@pytest.mark.parametrize("where", ["image patches", "vision layer 2 of 2", "projector", "text layer 2 of 3", "final norm"])
def test_a_killed_run_goes_on_with_the_layer_it_was_in_and_gives_the_same_bytes(random_checkpoint, tmp_path, monkeypatch, where):
    monkeypatch.setattr(steps, "PACK", 1)  # a sample a pack

    def options(name: str) -> CalibrateOptions:
        return CalibrateOptions(tmp_path / name, checkpoint=random_checkpoint, samples=3)

    calibrate(options("whole"))
    labels: list[str] = []

    def kill(label: str, done: int, total: int) -> None:
        labels.append(label)
        if labels.count(where) == 2:
            raise Killed

    with pytest.raises(Killed):
        calibrate(options("killed"), progress=kill)
    assert not (tmp_path / "killed").exists()
    again: list[tuple[str, int, int]] = []
    calibrate(options("killed"), progress=lambda *seen: again.append(seen))
    assert again[0][0] == where
    assert [done for _, done, _ in again] == sorted(done for _, done, _ in again)
    assert again[-1][1] == again[-1][2]
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.usefixtures("no_entropy_search")
def test_work_that_was_begun_for_something_else_is_not_used(random_checkpoint, tmp_path):
    options = CalibrateOptions(tmp_path / "c", checkpoint=random_checkpoint, samples=2)

    def kill(label: str, done: int, total: int) -> None:
        if label.startswith("text"):
            raise Killed

    for other in (replace(options, samples=3), replace(options, moments=False)):
        with pytest.raises(Killed):
            calibrate(other, progress=kill)
        labels: list[str] = []
        made = calibrate(options, progress=lambda label, *_: labels.append(label))  # noqa: B023
        assert labels[0] == "image patches"
        assert (made.samples, made.about.moments) == (2, True)
        (tmp_path / "c").unlink()
    (tmp_path / "c.work").mkdir()
    (tmp_path / "c.work" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        calibrate(options)
    assert (tmp_path / "c.work" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("recipe", ["w8a8-static", "int4-fast-kv8"])
def test_what_is_gathered_for_a_recipe_is_read_by_its_export(tmp_path, recipe):
    options = CalibrateOptions(tmp_path / "c", size="tiny", res=112, samples=2, recipe=recipe)
    made = calibrate(options)
    given = {"size": "tiny", "res": 112, "precision": recipe, "calibration": tmp_path / "c", "parity": 0}
    assert export(ExportOptions(tmp_path / "b", **given)).manifest.provenance.calibration_sha256 == file_sha256(tmp_path / "c")
    if recipe == "w8a8-static":  # the ranges of other observers take half of the time, and were not asked for
        path, wanted = "language_model.model.layers.0.mlp.down_proj.weight", RECIPES["cpu"][recipe]
        low, high = made.changed_range(path, wanted.scheme(path).observer)
        assert low < high
        with pytest.raises(UsageError, match=r"without what the observer 'mse' keeps; it was made for the recipe"):
            made.changed_range(path, "mse")


def test_a_bundle_whose_products_are_not_in_float_is_refused(tiny_112, tmp_path):
    bundle = Bundle.open(tiny_112)
    spec = bundle.manifest.spec
    rounded = export(ExportOptions(tmp_path / "int8", size="tiny", res=112, precision="int8")).path
    with pytest.raises(UsageError, match=r"\(int8\) does not multiply by .* in float.*calibrate the checkpoint"):
        calibrate(CalibrateOptions(tmp_path / "c", checkpoint=rounded, samples=1))
    deeper = {**spec, "text": {**spec["text"], "depth": spec["text"]["depth"] + 1}}
    changed = replace(bundle, manifest=bundle.manifest.model_copy(update={"spec": deeper}))
    with pytest.raises(UsageError, match=r"does not multiply by 'language_model\.model\.layers\.4.*--precision fp32"):
        bundle_pass.observe_bundle(changed, [], NOTHING, progress=None)
    for_cuda = replace(bundle, manifest=bundle.manifest.model_copy(update={"target": "cuda"}))
    with pytest.raises(UsageError, match="target 'cuda'; calibrate the checkpoint"):
        bundle_pass.observe_bundle(for_cuda, [], NOTHING, progress=None)


@pytest.mark.usefixtures("no_entropy_search")
def test_second_moments_that_do_not_fit_are_refused_with_what_they_take(tiny_112, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_pass, "available_memory", lambda: 20_000_000)
    with pytest.raises(NumericError, match=r"second moments of all layers of .* are free; give the checkpoint"):
        calibrate(CalibrateOptions(tmp_path / "c", checkpoint=tiny_112, samples=1))
    assert calibrate(CalibrateOptions(tmp_path / "c", checkpoint=tiny_112, samples=1, moments=False)).samples == 1


def test_options_that_name_nothing_or_too_much_are_refused(tmp_path, random_checkpoint):
    with pytest.raises(UsageError, match="name one model"):
        calibrate(CalibrateOptions(tmp_path / "c"))
    with pytest.raises(UsageError, match="name one model"):
        calibrate(CalibrateOptions(tmp_path / "c", checkpoint=random_checkpoint, size="tiny"))
    (tmp_path / "c").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        calibrate(CalibrateOptions(tmp_path / "c", checkpoint=random_checkpoint))
    with pytest.raises(InputError, match=r"samples\.jsonl:2"):
        calibrate(
            CalibrateOptions(tmp_path / "d", checkpoint=random_checkpoint, data=data(tmp_path / "x", ("ocr", None), ("", None)))
        )


def test_the_command_writes_the_file_and_says_what_to_do_with_it(tmp_path):
    out = tmp_path / "calibration.safetensors"
    args = ["calibrate", "--size", "tiny", "--res", "112", "--samples", "2", "-o", str(out)]
    said = CliRunner().invoke(cli, args, catch_exceptions=False).stdout
    assert said.startswith(f"wrote {out}: ")
    assert "peak memory" in said
    assert f"try: pgx export --size tiny --res 112 --precision int4 --calibration {out}" in said
    found = json.loads(CliRunner().invoke(cli, [*args, "--overwrite", "--no-moments", "--json"], catch_exceptions=False).stdout)
    made = Calibration.open(out)
    assert (found["sha256"], found["samples"], found["moments"]) == (made.digest, 2, False)
    assert found["command"] == "pgx calibrate --size tiny --res 112 --samples 2 --no-moments"
    tiny = Checkpoint.open(Path(__file__).parents[2] / "pgxport" / "models" / "tiny" / "tiny-112")
    made.check(checkpoint_sha256(tiny.files()), "tiny-112")


def test_records_that_cannot_be_used_are_named_and_the_next_are_taken(tmp_path):
    rows = [("detect heron", ""), ("", "x"), *[("ocr", f"B{n}") for n in range(9)], ("words " * 9000, "x")]
    file = data(tmp_path / "x", *rows)
    args = [
        "calibrate",
        "--size",
        "tiny",
        "--res",
        "112",
        "--data",
        str(file),
        "-o",
        str(tmp_path / "c.safetensors"),
        "--no-moments",
    ]
    few = CliRunner().invoke(cli, [*args, "--samples", "10"], catch_exceptions=False)
    assert few.stderr == f"1 of the records cannot be used and are left out: {file}:2: 'prompt' is '', and has to be text\n"
    assert "10 samples (1 records left out): " in few.stdout
    made = Calibration.open(tmp_path / "c.safetensors").about
    assert (made.samples, made.skipped) == (10, 1)
    every = CliRunner().invoke(cli, [*args, "--overwrite"])
    assert isinstance(every.exception, InputError)
    assert "2 of 12 records of format jsonl cannot be used" in str(every.exception)
    assert f"{file}:12: sample samples.jsonl:12: image, prompt and answer have " in str(every.exception)
    assert "tokens, more than 8192" in str(every.exception)
