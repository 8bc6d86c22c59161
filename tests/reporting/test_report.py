# SPDX-License-Identifier: Apache-2.0
"""pgx report on real bundles: planted ones are reported as what they are, and being killed changes nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import PAYLOADS, Page, assert_harmless
from PIL import Image

from pgxport import cli
from pgxport.bundle.manifest import MANIFEST
from pgxport.data.loader import DataOptions
from pgxport.errors import IntegrityError, UsageError
from pgxport.files import file_sha256
from pgxport.machine.clocks import Clocks
from pgxport.reporting import files
from pgxport.reporting.schema import Device, Report

pytest.importorskip("onnxruntime")
for library in ("altair", "vl_convert", "sacrebleu", "rouge_score", "pycocotools"):
    pytest.importorskip(library)

from pgxport.reporting.report import ReportOptions, merge, report  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are killed as Linux does it")
FEW, FEWER = DataOptions(limit=3), DataOptions(limit=2)  # of each of five tasks


def copied(bundle: Path, to: Path) -> Path:
    shutil.copytree(bundle, to)
    return to


def resealed(bundle: Path, name: str) -> None:
    """Let the manifest promise what a file holds now."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": file_sha256(bundle / name), "size": (bundle / name).stat().st_size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def options(output: Path, *bundles: Path, **more: Any) -> ReportOptions:
    return ReportOptions(tuple(map(str, bundles)), output, **{"data": FEW, "threads": 1, **more})


@pytest.fixture(scope="module")
def planted(tiny_112: Path, tiny_224: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, list[str]]:
    """A sound bundle, a slow one, an inaccurate one, one without a graph, and one that is truncated while it is measured."""
    folder = tmp_path_factory.mktemp("planted")
    sound, slow = copied(tiny_112, folder / "sound"), copied(tiny_224, folder / "slow")
    coarse = copied(tiny_112, folder / "inaccurate")
    table = np.fromfile(coarse / "token_table.bin", np.float32)
    noise = np.random.default_rng(0).normal(0, 1.5 * table.std(), table.shape)
    (table + noise).astype(np.float32).tofile(coarse / "token_table.bin")
    # The decoder multiplies by the same bytes, so that every logit is wrong as well.
    resealed(coarse, "token_table.bin")
    missing = copied(tiny_112, folder / "missing")
    (missing / "decoder_step.onnx").unlink()
    crashing = copied(tiny_112, folder / "crashing")
    said: list[str] = []

    def progress(what: str) -> None:
        said.append(what)
        if what.startswith("sample 3 of 15: crashing"):
            for file in crashing.glob("*.data"):
                os.truncate(file, 0)

    # True answers have 30 tokens at most; the inaccurate bundle would go on to 256.
    given = options(folder / "report", sound, slow, coarse, missing, crashing, max_new_tokens=40)
    made = report(given, progress=progress)
    return made, folder / "report", said


def rows(made: Report) -> dict[str, Any]:
    return {row.label: row for row in made.devices[0].rows}


def test_the_sound_bundle_is_the_reference(planted: tuple[Report, Path, list[str]]):
    device = planted[0].devices[0]
    assert device.reference == "sound"
    sound = rows(planted[0])["sound"]
    assert (sound.status, sound.measured, sound.refused, sound.fidelity) == ("ok", 15, 0, None)
    assert sound.quality.low <= sound.quality.value <= sound.quality.high
    assert sound.seconds["first_token"].p50 < sound.seconds["answer"].p50
    assert sound.peak.private > 0
    assert sound.load_seconds.keys() == {"verify", "load"}


def test_a_slow_bundle_is_called_slow(planted: tuple[Report, Path, list[str]]):
    assert rows(planted[0])["slow"].status == "ok"
    said = [f.text for f in planted[0].devices[0].verdict if f.kind == "no gain"]
    assert any(text.startswith("Did not pay here: neither faster nor smaller than sound: slow ×") for text in said), said


def test_an_inaccurate_bundle_is_below_the_gate(planted: tuple[Report, Path, list[str]]):
    row = rows(planted[0])["inaccurate"]
    assert row.kept.high < 0.99
    assert any(score.change.verdict == "worse" for score in row.scores)
    assert row.fidelity.top1 < 0.9
    assert row.fidelity.kl > 0.1
    assert row.fidelity.diverged > 0
    assert any(f.kind == "gate" and "inaccurate " in f.text for f in planted[0].devices[0].verdict)
    assert not any(f.kind == "best" and "inaccurate" in f.text for f in planted[0].devices[0].verdict)


