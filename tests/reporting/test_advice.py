# SPDX-License-Identifier: Apache-2.0
"""What a report advises, on numbers made up: nothing is ranked that overlaps, and what did not pay is said."""

import pytest
from made_up_report import device, failed, row

from pgxport.reporting.advice import gate_failures, latency, passes
from pgxport.reporting.schema import Device


def said(d: Device, kind: str) -> str:
    return "\n".join(f.text for f in d.verdict if f.kind == kind)


def test_the_fastest_that_passes_is_advised():
    d = device(row("fp32", ms=30), row("int8", ms=10, quality=0.899), row("int4", ms=5, quality=0.5))
    assert "Take int8: 10 ms an answer (median), 10 MB, 99.9 %" in said(d, "best")
    assert said(d, "gate") == "Below the gate of 0.99 of fp32's quality, over 50 samples: int4 55.6 % (53.6–57.6)."


def test_times_that_overlap_are_never_ranked_and_the_smaller_is_advised():
    d = device(row("fp32", ms=30, megabytes=40), row("a", ms=10, megabytes=9), row("b", ms=10.1, megabytes=8))
    assert "Take b" in said(d, "best")
    assert "cannot be told apart (a, b)" in said(d, "best")


def test_a_gate_inside_the_interval_is_a_doubt():
    d = device(row("fp32"), row("int8", quality=0.9))
    assert "lies inside the interval" in said(d, "noise")
    fast = device(row("fp32", ms=30), row("int8", ms=10))
    assert said(fast, "best") == (  # and not that fp32, of the same size, is for where size matters
        "Take int8: 10 ms an answer (median), 10 MB, 100.0 % (98.0–102.0) of fp32's quality, over 50 samples. "
        "The gate lies inside that interval."
    )
    known = device(row("fp32", ms=30), row("int8", ms=10), margin=0.001)
    assert "interval" not in said(known, "best")
    below = device(row("fp32"), row("int8", quality=0.885))
    assert "could be chance" in said(below, "gate")
    sure = device(row("fp32"), row("int8", quality=0.6))
    assert "chance" not in said(sure, "gate")


def test_what_did_not_pay_is_said():
    d = device(row("fp32", ms=10, megabytes=10), row("slow", ms=14, megabytes=12), row("small", ms=10, megabytes=4))
    assert said(d, "no gain").splitlines() == [
        "Did not pay here: neither faster nor smaller than fp32: slow ×1.40 (1.37–1.43), 1.20 of the size.",
        "Paid in size only: not faster than fp32 that these runs can tell: small ×1.00 (0.98–1.02), 0.40 of the size.",
    ]
    slow = device(row("fp32", ms=10, megabytes=10), row("small", ms=14, megabytes=4))
    assert said(slow, "no gain").startswith("Paid in size only, and takes longer than fp32 here: small ×1.40")
    assert said(device(row("fp32", ms=10), row("fast", ms=5, megabytes=4)), "no gain") == ""


def test_a_budget_names_what_cannot_be_told_from_the_best():
    d = device(
        row("fp32", ms=30, quality=0.95),
        row("a", ms=10, quality=0.90),
        row("b", ms=9, quality=0.895),
        row("c", ms=3, quality=0.5),
    )
    budgets = [f.text for f in d.verdict if f.kind == "budget"]
    assert budgets[0].startswith("Best accuracy under 3 ms: c")
    assert budgets[1].startswith("Best accuracy under 9 ms: b")
    assert any(text.startswith("Best accuracy under 30 ms: fp32") for text in budgets)
    assert not any("under 10 ms: a" in text for text in budgets)  # a is not better than b beyond doubt


def test_a_failed_bundle_is_said_and_a_failed_reference_ends_comparison():
    d = device(row("fp32"), failed("broken", "its process was ended by signal 7"))
    assert said(d, "failed") == "broken failed: its process was ended by signal 7"
    lost = device(failed("fp32", "no such file"), row("int8"))
    assert "The reference fp32 failed, so no accuracy is compared." in said(lost, "failed")
    assert said(lost, "best") == ""


@pytest.mark.parametrize(("samples", "doubted"), [(5, "45.1 %"), (50, "5.8 %"), (298, "1.0 %"), (300, None)])
@pytest.mark.parametrize("margin", [0.0, 0.001])
def test_few_samples_are_no_proof_whatever_their_interval(samples: int, doubted: str | None, margin: float):
    """Where a share p of all samples is worse, none of n shows it in (1 - p) ** n of cases; at 5 % they still could be p."""
    d = device(row("fp32", ms=30, measured=samples), row("int8", ms=10, measured=samples), margin=margin)
    if doubted is None:
        assert said(d, "noise") == ""
        assert "So few" not in said(d, "best")
    else:
        assert f"do not rule out a loss on up to {doubted} of such samples: int8." in said(d, "noise")
        assert f"So few do not rule out a loss on up to {doubted} of such samples." in said(d, "best")


def test_what_failed_follows_the_advice_and_comes_before_all_else():
    d = device(row("fp32", ms=30), row("int8", ms=10), row("int4", ms=5, quality=0.5), failed("broken", "a reason"))
    kinds = [f.kind for f in d.verdict]
    assert list(dict.fromkeys(kinds))[:3] == ["best", "failed", "gate"]


def test_a_budget_says_where_its_best_is_below_the_gate():
    d = device(row("fp32", ms=30, megabytes=40), row("int4", ms=5, quality=0.5, megabytes=5))
    budgets = said(d, "budget").splitlines()
    assert "Best accuracy under 5 ms: int4, quality 50.0 % (48.0–52.0), below the gate." in budgets
    assert "Best accuracy under 30 ms: fp32, quality 90.0 % (88.0–92.0)." in budgets


def test_a_smaller_bundle_is_not_named_without_what_it_keeps():
    d = device(row("fp32", ms=30, megabytes=40), row("fast", ms=5, megabytes=9), row("small", ms=9, megabytes=4, quality=0.895))
    assert (
        said(d, "best")
        .splitlines()[1]
        .startswith("Where size matters more: small, 4 MB, 99.4 % (97.4–101.4) of fp32's quality, ×1.80")
    )


def test_a_reference_that_is_never_right_advises_nothing():
    d = device(row("fp32", quality=0.0), row("fast", ms=5, quality=0.0))
    assert said(d, "best") == ""
    assert said(d, "failed").startswith("The reference fp32 has a quality of 0 on 50 samples, so no bundle can be advised")


def test_nothing_that_passes_is_no_advice():
    assert "No bundle keeps" in said(device(row("torch", target="torch"), row("int4", quality=0.2)), "best")


def test_the_gate_names_who_fails_it_and_why():
    d = device(row("fp32"), row("int4", quality=0.45), failed("broken", "a reason"), row("int8"))
    lines = gate_failures(d)
    assert lines[0].startswith("int4 keeps 50.0 % (48.0–52.0) of fp32's, over 50 samples; the gate is 0.99")
    assert lines[-1] == "broken failed: a reason"
    assert not any("int8" in line for line in lines)
    assert passes(d.rows[3], d)


def test_a_ratio_read_the_other_way_round_is_its_inverse():
    d = device(row("fp32", ms=20), row("int8", ms=10))
    there, back = latency(d, "fp32", "int8"), latency(d, "int8", "fp32")
    assert there is not None
    assert back is not None
    assert (there.value, back.value) == pytest.approx((0.5, 2.0))
    assert there.low is not None
    assert back.high == pytest.approx(1 / there.low)
