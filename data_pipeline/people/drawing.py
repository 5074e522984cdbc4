"""SVG by hand: what every drawing of a page needs, texts, lines, scales with round ticks.

Colours are classes of the page's style sheet, so that a drawing follows the light or dark scheme. A drawing is 380
units wide: about as wide as a phone, so that texts keep their size there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import ceil, floor, isfinite, log10

WIDTH, FONT, SMALL = 380, 13, 12
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


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
