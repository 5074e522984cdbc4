"""Pictures on disk: PNG files that say how they were made, numbered on from what a folder already holds.

Last stage of generation. The text chunks `prompt`, `seed`, `settings`, `subjects` and `model` let anyone draw a picture
again; other programs show them as ordinary PNG comments.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from data_pipeline.errors import UserError

SOFTWARE = "subject-diffusion"
_NUMBERED = re.compile(r"(\d{5,})\.png")


@dataclass(frozen=True)
class PictureRecord:
    """What made one picture."""

    prompt: str
    seed: int
    model: str  # fingerprint of the weights
    settings: dict[str, Any] = field(default_factory=dict)  # resolved settings, JSON values
    subjects: Sequence[dict[str, Any]] = ()  # noun, occurrence, box, strength, files of each


def open_output_folder(folder: Path) -> Path:
    """Create the folder and make sure that files can be written there.

    Raises:
        UserError: it is a file, or cannot be created or written.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output {folder}: cannot be written ({error.strerror}); give another folder") from error
    return folder


def write_picture(folder: Path, picture: Image.Image, record: PictureRecord) -> Path:
    """Write the picture under the next free number: `00000.png`, `00001.png`, … Nothing is ever overwritten.

    Raises:
        UserError: the disk is full or the folder cannot be written; no partial file stays.
    """
    content = encode_picture(picture, record)
    number = next_number(folder)
    while not write_new(folder / f"{number:05d}.png", content):
        number += 1
    return folder / f"{number:05d}.png"


def encode_picture(picture: Image.Image, record: PictureRecord | None = None) -> bytes:
    """A PNG file's content, with the record as text chunks."""
    chunks = PngInfo()
    texts = (
        {}
        if record is None
        else {
            "prompt": record.prompt,
            "seed": str(record.seed),
            "settings": json.dumps(record.settings, ensure_ascii=False),
            "subjects": json.dumps(list(record.subjects), ensure_ascii=False),
            "model": record.model,
            "Software": SOFTWARE,
        }
    )
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    encoded = BytesIO()
    picture.save(encoded, "PNG", pnginfo=chunks)
    return encoded.getvalue()


def read_record(path: Path) -> PictureRecord:
    """Read back what `write_picture` put into a PNG.

    Raises:
        UserError: not a picture, or one that this program did not write.
    """
    try:
        with Image.open(path) as opened:
            text = dict(opened.info)  # our chunks stand before the pixels, which need not be decoded
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not a PNG that can be read ({error})") from error
    try:
        return PictureRecord(
            prompt=str(text["prompt"]),
            seed=int(text["seed"]),
            model=str(text["model"]),
            settings=json.loads(text["settings"]),
            subjects=tuple(json.loads(text["subjects"])),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}: has no complete record of how it was made ({error}); expected a PNG written by generate"
        ) from error


def next_number(folder: Path) -> int:
    """The number after the highest numbered picture of the folder, 0 for an empty one."""
    found = (_NUMBERED.fullmatch(file.name) for file in folder.iterdir())
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


def write_new(path: Path, content: bytes) -> bool:
    """Write a file that must not exist yet, whole or not at all.

    Returns:
        False if the path is taken; the file there is left alone.
    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        path.open("xb").close()  # claims the name: a plain rename would replace a file that appeared meanwhile
        part.replace(path)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free the disk or give another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return True
