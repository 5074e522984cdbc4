"""A picture with its boxes, translucent masks and labels as one SVG, and its caption with the phrases marked.

Every entity has a number and one of `NUM_COLOURS` colours (classes `e0`, `e1` … of the style sheet), the same in the
picture, in the caption and below. Labels never leave the picture and never cover each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from typing import Any

import cv2
import numpy as np

from data_pipeline.people.drawing import Drawing, shortened, text_width
from data_pipeline.record import Entity, Record

NUM_COLOURS = 8
MOST_WIDTH, MOST_HEIGHT = 420.0, 470.0  # units of a drawing, about pixels of the page
LABEL_FONT, LABEL_HEIGHT, LABEL_PAD = 13.6, 17.0, 4.0  # the face is 12 px, but bold
OUTLINE_SIDE = 512  # pixels of the longer side at which masks are outlined
MOST_POINTS = 2000  # of the outline of one mask

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Piece:
    """A stretch of a caption; `numbers` are the entities that it names, from 1."""

    text: str
    numbers: tuple[int, ...] = ()


def colour(number: int) -> str:
    """Class of the entity with that number, from 1."""
    return f"e{(number - 1) % NUM_COLOURS}"


def picture_svg(record: Record, masks: Iterable[np.ndarray], source: str, most_points: int = MOST_POINTS) -> str:
    """The picture `source` (a data URI) with everything that was found in it.

    Args:
        masks: (H, W) bool, one an entity.
        most_points: of the outline of one mask.
    """
    scale = min(MOST_WIDTH / record.width, MOST_HEIGHT / record.height)
    width, height = record.width * scale, record.height * scale
    drawing = Drawing(height, record.caption or record.key, width)
    drawing.add("image", href=source, width=width, height=height, preserveAspectRatio="none")
    boxes = [_scaled(entity, scale) for entity in record.entities]
    for number, (entity, mask) in enumerate(zip(record.entities, masks, strict=True), 1):
        drawing.add(
            "path", _tip(entity), d=outline(mask, scale, min(most_points, MOST_POINTS)), class_=f"mask {colour(number)}"
        )
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        place: dict[str, Any] = {"x": left, "y": top, "width": right - left, "height": bottom - top, "fill": "none"}
        drawing.add("rect", **place, class_="box halo")
        drawing.add("rect", **place, class_=f"box {colour(number)}")
    texts = [
        f"{number} {entity.phrase or entity.noun} {entity.score:.2f}"
        for number, entity in enumerate(record.entities, 1)
    ]
    for number, label in enumerate(place_labels(boxes, texts, width, height), 1):
        if label:
            _label(drawing, label, boxes[number - 1], colour(number))
    return drawing.svg()


@dataclass(frozen=True)
class Label:
    """A text and where it stands."""

    text: str
    place: Rectangle


def place_labels(boxes: Sequence[Rectangle], texts: Sequence[str], width: float, height: float) -> list[Label | None]:
    """A place for each box's text: at an edge of its box where that is free, else the nearest free place.

    The smallest boxes choose first. A text too long for the picture is cut; where all is full only its number (the
    first word) is placed, and None where even that finds no room.
    """
    found: list[Label | None] = [None] * len(boxes)
    taken: list[Rectangle] = []
    for i in sorted(range(len(boxes)), key=lambda i: _area(boxes[i])):
        whole = shortened(texts[i], width - 2 * LABEL_PAD, LABEL_FONT)
        for text in (whole, texts[i].split(" ", 1)[0]):
            size = text_width(text, LABEL_FONT) + 2 * LABEL_PAD
            if size > width or height < LABEL_HEIGHT:
                continue
            free = (
                place
                for place in chain(_beside(boxes[i], size, width, height), _anywhere(boxes[i], size, width, height))
                if not any(_touch(place, other) for other in taken)
            )
            place = next(free, None)
            if place:
                found[i] = Label(text, place)
                taken.append(place)
                break
    return found


def _beside(box: Rectangle, size: float, width: float, height: float) -> Iterator[Rectangle]:
    """Places at the edges of a box, moved into the picture: above, inside at the top, below, inside at the bottom."""
    left, top, right, bottom = box
    for y in (top - LABEL_HEIGHT, top, bottom, bottom - LABEL_HEIGHT):
        if 0 <= y <= height - LABEL_HEIGHT:
            for x in (left, right - size):
                x = min(max(x, 0.0), width - size)
                yield (x, y, x + size, y + LABEL_HEIGHT)


def _anywhere(box: Rectangle, size: float, width: float, height: float) -> list[Rectangle]:
    """Places all over the picture, the nearest to the box's middle first."""
    middle_x, middle_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    columns = np.append(np.arange(0, width - size, 12), width - size)
    rows = np.append(np.arange(0, height - LABEL_HEIGHT, LABEL_HEIGHT / 2), height - LABEL_HEIGHT)
    places = [(float(x), float(y), float(x) + size, float(y) + LABEL_HEIGHT) for y in rows for x in columns]
    return sorted(places, key=lambda p: ((p[0] + p[2]) / 2 - middle_x) ** 2 + ((p[1] + p[3]) / 2 - middle_y) ** 2)


