# SPDX-License-Identifier: Apache-2.0
"""An export takes its statistics of embedded scenes where none are given: what its recipe needs, as pgx calibrate would."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "onnxruntime", "torch", "transformers")):
    pytest.skip("needs the exporter, an engine and the reference", allow_module_level=True)

from click.testing import CliRunner
from rounded import make_checkpoint, recipe_of

from pgxport.activations.calibration_file import Calibration
from pgxport.activations.steps import linears
from pgxport.bundle.reader import Bundle
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.cli import cli
from pgxport.errors import UsageError
from pgxport.exporter import gather as gathering
from pgxport.exporter.export import export
from pgxport.exporter.gather import CHECK_TOKENS, check_tokens, gather
from pgxport.exporter.inputs.needs import needs_of
from pgxport.exporter.prepare import ExportOptions, prepare
from pgxport.exporter.recipe import Scheme
from pgxport.exporter.recipe_toml import to_toml
from pgxport.models.spec import published

EIGHT, STATIC = Scheme(bits=8, group_size=32), Scheme(bits=8, activations="static", observer="percentile")
DYNAMIC = Scheme(bits=8, activations="dynamic")
RECIPES = {
    "scaled": recipe_of("scaled", replace(DYNAMIC, scaling="smoothquant"), EIGHT, EIGHT),
    "static": recipe_of("static", STATIC, EIGHT, EIGHT),
    "rotated": recipe_of("rotated", replace(STATIC, scaling="smoothquant", rotate=16), EIGHT, EIGHT),
    "gptq": recipe_of("gptq", replace(EIGHT, method="gptq"), EIGHT, EIGHT),
    "cache": replace(recipe_of("cache", EIGHT, EIGHT, EIGHT), cache="int8"),
    "rotated cache": replace(recipe_of("rotated-cache", replace(DYNAMIC, rotate=16), EIGHT, EIGHT), cache="int8"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "one"
    make_checkpoint(path, "paligemma2")
    return path


def options(folder: Path, name: str, out: Path, **more) -> ExportOptions:
    file = out / f"{name}.toml"
    file.write_text(to_toml(RECIPES[name]))
    return ExportOptions(**{"output": out / "b", "checkpoint": folder, "recipe": file, "parity": 0, "answer": False, **more})


def for_recipe(folder: Path, name: str, out: Path, samples: int = 2) -> Calibration:
    (out / f"{name}.toml").write_text(to_toml(RECIPES[name]))
    return calibrate(CalibrateOptions(out / "c", checkpoint=folder, samples=samples, recipe=out / f"{name}.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_an_export_gathers_what_calibrate_writes_for_the_recipe_on_the_same_scenes(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(gathering, "MOMENT_SCENES", 2)
    monkeypatch.setattr(gathering, "RANGE_SCENES", 2)
    calibration = for_recipe(folder, name, tmp_path)
    job = prepare(options(folder, name, tmp_path, parity=1))
    found = gather(job, tmp_path)
    needs = needs_of(job.recipe, job.spec)
    assert found.statistics.inputs == calibration.inputs
    assert set(needs.channels) == {path for path in linears(job.spec) if job.recipe.scheme(path).bits}
    for path in needs.channels:
        for part in ("absmax", "mean", "mean_abs", "square"):
            got, expected = (getattr(s, part)(path) for s in (found.statistics, calibration))
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(np.abs(expected).max())), path
    for path in needs.moments:
        assert found.statistics.moment(path) == pytest.approx(calibration.moment(path), abs=1e-4)
    wider = gathering.HEADROOM  # for what other scenes may have
    for path in needs.ranges:
        expected = wider * np.array(calibration.range(path, "percentile"))
        assert found.statistics.range(path, "percentile") == pytest.approx(expected, rel=0.02)
    for path in needs.changed:
        expected = wider * np.array(calibration.changed_range(path, "percentile"))
        assert found.statistics.changed_range(path, "percentile") == pytest.approx(expected, rel=0.02)
    for layer in range(job.spec.text.depth if needs.caches else 0):
        assert found.statistics.cache(layer, "key") == pytest.approx(wider * calibration.cache(layer, "key"), rel=1e-4)
        if needs.changed_values:
            assert found.statistics.changed_values(layer) == pytest.approx(wider * calibration.changed_values(layer), rel=1e-4)
    assert needs.changed_values == (name == "rotated cache")
    assert len(found.reference) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_an_export_without_calibration_says_where_its_statistics_come_from(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(gathering, "MOMENT_SCENES", 3)
    monkeypatch.setattr(gathering, "RANGE_SCENES", 2)
    said: list[str] = []
    bundle = export(options(folder, name, tmp_path, parity=1), say=said.append)
    provenance, scenes = bundle.manifest.provenance, 3 if name == "gptq" else 2
    assert (provenance.calibration, provenance.calibration_sha256) == (f"embedded scenes ({scenes})", None)
    assert f"of {scenes} embedded scenes (--calibration takes yours)" in said[0]
    assert "the reference of the check on 1 more" in said[0]
    assert "layers" in said[1]
    assert ("second moments" in said[0]) == (name == "gptq")
    assert bundle.manifest.parity.agreement > 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", f"{name}.toml"]
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_a_recipe_that_needs_nothing_takes_no_pass_without_a_check(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "observe_checkpoint", lambda *args, **more: pytest.fail("a pass was made"))
    made = export(ExportOptions(checkpoint=folder, output=tmp_path / "b", precision="bf16", parity=1))
    assert made.manifest.provenance.calibration is None


def test_a_calibration_goes_before_embedded_scenes(folder, tmp_path):
    calibration = for_recipe(folder, "static", tmp_path, samples=1)
    made = export(options(folder, "static", tmp_path, calibration=calibration.path))
    assert made.manifest.provenance.calibration is None
    assert made.manifest.provenance.calibration_sha256 == calibration.digest


@pytest.mark.parametrize(
    ("made_for", "used_by", "missing"),
    [
        ("cache", "gptq", r"moment/"),
        ("gptq", "static", r"range/"),
        ("scaled", "cache", r"cache/0/key"),
        ("static", "rotated", r"changed/"),
        ("cache", "rotated cache", r"changed/0/value"),
    ],
)
def test_what_a_calibration_lacks_for_another_recipe_is_named_with_the_command(folder, tmp_path, made_for, used_by, missing):
    calibration = for_recipe(folder, made_for, tmp_path, samples=1)
    with pytest.raises(UsageError, match=rf"was made without .*{missing}.*`pgx calibrate --for \S*{used_by}"):
        export(options(folder, used_by, tmp_path, calibration=calibration.path))
    assert not (tmp_path / "b").exists()


def test_inputs_changed_in_another_way_are_not_taken_for_these(folder, tmp_path, monkeypatch):
    calibration = for_recipe(folder, "rotated", tmp_path, samples=1)
    other = recipe_of("rotated", replace(STATIC, scaling="smoothquant", alpha=0.7, rotate=16), EIGHT, EIGHT)
    monkeypatch.setitem(RECIPES, "rotated", other)
    with pytest.raises(UsageError, match=r"was made without changed/"):
        export(options(folder, "rotated", tmp_path, calibration=calibration.path))


def test_calibrate_for_a_recipe_holds_what_that_needs_and_nothing_else(folder, tmp_path):
    calibration = for_recipe(folder, "cache", tmp_path, samples=1)
    assert (calibration.about.recipe, calibration.about.moments) == ("cache", False)
    assert not any(calibration.moment(path) is not None for path in calibration.inputs)
    with pytest.raises(UsageError, match=r"without 'range/"):
        calibration.range(next(iter(calibration.inputs)), "minmax")
    assert calibration.about.command.endswith("--for cache.toml")
    again = Calibration.open(calibration.path)
    assert again.digest == calibration.digest


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("none", {}, "none"),
        ("fp16", {}, "needs nothing that a calibration measures"),
        ("w8a8-static", {"moments": True}, "has no use for second moments.*leave --moments away"),
        ("int4-gptq", {"moments": False}, "has a use for second moments.*leave --no-moments away"),
    ],
)
def test_a_recipe_that_cannot_be_calibrated_for_is_refused(folder, tmp_path, recipe, more, message):
    with pytest.raises(UsageError, match=message):
        calibrate(CalibrateOptions(tmp_path / "c", checkpoint=folder, samples=1, recipe=recipe, **more))
    assert not (tmp_path / "c").exists()


def test_the_check_compares_an_even_subset_and_all_where_asked(tmp_path, folder):
    """256 of a picture's patches at most, 64 of the models that are published; what was compared is in the manifest."""
    assert check_tokens(prepare(options(folder, "cache", tmp_path)).spec, None) == CHECK_TOKENS[0] == 256
    assert check_tokens(published("paligemma2", "3b", 224), None) == CHECK_TOKENS[1] == 64
    assert check_tokens(published("paligemma2", "28b", 896), None) == CHECK_TOKENS[1]
    assert check_tokens(published("paligemma2", "28b", 896), 0) == 4096
    tables = {}
    for asked in (None, 4, 0):
        tables[asked] = export(options(folder, "cache", tmp_path, parity=1, parity_tokens=asked, overwrite=True)).manifest.parity
    assert [tables[asked].image_tokens for asked in (None, 4, 0)] == [9, 4, 9]
    assert tables[None] == tables[0]
    assert tables[4].kl != tables[0].kl


def test_the_commands_say_what_they_did(folder, tmp_path):
    (tmp_path / "cache.toml").write_text(to_toml(RECIPES["cache"]))
    command = ["export", "--checkpoint", str(folder), "--recipe", str(tmp_path / "cache.toml"), "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, [*command, "--parity-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert "statistics of 8 embedded scenes" in done.stderr
    assert "(4 of 9 image tokens; --parity-tokens all)" in done.stdout
    done = CliRunner().invoke(cli, [*command, "--overwrite", "--parity-tokens", "all"])
    assert "image tokens" not in done.stdout
    assert CliRunner().invoke(cli, [*command, "--overwrite", "--parity-tokens", "none"]).exit_code == 2
    calibration = ["calibrate", str(folder), "--samples", "1", "--for", str(tmp_path / "cache.toml"), "-o", str(tmp_path / "c")]
    done = CliRunner().invoke(cli, calibration)
    assert done.exit_code == 0, done.output
    assert (
        f"try: pgx export --checkpoint {folder} --recipe {tmp_path / 'cache.toml'} --calibration {tmp_path / 'c'}" in done.stdout
    )
