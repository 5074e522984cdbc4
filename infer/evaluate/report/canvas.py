"""SVG by hand: marks of methods, and texts that do not cover each other, on what every page draws with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import cos, pi, sin

from data_pipeline.people import drawing
from data_pipeline.people.drawing import FONT, SMALL, WIDTH, Scale, shortened, text_width
from infer.evaluate.report.tables import Look

__all__ = [
    "FONT", "SMALL", "WIDTH", "Drawing", "Label", "Rectangle", "Scale", "place_labels", "shortened", "text_width",
]  # fmt: skip
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


class Drawing(drawing.Drawing):
    """An SVG in the making that knows the marks of methods."""

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
