# SPDX-License-Identifier: Apache-2.0
"""pgx bench: what it measures, in which order, and when it refuses to rank."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgxport.benchmarking import measure
from pgxport.benchmarking.bench import Bench, bench, render
from pgxport.benchmarking.intervals import T, paired_ratio, verdict
from pgxport.benchmarking.measure import Steps, WholeAnswers, lengths, open_bundle
from pgxport.benchmarking.worker import Measurement, Worker, environment, interleave, turns
from pgxport.bundle.reader import Bundle
from pgxport.errors import InputError, UsageError
from pgxport.machine.cpu import processor_name, vectors
from pgxport.machine.memory import process_memory

pytest.importorskip("onnxruntime")
SHORT = WholeAnswers(prompt_tokens=4, new_tokens=3)
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")

# A worker that needs no bundle: it writes what it does to a file, and takes the seconds it was given.
STUB = """
import os, sys
from pathlib import Path
from pgxport.errors import IntegrityError
from pgxport.benchmarking.worker import serve

class Stub:
    def __init__(self, request):
        self.request, self.facts, self.opening, self.done = request, {"held": 0}, {"load": 1.0}, 0
        if request.get("fault") == "open":
            raise IntegrityError("no such thing")

    def repeat(self, *, warm_up):
        with open(self.request["log"], "a") as log:
            print(self.request["name"] + ("~" if warm_up else ""), file=log)
        self.done += not warm_up
        if self.done == 2 and self.request.get("fault") == "die":
            print("a last word", file=sys.stderr, flush=True)
            os.abort()
        if self.request.get("fault") == "raise":
            raise ZeroDivisionError("by nought")
        print("an engine that prints", flush=True)
        if size := self.request.get("allocate"):
            self.block = None  # the one of the repetition before
            self.block = bytearray(size)
        return {"step": self.request["seconds"][self.done - 1]}

serve(Stub)
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Callable[..., tuple[list[Measurement], list[str]]]:
    """Measure stubs that are told what to do, and what they logged."""

    def run(*requests: dict[str, Any], repetitions: int = 3) -> tuple[list[Measurement], list[str]]:
        log = tmp_path / "log"
        log.touch()
        workers = [
            Worker(r["name"], [sys.executable, "-c", STUB], {"log": str(log), "seconds": [1.0] * repetitions, **r})
            for r in requests
        ]
        for worker in workers:
            worker.__enter__()
        try:
            return interleave(workers, repetitions), log.read_text().split()
        finally:
            for worker in workers:
                worker.__exit__(None, None, None)

    return run


# Ranking, on numbers made up


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.2, 1.8], "A is faster than B (×2.00, 2.00–2.00)"),
        ([2.0, 2.2, 1.8], [1.0, 1.1, 0.9], "B is faster than A (×2.00, 2.00–2.00)"),
        ([1.0, 1.0, 1.0], [1.2, 0.9, 1.1], "A and B: no difference that these runs can tell"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "A and B: no difference that these runs can tell (×1.00, 1.00–1.00)"),
        ([1.0], [9.0], "A and B cannot be ranked from one repetition"),
        # The machine is twice as slow in every other round: unpaired, the two overlap.
        ([1.0, 2.0, 1.01, 2.02, 1.0], [1.2, 2.41, 1.2, 2.4, 1.19], "A is faster than B (×1.19, 1.18–1.20)"),
        # All five agree but by too different amounts.
        ([1.0] * 5, [1.01, 3.0, 1.02, 1.01, 1.01], "A and B: no difference"),
    ],
)
def test_only_an_interval_that_excludes_one_ranks(first: list[float], second: list[float], says: str):
    assert verdict("A", "B", paired_ratio(first, second)).startswith(says)


def test_the_interval_is_students():
    # Of the logarithms 0, ln 1.1, ln 1.2 by hand: mean 0.0925, deviation 0.0913, t(2) = 4.303.
    ratio = paired_ratio([1.0, 1.0, 1.0], [1.0, 1.1, 1.2])
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.0970, 0.8743, 1.3763), abs=1e-3)


def test_the_interval_covers_what_it_promises():
    random, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        drift = random.lognormal(0, 0.5, 5)
        ratio = paired_ratio(
            (drift * random.lognormal(0, 0.05, 5)).tolist(), (1.1 * drift * random.lognormal(0, 0.05, 5)).tolist()
        )
        covered += ratio is not None and ratio.low <= 1.1 <= ratio.high
    assert 0.93 < covered / 2000 < 0.97


def test_the_table_of_t_falls_towards_the_normal_distribution():
    assert list(T) == sorted(T, reverse=True)
    assert len(T) == 30
    assert T[-1] > 1.96


# Interleaving and failures, on a worker that needs no bundle


def test_every_other_round_goes_backwards():
    assert turns(3, 3) == [(0, 1, 2), (2, 1, 0), (0, 1, 2)]


