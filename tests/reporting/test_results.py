# SPDX-License-Identifier: Apache-2.0
"""From answers and times to rows: by hand where a hand can, and intervals that hold what they promise."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgxport.metrics.metrics import Tally, tally
from pgxport.metrics.sample import Sample
from pgxport.reporting.asking import TokenAgreement
from pgxport.reporting.measured import Asked, Opened, TeacherForced
from pgxport.reporting.results import notes, pairs, rows, spread, subsets
from pgxport.reporting.schema import Memory
from pgxport.reporting.shared_pass import SubjectRun

FACTS = {"name": "n", "recipe": "r", "target": "cpu", "digest": "d", "bytes": 10, "parity": None}


def samples(*tasks: str) -> list[Sample]:
    return [
        Sample(
            f"s{i}", Path(f"{i}.png"), f"prompt {i}", task, "character_error_rate" if task == "ocr" else "exact_match", ("abcd",)
        )
        for i, task in enumerate(tasks)
    ]


def run(label: str, texts: list[str], seconds: float = 1.0, **more: object) -> SubjectRun:
    """Tokens are the text's characters."""
    asked = {
        f"k{i}": Asked(
            sample=f"k{i}", seconds={"answer": seconds * (1 + i % 3), "first_token": seconds / 2},
            answer={"text": t, "token_ids": [ord(c) for c in t], "boxes": [], "masks": [], "warnings": [], "truncated": False},
        )
        for i, t in enumerate(texts)
    }  # fmt: skip
    return SubjectRun(label, FACTS, [Opened(facts={}, seconds={"load": 1.0}, loaded=None)], asked, **more)  # type: ignore[arg-type]


def keys(count: int) -> list[str]:
    return [f"k{i}" for i in range(count)]


def test_quality_is_the_mean_over_tasks_of_shares_of_the_best():
    asked = samples("answer", "answer", "answer", "answer", "ocr", "ocr")
    # Three of four answers right, and one of eight characters wrong, where less is better.
    mine = run("mine", ["abcd", "abcd", "abcd", "x", "abcd", "abcx"])
    (row,) = rows(asked, keys(6), [mine], 0)
    assert row.quality is not None
    assert row.quality.value == pytest.approx((3 / 4 + 7 / 8) / 2)
    deciding = {(s.task, s.metric): s.result.value for s in row.scores if s.decides}
    assert deciding == {("answer", "exact_match"): 0.75, ("ocr", "character_error_rate"): pytest.approx(1 / 8)}
    # What is not the metric of a task's samples is shown, and does not count.
    assert [s.metric for s in row.scores if not s.decides] == ["exact_match"]


def test_what_is_kept_is_a_share_of_the_reference_on_the_same_samples():
    asked = samples(*["answer"] * 8)
    whole, half = run("whole", ["abcd"] * 8), run("half", ["abcd"] * 4 + ["x"] * 4, seconds=2.0)
    reference, row = rows(asked, keys(8), [whole, half], 0)
    assert reference.fidelity is None
    assert row.kept is not None
    assert row.kept.value == pytest.approx(0.5)
    assert row.kept.low is not None
    assert row.kept.low < 0.5
    assert row.scores[0].change is not None
    assert (row.scores[0].change.value, row.scores[0].change.verdict) == (-0.5, "worse")
    assert row.fidelity is not None
    assert (row.fidelity.identical, row.fidelity.diverged, row.fidelity.first_divergence) == (0.5, 4, 0)
    (pair,) = pairs(asked, keys(8), [whole, half])
    assert pair.latency is not None
    assert (pair.latency.value, pair.latency.low, pair.latency.high) == pytest.approx((2.0, 2.0, 2.0))


def test_a_metric_is_drawn_once_for_a_run_and_not_again_for_each_comparison(monkeypatch: pytest.MonkeyPatch):
    """mAP of 5,000 pictures takes minutes to draw."""
    drawn: Counter[str] = Counter()

    def counted(name: str, *given: Any) -> Tally:
        found = tally(name, *given)

        def curve(weights: np.ndarray) -> np.ndarray:
            drawn[name] += len(weights) > 1
            return found.curve(weights)

        return Tally(found.per_sample, curve)

    monkeypatch.setattr("pgxport.reporting.results.tally", counted)
    asked = samples(*["ocr"] * 4)
    runs = [run(f"r{i}", ["abcd", "abcx", "x", "abcd"]) for i in range(4)]
    assert len(rows(asked, keys(4), runs, 0)) == 4
    assert drawn["exact_match"] == 4
    before = drawn["character_error_rate"]
    assert len(pairs(asked, keys(4), runs)) == 6
    assert drawn["character_error_rate"] - before == 4


def test_of_nothing_nothing_is_kept():
    asked = samples(*["answer"] * 3)
    assert rows(asked, keys(3), [run("a", ["x"] * 3), run("b", ["abcd"] * 3)], 0)[1].kept is None


