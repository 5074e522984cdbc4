"""Entities that somebody gives with a picture: boxes, masks and cut-outs checked before anything relies on them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from data_pipeline.record import BoxPx
from data_pipeline.sources import GivenEntity
from data_pipeline.sources.files import FileRefused
from data_pipeline.sources.metadata import clean_text

MAX_ENTITIES = 200
MAX_REFERENCES = 16
MAX_PIXELS = 64_000_000  # of a mask or a cut-out
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF
ENTITY_KEYS = {"noun", "phrase", "box_xyxy_px", "mask", "subject_id", "references"}


def picture_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the picture's header, as it is shown: turned as its EXIF says; None: no picture."""
    from PIL import Image

    from data_pipeline.images import FORMATS

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in SIDEWAYS
            return (picture.height, picture.width) if turned else picture.size
    except Exception:  # what Pillow raises on damaged headers is not listed anywhere
        return None


def mask_at(data: bytes, size: tuple[int, int], *, resize: bool) -> bytes | None:
    """A mask picture as PNG: 255 where it is not zero, at the picture's size; None: it is unreadable or does not fit.

    Args:
        size: width and height of the picture.
        resize: whether a mask of another size is stretched to it or refused.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:  # JPEG would not keep zeros zero
            if opened.width * opened.height > MAX_PIXELS or (opened.size != size and not resize):
                return None
            if len(opened.getbands()) != 1:  # palettes, bits, 8 and 16 bits have one
                return None
            inside = Image.fromarray((np.asarray(opened) != 0).astype(np.uint8) * 255)
    except Exception:
        return None
    return png_of(inside if inside.size == size else inside.resize(size, Image.Resampling.NEAREST))


def png_of(picture: Any) -> bytes:
    """A Pillow picture as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def read_entities(
    entries: Any, read: Callable[[str], bytes], size: tuple[int, int], name: str
) -> tuple[GivenEntity, ...]:
    """The list "entities" of the JSON file `name`; `read` gives the bytes of the files that it names.

    Raises:
        FileRefused: an entry does not fit the format, or a file it names is missing or not what it should be.
    """
    if not isinstance(entries, list) or len(entries) > MAX_ENTITIES:
        raise FileRefused("bad_metadata", f"{name}: entities: expected a list of at most {MAX_ENTITIES} objects")
    return tuple(_read_entity(entry, read, size, f"{name}: entities[{i}]") for i, entry in enumerate(entries))


def _read_entity(entry: Any, read: Callable[[str], bytes], size: tuple[int, int], name: str) -> GivenEntity:
    if not isinstance(entry, dict) or not set(entry) <= ENTITY_KEYS:
        raise FileRefused("bad_metadata", f"{name}: expected an object of {', '.join(sorted(ENTITY_KEYS))}")
    texts = {key: entry.get(key) or "" for key in ("noun", "phrase", "subject_id", "mask")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise FileRefused("bad_metadata", f"{name}.{key}: expected text")
    noun = clean_text(texts["noun"])
    if not noun:
        raise FileRefused("bad_metadata", f"{name}.noun: missing; what the thing is called, such as dog")
    files = entry.get("references") or []
    if not isinstance(files, list) or len(files) > MAX_REFERENCES or not all(isinstance(file, str) for file in files):
        raise FileRefused("bad_metadata", f"{name}.references: expected at most {MAX_REFERENCES} file names")
    mask = None
    if texts["mask"]:
        mask = mask_at(read(texts["mask"]), size, resize=False)
        if mask is None:
            raise FileRefused(
                "bad_metadata", f"{name}.mask: {texts['mask']} is no one-channel picture of {size[0]} x {size[1]}"
            )
    return GivenEntity(
        noun=noun,
        box_xyxy_px=_read_box(entry.get("box_xyxy_px"), size, f"{name}.box_xyxy_px"),
        mask_png=mask,
        phrase=clean_text(texts["phrase"]),
        subject_id=clean_text(texts["subject_id"]) or None,
        references=tuple(_read_reference(read(file), f"{name}.references: {file}") for file in files),
    )


def _read_box(box: Any, size: tuple[int, int], name: str) -> BoxPx:
    """Four numbers in order, cut to the picture."""
    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError) as error:
        raise FileRefused("bad_metadata", f"{name}: expected [x0, y0, x1, y1] in pixels") from error
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        raise FileRefused("bad_metadata", f"{name}: expected finite numbers")
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(size[0])), min(y1, float(size[1]))
    if x0 >= x1 or y0 >= y1:
        raise FileRefused("bad_metadata", f"{name}: empty, or outside the picture of {size[0]} x {size[1]}")
    return x0, y0, x1, y1


def _read_reference(data: bytes, name: str) -> bytes:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode == "RGBA" and picture.width * picture.height <= MAX_PIXELS:
                picture.load()
                return data
    except Exception as error:
        raise FileRefused("bad_metadata", f"{name}: cannot be decoded") from error
    raise FileRefused("bad_metadata", f"{name}: expected a PNG cut-out with alpha (RGBA)")
