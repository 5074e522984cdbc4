"""Small real samples: a drawn picture, true masks as run lengths, an RGBA cut-out."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from data_pipeline.record import Drop, Entity, Provenance, Record, Sample
from data_pipeline.shards.masks import encode_mask
from data_pipeline.shards.writer import write_shard

FolderType = TypeVar("FolderType", Path, str)

WIDTH, HEIGHT = 48, 32
FACTS = {"config_hash": "c0ffee", "code_version": "0.1.0"}


def picture(seed: int) -> bytes:
    """A JPEG of coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares.repeat(8, axis=0).repeat(8, axis=1)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def cutout() -> bytes:
    """A half transparent RGBA PNG."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def entity(number: int, noun: str, phrase: str, caption: str, references: tuple[str, ...] = ()) -> Entity:
    """A box of 10 x 8 pixels whose left half is the mask."""
    x, y = 3.0 + 12 * number, 5.0
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:13, int(x) : int(x) + 5] = True
    start = caption.index(phrase)
    return Entity(
        id=number,
        noun=noun,
        phrase=phrase,
        caption_span=(start, start + len(phrase)),
        box_xyxy_px=(x, y, x + 10, y + 8),
        score=0.5 + number / 10,
        mask=encode_mask(mask),
        mask_area_px=40,
        subject_id="fido" if references else None,
        references=references,
    )


def sample(number: int, *, prefix: str = "k") -> Sample:
    """Sample `number`: a dog with a reference and a ball; every third has no entity."""
    key, caption = f"{prefix}{number:06d}", f"a small dog beside a ball, no. {number}"
    jpeg = picture(number)
    names = (f"{key}.ref0.png",) if number % 2 == 0 else ()
    entities = (entity(0, "dog", "a small dog", caption, names), entity(1, "ball", "a ball", caption))
    if number % 3 == 2:
        entities, names = (), ()
    record = Record(
        key=key,
        sha256=hashlib.sha256(jpeg).hexdigest(),
        width=WIDTH,
        height=HEIGHT,
        caption=caption,
        alt_text="Hund – été ☃",
        entities=entities,
        url=f"https://example.org/{number}.jpg",
        source_scores={"similarity": 0.31, "punsafe": 0.0},
        provenance={"detect": Provenance("grounding_dino", "IDEA-Research/grounding-dino-tiny", "abc")},
    )
    return Sample(record, jpeg, {name: cutout() for name in names})


def items(count: int = 6, *, prefix: str = "k") -> list[Sample | Drop]:
    """Samples with a drop after every second."""
    found: list[Sample | Drop] = []
    for number in range(count):
        found.append(sample(number, prefix=prefix))
        if number % 2:
            found.append(
                Drop(f"{prefix}bad{number}", "image_corrupt", "truncated", "https://example.org/x", "ab", "alt")
            )
    return found


def small_folder(folder: FolderType, shards: int = 2) -> FolderType:
    """A folder with finished shards `00000`, `00001` …"""
    for number in range(shards):
        write_shard(folder, f"{number:05d}", items(prefix=f"s{number}_"), FACTS)
    return folder