def test_the_metric_that_needs_all_samples_of_its_task_gets_those():
    parts = subsets(samples("answer", "ocr", "answer"))
    assert [(p.task, p.metric, p.decides, p.at) for p in parts] == [
        ("answer", "exact_match", True, (0, 2)),
        ("ocr", "character_error_rate", True, (1,)),
        ("ocr", "exact_match", False, (1,)),
    ]


@pytest.mark.parametrize(("different", "shown"), [(49, False), (50, True)])
def test_cider_is_shown_beside_another_metric_only_where_it_says_something(different, shown):
    asked = [Sample(str(n), Path("a.png"), "caption en", "caption", "exact_match", (f"gull {n % different}",)) for n in range(60)]
    assert [p.metric for p in subsets(asked)] == ["exact_match", *(["cider"] if shown else []), "bleu", "rouge_l"]


def test_a_run_that_ended_early_shows_no_number():
    asked = samples(*["answer"] * 3)
    early = run("early", ["abcd"] * 2, reason="its process was ended by signal 9", exit_code=6)
    row = rows(asked, keys(3), [run("whole", ["abcd"] * 3), early], 0)[1]
    assert (row.status, row.reason, row.exit_code, row.measured) == ("failed", "its process was ended by signal 9", 6, 2)
    assert (row.quality, row.seconds, row.scores) == (None, {}, ())
    silent = rows(asked, keys(3), [run("short", ["abcd"] * 2)], 0)[0]
    assert silent.reason == "measured on 2 of 3 samples only"


def test_a_failed_reference_leaves_the_others_uncompared():
    asked = samples(*["answer"] * 2)
    row = rows(asked, keys(2), [run("lost", [], reason="gone", exit_code=4), run("whole", ["abcd"] * 2)], 0)[1]
    assert row.status == "ok"
    assert (row.kept, row.fidelity, row.scores[0].change) == (None, None, None)


def test_positions_are_added_up_over_the_answers_that_were_compared():
    asked = samples(*["answer"] * 2)
    mine = run("mine", ["abcd"] * 2)
    of = TokenAgreement(positions=4, agreed=3, kl=0.4, kl_worst=0.3)
    mine.teacher_forced = {
        "k0": TeacherForced(sample="k0", reference="d", agreement=of),
        "k1": TeacherForced(sample="k1", reference="d", agreement=replace(of, positions=6, agreed=6, located=2, kl_located=0.1)),
    }
    found = rows(asked, keys(2), [run("whole", ["abcd"] * 2), mine], 0)[1].fidelity
    assert found is not None
    assert (found.followed, found.positions, found.top1) == (2, 10, 0.9)
    assert (found.kl, found.kl_worst, found.kl_located) == pytest.approx((0.08, 0.3, 0.05))
    mine.teacher_forced = {"k0": TeacherForced(sample="k0", reference="d", refused="another vocabulary")}
    found = rows(asked, keys(2), [run("whole", ["abcd"] * 2), mine], 0)[1].fidelity
    assert found is not None
    assert (found.top1, found.kl, found.not_compared) == (None, None, "another vocabulary")


def test_the_interval_of_a_median_covers_what_it_promises():
    random, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        s = spread(random.lognormal(0, 0.5, 60).tolist())
        covered += s.low is not None and s.high is not None and s.low <= 1.0 <= s.high
    assert 0.93 < covered / 1000 < 0.99
    assert spread([1.0, 2.0]).low is None


def test_clocks_are_noted_where_they_moved():
    steady = [Asked(sample="a", mhz=2000.0, celsius=50.0, throttled=0)] * 3
    assert notes(steady) == ["not throttled", "up to 50 °C"]
    assert notes([*steady, Asked(sample="b", mhz=1500.0, celsius=81.0, throttled=2)]) == [
        "throttled 2 times",
        "clock between 1500 and 2000 MHz",
        "up to 81 °C",
    ]


def test_what_slowed_a_gpu_is_noted_and_silence_is_not_taken_for_none():
    assert notes([Asked(sample="a")]) == ["throttling not told"]
    cool = Asked(sample="a", gpu_mhz=900.0)
    assert notes([cool, cool]) == ["not throttled"]
    hot = Asked(sample="b", gpu_mhz=600.0, slowed=("gpu-throttle-alert",))
    assert notes([cool, hot]) == ["gpu-throttle-alert at the end of 1 of 2 answers", "GPU clock between 600 and 900 MHz"]


def test_joules_and_memory_are_of_the_samples():
    asked = samples(*["answer"] * 3)
    mine = run("mine", ["abcd"] * 3)
    mine.asked = {
        key: a.model_copy(
            update={"joules": {"RAPL, 1 package": 2.0 + i}, "peak": Memory(private=10 * i, mapped=5, resident=40 - i)}
        )
        for i, (key, a) in enumerate(mine.asked.items())
    }
    (row,) = rows(asked, keys(3), [mine], 0)
    assert [(e.source, e.joules.p50, e.joules.count) for e in row.energy] == [("RAPL, 1 package", 3.0, 3)]
    assert row.peak is not None
    assert (row.peak.private, row.peak.mapped, row.peak.resident) == (20, 5, 40)  # each at its own highest
