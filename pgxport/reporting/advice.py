# SPDX-License-Identifier: Apache-2.0
"""The advice of a report, in sentences: which bundle to take, what each costs, and what is uncertain.

Two rows are ranked only where the interval of their difference leaves no doubt.
"""

from collections.abc import Callable, Iterator, Sequence

from pgxport.reporting.schema import Device, Finding, Interval, Pair, Row
from pgxport.text import size

STEPS = 4  # lines on budgets of one kind


def findings(device: Device) -> tuple[Finding, ...]:
    """Return the sentences: the advice, what failed, what is below the gate, and then the rest."""
    rows = {row.label: row for row in device.rows}
    ok = [row for row in device.rows if row.status == "ok"]
    passing = [row for row in ok if passes(row, device)]
    reference = rows[device.reference]
    if reference.status == "failed":
        sentences = [Finding(kind="failed", text=f"The reference {device.reference} failed, so no accuracy is compared.")]
    elif reference.quality and reference.quality.value <= 0:
        text = (
            f"The reference {device.reference} has a quality of 0 on {reference.measured} samples, so no bundle can be advised; "
        )
        sentences = [
            Finding(kind="failed", text=text + "see where answers differ from what is true, and ask otherwise with --prompt.")
        ]
    else:
        sentences = list(_best(device, passing))
    sentences += [
        Finding(kind="failed", text=f"{row.label} failed: {row.reason}") for row in device.rows if row.status == "failed"
    ]
    sentences += [*_gate(device, ok), *_budgets(device, [row for row in ok if row.target != "torch"]), *_gains(device, ok)]
    return tuple(sentences)


def passes(row: Row, device: Device) -> bool:
    """Whether a row keeps the share of the reference's quality that the gate asks for."""
    if row.status != "ok":
        return False
    return row.label == device.reference or (row.kept is not None and row.kept.value >= device.gate)


def gate_failures(device: Device) -> list[str]:
    """Return a line for each row that a gate must stop; a bundle that failed has no accuracy at all."""
    lines = []
    for row in device.rows:
        if row.status == "failed":
            lines.append(f"{row.label} failed: {row.reason}")
        elif not passes(row, device):
            kept = f"keeps {percent(row.kept)}" if row.kept else "cannot be compared with the quality"
            lines.append(
                f"{row.label} {kept} of {device.reference}'s, over {row.measured} samples; the gate is {device.gate:.4g}"
            )
            lines += [
                f"    {s.task}, {s.title}: {s.result.value:.4g}, {s.change.value:+.4g} ({s.change.low:+.4g} to {s.change.high:+.4g})"
                for s in row.scores
                if s.decides
                and s.change
                and s.change.verdict == "worse"
                and s.change.low is not None
                and s.change.high is not None
            ]
    return lines


def percent(interval: Interval) -> str:
    """Format a share, and its interval.

    >>> percent(Interval(value=0.991, low=0.982, high=1.0))
    '99.1 % (98.2–100.0)'
    """
    spread = "" if interval.low is None or interval.high is None else f" ({interval.low * 100:.1f}–{interval.high * 100:.1f})"
    return f"{interval.value * 100:.1f} %{spread}"


def ratio(interval: Interval) -> str:
    """Format a ratio, and its interval.

    >>> ratio(Interval(value=1.2, low=1.1, high=1.3))
    '×1.20 (1.10–1.30)'
    """
    spread = "" if interval.low is None or interval.high is None else f" ({interval.low:.2f}–{interval.high:.2f})"
    return f"×{interval.value:.2f}{spread}"


def latency(device: Device, first: str, second: str) -> Interval | None:
    """Return how many times as long the second row's answers take as the first's."""
    pair = _pair(device.pairs, first, second)
    if pair is None or pair.latency is None or pair.first == first:
        return pair.latency if pair else None
    i = pair.latency
    return Interval(value=1 / i.value, low=1 / i.high if i.high else None, high=1 / i.low if i.low else None)


def _best(device: Device, passing: Sequence[Row]) -> Iterator[Finding]:
    able = [row for row in passing if row.target != "torch"]
    bundles = [row for row in able if "answer" in row.seconds]
    if able and not bundles:
        return  # a node of a cluster that timed none of them
    if not bundles:
        yield Finding(kind="best", text=f"No bundle keeps {device.gate:.0%} of {device.reference}'s quality on this data.")
        return
    fastest = min(bundles, key=_p50)
    tied = [row for row in bundles if row is fastest or not _slower(device, fastest, row)]
    smallest = min(tied, key=lambda row: row.bytes)
    about = f"{_ms(smallest)} an answer (median), {_mb(smallest)}"
    kept, doubt = _kept(device, smallest), ""
    if smallest.kept and smallest.label != device.reference:
        if _too_few(smallest, device.gate):
            doubt = f" So few do not rule out a loss on up to {100 * _unseen(smallest.measured):.1f} % of such samples."
        elif not _sure(smallest.kept, device.gate):
            doubt = " The gate lies inside that interval."
    among = f" Of those whose times cannot be told apart ({_names(tied)}) it is the smallest." if len(tied) > 1 else ""
    yield Finding(kind="best", text=f"Take {smallest.label}: {about}{kept}, over {smallest.measured} samples.{doubt}{among}")
    least = min(bundles, key=lambda row: row.bytes)
    if least.bytes < smallest.bytes:
        slower = latency(device, smallest.label, least.label)
        yield Finding(
            kind="best",
            text=f"Where size matters more: {least.label}, {_mb(least)}{_kept(device, least)}"
            + (f", {ratio(slower)} as long." if slower else "."),
        )


