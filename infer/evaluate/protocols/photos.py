"""Photo folders as subjects: which files there are, which can be opened, and which of them a method gets to see."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from data_pipeline.errors import UserError
from infer.cutout import load_picture
from infer.evaluate.cases import EvaluatedSubject, Photo, as_file_name
from infer.evaluate.protocols.prompts import nearest
from infer.evaluate.settings import ProtocolSettings

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
RESERVED = "class"  # begins the groups of bare class words


def open_folder(settings: ProtocolSettings, holds: str) -> Path:
    """The protocol's folder.

    Args:
        holds: what must be in it, for the message.
    Raises:
        UserError: it was not given, or is no folder.
    """
    if settings.folder is None:
        raise UserError(f"protocol.folder: missing; give the folder that holds {holds}")
    if not settings.folder.is_dir():
        raise UserError(f"protocol.folder={settings.folder}: no such folder; give the one that holds {holds}")
    return settings.folder


def photo_files(folder: Path) -> list[Path]:
    """Files of a folder that are called like pictures, by name; hidden ones are passed over."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def picture_size(file: Path) -> tuple[int, int] | None:
    """Width and height in pixels, from the head of a file; None if it is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures: `load_picture` decides
            with Image.open(file) as opened:
                return opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's words for damaged data
        return None


def subject_of_files(
    name: str, noun: str, files: Sequence[Path], settings: ProtocolSettings, holes: list[str]
) -> EvaluatedSubject | None:
    """A subject and its photos; what cannot be read becomes a hole, and so does a subject without photos (None).

    Raises:
        UserError: the photo that `input_photos` names is not there.
    """
    ordered = [*files]
    first = settings.input_photos.get(name)
    if first is not None:
        names = [file.name for file in files]
        if first not in names:
            known = f"did you mean {nearest(first, names)}?" if names else "it has no photos"
            raise UserError(f"protocol.input_photos.{name}={first}: no such photo of it; {known}")
        ordered.sort(key=lambda file: file.name != first)
    unreadable = [file for file in ordered if picture_size(file) is None]
    holes += [f"{file}: not a picture that can be read; left out" for file in unreadable]
    photos = [Photo(str(file), partial(load_picture, file)) for file in ordered if file not in unreadable]
    return subject_of_photos(name, noun, photos, settings, holes)


def subject_of_photos(
    name: str, noun: str, photos: Sequence[Photo], settings: ProtocolSettings, holes: list[str]
) -> EvaluatedSubject | None:
    """As `subject_of_files`, from photos that are there."""
    if not photos:
        holes.append(f"subject {name}: no photo of it; left out")
        return None
    if len(photos) < settings.inputs:
        holes.append(f"subject {name}: inputs={settings.inputs}, but it has {len(photos)} photo(s)")
    # One photo is held back from tuning, so that there is one to compare with that nobody saw.
    tuning = tuple(photos[: max(1, min(settings.tuning_photos, len(photos) - 1))]) if settings.tuning_photos else ()
    given = min(settings.inputs, len(photos))
    return EvaluatedSubject(subject_id(name), noun, tuple(photos), given, settings.cutout, tuning)


def subject_id(name: str) -> str:
    """A subject's name as part of file names and of a group's; `+` joins subjects there."""
    return as_file_name(name).replace("+", "_")


def check_ids(names: Iterable[str]) -> None:
    """Make sure that no two subjects share an id.

    Raises:
        UserError: two do, or one is called like the group of bare class words.
    """
    seen: dict[str, str] = {RESERVED: "the group of bare class words"}
    for name in names:
        key = subject_id(name)
        if key in seen:
            raise UserError(f"subject {name!r}: would share its files with {seen[key]}; rename one of them")
        seen[key] = f"subject {name!r}"
