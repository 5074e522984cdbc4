"""Encoded scenes become one padded batch; what is padding counts nowhere."""

from __future__ import annotations

import torch

from tests.model.tiny_tokenizer import tiny_tokenizer
from train.data.diffusion_batch import DiffusionBatch, diffusion_batch, draw_latents, draw_references
from train.data.frozen_encoders import EncodedScene
from train.draws import SampleDraws

CAPTION = "a dog and a cat"


def scene(nouns: tuple[str, ...], counts: tuple[int, ...], value: float, std: float | None = None) -> EncodedScene:
    """References of a scene hold value, value + 1, … in order."""
    total = sum(counts)
    features = torch.arange(total).float() + value
    return EncodedScene(
        latents=torch.full((4, 2, 2), value).half(),
        caption=CAPTION,
        nouns=nouns,
        spans=tuple((CAPTION.index(noun), CAPTION.index(noun) + 3) for noun in nouns),
        boxes=torch.rand(len(nouns), 4).half(),
        masks=torch.ones(len(nouns), 16, 16).half(),
        pooled=features[:, None].expand(total, 5).half(),
        patches=features[:, None, None].expand(total, 3, 6).half(),
        reference_counts=counts,
        key=f"shard/{value:g}",
        latent_std=None if std is None else torch.full((4, 2, 2), std).half(),
    )


def batch() -> DiffusionBatch:
    scenes = [scene(("dog", "cat"), (3, 1), 10.0), scene((), (), 20.0), scene(("dog",), (2,), 30.0)]
    return diffusion_batch(scenes, tiny_tokenizer(), ("placeholder", "noun"), torch.device("cpu"))


def test_rows_keep_their_keys() -> None:
    assert batch().keys == ("shard/10", "shard/20", "shard/30")


def test_subjects_and_references_are_padded_and_marked() -> None:
    inputs = batch().inputs
    assert inputs.subject_keep.tolist() == [[True, True], [False, False], [True, False]]
    assert inputs.reference_keep.sum(dim=2).tolist() == [[3, 1], [0, 0], [2, 0]]
    assert inputs.patches.shape == (3, 2, 3, 3, 6)
    assert (inputs.placeholder_positions >= 0).tolist() == inputs.subject_keep.tolist()
    assert inputs.patches[0, 1, 0, 0, 0] == 13 and not inputs.patches[0, 1, 1:].any()


def test_the_pooled_vector_is_the_mean_over_the_references_that_are_there() -> None:
    pooled = batch().inputs.pooled[..., 0]
    assert pooled.tolist() == [[11.0, 13.0], [0.0, 0.0], [30.5, 0.0]]


def test_supervised_tokens_weigh_one_in_all_for_each_subject() -> None:
    found = batch()
    assert torch.allclose(found.supervised.sum(dim=2), found.inputs.subject_keep.float())


def test_fewer_references_are_drawn_and_the_pooled_vector_follows() -> None:
    whole, widths = batch(), set()
    for seed in range(40):
        inputs = draw_references(whole, torch.Generator().manual_seed(seed))
        widths.add(inputs.patches.shape[2])
        assert inputs.subject_keep.equal(whole.inputs.subject_keep)
        if inputs.patches.shape[2] == 1:
            assert inputs.pooled[..., 0].tolist() == [[10.0, 13.0], [0.0, 0.0], [30.0, 0.0]]
        if inputs.patches.shape[2] == 3:
            assert inputs.pooled.equal(whole.inputs.pooled)
    assert widths == {1, 2, 3}


def test_latents_are_drawn_from_the_posterior_where_its_spread_was_kept() -> None:
    whole, draws = batch(), SampleDraws(0, 0, [5, 6, 7])
    assert draw_latents(whole, draws) is whole.latents
    spread = diffusion_batch(
        [scene((), (), 0.0, std) for std in (0.5, 0.0, 2.0)], tiny_tokenizer(), ("placeholder",), torch.device("cpu")
    )
    normal = SampleDraws(0, 0, [5, 6, 7]).normal(4, 2, 2)
    expected = normal * torch.tensor([0.5, 0.0, 2.0]).reshape(3, 1, 1, 1)
    assert torch.equal(draw_latents(spread, SampleDraws(0, 0, [5, 6, 7])), expected)
