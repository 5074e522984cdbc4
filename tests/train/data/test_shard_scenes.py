"""Samples of shards as training scenes: the square, the entities that stay, their references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.toybox.world import ToyboxScene
from tests.train.data.scene_shards import data_of, samples_of, scene_shards, stream_of, world
from train.data.scenes import make_world
from train.data.shard_scenes import ShardScene, crop_offset, reduced_picture, scene_of, square
from train.settings import DataSettings
from train.stream import StreamSample


@pytest.fixture
def shards() -> Path:
    return scene_shards()


def scene(data: DataSettings, sample: StreamSample, nouns: frozenset[str] | None = None) -> ShardScene:
    return scene_of(sample, data, data.shards["pairs"].filters, nouns)


def scenes(data: DataSettings, count: int = 12, nouns: frozenset[str] | None = None) -> list[ShardScene]:
    return [scene(data, sample, nouns) for sample in samples_of(data, count)]


def rendered(sample: StreamSample) -> ToyboxScene:
    return world().scene(int(sample.key.rsplit("-", 1)[1]))


def test_scenes_hold_what_the_renderer_drew(shards: Path, tmp_path: Path) -> None:
    data = data_of(shards, tmp_path)
    for sample in samples_of(data, 6):
        found = scene(data, sample)
        truth = rendered(sample)
        assert found.key == f"{sample.shard}/{sample.key}" and found.caption == truth.caption
        small = np.asarray(Image.fromarray(truth.image).resize((32, 32), Image.Resampling.BOX), float)
        assert np.abs(found.image - small).mean() < 6  # JPEG lies between them
        masks = {
            e.noun: cv2.resize(e.mask.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA) >= 0.5
            for e in truth.entities
        }
        for entity in found.entities:
            x0, y0, x1, y1 = (int(value) for value in entity.box_xyxy_px)
            assert entity.mask[y0:y1, x0:x1].sum() == entity.mask.sum() > 0
            assert entity.references and all(picture.shape == (48, 48, 4) for picture in entity.references)
            if [e.noun for e in truth.entities].count(entity.noun) == 1:
                assert (entity.mask == masks[entity.noun]).mean() > 0.98


def test_the_published_filters_drop_small_subjects_and_count_them(shards: Path, tmp_path: Path) -> None:
    every, published = scenes(data_of(shards, tmp_path)), scenes(data_of(shards, tmp_path, filters={}))
    assert sum(len(s.entities) for s in published) < sum(len(s.entities) for s in every)
    for before, after in zip(every, published, strict=True):
        assert len(after.entities) + sum(after.drops.values()) == len(before.entities) + sum(before.drops.values())
        for entity in after.entities:
            assert 0.05 < np.ptp(entity.box_xyxy_px[::2]) * np.ptp(entity.box_xyxy_px[1::2]) / 32**2 < 0.75
    assert {reason for s in published for reason in s.drops} >= {"area"}


def test_entities_are_limited_to_the_largest_and_to_the_nouns_of_a_file(shards: Path, tmp_path: Path) -> None:
    every = scenes(data_of(shards, tmp_path))
    one = scenes(data_of(shards, tmp_path, max_subjects=1))
    for before, after in zip(every, one, strict=True):
        assert len(after.entities) == min(1, len(before.entities))
        if before.entities:
            assert after.entities[0].mask.sum() == max(e.mask.sum() for e in before.entities)
    noun = every[0].entities[0].noun
    for before, found in zip(every, scenes(data_of(shards, tmp_path), 12, frozenset({noun})), strict=True):
        assert {e.noun for e in found.entities} <= {noun}
        assert found.drops.get("noun", 0) == sum(e.noun != noun for e in before.entities)


def test_a_sample_of_a_seed_is_always_the_same_scene(shards: Path, tmp_path: Path) -> None:
    data = data_of(shards, tmp_path)
    for first, again in zip(scenes(data, 4), scenes(data, 4), strict=True):
        np.testing.assert_array_equal(first.image, again.image)
        for a, b in zip(first.entities, again.entities, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a.references, b.references, strict=True))


def test_at_most_so_many_references_are_drawn_and_the_seed_draws_which(shards: Path, tmp_path: Path) -> None:
    data = data_of(shards, tmp_path, references={"most": 1})
    references = [[len(e.references) for e in sample.sample.record.entities] for sample in samples_of(data, 40)]
    sample = samples_of(data, 40)[next(i for i, counts in enumerate(references) if max(counts) > 2)]
    chosen = set()
    for turn in range(20):
        drawn = replace(sample, seed=(*sample.seed[:-1], turn))
        for entity in scene_of(drawn, data, data.shards["pairs"].filters, None).entities:
            assert len(entity.references) == 1
            chosen.add(entity.references[0].tobytes())
    assert len(chosen) >= 3


def test_entities_without_another_picture_are_left_out_unless_the_target_gives_the_reference(
    shards: Path, tmp_path: Path
) -> None:
    (sample,) = samples_of(data_of(shards, tmp_path), 1)
    record = replace(
        sample.sample.record, entities=tuple(replace(e, references=()) for e in sample.sample.record.entities)
    )
    bare = replace(sample, sample=replace(sample.sample, record=record))
    data = data_of(shards, tmp_path)
    filters, count = data.shards["pairs"].filters, len(record.entities)
    assert scene_of(bare, data, filters, None).drops == {"no_reference": count}
    same = data_of(shards, tmp_path, references={"source": "same_image"})
    found = scene_of(bare, same, filters, None)
    assert len(found.entities) == count and all(e.references == () for e in found.entities)


def test_a_picture_that_cannot_be_decoded_is_named(shards: Path, tmp_path: Path) -> None:
    data = data_of(shards, tmp_path)
    (sample,) = samples_of(data, 1)
    broken = replace(sample, sample=replace(sample.sample, jpeg=sample.sample.jpeg[:200]))
    with pytest.raises(UserError, match=f"{sample.shard}: {sample.key}.jpg: cannot be decoded"):
        scene_of(broken, data, data.shards["pairs"].filters, None)


def offsets(boxes: list[tuple[float, float]], seeds: range = range(200)) -> set[int]:
    starts, ends = np.array([b[0] for b in boxes]), np.array([b[1] for b in boxes])
    return {crop_offset(starts, ends, 40, 100, np.random.default_rng(seed)) for seed in seeds}


def test_a_random_square_is_drawn_among_those_that_contain_all_boxes() -> None:
    assert offsets([(30.5, 50.0), (45.0, 62.5)]) == set(range(23, 31))  # from 62.5 - 40 to 30.5, on whole pixels
    assert offsets([(20.0, 30.0)]) == set(range(21)), "never beyond the picture"
    assert offsets([], range(2000)) == set(range(61)), "anywhere, without boxes"


def test_where_no_square_contains_all_boxes_it_shows_the_most_of_them() -> None:
    assert offsets([(0.0, 20.0), (70.0, 90.0)]) == {50}, "one whole, the one nearer to the middle"
    assert offsets([(10.0, 70.0)]) == {30}, "40 of its 60 pixels, in the middle of the picture"


def test_without_a_seed_the_square_nearest_to_the_middle_is_taken() -> None:
    inside, wide = (np.array([v]) for v in (35.0, 65.0))
    assert crop_offset(inside, wide, 40, 100, None) == 30
    assert crop_offset(np.array([5.0]), np.array([25.0]), 40, 100, None) == 5


def test_pixels_masks_and_boxes_are_cut_alike() -> None:
    pixels, masks = np.zeros((40, 100, 3), np.uint8), np.zeros((2, 40, 100), bool)
    pixels[:, 60:] = 200
    masks[0, 10:30, 70:90], masks[1, 10:30, 0:20] = True, True
    near, far = (70, 10, 90, 30), (0, 10, 20, 30)
    cut = square(pixels, masks, [near, far], 20)
    assert cut.pixels.shape == (20, 20, 3) and cut.seen == [1.0, 0.0]
    # The square is that from 50 to 90, shown at half its size: the box begins at (70 - 50) / 2.
    assert cut.boxes == [(10.0, 5.0, 20.0, 15.0), (0.0, 5.0, 0.0, 15.0)]
    assert cut.masks[0].sum() == 100 and cut.masks[0][5:15, 10:20].all() and not cut.masks[1].any()
    assert (cut.pixels[:, :5] == 0).all() and (cut.pixels[:, 5:] == 200).all()


def test_tall_pictures_are_cut_likewise() -> None:
    pixels, box = np.zeros((100, 40, 3), np.uint8), (5.0, 60.0, 25.0, 95.0)
    masks = np.zeros((1, 100, 40), bool)
    masks[0, 60:95, 5:25] = True
    for seed in range(20):
        cut = square(pixels, masks, [box], 40, np.random.default_rng(seed))
        x0, y0, x1, y1 = (int(v) for v in cut.boxes[0])
        assert cut.seen == [1.0] and (x0, x1, y1 - y0) == (5, 25, 35)
        assert cut.masks[0][y0:y1, x0:x1].all() and cut.masks[0].sum() == 20 * 35


def test_a_reduced_picture_is_the_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (reduced_picture((tmp_path / "wide.png").read_bytes(), 20) == 255).all()
    with pytest.raises(UserError, match="cannot be decoded"):
        reduced_picture(b"nothing", 20)


def test_a_task_that_draws_its_own_scenes_refuses_shards(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.shards=pairs: this task learns from toybox scenes"):
        make_world(data_of(shards, tmp_path))
    assert stream_of(data_of(shards, tmp_path)).samples_an_epoch == {"pairs": 78}
