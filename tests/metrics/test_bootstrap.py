# SPDX-License-Identifier: Apache-2.0
"""Intervals hold the truth as often as they say, and a difference inside the noise is called that."""

import numpy as np
import pytest

from pgxport.metrics import bootstrap
from pgxport.metrics.bootstrap import Curve, Difference, Verdict, draw, estimate, mean, ratio, resamples

# A 95 % interval that covers 95 %, seen in 400 simulations, lies here with 99.9 %; percentile intervals cover a little less.
COVERS = (0.905, 0.985)
SIMULATIONS = 400


def difference(curve: Curve, reference: Curve, groups, *, higher_is_better: bool = True, draws: int = 2000) -> Difference:
    after, before = (draw(c, groups, draws) for c in (curve, reference))
    return after.change(before, higher_is_better=higher_is_better)


def coverage(simulate, truth: float) -> float:
    rng = np.random.default_rng(0)
    found = [simulate(rng) for _ in range(SIMULATIONS)]
    return float(np.mean([low <= truth <= high for low, high in ((e.low, e.high) for e in found)]))


def test_intervals_of_a_mean_cover_the_truth():
    def simulate(rng):
        return estimate(mean(rng.random(150) < 0.7), range(150), draws=400)

    assert COVERS[0] < coverage(simulate, 0.7) < COVERS[1]


def test_intervals_of_a_ratio_cover_the_truth():
    """Errors over characters, where long samples weigh more."""

    def simulate(rng):
        lengths = rng.integers(1, 20, 150)
        return estimate(ratio(rng.binomial(lengths, 0.2), lengths), range(150), draws=400)

    assert COVERS[0] < coverage(simulate, 0.2) < COVERS[1]


def test_intervals_of_a_paired_difference_cover_the_truth():
    def simulate(rng):
        difficulty = rng.random(150)
        before, after = difficulty < 0.7, difficulty < np.where(rng.random(150) < 0.5, 0.66, 0.7)
        return difference(mean(after), mean(before), range(150), draws=400)

    assert COVERS[0] < coverage(simulate, -0.02) < COVERS[1]


def test_questions_about_one_picture_are_drawn_together():
    """Six answers that stand or fall together are one observation; taken as six, the interval misses the truth."""

    def simulate(rng, together: bool):
        values = np.repeat(rng.random(60) < 0.7, 6)
        return estimate(mean(values), np.repeat(np.arange(60), 6).tolist() if together else range(360), draws=400)

    assert COVERS[0] < coverage(lambda rng: simulate(rng, True), 0.7) < COVERS[1]
    assert coverage(lambda rng: simulate(rng, False), 0.7) < 0.8


def test_a_difference_of_nothing_is_called_noise_as_often_as_it_says():
    rng = np.random.default_rng(1)
    noise = 0
    for _ in range(SIMULATIONS):
        before, after = rng.random((2, 100)) < 0.6
        noise += difference(mean(after), mean(before), range(100), draws=400).verdict == Verdict.NOISE
    assert COVERS[0] < noise / SIMULATIONS < COVERS[1]


def test_pairing_finds_what_separate_intervals_hide():
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.6
    after = before & (np.arange(300) % 15 != 0)
    alone = [estimate(mean(run), range(300)) for run in (before, after)]
    assert alone[1].high > alone[0].low
    assert difference(mean(after), mean(before), range(300)).verdict == Verdict.WORSE
    assert difference(mean(after), mean(before), range(300), higher_is_better=False).verdict == Verdict.BETTER


def test_the_same_answers_differ_by_nothing():
    found = difference(mean([1, 0, 1]), mean([1, 0, 1]), range(3))
    assert (found.value, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, Verdict.NOISE)


def test_an_interval_is_numpys_percentiles_of_the_same_draws():
    values = np.random.default_rng(3).random(40)
    drawn = np.random.default_rng(0).integers(0, 40, (2000, 40))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    found = estimate(mean(values), range(40))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.samples == 40


def test_scipys_bootstrap_agrees():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(4).exponential(size=120)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = estimate(mean(values), range(120), draws=4000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_seed_decides_and_the_size_of_a_block_does_not(monkeypatch):
    whole = np.concatenate(list(resamples("aabcd", draws=50, seed=7)))
    monkeypatch.setattr(bootstrap, "BLOCK", 11)
    assert np.array_equal(np.concatenate(list(resamples("aabcd", draws=50, seed=7))), whole)
    assert not np.array_equal(np.concatenate(list(resamples("aabcd", draws=50, seed=8))), whole)
    assert np.array_equal(whole[:, 0], whole[:, 1])
    assert (whole[:, 1:].sum(1) == 4).all()


def test_one_picture_gives_no_interval():
    found = estimate(mean([1, 0]), ["a", "a"])
    assert (found.value, found.low, found.high) == (0.5, None, None)
    assert difference(mean([1, 1]), mean([0, 0]), ["a", "a"]).verdict == Verdict.NOISE


def test_samples_without_anything_to_judge_do_not_count():
    assert estimate(ratio([1, 0, 0], [1, 0, 1]), range(3)).value == 0.5
    assert np.isnan(estimate(ratio([0, 0], [0, 0]), range(2)).value)