def test_what_is_no_bundle_is_a_row_with_its_reason(planted: tuple[Report, Path, list[str]]):
    row = rows(planted[0])["missing"]
    assert (row.status, row.exit_code, row.measured) == ("failed", 4, 0)
    assert "decoder_step.onnx is missing" in row.reason


def test_a_bundle_that_crashes_is_a_row_and_the_others_go_on(planted: tuple[Report, Path, list[str]]):
    row = rows(planted[0])["crashing"]
    assert row.status == "failed"
    assert "ended by signal 7" in row.reason  # SIGBUS, of the mapped weights
    assert 0 < row.measured < 15
    page = (planted[1] / "report.html").read_text()
    assert "FAILED: its process was ended by signal 7" in page
    assert "ended by signal 7" in (planted[1] / "report.md").read_text()
    assert "ended by signal 7" in (planted[1] / "results.csv").read_text()


def test_bundles_are_asked_in_turn_and_who_begins_moves_on(planted: tuple[Report, Path, list[str]]):
    asked = [line.partition(": ")[2].partition(":")[0] for line in planted[2] if line.startswith("sample ")]
    turn = [name for name in asked if not name.startswith("along")]
    assert turn[:8] == ["sound", "slow", "inaccurate", "crashing", "slow", "inaccurate", "crashing", "sound"]
    assert planted[2][-1] == "working out intervals"
    assert any(line.endswith(" left") for line in planted[2])


def test_pictures_show_where_answers_differ(planted: tuple[Report, Path, list[str]]):
    device = planted[0].devices[0]
    assert device.disagreements
    first = device.disagreements[0]
    lost = {said.label: said.score for said in first.answers}
    assert lost["sound"] > lost["inaccurate"] or lost["sound"] > lost["slow"]  # failures first
    drawn = [said.picture for d in device.disagreements for said in d.answers if said.picture]
    assert drawn
    page = (planted[1] / "report.html").read_text()
    assert page.count("data:image/webp;base64,") >= len(device.disagreements)
    assert len(page) < 5_000_000
    assert {file.name for file in (planted[1] / "pictures").iterdir()} >= set(drawn)


def test_the_json_can_be_read_again(planted: tuple[Report, Path, list[str]]):
    assert files.read(planted[1]) == planted[0]


