"""Scenes as the frozen models take them, of the toybox and of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from model.reference import MID_GREY, prepare_reference
from tests.train.data.scene_shards import data_of, samples_of, scene_shards, stream_of, write_scene_shards
from train.data.live_scenes import ShardScenes, ToyboxScenes
from train.data.prepared_scenes import PreparedScene, mask_side
from train.settings import DataSettings
from train.stream import SamplePlace

IMAGE_SIZE = 32


def toybox(**changes: object) -> ToyboxScenes:
    return ToyboxScenes(DataSettings.model_validate({"size": 48, **changes}), IMAGE_SIZE)


def prepared(tmp_path: Path, count: int = 8, **values: object) -> list[PreparedScene]:
    data = data_of(scene_shards(), tmp_path, **values)
    scenes = ShardScenes(stream_of(data), data, IMAGE_SIZE)
    return [scenes.of(sample) for sample in samples_of(data, count)]


def equal(first: PreparedScene, second: PreparedScene) -> bool:
    tensors = ("picture", "boxes", "masks", "references")
    return first.key == second.key and all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors)


def test_a_toybox_scene_brings_its_own_references_and_their_backgrounds() -> None:
    scenes = toybox()
    for number in range(6):
        scene, truth = scenes[number], scenes.world.scene(number)
        assert scene.key == f"toybox/{number}" and scene.caption == truth.caption
        assert torch.equal(scene.picture, torch.from_numpy(truth.image).permute(2, 0, 1))
        assert scene.reference_counts == tuple(len(e.references) for e in truth.entities)
        frames = [
            prepare_reference(*pair) * 255
            for e in truth.entities
            for pair in ((r, IMAGE_SIZE, b) for r, b in zip(e.references, e.reference_backgrounds, strict=True))
        ]
        assert all((a - b).abs().max() <= 0.5 for a, b in zip(scene.references, frames, strict=True))


def test_boxes_are_fractions_and_masks_small(tmp_path: Path) -> None:
    assert [mask_side(size) for size in (32, 64, 256, 512, 1024)] == [16, 16, 32, 64, 64]
    for scene in prepared(tmp_path):
        assert scene.boxes.min() >= 0 and scene.boxes.max() <= 1
        assert scene.masks.shape == (len(scene.nouns), 16, 16) and scene.masks.max() <= 1
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x0, y0, x1, y1 = (box * 16).round().int().tolist()
            assert mask[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1].sum() == mask.sum() > 0


def test_at_most_so_many_subjects_and_references_are_kept() -> None:
    every, few = toybox(), toybox(max_subjects=1, references={"most": 1})
    for number in range(8):
        scene, truth = few[number], every.world.scene(number)
        assert len(scene.nouns) == min(1, len(truth.entities)) and set(scene.reference_counts) <= {1}
        assert scene.drops.get("too_many", 0) == max(0, len(truth.entities) - 1)
        if truth.entities:
            largest = max(truth.entities, key=lambda e: int(e.mask.sum()))
            assert scene.nouns == (largest.noun,) and scene.spans == (largest.span,)


def grey_share(scene: PreparedScene) -> float:
    corners = scene.references[:, :, :1, :1].float()
    return float(((corners - MID_GREY).abs() < 1.5).all(dim=(1, 2, 3)).float().mean()) if len(corners) else np.nan


@pytest.mark.parametrize("source", ["same_image", "other_image"])
def test_backgrounds_are_replaced_by_chance(source: str, tmp_path: Path) -> None:
    for chance, least, most in ((0.0, 1.0, 1.0), (0.5, 0.2, 0.8), (1.0, 0.0, 0.1)):
        scenes = prepared(tmp_path, 20, references={"source": source, "background": chance})
        assert least <= np.nanmean([grey_share(scene) for scene in scenes]) <= most


def test_backgrounds_are_other_pictures_of_the_same_shard(tmp_path: Path) -> None:
    data = data_of(scene_shards(), tmp_path, references={"background": 1.0})
    stream = stream_of(data)
    scenes = ShardScenes(stream, data, IMAGE_SIZE)
    sample = samples_of(data, 1)[0]
    background = scenes._behind(sample)(np.random.default_rng(0))
    assert background is not None and background.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    others = [scenes.of(stream.another(sample, n)).picture.permute(1, 2, 0).numpy() for n in range(1, 39)]
    near = [np.abs(picture.astype(float) - background).mean() for picture in others]
    assert min(near) < 6 < np.median(near)


def test_a_sample_is_prepared_the_same_each_time_and_anew_in_the_next_epoch(tmp_path: Path) -> None:
    changes = {"references": {"flip": 0.5, "rotation_degrees": 10.0, "perspective": 0.5, "background": 0.5}}
    first, again = prepared(tmp_path, **changes), prepared(tmp_path, **changes)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    data = data_of(scene_shards(), tmp_path, **changes)
    scenes, sample = ShardScenes(stream_of(data), data, IMAGE_SIZE), samples_of(data, 1)[0]
    other = scenes.of(type(sample)(**{**vars(sample), "seed": (*sample.seed[:-1], 1)}))
    assert not torch.equal(other.references, scenes.of(sample).references)


def test_shards_without_references_are_refused_before_the_first_sample(tmp_path: Path) -> None:
    shards = write_scene_shards(tmp_path / "bare", 1, references=False)
    data = data_of(shards, tmp_path)
    scenes = ShardScenes(stream_of(data), data, IMAGE_SIZE)
    place = next(scenes.stream.places(0))
    assert isinstance(place, SamplePlace)
    with pytest.raises(UserError, match="data.shards.pairs: no entity has pictures of its own.*source=same_image"):
        scenes.check_references(place)
    same = data_of(shards, tmp_path, references={"source": "same_image"})
    ShardScenes(stream_of(same), same, IMAGE_SIZE).check_references(place)
