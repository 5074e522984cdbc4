"""Shards of the dataset builder as training scenes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build_settings import DataSettings as BuildSettings
from data_pipeline.engine.build import build
from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from data_pipeline.shards.reader import read_shard
from data_pipeline.shards.removal import remove_samples
from data_pipeline.toybox.world import ToyboxWorld
from tests.train.tiny_runs import tiny_settings
from train.loop import train
from train.scenes import make_world, open_world
from train.settings import DataSettings
from train.shard_scenes import ShardWorld, square

PAIRS = Path(__file__).resolve().parents[2] / "configs" / "data" / "toybox_pairs.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rendered scenes of 128 px with references."""
    output = tmp_path_factory.mktemp("pairs") / "shards"
    small = ["source.scenes=40", "source.shard_size=20", "source.size=128", "source.split=val", "gallery=0"]
    build(load_settings(BuildSettings, [PAIRS], [f"output={output}", *small, "duplicates.remove=false"]))
    return output


def world_of(shards: Path, split: str = "train", **options: object) -> ShardWorld:
    arguments = {"size": 64, "seed": 0, "max_subjects": 4, "need_references": True, **options}
    return ShardWorld(str(shards), split, **arguments)  # type: ignore[arg-type]


def test_a_pass_shows_every_sample_once_and_the_next_one_in_another_order(shards: Path) -> None:
    world = world_of(shards)
    count = len(world.items)
    first, second = ([world.scene(i).caption for i in range(start, start + count)] for start in (0, count))
    assert sorted(first) == sorted(second) and first != second
    assert [world_of(shards).scene(i).caption for i in range(5)] == first[:5]


def test_rebuilt_shards_are_not_taken_for_those_that_were_cached(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    assert world_of(copy).contents == world_of(shards).contents
    remove_samples(copy, {next(read_shard(copy / "00000.tar")).record.sha256})
    assert world_of(copy).contents != world_of(shards).contents


def test_validation_samples_are_never_trained_on(shards: Path) -> None:
    train, held = world_of(shards), world_of(shards, "val")
    assert len(train.items) + len(held.items) == 40 and not set(train.items) & set(held.items)


def test_scenes_hold_what_the_renderer_drew(shards: Path) -> None:
    world, truth = world_of(shards), ToyboxWorld("val", size=128, reference_size=128, min_subjects=1)
    sample = world.index[int(world.items[0])]
    rendered = truth.scene(int(sample.record.key.rsplit("-", 1)[1]))
    scene = next(s for s in map(world.scene, range(len(world.items))) if s.caption == rendered.caption)
    small = np.asarray(Image.fromarray(rendered.image).resize((64, 64), Image.Resampling.BOX), float)
    assert np.abs(scene.image - small).mean() < 4  # JPEG lies between them
    assert {e.noun for e in scene.entities} == {e.noun for e in rendered.entities}
    for entity in scene.entities:
        assert entity.references[0].shape == (128, 128, 4)
        assert entity.mask.any() and entity.box_xyxy_px[2] <= 64


def test_a_wide_picture_is_cut_where_its_entities_are() -> None:
    pixels, masks = np.zeros((40, 100, 3), np.uint8), np.zeros((2, 40, 100), bool)
    pixels[:, 60:] = 200
    masks[0, 10:30, 70:90], masks[1, 10:30, 0:20] = True, True
    picture, kept = square(pixels, masks[:1], [(70, 10, 90, 30)], 20)
    assert picture.shape == (20, 20, 3) and kept[0] is not None and kept[0].sum() == 100
    _, both = square(pixels, masks, [(70, 10, 90, 30), (0, 10, 20, 30)], 20)
    assert [mask is None for mask in both] == [False, True], "only one of them fits, the one nearer to the middle"


def test_shards_without_references_are_refused_where_they_are_needed(shards: Path, tmp_path: Path) -> None:
    small = ["source.scenes=8", "source.size=64", "gallery=0", "duplicates.remove=false"]
    build(load_settings(BuildSettings, [PAIRS], [f"output={tmp_path}", *small]))
    with pytest.raises(UserError, match="8 samples in finished shards; training needs at least 32"):
        world_of(tmp_path)


def test_a_task_that_draws_its_own_scenes_refuses_shards(shards: Path) -> None:
    with pytest.raises(UserError, match="this task learns from toybox scenes"):
        make_world(DataSettings(shards=str(shards)))
    assert isinstance(open_world(DataSettings(shards=str(shards))), ShardWorld)


@pytest.mark.parametrize("reference", ["same_image", "other_image"])
def test_the_subject_model_trains_on_shards(reference: str, chain: Path, shards: Path) -> None:
    name = f"subject-{reference}"
    train(tiny_settings("subject", chain, name=name, data__shards=str(shards), diffusion__reference=reference))
    logged = [json.loads(line) for line in (chain / name / "log.jsonl").read_text().splitlines()]
    assert len(logged) == 3 and all(math.isfinite(entry["loss"]) for entry in logged)
