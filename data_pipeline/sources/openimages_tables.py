"""OpenImages' CSVs of millions of rows in little memory: one pass in blocks, only what is kept, sorted by picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute
from pyarrow import csv as arrow_csv

from data_pipeline.errors import UserError
from data_pipeline.sources.files import Place

BLOCK_BYTES = 16 << 20
SAME_BOX = 2e-3  # largest difference of a coordinate: a mask's box is the annotated one, rounded
BOX_COLUMNS = ("XMin", "YMin", "XMax", "YMax")  # fractions of the picture
MASK_BOX_COLUMNS = tuple(f"Box{column}" for column in BOX_COLUMNS)


@dataclass(frozen=True)
class AnnotatedBox:
    """A row: class and place."""

    label: str  # /m/0bt9lr
    xyxy: tuple[float, float, float, float]  # fractions of the picture

    def is_same(self, other: AnnotatedBox) -> bool:
        """Whether both mean the same thing in the picture."""
        differences = np.abs(np.subtract(self.xyxy, other.xyxy))
        return self.label == other.label and bool(differences.max() <= SAME_BOX)


@dataclass(frozen=True)
class RowsByImage:
    """Rows of a table by picture: those of the i-th id in alphabetical order are starts[i] to starts[i + 1]."""

    ids: pyarrow.Array  # sorted
    starts: np.ndarray  # (ids + 1,) int64
    order: np.ndarray  # (rows,) of the table, by picture, else as they came

    @classmethod
    def of(cls, column: pyarrow.DictionaryArray) -> RowsByImage:
        rank_order = compute.sort_indices(column.dictionary)
        rank = np.empty(len(rank_order), np.int32)
        rank[rank_order.to_numpy()] = np.arange(len(rank_order), dtype=np.int32)
        ranks = rank[column.indices.to_numpy(zero_copy_only=False)]  # (rows,)
        starts = np.zeros(len(rank) + 1, np.int64)
        np.cumsum(np.bincount(ranks, minlength=len(rank)), out=starts[1:])
        order = np.argsort(ranks, kind="stable").astype(np.int32)
        return cls(column.dictionary.take(rank_order), starts, order)

    def rows(self, ids: Sequence[str]) -> list[np.ndarray]:
        """Row numbers of each picture, none for an unknown one."""
        places = compute.index_in(pyarrow.array(ids, pyarrow.string()), value_set=self.ids).to_pylist()
        return [self.order[self.starts[i] : self.starts[i + 1]] if i is not None else self.order[:0] for i in places]


@dataclass(frozen=True)
class BoxTable:
    """The boxes that are kept."""

    nouns: Mapping[str, str]  # by label
    images: RowsByImage
    label: np.ndarray  # (rows,) int16, position in `nouns`
    xyxy: np.ndarray  # (rows, 4) float32

    def of_images(self, ids: Sequence[str]) -> list[list[AnnotatedBox]]:
        """Boxes of each picture."""
        labels = list(self.nouns)
        return [[_box(labels[self.label[row]], self.xyxy[row]) for row in rows] for rows in self.images.rows(ids)]


@dataclass(frozen=True)
class MaskTable:
    """Names of the mask files."""

    images: RowsByImage
    label: pyarrow.DictionaryArray
    path: pyarrow.Array
    xyxy: np.ndarray  # (rows, 4) float32: the box that the mask belongs to

    def of_images(self, ids: Sequence[str]) -> list[list[tuple[AnnotatedBox, str]]]:
        """Boxes and mask files of each picture."""
        return [
            [(_box(self.label[row].as_py(), self.xyxy[row]), self.path[row].as_py()) for row in map(int, rows)]
            for rows in self.images.rows(ids)
        ]


def read_class_names(place: Place, path: str, body_parts: bool) -> dict[str, str]:
    """Noun of each label: lower case, no explanation in brackets.

    Args:
        body_parts: whether "human face" and its like are kept.
    Raises:
        UserError: no such table.
    """
    try:
        with place.system.open(path, "rb") as file:
            rows = list(csv.reader(file.read().decode("utf-8-sig", "replace").splitlines()))
    except (OSError, csv.Error) as error:
        raise UserError(f"{place.url(path)}: cannot be read ({error}); it is OpenImages' list of classes") from error
    nouns: dict[str, str] = {}
    for row in rows:
        noun = re.sub(r"\s*\(.*?\)", "", row[1]).strip().lower() if len(row) >= 2 else ""
        if noun and row[0].startswith("/") and (body_parts or not noun.startswith("human ")):
            nouns[row[0]] = noun
    if not nouns:
        raise UserError(f"{place.url(path)}: no classes in it; expected lines of label and name, such as /m/0bt9lr,Dog")
    return nouns


def read_boxes(place: Place, path: str, nouns: Mapping[str, str], depictions: bool, min_confidence: float) -> BoxTable:
    """The boxes of known classes that show single things from outside.

    Raises:
        UserError: no such table, or a column missing.
    """
    optional = {"Confidence": pyarrow.float32(), "IsGroupOf": pyarrow.int8(), "IsInside": pyarrow.int8()}
    optional["IsDepiction"] = pyarrow.int8()
    labels = pyarrow.array(list(nouns), pyarrow.string())
    kept, coordinates, classes = [], [], []
    for batch in _read(place, path, {"LabelName": pyarrow.string()}, BOX_COLUMNS, optional):
        label = compute.index_in(batch["LabelName"], value_set=labels)
        tests = [compute.is_valid(label)]
        xyxy = _matrix(batch, BOX_COLUMNS)
        inside = (xyxy >= 0).all(1) & (xyxy <= 1).all(1) & (xyxy[:, 0] < xyxy[:, 2]) & (xyxy[:, 1] < xyxy[:, 3])
        tests.append(pyarrow.array(inside))
        flags = ["IsGroupOf", "IsInside"] + ([] if depictions else ["IsDepiction"])
        tests += [compute.not_equal(batch[flag], 1) for flag in flags if flag in batch]  # -1: nobody said
        if "Confidence" in batch:
            tests.append(compute.greater_equal(batch["Confidence"], min_confidence))
        passed = np.logical_and.reduce([compute.fill_null(t, False).to_numpy(zero_copy_only=False) for t in tests])
        kept.append(batch["ImageID"].filter(pyarrow.array(passed)))
        coordinates.append(xyxy[passed])
        classes.append(compute.fill_null(label, -1).to_numpy(zero_copy_only=False)[passed].astype(np.int16))
    return BoxTable(nouns, RowsByImage.of(_unified(kept)), np.concatenate(classes), np.concatenate(coordinates))


def read_masks(place: Place, path: str) -> MaskTable:
    """The names of the mask files.

    Raises:
        UserError: no such table, or a column missing.
    """
    dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    batches = list(_read(place, path, {"LabelName": dictionary, "MaskPath": pyarrow.string()}, MASK_BOX_COLUMNS, {}))
    return MaskTable(
        RowsByImage.of(_unified([batch["ImageID"] for batch in batches])),
        _unified([batch["LabelName"] for batch in batches]),
        pyarrow.chunked_array([batch["MaskPath"] for batch in batches], pyarrow.string()).combine_chunks(),
        np.concatenate([_matrix(batch, MASK_BOX_COLUMNS) for batch in batches]),
    )


def _read(
    place: Place, path: str, texts: Mapping[str, Any], numbers: Sequence[str], optional: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Blocks of the table: its columns by name, ImageID among them; at least one block."""
    types = {"ImageID": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), **texts}
    types.update(dict.fromkeys(numbers, pyarrow.float32()))
    try:
        with place.system.open(path, "rb") as file:
            present = file.readline().decode("utf-8-sig", "replace").strip().split(",")
        lacking = [name for name in types if name not in present]
        if lacking:
            raise UserError(
                f"{place.url(path)}: no column {lacking[0]}; expected {', '.join(types)}, as OpenImages publishes them"
            )
        types.update({name: kind for name, kind in optional.items() if name in present})
        with (
            place.system.open(path, "rb") as file,
            arrow_csv.open_csv(
                file,
                arrow_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
                convert_options=arrow_csv.ConvertOptions(include_columns=list(types), column_types=types),
            ) as blocks,
        ):
            yield {field.name: pyarrow.array([], field.type) for field in blocks.schema}  # if there are no others
            for block in blocks:
                yield dict(zip(block.schema.names, block.columns, strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{place.url(path)}: no table that can be read ({told})") from error


def _matrix(batch: Mapping[str, Any], columns: Sequence[str]) -> np.ndarray:
    """Columns side by side: (rows, columns) float32, NaN where one is empty."""
    return np.stack([batch[column].to_numpy(zero_copy_only=False) for column in columns], axis=1)


def _unified(chunks: Sequence[Any]) -> Any:
    """One dictionary column of many that have dictionaries of their own."""
    return pyarrow.chunked_array(chunks).unify_dictionaries().combine_chunks()


def _box(label: str, xyxy: np.ndarray) -> AnnotatedBox:
    x0, y0, x1, y1 = (float(value) for value in xyxy)
    return AnnotatedBox(label, (x0, y0, x1, y1))