def outline(mask: np.ndarray, scale: float, most_points: int = MOST_POINTS) -> str:
    """The outline of a mask (H, W) as an SVG path, holes included, in pixels times `scale`; coarser if it is ragged."""
    height, width = mask.shape
    image: np.ndarray = mask.astype(np.uint8) * 255
    longer = max(height, width)
    if longer > OUTLINE_SIDE:
        share = OUTLINE_SIDE / longer
        size = max(1, round(width * share)), max(1, round(height * share))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    else:  # contours run through the middles of pixels: of small ones, so that nothing is lost at the rim
        times = -(-OUTLINE_SIDE // longer)
        image = image.repeat(times, axis=0).repeat(times, axis=1)
    contours, _ = cv2.findContours((image > 127).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    # Of a mask of specks the largest are drawn: a shape needs three points.
    contours = sorted(contours, key=len, reverse=True)[: max(1, most_points // 3)]
    tolerance = 0.6
    shapes = [cv2.approxPolyDP(contour, tolerance, True) for contour in contours]
    while sum(map(len, shapes)) > most_points:
        tolerance *= 2
        shapes = [shape for shape in (cv2.approxPolyDP(shape, tolerance, True) for shape in shapes) if len(shape) > 2]
    step = np.array([width / image.shape[1], height / image.shape[0]]) * scale
    parts = []
    for shape in shapes:
        if len(shape) > 2:
            points = (shape[:, 0] + 0.5) * step  # (P, 2)
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


def caption_pieces(record: Record) -> list[Piece]:
    """The caption, cut where phrases begin and end; of phrases that overlap the first keeps what both share."""
    spans = sorted(
        (entity.caption_span, number) for number, entity in enumerate(record.entities, 1) if entity.caption_span
    )
    pieces: list[Piece] = []
    done = 0
    for (start, end), number in spans:
        end = min(end, len(record.caption))
        if end <= done:  # the same phrase again, or one inside another
            if pieces and pieces[-1].numbers:
                pieces[-1] = Piece(pieces[-1].text, (*pieces[-1].numbers, number))
            continue
        start = max(start, done)
        if start > done:
            pieces.append(Piece(record.caption[done:start]))
        pieces.append(Piece(record.caption[start:end], (number,)))
        done = end
    return [*pieces, Piece(record.caption[done:])] if done < len(record.caption) else pieces


def _label(drawing: Drawing, label: Label, box: Rectangle, style: str) -> None:
    left, top, right, bottom = label.place
    near_x, near_y = min(max((left + right) / 2, box[0]), box[2]), min(max((top + bottom) / 2, box[1]), box[3])
    if not (left <= near_x <= right and top - 1 <= near_y <= bottom + 1):
        drawing.add("line", x1=(left + right) / 2, y1=(top + bottom) / 2, x2=near_x, y2=near_y, class_=f"label {style}")
    drawing.add("rect", x=left, y=top, width=right - left, height=bottom - top, rx=3, class_=f"label {style}")
    drawing.text(left + LABEL_PAD, (top + bottom) / 2, label.text, "label")


def _scaled(entity: Entity, scale: float) -> Rectangle:
    left, top, right, bottom = entity.box_xyxy_px
    return left * scale, top * scale, right * scale, bottom * scale


def _tip(entity: Entity) -> str:
    return f"<title>{escape(entity.phrase or entity.noun)}</title>"


def _area(box: Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _touch(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] + 1 and b[0] < a[2] + 1 and a[1] < b[3] + 0.5 and b[1] < a[3] + 0.5
