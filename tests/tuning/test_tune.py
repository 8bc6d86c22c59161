# SPDX-License-Identifier: Apache-2.0
"""pgx tune: its search against enumeration, its measurements against the runner, and what a kill leaves of it."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from pgxport import cli
from pgxport.data.scenes import scene_samples
from pgxport.errors import EngineError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.inputs.scaling import sites
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe import Scheme
from pgxport.exporter.recipe_toml import read_recipe, to_toml
from pgxport.exporter.recipes import NORMS, RECIPE_NAMES
from pgxport.exporter.targets import CPU
from pgxport.metrics.sample import Sample
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.spec import published
from pgxport.models.weights import output_matrix, weight_shapes
from pgxport.reporting.asking import compare_and_answer
from pgxport.reporting.store import alone
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.runner import Runner
from pgxport.tuning import bundles, score, tune
from pgxport.tuning.candidates import CANDIDATES, FLOAT, Group, chosen, groups, options, recipe
from pgxport.tuning.loss import Loss, loss
from pgxport.tuning.result import Limits, Tuning
from pgxport.tuning.score import ReferenceAnswers, features_of, prefix_of, score_here
from pgxport.tuning.search import Option, front, spread
from pgxport.tuning.tune import TuneOptions

TINY = Path(tune.__file__).parents[1] / "models" / "tiny" / "tiny-112"


# The search ---------------------------------------------------------------------------------------------------------


def random_table(seed: int) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    return {
        f"group {g}": [
            Option(f"o{i}", int(rng.integers(-50, 1)), float(rng.integers(-9, 3)), float(rng.integers(0, 1000)) / 8)
            for i in range(4)
        ]
        for g in range(5)
    }


def every_choice(table: dict[str, list[Option]]) -> list[tuple[int, float, float]]:
    """(bytes, ms, loss) of all there are."""
    picks = itertools.product(*table.values())
    return [(sum(o.nbytes for o in p), sum(o.ms for o in p), sum(o.loss for o in p)) for p in picks]


@pytest.mark.parametrize("seed", range(8))
def test_the_front_is_that_of_exhaustive_enumeration(seed):
    table = random_table(seed)
    best: list[tuple[int, float]] = []
    for nbytes, _, lost in sorted(every_choice(table), key=lambda c: (c[0], c[2])):
        if not best or lost < best[-1][1]:
            best.append((nbytes, lost))
    found = front(table)
    assert [(c.nbytes, c.loss) for c in found] == best
    for choice in found:
        picked = [next(o for o in table[g] if o.name == name) for g, name in choice.names.items()]
        assert (choice.nbytes, choice.ms, choice.loss) == tuple(
            sum(getattr(o, k) for o in picked) for k in ("nbytes", "ms", "loss")
        )


@pytest.mark.parametrize("seed", range(8))
def test_a_limit_of_time_is_kept_and_costs_no_more_than_rounding(seed):
    table, limit = random_table(seed), -15.0
    found = front(table, max_ms=limit)
    assert found
    assert all(c.ms <= limit for c in found)
    # Times are rounded up to bins, which are finer than this.
    for nbytes in {c.nbytes for c in found}:
        ours = min(c.loss for c in found if c.nbytes <= nbytes)
        strict = min(lost for b, ms, lost in every_choice(table) if b <= nbytes and ms <= limit)
        looser = [lost for b, ms, lost in every_choice(table) if b <= nbytes and ms <= limit - 5]
        assert strict <= ours <= min(looser, default=np.inf)


def test_where_no_choice_is_fast_enough_there_is_none():
    table = random_table(0)
    fastest = sum(min(o.ms for o in options) for options in table.values())
    assert front(table, max_ms=fastest - 0.5) == []
    assert next(c.ms for c in front(table, max_ms=fastest)) == fastest


def test_some_of_a_front_keep_its_ends():
    found = front(random_table(3))
    some = spread(found, 4)
    assert (some[0], some[-1]) == (found[0], found[-1])
    assert len(some) <= 6
    assert spread(found, 1000) == found


# Groups and recipes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "untied", "3b", "paligemma-3b"])
def spec(request):
    if request.param in ("tiny", "untied"):
        tiny = read_config(Checkpoint.open(TINY).config)
        return replace(tiny, text=replace(tiny.text, tied=request.param == "tiny"))
    return published("paligemma2" if request.param == "3b" else "paligemma", "3b", 224)


def members(group: Group, names: list[str]) -> set[str]:
    patterns = [p.format(layer) for p in group.patterns for layer in group.layers or ("",)]
    return {n for n in names if any(fnmatchcase(n, p) for p in patterns)}


def test_every_matrix_that_is_multiplied_by_is_in_one_group(spec):
    shapes = weight_shapes(spec)
    linears = {n for n, shape in shapes.items() if len(shape) == 2 and "position" not in n}
    found = [members(g, list(shapes)) for g in groups(spec)]
    assert set().union(*found) == linears
    assert sum(map(len, found)) == len(linears)


def test_linears_that_share_an_input_are_in_one_group(spec):
    found = [members(g, list(weight_shapes(spec))) for g in groups(spec)]
    for site in sites(spec):
        assert sum(bool(group & set(site.linears)) for group in found) == 1


def test_a_choices_recipe_gives_every_group_its_scheme(spec, tmp_path):
    shapes, found, rng = weight_shapes(spec), groups(spec), np.random.default_rng(7)
    for _ in range(2):
        choice = {g.name: list(CANDIDATES)[rng.integers(len(CANDIDATES))] for g in found}
        made = recipe("tuned", found, choice)
        made.check(shapes)
        CPU.check(made)
        for g in found:
            for name in members(g, list(shapes)):
                scheme = CANDIDATES[choice[g.name]]
                fixed = not any(name in site.linears for site in sites(spec))
                scheme = replace(scheme, scaling="none", alpha=0.5, rotate=None) if fixed else scheme
                table, output = "embed_tokens" in name, name == output_matrix(spec.text)
                expected = scheme if output else replace(scheme, shortlist=False)
                expected = replace(expected, symmetric=True) if table or output else expected
                if table and not output and expected.method == "gptq":
                    expected = replace(expected, method="nearest")
                assert made.scheme(name) == expected, name
        assert all(made.scheme(n) == NORMS.scheme for n in shapes if "norm" in n)
        (tmp_path / "r.toml").write_text(to_toml(made))
        assert read_recipe(tmp_path / "r.toml") == made


def test_the_named_recipes_lie_in_the_space_that_is_searched(spec):
    shapes, found = weight_shapes(spec), groups(spec)
    # Every group in another kind of float; or all of the decoder twice, which is no choice of a group's.
    for name in set(RECIPE_NAMES) - {"fp32", "bf16", "fp8", "mixed"}:
        named = CPU.recipe(name).fitted(shapes)
        choice = {}
        for g in found:
            schemes = {named.scheme(n) for p in g.patterns for n in members(replace(g, patterns=(p,)), list(shapes))}
            fitting = [c for c in CANDIDATES if {g.scheme(p, c) for p in g.patterns} == schemes]
            assert fitting, f"{name} stores {g.name} in {schemes}, and no candidate does"
            choice[g.name] = fitting[0]
        made = recipe("same", found, choice)
        assert all(made.scheme(n) == named.scheme(n) for n in shapes)


def test_candidates_that_need_second_moments_are_left_out_without_a_calibration():
    assert not any(CANDIDATES[name].method == "gptq" for name in chosen((), calibrated=False))
    assert len(chosen((), calibrated=False)) >= 8
    assert chosen((), calibrated=True) == list(CANDIDATES)
    assert chosen(("w4-g32",), calibrated=False) == [FLOAT, "w4-g32"]
    with pytest.raises(UsageError, match="choose float16, w8-dynamic"):
        chosen(("w5",), calibrated=False)


def test_a_candidate_that_is_the_same_as_another_for_a_group_is_not_tried_twice(spec, monkeypatch):
    table, projector, attention = (
        next(g for g in groups(spec) if start in g.name) for start in ("token table", "projector", "attention")
    )
    monkeypatch.setitem(CANDIDATES, "clip", Scheme(bits=4, group_size=32, symmetric=False, method="clip"))
    both = ["clip", "w4-g32-clip"]
    # Rows of the table are looked up: they are neither scaled nor rotated.
    assert (options(table, both), options(projector, both), options(attention, both)) == (["clip"], both, both)


# Losses -------------------------------------------------------------------------------------------------------------


def answer(text: str) -> Answer:
    return Answer(text, tuple(map(ord, text)), (), (), (), truncated=False, timings={})


def test_points_lost_are_the_mean_of_the_tasks():
    samples = [
        Sample(str(i), bytes([i]), "q", task, "exact_match", ("a",)) for i, task in enumerate(["ocr"] * 4 + ["answer"] * 2)
    ]
    before = [answer(t) for t in "aaaaab"]
    after = [answer(t) for t in "aaabbb"]
    found = loss(samples, after, before)
    assert found.tasks == {"ocr exact match": 25.0, "answer exact match": 50.0}
    assert found.points == pytest.approx(37.5)
    assert found.changed == 2
    assert found.low <= found.points <= found.high
    assert loss(samples, before, after).points == pytest.approx(-37.5)


def test_doubt_says_how_many_samples_would_tell():
    wide = Loss(0.5, -3.5, 4.5, {}, 3, 100)
    assert "± 4 points, wider than the limit of 1; about 1,600 samples" in wide.doubt(1)
    assert Loss(0.5, 0.1, 0.9, {}, 3, 100).doubt(1) is None
    # Without any change the interval is a point, which knows only what was drawn.
    assert "up to 3 points may be hidden" in Loss(0, 0, 0, {}, 0, 100).doubt(1)
    assert Loss(0, 0, 0, {}, 0, 300).doubt(1) is None


# The whole ----------------------------------------------------------------------------------------------------------

# A model of three groups, the others of which stay floats, and some of the named recipes.
FEW = ("token table", "vision 0–1 mlp", "decoder 3 gate,up")
ASKED = {"size": "tiny", "res": 112, "samples": 2, "candidates": ("w8-dynamic", "w4-g32"), "max_loss": 60.0, "threads": 1}


NAMED = ("fp32", "fp16", "fp8", "int8", "int4-gptq")


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "groups", lambda spec: [g for g in groups(spec) if g.name in FEW])
        patch.setattr(tune, "RECIPE_NAMES", NAMED)
        patch.setattr(score, "ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def tuned(few, tmp_path_factory) -> tuple[Tuning, Path]:
    folder = tmp_path_factory.mktemp("tune")
    return tune.tune(TuneOptions(output=folder / "recipe.toml", **ASKED)), folder


def again(folder: Path, **changes) -> Tuning:
    return tune.tune(TuneOptions(output=folder / "recipe.toml", overwrite=True, **(ASKED | changes)))


def test_two_tunes_do_not_work_in_one_folder(tuned):
    folder = tuned[1]
    with alone(folder / "recipe.toml.work", "--work"), pytest.raises(UsageError, match="another pgx works"):
        again(folder)


def without_times(found: Tuning) -> dict:
    """What has to be the same however often it is measured."""
    plain = json.loads(json.dumps(found.to_json()))
    for m in [plain["float"], *plain["wholes"], *plain["probes"]]:
        del m["ms"], m["stages"]
        m.pop("on_front", None)
    for mix in plain["mixes"].values():
        del mix["expected_ms"]
    del plain["machine"], plain["reference"]["ms"], plain["output"]
    return plain


@pytest.fixture
def exports(monkeypatch) -> list[str]:
    """The recipes that are exported, the float one apart."""
    done = []

    def counted(o: ExportOptions):
        if o.recipe:
            done.append(Path(o.recipe).read_text())
        return export(o)

    monkeypatch.setattr(bundles, "export", counted)
    return done


def test_the_winner_is_written_and_exports_to_what_was_measured(tuned, tmp_path):
    found, folder = tuned
    winner = found.winner
    assert winner == min((m for m in found.wholes if m.loss.points <= 60), key=lambda m: (m.nbytes, m.kl))
    text = (folder / "recipe.toml").read_text()
    assert f"KL {winner.kl:.3g} nats" in text
    assert "Chosen by pgx tune for --size tiny --res 112" in text
    assert read_recipe(folder / "recipe.toml").rules == winner.recipe.rules
    made = export(ExportOptions(output=tmp_path / "b", size="tiny", res=112, recipe=folder / "recipe.toml", parity=0))
    # The manifest says the recipe's name, and the time.
    assert abs(made.nbytes - winner.nbytes) < 200


def test_every_group_was_tried_in_every_candidate(tuned):
    found, _ = tuned
    assert {(p.group, p.candidate) for p in found.probes} == set(itertools.product(FEW, ["w8-dynamic", "w4-g32"]))
    assert all(p.measured.kl > found.base.kl and p.measured.nbytes < found.base.nbytes for p in found.probes)
    kl = {(p.group, p.candidate): p.measured.kl for p in found.probes}
    assert all(kl[g, "w4-g32"] > kl[g, "w8-dynamic"] for g, _ in kl)
    assert [m.label for m in found.named] == ["fp32", "fp16", "int8"]
    assert [reason.partition(":")[0] for reason in found.skipped] == ["fp8", "int4-gptq"]


def test_a_named_recipe_is_beaten_at_its_size_or_it_is_said_why_not(tuned):
    found, _ = tuned
    said = found.comparisons()
    assert said.keys() == {m.label for m in found.named}
    for m in found.named:
        beaten = [
            x
            for x in found.mixes
            if x.measured.nbytes <= m.nbytes and x.measured.kl <= m.kl and x.measured.recipe.rules != m.recipe.rules
        ]
        assert bool(beaten) == ("beats it" in said[m.label]), said[m.label]


def test_what_was_measured_is_not_measured_again(tuned, exports, tmp_path):
    found, folder = tuned
    once_more = again(folder)
    assert exports == []
    assert without_times(once_more) == without_times(found)
    assert [m.ms for m in once_more.wholes] == [m.ms for m in found.wholes]


def test_answers_of_the_float_model_that_were_deleted_are_asked_for_again(tuned, exports):
    found, folder = tuned
    (logits,) = folder.glob("recipe.toml.work/reference-*/logits-3.npy")
    logits.unlink()
    assert without_times(again(folder)) == without_times(found)
    assert logits.exists()
    assert exports == []


def kept_results(folder: Path) -> list[str]:
    """The whole lines of results, without the conditions."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines(keepends=True)[1:]]
    return [line for line in lines if line.endswith("\n")]