def test_subjects_take_turns_after_a_warm_up_that_is_not_counted(stubs):
    (a, b), log = stubs({"name": "A", "seconds": [1, 2, 3]}, {"name": "B", "seconds": [4, 5, 6]})
    assert log == ["A~", "B~", "A", "B", "B", "A", "A", "B"]
    assert (a.seconds, b.seconds) == ({"load": [1], "step": [1, 2, 3]}, {"load": [1], "step": [4, 5, 6]})


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [("open", 4, "no such thing"), ("raise", 1, "ZeroDivisionError: by nought"), ("die", 1, "ended by signal 6: a last word")],
)
def test_a_subject_that_fails_says_why_and_the_others_go_on(stubs, fault: str, code: int, says: str):
    (bad, good), log = stubs({"name": "A", "fault": fault}, {"name": "B"})
    assert says in bad.reason
    assert bad.exit_code == code
    assert (good.reason, good.exit_code, len(good.seconds["step"])) == (None, 0, 3)
    assert log.count("B") == 3
    assert log.count("A") <= 2


@linux
def test_private_memory_is_seen_in_the_worker_that_took_it(stubs):
    (small, large), _ = stubs({"name": "A"}, {"name": "B", "allocate": 200 << 20}, repetitions=1)
    taken = large.peak.private - small.peak.private
    assert 195 << 20 < taken < 205 << 20
    assert large.peak.resident - small.peak.resident == pytest.approx(taken, abs=5 << 20)
    assert large.loaded.private < large.peak.private - (195 << 20)


