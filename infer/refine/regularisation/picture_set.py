"""Pictures of a class with their captions, decoded when a sample asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.images import decode_stored
from infer.cutout import load_picture
from infer.refine.subject_images import SubjectPicture


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture of the class."""

    place: Path  # of its file; of one in a shard, SHARD/KEY.jpg
    caption: str
    jpeg: bytes | None = None  # its bytes, where it has no file of its own


class PictureSet:
    """See `samples.RegularisationSet`.

    Args:
        pictures: at least one.
        size: side of the squares in pixels.
    """

    def __init__(self, pictures: Sequence[CaptionedPicture], size: int) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[SubjectPicture, str]:
        chosen = self.pictures[index]
        if chosen.jpeg is None:
            picture = load_picture(chosen.place)
        else:
            picture = Image.fromarray(decode_stored(chosen.jpeg, str(chosen.place)))
        return SubjectPicture(chosen.place, _square(picture, self.size)), chosen.caption


def _square(picture: Image.Image, size: int) -> np.ndarray:
    """The middle square, (size, size, 4) uint8."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGBA").crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS))
