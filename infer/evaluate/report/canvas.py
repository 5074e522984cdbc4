"""SVG by hand: axes, marks, and texts that do not cover each other.

Colours are classes of the page's style sheet, so that a drawing follows the light or dark scheme. A drawing is 380
units wide: about as wide as a phone, so that texts keep their size there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import ceil, cos, floor, isfinite, log10, pi, sin

from infer.evaluate.report.tables import Look

WIDTH, FONT, SMALL = 380, 13, 12
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
_NARROW, _WIDE = set("iljtfrI.,:;'|!()[] "), set("mwMW@%—")


def text_width(text: str, font: float = FONT) -> float:
    """About how wide a text is in a sans-serif face, rather too wide than too narrow."""
    units = sum(
        0.39 if c in _NARROW else 0.97 if c in _WIDE else 1.0 if ord(c) > 0x2E80 else 0.7 if c.isupper() else 0.62
        for c in text
    )
    return units * font


def shortened(text: str, width: float, font: float = FONT) -> str:
    """The text, cut with an ellipsis to that width."""
    if text_width(text, font) <= width:
        return text
    while text and text_width(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


@dataclass(frozen=True)
class Scale:
    """From values to units of the drawing."""

    low: float
    high: float
    start: float  # where `low` stands
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        place = log10(max(value, 1e-9)) if self.log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, room: float = 0.08) -> Scale:
        """A linear one that holds all values, with some room around."""
        known = [value for value in values if isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        around = (high - low) * room or max(abs(high), 1.0) * room
        return cls(low - around, high + around, start, end)

    @classmethod
    def around_log(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """A logarithmic one, of at least a decade."""
        known = [value for value in values if isfinite(value) and value > 0] or [0.1, 1.0]
        low, high = min(known) / 1.6, max(known) * 1.6
        middle = (low * high) ** 0.5
        return cls(min(low, middle / 10**0.5), max(high, middle * 10**0.5), start, end, log=True)

    def ticks(self) -> list[float]:
        """Some round values."""
        if self.log:
            decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            steps = (1,) if self.high / self.low > 1e3 else (1, 3) if self.high / self.low > 30 else (1, 2, 5)
            found = [step * 10.0**decade for decade, step in product(decades, steps)]
        else:
            step = self._step()
            found = [number * step for number in range(ceil(self.low / step), floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]

    def _step(self) -> float:
        rough = (self.high - self.low) / 6.5
        power = 10.0 ** floor(log10(rough))
        return next(power * times for times in (1, 2, 5, 10) if power * times >= rough)

    def label(self, value: float) -> str:
        """A tick in as many decimals as its step needs."""
        return f"{value:.{max(0, -floor(log10(self._step()) + 1e-9))}f}".replace("-", "−")


class Drawing:
    """An SVG in the making; every text is escaped."""

    def __init__(self, height: float, title: str, width: float = WIDTH) -> None:
        self.width, self.height, self.title = width, height, title
        self.items: list[str] = []

    def add(self, tag: str, content: str = "", **attributes: object) -> None:
        said = "".join(f' {key.strip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
        self.items.append(f"<{tag}{said}>{content}</{tag}>" if content else f"<{tag}{said}/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """`y` is the middle of the line."""
        self.add("text", escape(text), x=x, y=y + 4.4, class_=style or "label", text_anchor=anchor)

    def mark(self, x: float, y: float, look: Look, tip: str = "", radius: float = 5.5) -> None:
        """A method's mark; hollow for bounds."""
        style = f"mark {look.colour}"
        said = f"<title>{escape(tip)}</title>" if tip else ""
        if look.shape == "circle":
            self.add("circle", said, cx=x, cy=y, r=radius, class_=style)
            return
        if look.shape == "square":
            self.add("rect", said, x=x - radius, y=y - radius, width=2 * radius, height=2 * radius, class_=style)
            return
        corners = {
            "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
            "triangle": ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
            "wedge": ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
            "cross": ((-1, -1), (0, -0.35), (1, -1), (0.35, 0), (1, 1), (0, 0.35), (-1, 1), (-0.35, 0)),
        }[look.shape]
        points = " ".join(f"{x + dx * radius:.1f},{y + dy * radius:.1f}" for dx, dy in corners)
        self.add("polygon", said, points=points, class_=style)

    def axis_below(self, scale: Scale, y: float, top: float, labels: Sequence[str] | None = None) -> None:
        """Ticks under `y` with lines up to `top`."""
        for i, tick in enumerate(scale.ticks()):
            self.line(scale(tick), top, scale(tick), y, "grid")
            self.text(scale(tick), y + 13, labels[i] if labels else scale.label(tick), "tick", "middle")

    def axis_left(self, scale: Scale, x: float, right: float) -> None:
        for tick in scale.ticks():
            self.line(x, scale(tick), right, scale(tick), "grid")
            self.text(x - 7, scale(tick), scale.label(tick), "tick", "end")

    def svg(self) -> str:
        title = escape(self.title)
        return (
            f'<svg viewBox="0 0 {_value(self.width)} {_value(self.height)}" role="img" aria-label="{title}">'
            f"{''.join(self.items)}</svg>"
        )


@dataclass(frozen=True)
class Label:
    """A text that is to stand beside a point."""

    x: float
    y: float
    text: str
    style: str


def place_labels(drawing: Drawing, labels: Sequence[Label], taken: Sequence[Rectangle], frame: Rectangle) -> None:
    """Write labels beside their points where they cover least: no other label, no mark, nothing outside the frame."""
    covered = list(taken)
    for label in labels:
        text = shortened(label.text, (frame[2] - frame[0]) * 0.6)
        width, height = text_width(text), FONT + 3
        options = [(reach, turn) for reach in (10, 18, 30, 44, 60, 80) for turn in range(0, 360, 30)]
        reach, turn = min(
            options, key=lambda o: _cost(_box(label, o[0], o[1], width, height), covered, frame) + o[0] * 0.5
        )
        box = _box(label, reach, turn, width, height)
        if reach > 18:
            end = min(max(label.x, box[0]), box[2]), min(max(label.y, box[1]), box[3])
            drawing.line(label.x, label.y, *end, "leader")
        # Held by the side that faces the point, so that a wider face than expected does not grow over the mark.
        anchor = "start" if box[0] >= label.x else "end" if box[2] <= label.x else "middle"
        x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        drawing.text(x, (box[1] + box[3]) / 2, text, f"label {label.style}", anchor)
        covered.append(box)


def _box(label: Label, reach: float, turn: float, width: float, height: float) -> Rectangle:
    """Where the text stands if its nearest edge is `reach` away from the point, in that direction."""
    right, down = cos(turn * pi / 180), sin(turn * pi / 180)
    x = label.x + right * (reach + width / 2) if abs(right) > 0.1 else label.x
    y = label.y + down * (reach + height / 2)
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _cost(box: Rectangle, covered: Sequence[Rectangle], frame: Rectangle) -> float:
    inside = _overlap(box, frame)
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    return 30 * outside + 10 * sum(_overlap(box, other) for other in covered)


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