@linux
def test_mapped_memory_is_told_from_private(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x" * (50 << 20))
    before = process_memory(os.getpid())
    mapped = np.memmap(tmp_path / "f", np.uint8, "r")
    assert mapped[:: 1 << 12].sum()
    after = process_memory(os.getpid())
    assert after.mapped - before.mapped > 45 << 20
    assert after.private - before.private < 5 << 20
    assert process_memory(os.getpid(), peak=True).resident >= after.resident


# A bundle


@pytest.mark.parametrize("images", [(), ("red.png", "red.png")])
def test_an_answer_takes_exactly_the_steps_that_were_asked_for(
    a_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: tuple[str, ...]
):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    work = {"prompt_tokens": 4, "new_tokens": 7, "images": [str(tmp_path / i) for i in images]}
    fed = []
    feed = measure.Decoder.next_token
    monkeypatch.setattr(measure.Decoder, "next_token", lambda self, embeds: fed.append(embeds.shape[1]) or feed(self, embeds))
    subject = open_bundle({"bundle": str(a_bundle), "engine": "cpu", "threads": 1, "Answers": work})
    seconds = subject.repeat(warm_up=False)
    prefix = subject.facts["image_tokens"] * max(1, len(images)) + 4
    assert fed == [prefix] + [1] * 7
    assert 0 < seconds["overhead"] < seconds["step"]
    before = sum(seconds[s] for s in ("preprocess", "vision", "projector", "prefill"))
    assert seconds["first_token"] == pytest.approx(before)
    assert seconds["answer"] == pytest.approx(before + 7 * seconds["step"] + seconds["post"])
    fed.clear()
    subject.repeat(warm_up=True)
    assert fed == [prefix, 1, 1]


def test_the_decoder_alone_steps_where_it_was_told_to(a_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    fed = []
    feed = measure.Decoder.next_token
    monkeypatch.setattr(
        measure.Decoder, "next_token", lambda self, embeds: fed.append((self.length, embeds.shape[1])) or feed(self, embeds)
    )
    work = {"pasts": [20, 50], "prefixes": [30], "steps": 2}
    subject = open_bundle({"bundle": str(a_bundle), "engine": "cpu", "threads": 1, "Steps": work})
    seconds = subject.repeat(warm_up=False)
    assert fed == [(0, 30), (20, 1), (20, 1), (50, 1), (50, 1)]
    assert seconds.keys() == {"prefill@30", "step@20", "overhead@20", "step@50", "overhead@50"}
    assert min(seconds.values()) > 0


def test_the_decoder_alone_begins_with_a_cache_of_finite_random_numbers(a_bundle: Path):
    subject: Any = open_bundle({"bundle": str(a_bundle), "engine": "cpu", "threads": 1, "Steps": {"pasts": [50]}})
    for array in subject.decoder.cache.arrays.values():
        assert np.isfinite(array).all()
        assert array.std() == pytest.approx(1, abs=0.1)


def test_a_cache_of_integers_is_filled_too():
    arrays = {"key": np.zeros((1, 2, 300, 4), np.int8), "value": np.zeros((1, 2, 300, 4), np.float16)}
    measure.fill(arrays, np.random.default_rng(0))
    assert all(array.std() > 0.9 for array in arrays.values())


def test_what_does_not_fit_the_bundle_is_refused(a_bundle: Path):
    context = Bundle.open(a_bundle).manifest.context_length
    request = {"bundle": str(a_bundle), "engine": "cpu", "threads": 1}
    assert open_bundle(request | {"Steps": {"pasts": [context - 1], "steps": 1}})
    with pytest.raises(UsageError, match=rf"room for {context} tokens, and {context + 1} .*--context"):
        open_bundle(request | {"Steps": {"pasts": [20, context]}})
    with pytest.raises(InputError, match="--context"):
        open_bundle(request | {"Answers": {"new_tokens": context}})


@pytest.mark.parametrize("text", ["x", "1,,2", "0", "-5", "1.5"])
def test_a_past_that_is_no_length_is_refused(text: str):
    with pytest.raises(UsageError, match="give integers"):
        lengths(text)


@pytest.fixture(scope="module")
def measured(a_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One bundle twice, with a broken copy of it in between."""
    broken = Path(shutil.copytree(a_bundle, tmp_path_factory.mktemp("broken") / "b\x1b[31m"))
    (broken / "tokenizer.json").write_bytes(b"changed")
    return bench([a_bundle, broken, a_bundle], SHORT, repetitions=2, threads=1)


def test_a_broken_bundle_is_a_row_with_its_reason(measured: Bench):
    first, broken, second = measured.measurements
    assert (first.reason, second.reason) == (None, None)
    assert "tokenizer.json" in str(broken.reason)
    assert broken.exit_code == 4
    assert broken.seconds == {}
    assert f"B: {broken.label}: FAILED: {broken.reason}" in render(measured).splitlines()


def test_there_is_a_row_for_every_stage(measured: Bench):
    text = render(measured)
    rows = [line.split("  ")[0].strip() for line in text.splitlines()]
    for row in (
        "load", "preprocess", "vision", "projector", "prefill", "to the first token", "decode step", "tokens a second", "post",
        "whole answer", "peak: private", "peak: mapped", "peak: resident",
    ):  # fmt: skip
        assert row in rows, row
    assert "4 prompt tokens, 3 decode steps" in text
    assert "2 repetitions" in text
    assert "cpu, threads: 1" in text
    assert "onnxruntime " in text
    assert f"cores of {processor_name()} ({vectors()})" in text
    assert text.count("A and C") + text.count("than A") + text.count("than C") == 3


def test_the_json_says_everything(measured: Bench):
    found = json.loads(json.dumps(measured.to_json()))
    assert found.keys() == {"machine", "engine", "threads", "repetitions", "work", "spread", "bundles", "comparisons"}
    assert found["machine"].keys() == {"processor", "vectors", "cores", "system", "load_average", "versions"}
    assert found["work"] == {"kind": "Answers", "prompt_tokens": 4, "new_tokens": 3, "images": []}
    first, broken, second = found["bundles"]
    assert (first["status"], broken["status"]) == ("ok", "failed")
    assert second["label"] == first["label"] + " #2"
    assert first["manifest_sha256"] == second["manifest_sha256"]
    assert first["stages"].keys() == {
        "verify", "load", "preprocess", "vision", "projector", "prefill", "first_token", "step", "overhead", "post", "answer",
    }  # fmt: skip
    for name, stage in first["stages"].items():
        assert len(stage["all"]) == (1 if name in ("verify", "load") else 2)
        assert 0 < stage["low"] <= stage["median"] <= stage["high"]
    assert {c["stage"] for c in found["comparisons"]} == {"first_token", "step", "answer"}
    assert all(c["low"] <= c["value"] <= c["high"] for c in found["comparisons"])


@linux
def test_the_memory_of_a_bundle_is_plausible(measured: Bench):
    bundle = measured.measurements[0]
    assert bundle.loaded is not None
    assert bundle.peak is not None
    for memory in (bundle.loaded, bundle.peak):
        assert 5 << 20 < memory.private < memory.resident < 1 << 30
        assert memory.mapped > 5 << 20
    assert bundle.peak.resident >= bundle.loaded.resident
    assert bundle.loaded.private + bundle.loaded.mapped == bundle.loaded.resident
    assert bundle.facts["cache_bytes"] > 0


# The command


def pgx(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pgxport.cli import main; main()", "bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)


def test_the_command_measures_and_prints_json(a_bundle: Path):
    done = pgx(a_bundle, "-r", 1, "--new-tokens", 2, "--threads", 1, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bundles"][0]["status"] == "ok"


def test_a_past_beyond_the_context_ends_with_2(a_bundle: Path):
    done = pgx(a_bundle, "--decoder-only", "--past", "20,10000000", "-r", 1)
    assert done.returncode == 2
    assert "--context" in done.stderr
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--past", "20"], "--decoder-only"),
        (["--decoder-only", "--image", "x.png"], "--past"),
        (["--decoder-only", "--prompt-tokens", "20"], "--past"),
        (["--decoder-only", "--past", "20,x"], "'x' is not a length"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(options: list[str], says: str):
    done = pgx("b", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_nothing_measured_ends_with_the_first_reasons_code(tmp_path: Path):
    done = pgx(tmp_path / "a\x1b[2J", "-r", 1)
    assert done.returncode == 4
    assert "no such folder" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_the_decoder_alone_is_measured_at_its_default_past(a_bundle: Path):
    work = Steps(steps=2)
    (found,) = bench([a_bundle], work, repetitions=1, threads=1).measurements
    past = found.facts["image_tokens"] + WholeAnswers.prompt_tokens
    assert found.seconds.keys() == {"verify", "load", f"step@{past}", f"overhead@{past}"}
    assert f"decode step after {past}" in render(Bench([found], work, 1, "cpu", 1, bench([], work).machine))
