"""OpenImages, test split: 296 classes x 2 entities, as Subject-Diffusion (Ma et al., 2023) measures; from its CSVs.

    FOLDER/class-descriptions-boxable.csv              label, name
    FOLDER/test-annotations-bbox.csv                   boxes
    FOLDER/images/IMAGE_ID.jpg
    FOLDER/test-annotations-object-segmentation.csv    with FOLDER/masks/: outlines, optional; else GrabCut

The paper names no classes and no prompts. Here every class and box has a rank by hash of its ids; the first ones that
can be used are taken, so that the choice depends neither on the order of files nor on the machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas
from PIL import Image

from data_pipeline.errors import UserError
from infer.cutout import load_picture
from infer.evaluate.cases import EvaluatedSubject, Photo, Protocol
from infer.evaluate.protocols.crossing import cross
from infer.evaluate.protocols.photos import open_folder, picture_size, subject_of_photos
from infer.evaluate.protocols.prompts import load_prompts
from infer.evaluate.settings import ProtocolSettings
from infer.subjects import Box

CLASSES, ENTITIES = 296, 2
NAMES_FILE = "class-descriptions-boxable.csv"
BOXES_FILE = "test-annotations-bbox.csv"
MASKS_FILE = "test-annotations-object-segmentation.csv"
FLAWS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction")
BOX_COLUMNS = ("XMin", "YMin", "XMax", "YMax")  # fractions of the picture
MASK_BOX_COLUMNS = tuple(f"Box{column}" for column in BOX_COLUMNS)
AREA = (0.08, 0.7)  # of the picture
ASPECT = (1 / 3, 3.0)  # width / height, in pixels
SAME_BOX = 2e-3  # largest difference of a coordinate: a mask's box is the annotated one, rounded
MARGIN = 0.1  # of the box's sides, added around it: GrabCut takes the border for background


def load(settings: ProtocolSettings) -> Protocol:
    """The protocol of the folder that the settings name.

    Raises:
        UserError: no such folder, file, column or list of prompts, or nothing of it is left.
    """
    folder = open_folder(settings, f"{NAMES_FILE}, {BOXES_FILE} and images/")
    prompts = load_prompts(settings.prompts)
    if not (folder / "images").is_dir():
        raise UserError(f"{folder / 'images'}: no such folder; put the test split's pictures there as IMAGE_ID.jpg")
    holes: list[str] = []
    entities = _entities(folder, holes)
    nouns = {name: row["noun"] for name, row in entities.items()}
    masks = _masks(folder, {row["ImageID"] for row in entities.values()})

    def build(name: str, holes: list[str]) -> EvaluatedSubject | None:
        row = entities[name]
        photo = _photo(folder, row, masks, holes)
        return subject_of_photos(name, row["noun"], [photo], settings, holes)

    return cross("OpenImages", settings, nouns, prompts, build, holes)


def _entities(folder: Path, holes: list[str]) -> dict[str, dict]:
    """The boxes that are taken, by name ("apple-1"), classes in the order of their ranks."""
    names, boxes = _class_names(folder / NAMES_FILE), _usable_boxes(folder / BOXES_FILE)
    boxes = boxes[boxes["LabelName"].isin(names)]
    by_class = dict(iter(boxes.groupby("LabelName")))
    found: dict[str, dict] = {}
    count = 0
    for label in sorted(by_class, key=_rank):
        taken = _first_usable(folder, by_class[label])
        if len(taken) < ENTITIES:
            continue
        for number, row in enumerate(taken, 1):
            found[f"{names[label].replace(' ', '-')}-{number}"] = {**row, "noun": names[label]}
        count += 1
        if count == CLASSES:
            return found
    holes.append(f"{folder}: {count} of {CLASSES} classes have {ENTITIES} boxes and pictures that can be used")
    return found


def _first_usable(folder: Path, boxes: pandas.DataFrame) -> list[dict]:
    """The first boxes by rank, each in another picture, whose picture is there and whose shape is not extreme."""
    taken: list[dict] = []
    rows = boxes.to_dict("records")
    rows.sort(key=lambda row: _rank(row["ImageID"], row["LabelName"], *(f"{row[c]:.6f}" for c in BOX_COLUMNS)))
    for row in rows:
        size = None if row["ImageID"] in {other["ImageID"] for other in taken} else picture_size(_image(folder, row))
        if size is None:
            continue
        aspect = (row["XMax"] - row["XMin"]) * size[0] / ((row["YMax"] - row["YMin"]) * size[1])
        if ASPECT[0] <= aspect <= ASPECT[1]:
            taken.append(row)
        if len(taken) == ENTITIES:
            break
    return taken


def _rank(*ids: str) -> str:
    return hashlib.sha256(" ".join(ids).encode()).hexdigest()


def _class_names(file: Path) -> dict[str, str]:
    """Noun of each label: lower case, no explanation in brackets; parts of people and nouns met before are left out."""
    table = _read_csv(file, None)
    if table.shape[1] < 2:
        raise UserError(f"{file}: has one column; expected label and name")
    found: dict[str, str] = {}
    for label, name in zip(table[0], table[1], strict=True):
        noun = re.sub(r"\s*\(.*?\)", "", str(name)).strip().lower()
        if str(label).startswith("/") and noun and not noun.startswith("human ") and noun not in found.values():
            found[str(label)] = noun
    return found


def _usable_boxes(file: Path) -> pandas.DataFrame:
    table = _read_csv(file, ("ImageID", "LabelName", *BOX_COLUMNS, *FLAWS))
    area = (table["XMax"] - table["XMin"]) * (table["YMax"] - table["YMin"])
    flawless = (table[list(FLAWS)] == 0).all(axis=1)
    return table[flawless & area.between(*AREA)]


def _masks(folder: Path, images: set[str]) -> dict[tuple[str, str], list[tuple[Box, str]]]:
    """Boxes and file names of the masks of some pictures, by picture and label; none without the file."""
    if not (folder / MASKS_FILE).exists():
        return {}
    table = _read_csv(folder / MASKS_FILE, ("MaskPath", "ImageID", "LabelName", *MASK_BOX_COLUMNS))
    found: dict[tuple[str, str], list[tuple[Box, str]]] = {}
    for row in table[table["ImageID"].isin(images)].to_dict("records"):
        x0, y0, x1, y1 = (float(row[column]) for column in MASK_BOX_COLUMNS)
        found.setdefault((row["ImageID"], row["LabelName"]), []).append(((x0, y0, x1, y1), row["MaskPath"]))
    return found


def _read_csv(file: Path, columns: Sequence[str] | None) -> pandas.DataFrame:
    """The named columns; None: a file without a line of names.

    Raises:
        UserError: the file is missing, no CSV, or lacks a column.
    """
    try:
        if columns is None:
            return pandas.read_csv(file, header=None, dtype=str)
        head = pandas.read_csv(file, nrows=0).columns
        lacking = [column for column in columns if column not in head]
        if lacking:
            raise UserError(
                f"{file}: no column {lacking[0]}; expected {', '.join(columns)}, as OpenImages publishes them"
            )
        text = {column: str for column in ("ImageID", "LabelName", "MaskPath") if column in columns}
        return pandas.read_csv(file, usecols=list(columns), dtype=text)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); it belongs to OpenImages' test split") from error
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{file}: no table that can be read ({' '.join(str(error).split())[:160]})") from error


def _image(folder: Path, row: dict) -> Path:
    return folder / "images" / f"{row['ImageID']}.jpg"


def _photo(folder: Path, row: dict, masks: dict[tuple[str, str], list[tuple[Box, str]]], holes: list[str]) -> Photo:
    """The box with a margin, cut out of its picture, and its mask if there is one."""
    x0, y0, x1, y1 = (float(row[column]) for column in BOX_COLUMNS)
    right, down = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    box = (max(x0 - right, 0.0), max(y0 - down, 0.0), min(x1 + right, 1.0), min(y1 + down, 1.0))
    file = _image(folder, row)
    mask = None
    for candidate, name in masks.get((row["ImageID"], row["LabelName"]), []):
        if np.abs(np.subtract(candidate, (x0, y0, x1, y1))).max() <= SAME_BOX:
            places = [place for place in _mask_places(folder, name) if place.exists()]
            if places:
                mask = partial(_cropped, places[0], box)
            else:
                holes.append(f"{folder / 'masks' / name}: no such mask; GrabCut takes its place")
    return Photo(f"{file} at {', '.join(f'{value:.3f}' for value in box)}", partial(_cropped, file, box), mask)


def _mask_places(folder: Path, name: str) -> Iterator[Path]:
    """Masks come in sixteen archives by the first letter of their name, unpacked together or each by itself."""
    yield folder / "masks" / name
    yield folder / "masks" / name[0] / name
    yield folder / "masks" / f"test-masks-{name[0]}" / name


def _cropped(file: Path, box: Box) -> Image.Image:
    picture = load_picture(file)
    width, height = picture.size
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (width, height, width, height), strict=True))
    return picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