def _kept(device: Device, row: Row) -> str:
    return f", {percent(row.kept)} of {device.reference}'s quality" if row.kept and row.label != device.reference else ""


def _gate(device: Device, ok: Sequence[Row]) -> Iterator[Finding]:
    """Yield the rows below the gate, and those for which more samples are needed."""
    below, doubted, few = [], [], []
    for row in ok:
        if row.label == device.reference or row.kept is None:
            continue
        kept, gate = row.kept, device.gate
        sure = _sure(kept, gate)
        if kept.value < gate:
            below.append(f"{row.label} {percent(kept)}" + ("" if sure else ", which could be chance"))
        elif _too_few(row, gate):
            few.append(row.label)
        elif not sure:
            doubted.append(f"{row.label} {percent(kept)}")
    of = f"of {device.reference}'s quality, over {ok[0].measured} samples" if ok else ""
    if below:
        yield Finding(kind="gate", text=f"Below the gate of {device.gate:.4g} {of}: {'; '.join(below)}.")
    if doubted:
        yield Finding(
            kind="noise",
            text=f"Above the gate of {device.gate:.4g} {of}, which lies inside the interval, so that more samples may say otherwise: "
            f"{'; '.join(doubted)}.",
        )
    if few:
        n = ok[0].measured
        yield Finding(
            kind="noise",
            text=f"Above the gate of {device.gate:.4g} with the whole interval, but {n} samples are too few for it: they do not rule out a "
            f"loss on up to {100 * _unseen(n):.1f} % of such samples: {', '.join(few)}.",
        )


def _too_few(row: Row, gate: float) -> bool:
    """Whether a forbidden loss may have hit no sample at all: resampling cannot show what no sample has."""
    kept = row.kept
    return kept is not None and kept.low is not None and kept.low >= gate and _unseen(row.measured) > 1 - gate


def _unseen(samples: int) -> float:
    """Return the largest share that so many samples miss in one of twenty cases (the rule of three, exactly).

    >>> round(_unseen(300), 4)
    0.0099
    """
    return 1 - 0.05 ** (1 / samples)


def _sure(kept: Interval, gate: float) -> bool:
    return kept.low is not None and kept.high is not None and not kept.low <= gate <= kept.high


def _gains(device: Device, ok: Sequence[Row]) -> Iterator[Finding]:
    """Yield the bundles that gained nothing in time, or nothing at all, over the float one."""
    bundles = [row for row in ok if row.target != "torch"]
    base = next((row for row in bundles if row.label == device.reference), bundles[0] if bundles else None)
    nothing, slower, level = list[str](), list[str](), list[str]()
    for row in bundles:
        if base is None or row is base or (times := latency(device, base.label, row.label)) is None:
            continue
        sentence = f"{row.label} {ratio(times)}, {row.bytes / base.bytes:.2f} of the size"
        if times.high is not None and times.high < 1:
            continue
        if row.bytes >= base.bytes:
            nothing.append(sentence)
        else:
            (slower if times.low is not None and times.low > 1 else level).append(sentence)
    if base is None:
        return
    for rows, says in (
        (nothing, f"Did not pay here: neither faster nor smaller than {base.label}"),
        (slower, f"Paid in size only, and takes longer than {base.label} here"),
        (level, f"Paid in size only: not faster than {base.label} that these runs can tell"),
    ):
        if rows:
            yield Finding(kind="no gain", text=f"{says}: {'; '.join(rows)}.")


def _budgets(device: Device, bundles: Sequence[Row]) -> Iterator[Finding]:
    """Yield the best quality under each budget of time and of size, from the tightest on."""
    rated = [row for row in bundles if row.quality and "answer" in row.seconds]
    kinds: list[tuple[Callable[[Row], float], Callable[[Row], str]]] = [(_p50, _ms), (lambda row: row.bytes, _mb)]
    for key, show in kinds:
        before, lines = None, 0
        for limit in sorted(rated, key=key):
            within = [row for row in rated if key(row) <= key(limit)]
            best = max(within, key=lambda row: row.quality.value if row.quality else 0)
            if best is before or lines == STEPS or (before and not _better(device, best, before)):
                continue
            assert best.quality is not None
            ties = [row for row in within if row is not best and not _better(device, best, row)]
            also = f"; not to be told from {_names(ties)}" if ties else ""
            below = "" if passes(best, device) or not best.kept else ", below the gate"
            yield Finding(
                kind="budget",
                text=f"Best accuracy under {show(limit)}: {best.label}, quality {percent(best.quality)}{below}{also}.",
            )
            before, lines = best, lines + 1


def _better(device: Device, first: Row, second: Row) -> bool:
    """Whether the first row is more accurate, beyond doubt."""
    pair = _pair(device.pairs, first.label, second.label)
    if pair is None or pair.quality is None or pair.quality.low is None or pair.quality.high is None:
        return False
    return pair.quality.high < 0 if pair.first == first.label else pair.quality.low > 0


def _slower(device: Device, first: Row, second: Row) -> bool:
    """Whether the second row takes longer, beyond doubt."""
    times = latency(device, first.label, second.label)
    return times is not None and times.low is not None and times.low > 1


def _pair(pairs: Sequence[Pair], a: str, b: str) -> Pair | None:
    return next((pair for pair in pairs if {pair.first, pair.second} == {a, b}), None)


def _p50(row: Row) -> float:
    return row.seconds["answer"].p50


def _ms(row: Row) -> str:
    milliseconds = _p50(row) * 1e3
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:.0f} ms"


def _mb(row: Row) -> str:
    return size(row.bytes)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(row.label for row in rows)
