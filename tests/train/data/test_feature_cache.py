"""Pools of encoded scenes: built once, restartable, shared between processes, passed over in a new order each time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.data.frozen_models import encoders
from train.data import feature_cache
from train.data.encoded_files import open_scenes, read_scenes, write_scenes
from train.data.feature_cache import GROUP, GROUPS_A_WINDOW, CachedScenes, grouped_order, own_share
from train.data.frozen_encoders import EncodedScene, FrozenEncoders
from train.engine.processes import Processes
from train.settings import DataSettings

DATA = DataSettings(size=32, workers=0, cache_scenes=6, cache_passes=2)


@pytest.fixture(scope="module")
def frozen() -> FrozenEncoders:
    return encoders()


def same(first: EncodedScene, second: EncodedScene) -> bool:
    tensors = ("latents", "boxes", "masks", "pooled", "patches")
    return first.caption == second.caption and all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors)


def test_a_scene_is_encoded_with_latents_boxes_masks_and_one_row_a_reference(
    frozen: FrozenEncoders, tmp_path: Path
) -> None:
    for number, scene in enumerate(CachedScenes(DATA, frozen, tmp_path, shuffle=False)[i] for i in range(6)):
        count = len(scene.nouns)
        assert scene.latents.shape == (4, 4, 4) and scene.latent_std is None and scene.key == f"toybox/{number}"
        assert scene.boxes.shape == (count, 4) and scene.masks.shape == (count, 16, 16)
        assert len(scene.pooled) == len(scene.patches) == sum(scene.reference_counts)
        assert [scene.caption[span[0] : span[1]] for span in scene.spans if span] == list(scene.nouns)


def test_files_give_back_what_was_written_whole_or_scene_by_scene(frozen: FrozenEncoders, tmp_path: Path) -> None:
    scenes = [CachedScenes(DATA, frozen, tmp_path)[i] for i in range(6)]
    path = tmp_path / "chunk.safetensors"
    write_scenes(scenes, path, tmp_path / "part")
    for found in (read_scenes(path), open_scenes(path)):
        assert len(found) == 6 and all(same(a, b) for a, b in zip(scenes, found, strict=True))
        assert [s.key for s in found] == [s.key for s in scenes]


def test_each_pass_sees_every_scene_once_and_the_next_pool_has_new_ones(frozen: FrozenEncoders, tmp_path: Path) -> None:
    cached = CachedScenes(DATA, frozen, tmp_path)
    first, second = ([cached[i] for i in range(start, start + 6)] for start in (0, 6))
    assert [s.caption for s in first] != [s.caption for s in second]
    assert all(any(same(a, b) for b in second) for a in first)
    assert not any(same(cached[12 + i], b) for i in range(6) for b in first)


def test_a_built_pool_is_read_and_not_rendered_again(
    frozen: FrozenEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [CachedScenes(DATA, frozen, tmp_path)[i] for i in range(6)]
    monkeypatch.setattr(CachedScenes, "_encode", lambda *arguments: pytest.fail("rendered again"))
    assert all(same(a, CachedScenes(DATA, frozen, tmp_path)[i]) for i, a in enumerate(before))


def test_settings_and_models_that_change_a_scene_have_pools_of_their_own(
    frozen: FrozenEncoders, tmp_path: Path
) -> None:
    folder = CachedScenes(DATA, frozen, tmp_path).folder
    same_pool = {"workers": 2, "cache_passes": 9, "scratch": Path("elsewhere")}
    assert CachedScenes(DATA.model_copy(update=same_pool), frozen, tmp_path).folder == folder
    for change in ({"size": 64}, {"seed": 1}, {"max_subjects": 2}, {"cache_scenes": 8}):
        assert CachedScenes(DATA.model_copy(update=change), frozen, tmp_path).folder != folder
    assert CachedScenes(DATA, encoders(vae_seed=1), tmp_path).folder != folder
    assert CachedScenes(DATA, encoders(clip_seed=1), tmp_path).folder != folder


def test_references_can_be_cut_from_the_picture_itself(frozen: FrozenEncoders, tmp_path: Path) -> None:
    changed = DATA.model_copy(update={"references": DATA.references.model_copy(update={"source": "same_image"})})
    own, other = CachedScenes(changed, frozen, tmp_path), CachedScenes(DATA, frozen, tmp_path)
    for i in range(6):
        assert set(own[i].reference_counts) <= {1}
        if own[i].nouns:
            assert not torch.equal(own[i].pooled[0], other[i].pooled[0])


def test_two_processes_share_a_pool_and_get_the_same(
    frozen: FrozenEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 2)
    both = [CachedScenes(DATA, encoders(), tmp_path / "both") for _ in range(2)]
    for index, cached in enumerate(both):
        cached.processes = Processes(index, 2, index, 2)
    threads = [threading.Thread(target=cached.build) for cached in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    alone = CachedScenes(DATA, frozen, tmp_path / "alone")
    assert all(same(alone[i], both[0][i]) and same(alone[i], both[1][i]) for i in range(6))
    assert not list((tmp_path / "both").rglob("*.part*"))


def test_what_a_dead_process_leaves_undone_is_done_by_another(
    frozen: FrozenEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 2)
    monkeypatch.setattr(feature_cache, "PATIENCE_S", 0.1)
    cached = CachedScenes(DATA, frozen, tmp_path)
    cached.processes = Processes(0, 2, 0, 2)
    assert len(list(cached.build().glob("chunk-*"))) == 3


def test_machines_begin_apart_and_each_goes_through_all_chunks() -> None:
    chunks = [Path(str(i)) for i in range(8)]
    shares = {(m, i): own_share(chunks, Processes(2 * m + i, 4, i, 2)) for m in (0, 1) for i in (0, 1)}
    names = {place: "".join(path.name for path in share) for place, share in shares.items()}
    assert names == {(0, 0): "0246", (0, 1): "1357", (1, 0): "4602", (1, 1): "5713"}


def test_scenes_with_like_numbers_of_subjects_stand_together() -> None:
    sizes = np.random.default_rng(0).integers(0, 5, 2 * GROUP * GROUPS_A_WINDOW + 10)
    order = grouped_order(sizes, np.random.default_rng(1))
    assert sorted(order) == list(range(len(sizes)))
    spread = [np.ptp(sizes[order[i : i + GROUP]]) for i in range(0, len(order) - GROUP, GROUP)]
    assert np.mean(spread) < 1 and max(spread) <= 2
    starts = [sizes[order[i]] for i in range(0, len(order) - GROUP, GROUP)]
    assert starts != sorted(starts)