def test_a_tune_that_was_killed_goes_on_to_the_same_result(tuned, exports, tmp_path):
    found, folder = tuned
    code = (
        "from pgxport.tuning import score, tune\nscore.ROUNDS = 2\nfrom pgxport.tuning.candidates import groups\n"
        f"tune.RECIPE_NAMES = {NAMED!r}\n"
        f"tune.groups = lambda spec: [g for g in groups(spec) if g.name in {FEW!r}]\n"
        f"tune.tune(tune.TuneOptions(output={str(tmp_path / 'recipe.toml')!r}, **{ASKED!r}))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    results = tmp_path / "recipe.toml.work" / "results"
    shutil.copytree(folder / "recipe.toml.work", results.parent)
    (file,) = results.glob("*.jsonl")
    begun = file.read_text().splitlines(keepends=True)[:7]  # the conditions, the reference, whole recipes and a probe
    file.write_text("".join(begun))
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    deadline = time.monotonic() + 120
    while len(kept_results(results)) < len(begun) + 1:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(kept_results(results))
    assert not (tmp_path / "recipe.toml").exists()
    rest = tune.tune(TuneOptions(output=tmp_path / "recipe.toml", **ASKED))
    assert without_times(rest) == without_times(found)
    assert len(set(exports)) == len(exports)
    # All results but the reference are of exports.
    assert len(exports) == len(kept_results(results)) - kept

    def body(file: Path) -> str:
        return "".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith("#"))

    assert body(tmp_path / "recipe.toml") == body(folder / "recipe.toml")


