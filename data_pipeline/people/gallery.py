"""`gallery.html`: samples of a built dataset as a person would judge them, uncurated, in one file without a network.

    print(write_gallery("datasets/toybox", limit=60, seed=0))

Each picture with boxes, masks and labels to switch on and off, its caption with the phrases marked, its references;
then dropped samples with their reasons. All texts are a stranger's: they are escaped, and the page allows no script.
"""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.people.overlay import Piece, caption_pieces, colour, picture_svg
from data_pipeline.people.page_files import finished_shards, folder_name, templates, write_page
from data_pipeline.people.selection import DROPS_PER_REASON, chosen_drops, chosen_samples, count_samples
from data_pipeline.reasons import REASONS
from data_pipeline.record import Entity, Sample
from data_pipeline.shards.reader import decode_sample
from data_pipeline.shards.storage import storage_of

PAGE = "gallery.html"
MOST_PICTURES = 300
# What a page of at most 15 MB is made of, in characters. Each picture has its part of each; sizes give way.
PICTURES_BUDGET, REFERENCES_BUDGET, OUTLINES_BUDGET = 9_000_000, 1_500_000, 2_500_000
SIZES = ((512, 86), (512, 75), (384, 75), (256, 70), (160, 60), (96, 50), (48, 40))  # longer side in px, JPEG quality
REFERENCE_SIDE = 72  # px
MOST_ENTITIES = 40  # of a picture that are drawn
MOST_CAPTION, MOST_TEXT = 1500, 160  # characters of a caption and of any other text
POINT_CHARACTERS = 12  # of a point of an outline
_WEB_ADDRESS = re.compile(r"https?://[^\s\x00-\x20\"'<>\\]+")


def write_gallery(folder: str | os.PathLike[str], limit: int = 60, seed: int | None = 0) -> str:
    """Write the gallery of the finished units of `folder` into it, in place of an older one.

    Args:
        folder: path or fsspec URL of a build's output.
        limit: pictures shown, at most 300.
        seed: of a draw over all kept samples and over the drops of each reason; None: the first of them.
    Returns:
        Address of the page.
    Raises:
        UserError: no finished unit, a file that is not what the builder wrote, a page that cannot be written.
    """
    if not 1 <= limit <= MOST_PICTURES:
        raise UserError(f"gallery: limit={limit}: expected 1 to {MOST_PICTURES} pictures on a page")
    units = count_samples(finished_shards(folder))
    kept = sum(unit.kept for unit in units)
    shown = max(1, min(limit, kept))
    cards = [card(sample, shown) for sample in chosen_samples(units, limit, seed)]
    page = (
        templates()
        .get_template("gallery.html.j2")
        .render(
            name=folder_name(folder),
            cards=cards,
            kept=kept,
            seed=seed,
            drops=chosen_drops(units, seed),
            dropped=sum(sum(unit.dropped.values()) for unit in units),
            drops_per_reason=DROPS_PER_REASON,
            meanings=REASONS,
            web_address=web_address,
            short=short,
        )
    )
    return write_page(storage_of(folder), PAGE, page)


@dataclass(frozen=True)
class Thing:
    """An entity as it is told below a picture."""

    number: int
    style: str
    entity: Entity
    mask_share: float  # of its box
    references: tuple[str, ...]  # data URIs


@dataclass(frozen=True)
class Card:
    """A sample as the page shows it."""

    sample: Sample
    svg: str
    caption: tuple[Piece, ...]
    styles: Mapping[int, str]  # colour of each number
    things: tuple[Thing, ...]
    left_out: int  # entities that are not drawn


def card(sample: Sample, shown: int) -> Card:
    """Draw a sample for a page of `shown` pictures."""
    decoded = decode_sample(sample)
    entities = sample.record.entities[:MOST_ENTITIES]
    record = replace(sample.record, entities=entities)
    outlines = max(12, OUTLINES_BUDGET // POINT_CHARACTERS // shown // max(1, len(entities)))
    source = embedded(decoded.pixels, PICTURES_BUDGET // shown)
    left = REFERENCES_BUDGET // shown
    things = []
    for number, entity in enumerate(entities, 1):
        thumbnails = []
        for name in entity.references:
            uri = thumbnail(decoded.references[name])
            if len(uri) <= left:
                thumbnails.append(uri)
                left -= len(uri)
        things.append(Thing(number, colour(number), entity, _mask_share(entity), tuple(thumbnails)))
    return Card(
        sample,
        picture_svg(record, decoded.masks[: len(entities)], source, outlines),
        tuple(_cut(caption_pieces(record))),
        {thing.number: thing.style for thing in things},
        tuple(things),
        len(sample.record.entities) - len(entities),
    )


def embedded(pixels: np.ndarray, budget: int) -> str:
    """A picture (H, W, 3) uint8 RGB as a data URI of at most `budget` characters, in the first of `SIZES` that fits."""
    uri = ""
    for side, quality in SIZES:
        small = _shrunk(pixels, side)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        uri = f"data:image/jpeg;base64,{b64encode(jpeg.tobytes()).decode()}"
        if len(uri) <= budget:
            break
    return uri


def thumbnail(cutout: np.ndarray) -> str:
    """A reference (h, w, 4) uint8 RGBA as a small data URI that keeps its transparency."""
    small = _shrunk(cutout, REFERENCE_SIDE)
    _, webp = cv2.imencode(".webp", cv2.cvtColor(small, cv2.COLOR_RGBA2BGRA), [cv2.IMWRITE_WEBP_QUALITY, 85])
    return f"data:image/webp;base64,{b64encode(webp.tobytes()).decode()}"


def web_address(text: str | None) -> str:
    """The text if it is a plain http or https address, else "": nothing else is made a link."""
    return text if text and _WEB_ADDRESS.fullmatch(text) else ""


def short(text: str, most: int = MOST_TEXT) -> str:
    """The text, cut to that many characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _cut(pieces: Sequence[Piece]) -> list[Piece]:
    left, found = MOST_CAPTION, list[Piece]()
    for piece in pieces:
        if left <= 0:
            return [*found, Piece("…")]
        found.append(replace(piece, text=short(piece.text, left)))
        left -= len(piece.text)
    return found


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    share = side / max(height, width)
    if share >= 1:
        return pixels
    return cv2.resize(
        pixels, (max(1, round(width * share)), max(1, round(height * share))), interpolation=cv2.INTER_AREA
    )


def _mask_share(entity: Entity) -> float:
    left, top, right, bottom = entity.box_xyxy_px
    return entity.mask_area_px / ((right - left) * (bottom - top))
