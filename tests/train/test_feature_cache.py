"""Pools of encoded scenes: built once, restartable, passed over in a new order each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from model.image_encoder import SubjectImageEncoder
from model.open_clip_conversion import load_open_clip
from train.feature_cache import (
    GROUP,
    GROUPS_A_WINDOW,
    MASK_SIZE,
    CachedScenes,
    EncodedScene,
    SceneEncoder,
    grouped_order,
    read_scenes,
    write_scenes,
)
from train.settings import DataSettings

DATA = DataSettings(size=32, workers=0, cache_scenes=6, cache_passes=2)


@pytest.fixture
def encoder(chain: Path) -> Callable[..., SceneEncoder]:
    vae = AutoencoderKL.from_pretrained(chain / "vae" / "export")
    clip, config = load_open_clip(chain / "clip" / "export")
    image_encoder = SubjectImageEncoder.from_open_clip(clip, config["model_cfg"])
    return lambda **options: SceneEncoder(vae, image_encoder, torch.device("cpu"), **{"same_image": False} | options)


def same(first: EncodedScene, second: EncodedScene) -> bool:
    tensors = ("latents", "boxes", "masks", "pooled", "patches")
    return first.caption == second.caption and all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors)


def test_a_scene_is_encoded_with_latents_boxes_masks_and_one_row_a_reference(
    encoder: Callable[..., Any], tmp_path: Path
) -> None:
    for scene in (CachedScenes(DATA, encoder(), tmp_path)[i] for i in range(6)):
        count = len(scene.nouns)
        assert scene.latents.shape == (4, 4, 4)
        assert scene.boxes.shape == (count, 4) and scene.masks.shape == (count, MASK_SIZE, MASK_SIZE)
        assert len(scene.pooled) == len(scene.patches) == sum(scene.reference_counts)
        assert [scene.caption[a:b] for a, b in scene.spans] == list(scene.nouns)


def test_files_give_back_what_was_written(encoder: Callable[..., Any], tmp_path: Path) -> None:
    scenes = [CachedScenes(DATA, encoder(), tmp_path)[i] for i in range(6)]
    write_scenes(scenes, tmp_path / "chunk.safetensors")
    assert all(same(a, b) for a, b in zip(scenes, read_scenes(tmp_path / "chunk.safetensors"), strict=True))


def test_each_pass_sees_every_scene_once_and_the_next_pool_has_new_ones(
    encoder: Callable[..., Any], tmp_path: Path
) -> None:
    cached = CachedScenes(DATA, encoder(), tmp_path)
    first, second = ([cached[i] for i in range(start, start + 6)] for start in (0, 6))
    assert [s.caption for s in first] != [s.caption for s in second]
    assert all(any(same(a, b) for b in second) for a in first)
    assert not any(same(cached[12 + i], b) for i in range(6) for b in first)


def test_a_built_pool_is_read_and_not_rendered_again(
    encoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [CachedScenes(DATA, encoder(), tmp_path)[i] for i in range(6)]
    monkeypatch.setattr(CachedScenes, "_encode", lambda *arguments: pytest.fail("rendered again"))
    assert all(same(a, CachedScenes(DATA, encoder(), tmp_path)[i]) for i, a in enumerate(before))


def test_references_can_be_cut_from_the_picture_itself(encoder: Callable[..., Any], tmp_path: Path) -> None:
    own = CachedScenes(DATA, encoder(same_image=True), tmp_path)
    other = CachedScenes(DATA, encoder(), tmp_path)
    for i in range(6):
        assert set(own[i].reference_counts) <= {1}
        if own[i].nouns:
            assert not torch.equal(own[i].pooled[0], other[i].pooled[0])


def test_scenes_with_like_numbers_of_subjects_stand_together() -> None:
    sizes = np.random.default_rng(0).integers(0, 5, 2 * GROUP * GROUPS_A_WINDOW + 10)
    order = grouped_order(sizes, np.random.default_rng(1))
    assert sorted(order) == list(range(len(sizes)))
    spread = [np.ptp(sizes[order[i : i + GROUP]]) for i in range(0, len(order) - GROUP, GROUP)]
    assert np.mean(spread) < 1 and max(spread) <= 2
    starts = [sizes[order[i]] for i in range(0, len(order) - GROUP, GROUP)]
    assert starts != sorted(starts)