def test_limits_of_size_and_time_are_kept(tuned):
    found, folder = tuned
    sizes, times = [m.nbytes for m in found.wholes], [m.ms for m in found.wholes]
    small = again(folder, max_size=(min(sizes) + 1) / 1e6)
    assert small.winner is not None
    assert small.winner.nbytes <= min(sizes) + 1
    quick = again(folder, max_latency=sorted(times)[len(times) // 2])
    assert quick.winner is None or quick.winner.ms <= sorted(times)[len(times) // 2]
    exact = again(folder, max_loss=0.0)
    assert exact.winner is not None
    assert exact.winner.loss.points <= 0


def test_limits_that_nothing_keeps_end_with_code_8_and_the_nearest(tuned, monkeypatch, capsys):
    _, folder = tuned
    output = folder / "none.toml"
    words = "tune --size tiny --res 112 --samples 2 --candidates w8-dynamic,w4-g32 --max-loss 60% --threads 1 --max-size 0.5"
    monkeypatch.setattr(sys, "argv", ["pgx", *words.split(), "--work", str(folder / "recipe.toml.work"), "-o", str(output)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 8
    printed = capsys.readouterr()
    assert "whole bundles" in printed.out
    assert "none of" in printed.err
    assert "The nearest, " in printed.err
    assert not output.exists()


def test_the_command_prints_the_front_and_what_to_do_next(tuned, monkeypatch, capsys):
    _, folder = tuned
    words = "tune --size tiny --res 112 --samples 2 --candidates w8-dynamic,w4-g32 --max-loss 60 --threads 1 --overwrite"
    output = str(folder / "recipe.toml")
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["pgx", *words.split(), "-o", output, *more])
        cli.main()
        printed = capsys.readouterr().out
        if more:
            assert json.loads(printed)["winner"]
        else:
            assert f"try: pgx export --size tiny --res 112 --recipe {output} -o tuned" in printed
            assert all(f"  {name}\n" in printed for name in ("fp32", "fp16", "int8"))


def test_answers_beside_a_reference_are_those_of_the_runner(tiny_112, tmp_path):
    every = groups(read_config(Checkpoint.open(TINY).config))
    (tmp_path / "r.toml").write_text(to_toml(recipe("rough", every, {g.name: "w4-g128" for g in every})))
    rough = export(ExportOptions(output=tmp_path / "rough", size="tiny", res=112, recipe=tmp_path / "r.toml", parity=0))
    samples = scene_samples(3)
    differ = 0
    with Runner.from_pretrained(tiny_112, threads=1) as exact, Runner(rough, threads=1) as runner:
        asked, every_one = ReferenceAnswers(samples, tmp_path / "kept"), range(len(samples))
        asked.answer_all(exact, lambda text: None)
        here = partial(score_here, runner)
        found = asked.score(every_one, "v", here, keep=True)
        for i, sample in enumerate(samples):
            assert asked.ids[i] == list(exact.answer(sample.open(), sample.prompt).token_ids)
            assert found.ids[i] == list(runner.answer(sample.open(), sample.prompt).token_ids)
            differ += found.ids[i] != asked.ids[i]
        assert asked.score(every_one, "v", here, keep=True) == found  # from kept features
        same = asked.score(every_one, "w", partial(score_here, exact), keep=False)
        assert (same.ids, same.kl, same.agreement) == (asked.ids, 0.0, 1.0)
        # Cut off at the bundle's limit, as the runner does.
        pipeline = exact
        short = replace_limit(pipeline, 2)
        prefix, given = prefix_of(pipeline, samples[0], features_of(pipeline, samples[0])), asked.ids[0][:2]
        logits = np.stack([row.copy() for row in pipeline.teacher_forced(prefix, given)])
        agreement, ids = compare_and_answer(short, prefix, given, logits)
        assert (agreement.positions, agreement.agreed, agreement.kl, ids) == (3, 3, 0.0, given)
    assert differ
    assert found.kl > 0


def replace_limit(pipeline: Pipeline, tokens: int) -> Pipeline:
    """The same sessions with another limit."""
    other = copy.copy(pipeline)
    other.manifest = pipeline.manifest.model_copy(update={"max_new_tokens": tokens})
    return other


def test_mistakes_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("pgxport.machine.driver.LIBRARY", "libcuda-of-a-machine-without-driver.so")
    for error, match, changes in (
        (UsageError, "--max-loss nan", {"max_loss": float("nan")}),
        (UsageError, "'w5' does not exist", {"candidates": ("w5",)}),
        (UsageError, "name one model", {"size": None}),
        (EngineError, "does not run target 'cuda'", {"target": "cuda"}),
        (EngineError, "has to be compiled first", {"target": "tensorrt"}),
    ):
        with pytest.raises(error, match=match):
            tune.tune(TuneOptions(output=tmp_path / "recipe.toml", **(ASKED | changes)))
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_no_bundle_would_be_asked_is_left_out(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "prompt": "ocr", "answer": str(n)} for n in range(9)] + [
        {"image": "a.png", "prompt": "word " * 900, "answer": "x"}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subject = tune.tuned_model(TuneOptions(size="tiny", res=112, data=tmp_path / "rows.jsonl"))
    assert len(subject.samples) == 9
    (remark,) = subject.remarks
    assert f"{tmp_path}/rows.jsonl:10: the prompt of 4499 characters makes a prefix of " in remark


def test_a_bundle_is_over_a_limit_by_its_part(tuned):
    found, _ = tuned
    m = replace(found.base, nbytes=200, ms=3.0, loss=replace(found.base.loss, points=1.5))
    assert Limits(1.0, 2.0, 100).excess(m) == pytest.approx(0.5 + 0.5 + 1.0)
    assert Limits(1.5, None, None).excess(m) == 0
