"""OpenImages as a source: its tables in their published layout become entities in pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.sources import SourceSample
from data_pipeline.sources.openimages import OpenImagesSettings
from tests.data_pipeline.sources.picture_server import picture_bytes

NAMES = (
    'LabelName,DisplayName\n/m/dog,Dog\n/m/organ,Organ (Musical Instrument)\n/m/face,Human face\n/m/odd,"Fork, big"\n'
)
BOXES_HEAD = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
MASKS_HEAD = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
BOXES = """
a1,xclick,/m/dog,1,0.25,0.75,0.0,0.5,0,0,0,0,0
b2,xclick,/m/organ,1,0,1,0,1,0,0,0,0,0
a1,xclick,/m/odd,1,0.1,0.2,0.3,0.4,0,0,-1,0,0
a1,xclick,/m/dog,1,0,1,0,1,0,0,1,0,0
a1,xclick,/m/dog,1,0,1,0,1,0,0,0,0,1
a1,xclick,/m/dog,0,0,1,0,1,0,0,0,0,0
a1,xclick,/m/cat,1,0,1,0,1,0,0,0,0,0
a1,xclick,/m/face,1,0.5,0.6,0.1,0.2,0,0,0,0,0
a1,xclick,/m/dog,1,0.6,0.4,0.1,0.2,0,0,0,0,0
a1,xclick,/m/dog,1,,0.4,0.1,0.2,0,0,0,0,0
c3,xclick,/m/dog,1,0.5,0.9,0.5,0.9,0,0,0,1,0
"""
MASKS = """
a1_mdog_1.png,a1,/m/dog,1,0.2501,0.7499,0.0,0.5,0.9,
a1_mdog_2.png,a1,/m/dog,2,0.9,0.95,0.0,0.5,0.9,
../../secret.png,b2,/m/organ,1,0,1,0,1,0.9,
c3_gone.png,c3,/m/dog,1,0.5,0.9,0.5,0.9,0.9,
"""


def write_split(root: Path, boxes: str = BOXES, masks: str | None = MASKS) -> Path:
    (root / "images/train_0").mkdir(parents=True)
    (root / "masks/train-masks-a").mkdir(parents=True)
    for number, name in enumerate(("a1", "train_0/b2", "c3", "d4")):
        (root / f"images/{name}.jpg").write_bytes(picture_bytes(number, (40, 20)))
    (root / "oidv7-class-descriptions-boxable.csv").write_text(NAMES)
    (root / "oidv6-train-annotations-bbox.csv").write_text(BOXES_HEAD + boxes)
    if masks is not None:
        (root / "train-annotations-object-segmentation.csv").write_text(MASKS_HEAD + masks)
    mask = np.zeros((10, 20), bool)
    mask[:5, 5:15] = True
    Image.fromarray(mask).save(root / "masks/train-masks-a/a1_mdog_1.png")
    return root


def answers(root: Path, **keys: Any) -> dict[str, SourceSample | Drop]:
    source = OpenImagesSettings(folder=str(root), **keys).open()
    return {answer.key: answer for unit in source.units() for answer in source.samples(unit)}


def given(answer: SourceSample | Drop) -> list[tuple[str, tuple[float, ...]]]:
    assert isinstance(answer, SourceSample) and answer.given is not None
    return [(entity.noun, tuple(round(v, 3) for v in entity.box_xyxy_px)) for entity in answer.given]


def test_boxes_become_entities_in_pixels_with_the_class_for_a_noun(tmp_path: Path) -> None:
    found = answers(write_split(tmp_path))
    assert list(found) == ["a1", "c3", "d4", "b2"]  # by path
    assert given(found["a1"]) == [("dog", (10, 0, 30, 10)), ("fork, big", (4, 6, 8, 8))]
    assert given(found["b2"]) == [("organ", (0, 0, 40, 20))]
    assert isinstance(found["d4"], Drop) and found["d4"].reason == "no_given_entities"


def test_parts_of_bodies_and_depictions_are_kept_or_not(tmp_path: Path) -> None:
    found = answers(write_split(tmp_path), body_parts=True, depictions=False)
    assert [noun for noun, _ in given(found["a1"])] == ["dog", "fork, big", "human face"]
    assert isinstance(found["c3"], Drop)


def test_a_mask_is_stretched_to_its_picture_and_others_are_left_to_the_segmenter(tmp_path: Path) -> None:
    Image.fromarray(np.ones((20, 40), bool)).save(tmp_path / "secret.png")
    found = answers(write_split(tmp_path / "split"))
    masks = {
        key: [e.mask_png for e in answer.given or ()]
        for key, answer in found.items()
        if isinstance(answer, SourceSample)
    }
    assert [mask is not None for mask in masks["a1"]] == [True, False]
    mask = np.asarray(Image.open(io.BytesIO(masks["a1"][0] or b"")))
    expected = np.zeros((20, 40), np.uint8)
    expected[:10, 10:30] = 255
    np.testing.assert_array_equal(mask, expected)
    assert masks["b2"] == masks["c3"] == [None]  # leads out of the folder; is not there


def test_masks_are_optional(tmp_path: Path) -> None:
    found = answers(write_split(tmp_path, masks=None))
    assert isinstance(found["a1"], SourceSample) and all(e.mask_png is None for e in found["a1"].given or ())


def test_units_hold_shard_size_pictures_and_any_of_them_can_be_read_alone(tmp_path: Path) -> None:
    source = OpenImagesSettings(folder=str(write_split(tmp_path)), shard_size=3).open()
    units = source.units()
    assert [(unit.name, unit.count) for unit in units] == [("00000", 3), ("00001", 1)]
    assert [answer.key for answer in source.samples(units[1])] == ["b2"]


def test_tables_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.openimages_tables.BLOCK_BYTES", 200)
    rows = "".join(f"\n{name},x,/m/dog,1,0.{i + 1},0.9,0,1,0,0,0,0,0" for i in range(8) for name in ("c3", "a1", "b2"))
    found = answers(write_split(tmp_path, boxes=rows + "\n"))
    for key in ("a1", "b2", "c3"):
        assert [box[0] for _, box in given(found[key])] == [4 * (i + 1) for i in range(8)]


def test_missing_files_and_columns_are_one_line(tmp_path: Path) -> None:
    root = write_split(tmp_path)
    (root / "oidv6-train-annotations-bbox.csv").write_text("ImageID,LabelName,XMin\n")
    with pytest.raises(UserError, match="bbox.csv: no column YMin; expected ImageID, LabelName, XMin, YMin"):
        answers(root)
    (root / "oidv6-train-annotations-bbox.csv").write_text(BOXES_HEAD + "\na1,x,/m/dog,1,left,1,0,1,0,0,0,0,0\n")
    with pytest.raises(UserError, match="no table that can be read"):
        answers(root)
    with pytest.raises(UserError, match="no validation-annotations-bbox.csv there"):
        answers(root, split="validation")


def test_a_table_without_rows_has_no_entities(tmp_path: Path) -> None:
    found = answers(write_split(tmp_path, boxes="\n", masks="\n"))
    assert all(isinstance(answer, Drop) for answer in found.values()) and len(found) == 4
