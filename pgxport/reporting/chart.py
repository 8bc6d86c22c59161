# SPDX-License-Identifier: Apache-2.0
"""The chart of a report: time against quality, a dot for each bundle, whose area is the bundle's size.

altair describes the chart and vl-convert draws it, both without network. Text from the data is a label, never
an expression.
"""

import io
import math
from typing import Any

from PIL import Image

from pgxport.errors import require
from pgxport.reporting.schema import Device, Report, Row
from pgxport.text import terminal_safe

VERSION = "6.1"  # of Vega-Lite: the oldest that vl-convert 1.8 and 1.9 both bring
WIDTH, HEIGHT = 620, 340
# Each has a contrast of 3.5 : 1 or more to white and to black.
COLOURS = ("#0e7fa3", "#c2620a", "#8a63c4", "#1a8a50", "#d0447c", "#8a7415", "#4a78d6", "#7a7a7a", "#b0593f", "#2f8a8a")
GREY = "#808080"  # is legible on white and on black
LABEL = 28  # characters
GATE, UNDER = "gate, {:.4g} of the reference's", 12  # the name of its line, and how far below that it stands
SHIFTS = (-10, 14, -26, 30, -42, 46, -58, 62, -74, 78)  # of a name, in pixels


def require_charts() -> None:
    """Check that the libraries are installed.

    Raises:
        UsageError: one is not.
    """
    require("altair", "the chart of a report")
    require("vl_convert", "the chart of a report")


def svg(report: Report) -> str:
    """Draw all devices, one under the other, on white, as SVG."""
    return _converter().vegalite_to_svg(spec(report.devices, background="white"), vl_version=VERSION)