def test_reports_are_joined_each_with_its_environment(planted: tuple[Report, Path, list[str]], tmp_path: Path):
    other = planted[0].model_copy(update={"devices": (_renamed(planted[0].devices[0], "Jetson Orin Nano"),)})
    files.write(other, files.read_pictures(planted[0], planted[1]), tmp_path / "other")
    made = merge([planted[1] / "report.json", tmp_path / "other"], tmp_path / "both")
    assert [device.name for device in made.devices] == [planted[0].devices[0].name, "Jetson Orin Nano"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "data:image/webp" in page
    with pytest.raises(UsageError, match="two or more"):
        merge([planted[1]], tmp_path / "one")


def _renamed(device: Device, name: str) -> Device:
    return device.model_copy(update={"name": name, "environment": device.environment.model_copy(update={"processor": name})})


# Being stopped


def told(made: Report) -> Any:
    """What a report says that does not depend on a clock."""
    kept = ("label", "status", "digest", "measured", "quality", "kept", "scores", "fidelity", "empty", "malformed", "truncated")
    return [[getattr(row, name) for name in kept] for row in made.devices[0].rows], made.devices[0].disagreements


def lines(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (output / "measured").glob("*.jsonl")}


@pytest.fixture(scope="module")
def two(tiny_112: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles that answer differently."""
    folder = tmp_path_factory.mktemp("two")
    other = copied(tiny_112, folder / "other")
    table = np.fromfile(other / "token_table.bin", np.float32)
    (table + np.random.default_rng(1).normal(0, 0.3 * table.std(), table.shape)).astype(np.float32).tofile(
        other / "token_table.bin"
    )
    resealed(other, "token_table.bin")
    return tiny_112, other


@pytest.fixture(scope="module")
def whole(two: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    output = tmp_path_factory.mktemp("whole") / "report"
    return report(options(output, *two, data=FEWER)), output


def test_three_kills_change_nothing(two: tuple[Path, Path], whole: tuple[Report, Path], tmp_path: Path):
    output = tmp_path / "report"
    command = [sys.executable, "-m", "pgxport", "report", *map(str, two), "--limit", "2", "--threads", "1", "-o", str(output)]
    before: dict[str, bytes] = {}
    for enough in (4, 14, 24):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while sum(content.count(b"\n") for content in lines(output).values()) < enough:
            assert process.poll() is None, "it came to its end before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
        after = lines(output)
        for name, content in before.items():
            assert after[name].startswith(content[: content.rfind(b"\n") + 1]), "a measured line was changed"
        before = after
    assert not (output / "report.json").exists()
    made = report(options(output, *two, data=FEWER))
    assert told(made) == told(whole[0])
    for content in lines(output).values():
        asked = [line["sample"] for line in map(json.loads, content.splitlines()) if line["kind"] == "asked"]
        assert len(asked) == len(set(asked)) == 10, "a sample was measured twice"


def test_what_was_measured_opens_no_process(two: tuple[Path, Path], whole: tuple[Report, Path]):
    before, said = lines(whole[1]), list[str]()
    again = report(options(whole[1], *two, data=FEWER), progress=said.append)
    assert said == ["working out intervals"]
    assert lines(whole[1]) == before
    assert told(again) == told(whole[0])


def test_a_line_that_was_cut_off_is_measured_again(two: tuple[Path, Path], whole: tuple[Report, Path], tmp_path: Path):
    output = tmp_path / "report"
    shutil.copytree(whole[1] / "measured", output / "measured")
    file = max((output / "measured").glob("*.jsonl"))
    os.truncate(file, file.stat().st_size - 10)
    for _ in range(2):  # what is left of the line must not spoil the next one
        assert told(report(options(output, *two, data=FEWER))) == told(whole[0])


def test_a_line_that_is_damaged_is_an_error(two: tuple[Path, Path], whole: tuple[Report, Path], tmp_path: Path):
    output = tmp_path / "report"
    shutil.copytree(whole[1] / "measured", output / "measured")
    file = max((output / "measured").glob("*.jsonl"))
    content = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*content[:3], b'{"kind": "asked"}\n', *content[3:]]))
    with pytest.raises(IntegrityError, match=r"line 4: .*; delete the file"):
        report(options(output, *two, data=FEWER))


def test_more_samples_ask_only_for_those(two: tuple[Path, Path], whole: tuple[Report, Path], tmp_path: Path):
    output = tmp_path / "report"
    shutil.copytree(whole[1] / "measured", output / "measured")
    said: list[str] = []
    made = report(options(output, *two, data=DataOptions(limit=3)), progress=said.append)
    assert sum(": along" not in line and line.startswith("sample ") for line in said) == 2 * 5
    assert all(row.measured == 15 for row in made.devices[0].rows)


def test_other_conditions_are_measured_anew(two: tuple[Path, Path], whole: tuple[Report, Path], tmp_path: Path):
    output = tmp_path / "report"
    shutil.copytree(whole[1] / "measured", output / "measured")
    few = DataOptions(limit=1)
    report(options(output, two[0], data=few, max_new_tokens=3))
    assert len(lines(output)) == 3


def test_a_bundle_beside_itself_is_measured_twice(tiny_112: Path, tmp_path: Path):
    made = report(options(tmp_path / "report", tiny_112, tiny_112, data=DataOptions(limit=1)))
    assert [row.label for row in made.devices[0].rows] == [tiny_112.name, f"{tiny_112.name} #2"]
    assert len(lines(tmp_path / "report")) == 2
    assert made.devices[0].rows[1].fidelity.identical == 1.0
    assert made.devices[0].rows[1].fidelity.kl == 0.0


def test_a_folder_of_something_else_is_not_written_to(tiny_112: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no report"):
        report(options(tmp_path, tiny_112))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_sample_that_cannot_be_asked_is_counted_and_the_rest_go_on(tiny_112: Path, tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"image": "red.png", "prompt": p, "answer": "red"}) + "\n" for p in ("caption en", "word " * 5000))
    )
    made = report(options(tmp_path / "report", tiny_112, data=DataOptions(tmp_path / "data.jsonl")))
    (row,) = made.devices[0].rows
    assert (row.status, row.measured, row.refused) == ("ok", 2, 1)


def test_a_board_that_was_slowed_by_heat_says_so_in_its_row(tiny_112: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hot = Clocks(None, None, None, None, None, gpu_mhz=600.0, hot=("gpu-throttle-alert",))
    monkeypatch.setattr("pgxport.reporting.shared_pass.look", lambda nvml=None: hot)
    made = report(options(tmp_path / "report", tiny_112, data=DataOptions(limit=1)))
    assert made.devices[0].rows[0].notes == ("gpu-throttle-alert at the end of 5 of 5 answers",)


def test_names_prompts_and_answers_of_strangers_are_text(two: tuple[Path, Path], tmp_path: Path):
    names = [payload for payload in PAYLOADS if "/" not in payload and "\0" not in payload]
    bundles = [copied(bundle, tmp_path / name) for bundle, name in zip(two, names, strict=False)]
    data = tmp_path / names[2]
    data.mkdir()
    lines = []
    for i, payload in enumerate(PAYLOADS):
        file = names[i % len(names)] + ".png"
        Image.new("RGB", (64, 48), "red").save(data / file)
        lines.append(json.dumps({"image": file, "prompt": f"answer en {payload}", "answer": payload}))
    (data / "samples.jsonl").write_text("\n".join(lines))
    made = report(options(tmp_path / "report", *bundles, data=DataOptions(data), max_new_tokens=4, pictures=30))
    assert [row.status for row in made.devices[0].rows] == ["ok", "ok"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert_harmless(page)
    assert Page(page).tables[0][1][0] == bundles[0].name
    assert len(made.devices[0].disagreements) > 5
    assert "<" not in (tmp_path / "report" / "report.md").read_text()


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgx", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_gate_ends_with_8_and_its_reason(planted: tuple[Report, Path, list[str]], run: Callable[..., tuple[int, str, str]]):
    folder = planted[1].parent
    words = ("report", folder / "sound", folder / "inaccurate", "--limit", 3, "--threads", 1)
    words += ("--max-new-tokens", 40, "-o", planted[1])
    code, out, err = run(*words, "--gate", 0.99)
    assert code == 8
    assert "inaccurate keeps " in err
    assert "the gate is 0.99" in err
    assert len(err.splitlines()) <= 24
    assert "wrote " in out
    assert run(*words)[0] == 0
    assert run(*words, "--gate", 0)[0] == 0


def test_reports_are_joined_by_the_command(whole: tuple[Report, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    code, out, _ = run("report", "--merge", whole[1], whole[1] / "report.json", "-o", tmp_path / "both", "--json")
    assert code == 0
    assert len(json.loads(out)["devices"]) == 2
    assert (tmp_path / "both" / "report.html").exists()


def test_all_that_failed_is_a_failure(tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    code, _, err = run("report", tmp_path / "nothing", "--limit", 1, "-o", tmp_path / "report")
    assert code == 4
    assert "nothing could be measured" in err


def test_diff_of_bundles_tells_manifests_and_answers(two: tuple[Path, Path], run: Callable[..., tuple[int, str, str]]):
    code, out, _ = run("diff", *two)
    assert code == 0
    assert "token_table.bin: " in out
    assert "other content of the same size" in out
    code, out, err = run("diff", *two, "--limit", 2, "--gate", 1.0, "--threads", 1)
    assert "quality: 100 % → " in out
    assert (code == 8) == ("keeps" in err)
    code, out, _ = run("diff", two[0], two[0])
    assert out.strip().endswith("no difference")
    assert run("diff", *two, "--gate", 0.9)[0] == 2


def test_diff_of_reports_tells_metrics(whole: tuple[Report, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    worse = json.loads((whole[1] / "report.json").read_text())
    worse["devices"][0]["rows"][1]["quality"]["value"] *= 0.5
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    code, out, err = run("diff", whole[1], tmp_path / "worse.json", "--gate", 0.99)
    assert code == 8
    assert ", quality: " in out
    assert "keeps 50.0%" in err
    assert run("diff", whole[1], whole[1], "--gate", 0.99)[:2] == (0, f"{whole[1]} and {whole[1]}: no difference\n")
    assert run("diff", whole[1], tmp_path / "worse.json", "--json")[0] == 0


def records_of(folder: Path, *, missing: int = 0) -> Path:
    """Captions, a picture without what is asked for, a box without area, and records whose picture is not there."""
    Image.new("RGB", (64, 48), "green").save(folder / "lawn.png")
    rows = [{"image": "lawn.png", "prefix": "caption en", "suffix": f"lawn {n}", "id": f"lawn {n}"} for n in range(8)]
    rows += [{"image": "lawn.png", "prefix": "detect red circle", "suffix": ""}]
    rows += [{"image": "lawn.png", "prefix": "detect blue bar", "suffix": "<loc0100><loc0100><loc0100><loc0900> blue bar"}]
    rows += [{"file_name": f"night\\{n}<b>.png", "prefix": "ocr", "suffix": "x"} for n in range(missing)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_records_that_cannot_be_used_are_named_wherever_the_figures_are(
    two: tuple[Path, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
):
    data, output = records_of(tmp_path, missing=1), tmp_path / "report"
    code, out, _ = run("report", two[0], "--data", data, "--max-new-tokens", 8, "--threads", 1, "-o", output)
    device = files.read(output).devices[0]
    d, (row,) = device.data, device.rows
    assert (code, d.samples, d.records, d.skipped, d.unusable, row.measured) == (0, 10, 11, 1, 1, 3)
    left_out, caption = d.remarks
    assert left_out.startswith(f"1 of the records cannot be used and are left out: {data}:11: no image 'night/0<b>.png' below")
    assert caption.startswith("captions are judged by ROUGE-L, with exact match beside it: CIDEr-D weighs")
    assert all(f"  {remark}" in out.splitlines() for remark in d.remarks)
    page = (output / "report.html").read_text()
    assert "0&lt;b&gt;.png&#x27; below" in page
    assert "captions are judged by ROUGE-L" in page
    assert "captions are judged by ROUGE-L" in (output / "report.md").read_text()
    metrics = {(s.task, s.metric): (s.decides, s.samples) for s in row.scores}
    assert metrics["caption", "rouge_l"] == (True, 8)
    assert metrics["caption", "exact_match"] == (False, 8)
    assert ("caption", "cider") not in metrics
    assert metrics["detect", "box_accuracy"] == (True, 2)
    code, out, _ = run("diff", two[0], two[0], "--data", data, "--threads", 1)
    assert (code, left_out in out.splitlines(), caption in out.splitlines()) == (0, True, True)
    assert run("diff", two[0], two[0], "--data", data, "--threads", 1, "--json")[1].count("1 of the records cannot be used") == 1


def test_too_many_records_that_cannot_be_used_end_with_3_before_anything_is_measured(
    two: tuple[Path, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
):
    data = records_of(tmp_path, missing=8)
    for words in (("report", two[0], "-o", tmp_path / "report"), ("diff", *two)):
        code, out, err = run(*words, "--data", data)
        assert (code, out) == (3, "")
        assert "8 of 18 records of format jsonl cannot be used, and at most 10% may be so: " in err
        assert err.rstrip().endswith(" and 3 more")
    assert not (tmp_path / "report").exists()


def test_a_bundle_and_a_report_are_not_compared(
    two: tuple[Path, Path], whole: tuple[Report, Path], run: Callable[..., tuple[int, str, str]]
):
    assert run("diff", two[0], whole[1])[0] == 2


# transformers


def test_the_checkpoint_in_transformers_is_the_reference(tiny_112: Path, tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from pgxport.hub.locate import TINY

    made = report(options(tmp_path / "report", tiny_112, data=DataOptions(limit=1), reference=TINY / "tiny-112"))
    ours, theirs = made.devices[0].rows
    assert made.devices[0].reference == theirs.label == "tiny-112 (transformers)"
    assert ours.fidelity.identical == ours.fidelity.top1 == 1.0
    assert ours.fidelity.kl < 1e-6
    assert ours.quality == theirs.quality
