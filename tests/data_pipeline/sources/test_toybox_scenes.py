"""The toybox as a source: the same scenes each time, with the truth only where it is asked for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from data_pipeline.sources import SourceSample
from data_pipeline.sources.toybox_scenes import ToyboxSettings
from data_pipeline.toybox.world import ToyboxWorld, box_of


def samples(**keys: Any) -> list[SourceSample]:
    source = ToyboxSettings(**{"size": 64, "scenes": 6, "shard_size": 4, "seed": 3, **keys}).open()
    found = [answer for unit in source.units() for answer in source.samples(unit)]
    return [answer for answer in found if isinstance(answer, SourceSample)]


def test_units_are_ranges_of_scenes_and_keys_say_which() -> None:
    source = ToyboxSettings(size=64, scenes=6, shard_size=4, seed=3, split="val").open()
    assert [(unit.name, unit.count) for unit in source.units()] == [("00000", 4), ("00001", 2)]
    assert [answer.key for answer in source.samples(source.units()[1])] == ["val-3-000004", "val-3-000005"]


def test_pictures_and_captions_are_those_of_the_world() -> None:
    scene = ToyboxWorld("train", seed=3, size=64, min_subjects=1).scene(5)
    sample = samples()[5]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), scene.image)
    assert sample.alt_text == scene.caption
    assert sample.given is None


def test_equal_settings_give_equal_bytes() -> None:
    assert samples(entities="true") == samples(entities="true")


def test_the_truth_holds_boxes_masks_ids_and_references() -> None:
    for sample in samples(entities="true", min_subjects=2, reference_size=48):
        assert sample.given
        for entity in sample.given:
            mask = np.asarray(Image.open(io.BytesIO(entity.mask_png or b"")))
            assert mask.shape == (64, 64) and box_of(mask > 0) == entity.box_xyxy_px
            assert entity.subject_id and entity.phrase in sample.alt_text
            assert all(Image.open(io.BytesIO(r)).mode == "RGBA" for r in entity.references) and entity.references
            assert Image.open(io.BytesIO(entity.references[0])).size == (48, 48)


def test_the_truth_stands_in_the_order_of_the_caption() -> None:
    for sample in samples(entities="true", min_subjects=3):
        assert sample.given
        places: list[int] = []
        start: dict[str, int] = {}
        for entity in sample.given:  # the k-th entity of a phrase is its k-th occurrence
            places.append(sample.alt_text.index(entity.phrase, start.get(entity.phrase, 0)))
            start[entity.phrase] = places[-1] + 1
        assert places == sorted(places)


def test_a_bare_true_in_yaml_is_the_word() -> None:
    assert load_settings(ToyboxSettings, [], ["entities=true"]).entities == "true"


def test_numbers_that_do_not_go_together_are_one_line() -> None:
    with pytest.raises(UserError, match="min_subjects=3, max_subjects=2"):
        ToyboxSettings(min_subjects=3, max_subjects=2).open()