def png(drawn: str) -> bytes:
    """Turn a chart's SVG into a PNG of 256 colours, which has a third of the bytes."""
    file = io.BytesIO()
    Image.open(io.BytesIO(_converter().svg_to_png(drawn, scale=2))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


def device_svg(device: Device) -> str | None:
    """Draw one device for a page of either colour; None where nothing was measured."""
    if not points(device):
        return None
    return _converter().vegalite_to_svg(spec([device], background="transparent"), vl_version=VERSION)


def points(device: Device) -> list[dict[str, Any]]:
    """Return the dots of a device: milliseconds, percent and megabytes, with their intervals."""
    drawn = []
    for row in device.rows:
        if row.status == "ok" and row.quality and "answer" in row.seconds:
            time, quality = row.seconds["answer"], row.quality
            drawn.append(
                {
                    "label": _label(row.label),
                    "ms": time.p50 * 1e3,
                    "ms_low": (time.low or time.p50) * 1e3,
                    "ms_high": (time.high or time.p50) * 1e3,
                    "quality": 100 * quality.value,
                    "quality_low": 100 * (quality.value if quality.low is None else quality.low),
                    "quality_high": 100 * (quality.value if quality.high is None else quality.high),
                    "MB": row.bytes / 1e6,
                }
            )
    return drawn


def gate_line(device: Device) -> float | None:
    """Return the quality in percent below which a bundle fails the gate; None without a reference's."""
    reference = next(row for row in device.rows if row.label == device.reference)
    return 100 * device.gate * reference.quality.value if reference.quality else None


def describe(device: Device) -> str:
    """Describe the chart in words, for readers who cannot see it."""
    rows = [f"{p['label']}: {p['ms']:.3g} ms, {p['quality']:.1f} %, {p['MB']:.3g} MB" for p in points(device)]
    gate = gate_line(device)
    below = "" if gate is None else f" The gate is at {gate:.1f} %."
    return f"Median time of an answer against quality.{below} {'; '.join(rows)}"


def metric_title(row: Row) -> str:
    """Return the name of a row's quality: the one deciding metric, or a mean."""
    deciding = [score for score in row.scores if score.decides]
    if len(deciding) == 1:
        return f"{deciding[0].title} ({deciding[0].task})"
    return f"mean of {len(deciding)} tasks' deciding metrics"


def spec(devices: Any, *, background: str) -> dict[str, Any]:
    """Return the chart of devices as a Vega-Lite specification."""
    alt = require("altair", "the chart of a report")
    charts = [_layers(alt, device, titled=len(devices) > 1) for device in devices]
    charts = [chart for chart in charts if chart is not None]
    if not charts:
        nothing = alt.Data(values=[{"text": "nothing was measured to its end"}])
        charts = [alt.Chart(nothing).mark_text(color=GREY).encode(text="text:N").properties(width=WIDTH, height=80)]
    whole = alt.vconcat(*charts) if len(charts) > 1 else charts[0]
    styled = (
        whole.configure(background=background, font="system-ui, sans-serif")
        .configure_axis(labelColor=GREY, titleColor=GREY, domainColor=GREY, tickColor=GREY, gridColor=GREY, gridOpacity=0.25)
        .configure_legend(labelColor=GREY, titleColor=GREY)
        .configure_view(stroke=None)
        .configure_title(color=GREY)
    )
    made: dict[str, Any] = styled.to_dict(validate=False)  # a test validates it; here that costs as much as all the rest
    return made


def _layers(alt: Any, device: Device, *, titled: bool) -> Any:
    drawn = points(device)
    if not drawn:
        return None
    ok = next(row for row in device.rows if row.status == "ok")
    base = alt.Chart(alt.Data(values=drawn))
    x_domain = (min(p["ms_low"] for p in drawn) / 1.1, max(p["ms_high"] for p in drawn) * 1.4)  # names stand to the right
    gate = gate_line(device)
    qualities = [p[end] for p in drawn for end in ("quality_low", "quality_high")] + ([] if gate is None else [gate])
    low, high = min(qualities), max(qualities)
    y_domain = (low - 0.06 * (high - low) - 0.1, high + 0.06 * (high - low) + 0.1)
    x_scale = alt.Scale(type="log", domain=list(x_domain), nice=False)
    x = alt.X("ms:Q", scale=x_scale, title="whole answer, median, ms (logarithmic)")
    y_scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    y = alt.Y("quality:Q", scale=y_scale, title=f"{metric_title(ok)}, %")
    colour = alt.Color("label:N", scale=alt.Scale(range=list(COLOURS)), legend=None, sort=None)
    sizes = sorted({p["MB"] for p in drawn})
    key = alt.Legend(title="MB", symbolFillColor=GREY, symbolStrokeWidth=0, values=[sizes[0], sizes[-1]], format=".3~g")
    area = alt.Size("MB:Q", scale=alt.Scale(range=[0, 500], domain=[0, sizes[-1]]), legend=key)
    marks = (
        base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("quality_low:Q", scale=y_scale), y2="quality_high:Q", color=colour)
        + base.mark_rule(strokeWidth=1.5).encode(x=alt.X("ms_low:Q", scale=x_scale), x2="ms_high:Q", y=y, color=colour)
        + base.mark_circle(opacity=0.75).encode(x=x, y=y, size=area, color=colour)
    )
    for point, dy in zip(drawn, _places(drawn, x_domain, y_domain, gate), strict=True):
        name = alt.Chart(alt.Data(values=[point])).mark_text(align="left", dx=10, dy=dy, fontSize=12)
        marks += name.encode(x=x, y=y, text="label:N", color=colour)
    if gate is not None:
        line = alt.Chart(alt.Data(values=[{"gate": gate, "name": GATE.format(device.gate)}]))
        at = alt.Y("gate:Q", scale=y_scale)
        marks += line.mark_rule(color=GREY, strokeDash=[5, 4]).encode(y=at)
        marks += line.mark_text(color=GREY, align="left", dy=UNDER, fontSize=11).encode(x=alt.value(4), y=at, text="name:N")
    title = {"title": _label(device.name)} if titled else {}
    return marks.properties(width=WIDTH, height=HEIGHT, **title)


def _places(
    drawn: list[dict[str, Any]], x_domain: tuple[float, float], y_domain: tuple[float, float], gate: float | None
) -> list[int]:
    """Return how far under its dot each name stands, so that no name overlaps another or the gate's."""
    taken: list[tuple[float, float, float]] = []  # left, right, middle
    if gate is not None:
        taken.append((4, 4 + 6 * len(GATE), HEIGHT * (y_domain[1] - gate) / (y_domain[1] - y_domain[0]) + UNDER))
    shifts = []
    for point in drawn:
        left = WIDTH * math.log(point["ms"] / x_domain[0]) / math.log(x_domain[1] / x_domain[0]) + 10
        right = left + 7 * len(point["label"])
        at = HEIGHT * (y_domain[1] - point["quality"]) / (y_domain[1] - y_domain[0])
        free = [dy for dy in SHIFTS if not any(a < right and left < b and abs(at + dy - c) < 14 for a, b, c in taken)]
        dy = (free or list(SHIFTS))[0]
        taken.append((left, right, at + dy))
        shifts.append(dy)
    return shifts


def _label(text: str) -> str:
    """Shorten a text and remove controls: a NUL ends the whole process inside vl-convert 1.9."""
    plain = terminal_safe(text)
    return plain if len(plain) <= LABEL else plain[: LABEL - 1] + "…"


def _converter() -> Any:
    return require("vl_convert", "the chart of a report")
