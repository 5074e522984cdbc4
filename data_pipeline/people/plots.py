"""The histograms of the statistics page as SVG; bars with names beside them are plain HTML in its template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from math import log2

from data_pipeline.people import wording
from data_pipeline.people.drawing import WIDTH, Drawing, Scale, text_width
from data_pipeline.people.histogram import Bar, Histogram

LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 46.0, WIDTH - 12.0, 40.0, 206.0, 246
FEW_BARS = 14  # of whole numbers that get a label each
BEYOND = 0.005  # of the numbers may be folded into the last bar
ASPECTS = tuple(log2(value) for value in (1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4))
FINE_ASPECTS = tuple(log2(value) for value in (1 / 2, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 2))

Say = Callable[[float], str]


@dataclass(frozen=True)
class Figure:
    """A drawing and what is said beside it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Axis:
    """What a histogram counts."""

    title: str
    unit: str  # under the axis: "share of the picture", "px"
    thing: str  # what is counted: "boxes"
    say: Say = wording.number  # how a value is written
    ticks: tuple[tuple[float, ...], ...] = ()  # lists, coarse before fine, where the scale's own would be odd


def histogram_figure(found: Histogram, axis: Axis) -> Figure | None:
    """Bars with the median marked; None where nothing was counted."""
    if not found.count:
        return None
    bars = found.bars(beyond=BEYOND)
    folded = found.high > bars[-1].high or (found.high == bars[-1].high and found.high != found.top)
    drawing = Drawing(HEIGHT, f"{axis.title}: {_summary(found, axis)}")
    room = 2 * (bars[0].high - bars[0].low) if len(bars) == 1 and not found.whole else 0.0
    across = Scale(bars[0].low - room, bars[-1].high + room, LEFT, RIGHT)
    up = Scale(0, max(bar.count for bar in bars) * 1.04, BOTTOM, TOP)
    drawing.text(2, 9, axis.thing, "axis")
    drawing.text(RIGHT, BOTTOM + 33, axis.unit, "axis", "end")
    _axis_left(drawing, up)
    single = found.whole and len(bars) <= FEW_BARS and bars[0].high - bars[0].low == 1
    if single:
        _names_below(drawing, bars, across, folded)
    else:
        _axis_below(drawing, across, axis)
    for i, bar in enumerate(bars):
        last = folded and i == len(bars) - 1
        _bar(drawing, bar, across, up, _tip(bar, found, axis, single, last), 1.5 if single else 0.35)
    drawing.line(LEFT, BOTTOM, RIGHT, BOTTOM, "zero")
    middle = across(min(max(found.quantile(0.5), bars[0].low), bars[-1].high) + (0.5 if single else 0))
    drawing.line(middle, TOP - 6, middle, BOTTOM, "level")
    wide = text_width("median") / 2
    drawing.text(min(max(middle, LEFT + wide), RIGHT - wide), TOP - 13, "median", "tick", "middle")
    return Figure(axis.title, drawing.svg(), _caption(found, axis, bars[-1] if folded else None))


def _summary(found: Histogram, axis: Axis) -> str:
    return f"median {axis.say(found.quantile(0.5))}"


def _caption(found: Histogram, axis: Axis, last: Bar | None) -> str:
    low, high = axis.say(found.quantile(0.05)), axis.say(found.quantile(0.95))
    spread = f"nine in ten from {low} to {high}" if low != high else f"nine in ten at {low}"
    wild = f" The last bar holds all above, up to {axis.say(found.high)}." if last else ""
    return f"{found.count:,} {axis.thing}: {_summary(found, axis)}, {spread}.{wild}"


def _tip(bar: Bar, found: Histogram, axis: Axis, single: bool, last: bool) -> str:
    place = axis.say(bar.low) if single else f"{axis.say(bar.low)} to {axis.say(bar.high)}"
    more = f"{axis.say(bar.low)} and more" if last else place
    return f"{more}: {bar.count:,} {axis.thing} ({wording.share(bar.count, found.count)})"


def _bar(drawing: Drawing, bar: Bar, across: Scale, up: Scale, tip: str, gap: float) -> None:
    if not bar.count:
        return
    left, right = across(bar.low) + gap, across(bar.high) - gap
    top = min(up(bar.count), BOTTOM - 1)  # what is there is seen
    drawing.add(
        "rect",
        f"<title>{escape(tip)}</title>",
        x=left,
        y=top,
        width=max(right - left, 0.5),
        height=BOTTOM - top,
        class_="bar",
    )


def _axis_left(drawing: Drawing, up: Scale) -> None:
    ticks = [tick for tick in up.ticks() if tick == int(tick)]
    for tick in ticks[:: 1 + len(ticks) // 5]:
        drawing.line(LEFT, up(tick), RIGHT, up(tick), "grid")
        drawing.text(LEFT - 6, up(tick), _short(tick), "tick", "end")


def _axis_below(drawing: Drawing, across: Scale, axis: Axis) -> None:
    inside = [[tick for tick in ticks if across.low <= tick <= across.high] for ticks in axis.ticks]
    ticks = next((ticks for ticks in inside if len(ticks) >= 3), max(inside, key=len, default=[])) or across.ticks()
    free = -1e9
    for tick in ticks:
        text = across.label(tick) if axis.say is wording.number else axis.say(tick)
        half = text_width(text, 12) / 2
        drawing.line(across(tick), BOTTOM, across(tick), BOTTOM + 4, "zero")
        if across(tick) - half > free:
            drawing.text(across(tick), BOTTOM + 14, text, "tick", "middle")
            free = across(tick) + half + 4


def _names_below(drawing: Drawing, bars: list[Bar], across: Scale, folded: bool) -> None:
    for i, bar in enumerate(bars):
        more = "+" if folded and i == len(bars) - 1 else ""
        drawing.text(across(bar.low + 0.5), BOTTOM + 14, f"{bar.low:.0f}{more}", "tick", "middle")


def _short(value: float) -> str:
    """A count in at most four characters or so: `800`, `12k`, `1.5M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
