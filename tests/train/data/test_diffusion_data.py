"""From the settings to batches on the device: live, cached and pooled, in one form."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from data_pipeline.shards.writer import write_shard
from model.image_encoder import SubjectImageEncoder
from tests.data_pipeline.shards.small_shards import FACTS
from tests.model.tiny_tokenizer import tiny_tokenizer
from tests.train.data.frozen_models import CPU, base_run, clip, vae
from tests.train.data.scene_shards import data_of, rendered_sample, scene_shards, write_scene_shards
from tests.train.tiny_runs import SIZES
from train.cache_command import cache_shards
from train.data import diffusion_data
from train.data.diffusion_batch import DiffusionBatch, prompt_of
from train.data.diffusion_data import DiffusionData
from train.engine.processes import Processes
from train.settings import DataSettings


def opened(runs: Path, data: DataSettings, **values: Any) -> DiffusionData:
    tower = SubjectImageEncoder.from_open_clip(clip(), SIZES["architecture"]["clip"])
    return DiffusionData(base_run(runs, data, **values), vae(), tower, tiny_tokenizer(56), CPU)


def batch_of(data: DiffusionData, numbers: range) -> DiffusionBatch:
    return data.batch(data.collate([data.dataset[n] for n in numbers]))


def same(first: DiffusionBatch, second: DiffusionBatch, tolerance: float = 0.0) -> None:
    assert first.keys == second.keys
    pairs = [
        (getattr(first, n), getattr(second, n)) for n in ("latents", "pooled_each", "masks", "supervised", "latent_std")
    ]
    pairs += [(value, getattr(second.inputs, name)) for name, value in vars(first.inputs).items()]
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_live_batches_hold_pictures_of_shards_as_the_frozen_models_see_them(tmp_path: Path) -> None:
    data = opened(tmp_path, data_of(scene_shards(), tmp_path))
    batch = batch_of(data, range(4))
    assert batch.latents.shape == (4, 4, 4, 4) and batch.latent_std is not None
    assert all(key.startswith("0000") and "/scene-" in key for key in batch.keys)
    item = data.dataset[2]
    assert not isinstance(item, UserError)
    mean, std = data.encoders.latents(item.scene.picture[None])  # type: ignore[union-attr]
    assert torch.allclose(batch.latents[2], mean[0], atol=1e-5) and torch.allclose(
        batch.latent_std[2], std[0], atol=1e-5
    )
    pooled, _ = data.encoders.features(item.scene.references)  # type: ignore[union-attr]
    found = batch.pooled_each[2][batch.inputs.reference_keep[2]]
    assert torch.allclose(found, pooled, atol=1e-5) and len(found) == sum(item.scene.reference_counts) > 0


def test_loading_processes_hand_over_what_the_training_process_would_read(tmp_path: Path) -> None:
    alone = opened(tmp_path, data_of(scene_shards(), tmp_path))
    others = opened(tmp_path, data_of(scene_shards(), tmp_path, workers=2))
    assert (alone.loader_workers, others.loader_workers) == (0, 2)
    batches = [list(range(4 * p, 4 * p + 4)) for p in range(4)]
    loader = DataLoader(others.dataset, batch_sampler=batches, num_workers=2, collate_fn=others.collate)  # type: ignore[arg-type]
    for numbers, collated in zip(batches, loader, strict=True):
        expected = others.collate([others.dataset[n] for n in numbers])
        assert others.keys(collated) == others.keys(expected)
        same(others.batch(collated), others.batch(expected))


def test_the_prompts_of_a_pool_are_tokenised_in_its_first_pass_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(tmp_path, DataSettings(size=32, workers=0, cache_scenes=8, cache_passes=2))
    tokenised: list[str] = []

    def noted(scene: Any, tokenizer: Any) -> Any:
        tokenised.append(scene.key)
        return prompt_of(scene, tokenizer)

    monkeypatch.setattr(diffusion_data, "prompt_of", noted)
    first, second = (
        {i.scene.key: i.prompt for i in map(data.dataset.__getitem__, n)} for n in (range(8), range(8, 16))
    )
    assert first == second and sorted(tokenised) == sorted(first)
    data.dataset[16]  # the next pool
    assert len(tokenised) == 9


def test_the_cache_gives_the_batches_that_live_models_give(tmp_path: Path) -> None:
    changes = {"crop": "middle", "references": {"flip": 0.5, "rotation_degrees": 10.0}}
    settings = data_of(scene_shards(), tmp_path, **changes)
    live = opened(tmp_path, settings)
    cache_shards(settings, live.encoders, tmp_path / "cache", Processes())
    cached = opened(tmp_path, settings.model_copy(update={"cache": tmp_path / "cache"}))
    for first in (0, 4, 72):  # all in the first epoch
        same(batch_of(live, range(first, first + 4)), batch_of(cached, range(first, first + 4)), tolerance=4e-3)
    again = opened(tmp_path, settings.model_copy(update={"cache": tmp_path / "cache"}))
    same(batch_of(cached, range(8)), batch_of(again, range(8)))


def test_toybox_scenes_and_shards_mix_in_one_batch(tmp_path: Path) -> None:
    settings = data_of(scene_shards(), tmp_path, toybox={"weight": 1.0})
    live = opened(tmp_path, settings)
    cache_shards(settings, live.encoders, tmp_path / "cache", Processes())
    mixed = opened(tmp_path, settings.model_copy(update={"cache": tmp_path / "cache"}))
    batch = batch_of(mixed, range(8))
    assert sum(key.startswith("toybox/") for key in batch.keys) == 4
    assert batch.keys == batch_of(live, range(8)).keys
    assert batch.latent_std is not None and (batch.latent_std.flatten(1).amax(dim=1) > 0).all()
    assert (batch.latents.flatten(1).std(dim=1) > 0).all()


def test_pools_hold_toybox_scenes_and_go_on_under_another_layout(tmp_path: Path) -> None:
    data = opened(tmp_path, DataSettings(size=32, workers=0, cache_scenes=8, cache_passes=2))
    assert data.loader_workers == 0 and batch_of(data, range(4)).latent_std is None
    position = data.dataset.position(3)
    keys = batch_of(data, range(12, 16)).keys
    fresh = opened(tmp_path, DataSettings(size=32, workers=0, cache_scenes=8, cache_passes=2), accumulate=1)
    fresh.dataset.resume(position, 3)
    assert batch_of(fresh, range(12, 16)).keys == keys
    larger = opened(tmp_path, DataSettings(size=32, workers=0, cache_scenes=8, cache_passes=2))
    larger.dataset.layout = type(larger.dataset.layout)(2, 0, 4)  # type: ignore[union-attr]
    larger.dataset.resume(position, 3)
    assert batch_of(larger, range(24, 28)).keys == keys
    assert larger.dataset.position(3) == position


def test_a_damaged_picture_is_passed_over_and_a_caption_that_no_prompt_can_hold_too(tmp_path: Path) -> None:

    good = [rendered_sample(n) for n in range(24)]
    bad = replace(good[3], jpeg=good[3].jpeg[:300])
    reserved = replace(
        good[5], record=replace(good[5].record, caption="<subject> on the beach", entities=()), references={}
    )
    write_shard(tmp_path / "shards", "00000", [*good[:3], bad, good[4], reserved, *good[6:]], FACTS)
    data = opened(tmp_path, data_of(tmp_path / "shards", tmp_path))
    keys = [key for first in range(0, 24, 4) for key in batch_of(data, range(first, first + 4)).keys]
    assert not any(key.endswith(("scene-0003", "scene-0005")) for key in keys) and len(set(keys)) == 22
    assert data.dataset.stream.damage.samples == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_ends_a_run_comes_out_of_the_loading_process_as_one_line(workers: int, tmp_path: Path) -> None:
    shards = write_scene_shards(tmp_path / "bare", 1, references=False)
    data = opened(tmp_path, data_of(shards, tmp_path, workers=workers))
    loader = DataLoader(data.dataset, batch_sampler=[[0, 1]], num_workers=workers, collate_fn=data.collate)  # type: ignore[arg-type]
    collated = next(iter(loader))
    assert data.keys(collated) == []
    with pytest.raises(UserError, match="^data.shards.pairs: no entity has pictures of its own[^\n]*$"):
        data.batch(collated)


@pytest.mark.parametrize("kind", ["shards", "pool", "toybox"])
def test_validation_samples_are_fixed_and_never_trained_on(kind: str, tmp_path: Path) -> None:
    shards = data_of(write_scene_shards(tmp_path / "s", 2), tmp_path) if kind == "shards" else None
    settings = shards or DataSettings(size=32, workers=0, cache_scenes=8 if kind == "pool" else 0)
    data, again = opened(tmp_path, settings), opened(tmp_path, settings)
    batch = data.validation_batch(2, 3)
    same(batch, again.validation_batch(2, 3))
    assert data.captions(2, 3) == [scene.caption for scene in data.unseen()[2:5]] and len(data.unseen()) == 64
    if kind == "shards":
        trained = {key for first in range(0, 80, 4) for key in batch_of(data, range(first, first + 4)).keys}
        assert {scene.key for scene in data.unseen()} == {"00000/scene-0031", "00001/scene-0071"}
        assert not trained & {scene.key for scene in data.unseen()} and len(trained) == 78


def test_latents_are_drawn_as_pictures(tmp_path: Path) -> None:
    data = opened(tmp_path, DataSettings(size=32, workers=0))
    assert data.draw(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 32, 32)


def test_a_mixture_remembers_its_place(tmp_path: Path) -> None:
    settings = data_of(scene_shards(), tmp_path, toybox={"weight": 0.5})
    data, resumed = opened(tmp_path, settings), opened(tmp_path, settings)
    resumed.dataset.resume(data.dataset.position(5), 5)
    same(batch_of(data, range(20, 24)), batch_of(resumed, range(20, 24)))
    shutil.rmtree(tmp_path)


def test_entities_are_counted_under_the_same_names_in_every_batch(tmp_path: Path) -> None:
    live = opened(tmp_path, data_of(scene_shards(), tmp_path, filters={}))
    counts = [live.counts(live.collate([live.dataset[n] for n in range(i, i + 2)])) for i in range(0, 16, 2)]
    assert len({tuple(count) for count in counts}) == 1
    assert sum(count["left_out_area"] for count in counts) > 0 and sum(count["entities"] for count in counts) > 0
    toybox = opened(tmp_path, DataSettings(size=32, workers=0))
    items = [toybox.dataset[n] for n in range(4)]
    kept = sum(len(item.scene.nouns) for item in items if not isinstance(item, UserError))
    assert toybox.counts(toybox.collate(items)) == {"entities": kept}
