"""infer/evaluate/toybox_truth.py: requests that can be answered exactly, and galleries that make it hard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from data_pipeline.errors import UserError
from data_pipeline.toybox.archive import SubjectArchive
from data_pipeline.toybox.captions import COLOURS
from infer.evaluate.judges import Judges, boxes_of_things
from infer.evaluate.scores import box_iou
from infer.evaluate.toybox_truth import (
    GALLERY,
    HARD_NEGATIVES,
    PROMPTS,
    BackgroundJudge,
    Galleries,
    held_out_subjects,
    in_another_hue,
    pair_requests,
    single_requests,
)
from infer.subjects import Subject, match_nouns
from train.tasks.judge_identity import IdentityJudge
from train.tasks.judge_segment import SegmentLoss


@pytest.fixture(scope="module")
def archive() -> SubjectArchive:
    return SubjectArchive()


def test_subjects_are_held_out_and_of_different_families(archive: SubjectArchive) -> None:
    subjects = held_out_subjects(archive, 40)
    assert len(subjects) == 40 == len({subject.family for subject in subjects})
    assert {subject.split for subject in subjects} == {"heldout"}


def test_half_of_a_subjects_prompts_use_its_group_word_and_none_names_a_colour(archive: SubjectArchive) -> None:
    subjects = held_out_subjects(archive, 40)
    requests = single_requests(archive, subjects)
    assert len(requests) == PROMPTS * len(subjects)
    for i, request in enumerate(requests):
        subject = request.subjects[0]
        assert request.words == (subject.noun if i % PROMPTS < PROMPTS // 2 else subject.group_word,)
        assert not set(request.prompt.split()) & set(COLOURS)


def test_every_request_can_be_drawn(archive: SubjectArchive) -> None:
    subjects = held_out_subjects(archive, 40)
    for request in [*single_requests(archive, subjects), *pair_requests(archive, subjects)]:
        match_nouns(request.prompt, [Subject(word, []) for word in request.words])
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in request.boxes)


def test_requests_are_a_function_of_the_seed(archive: SubjectArchive) -> None:
    subjects = held_out_subjects(archive, 2)
    first, second, other = (single_requests(archive, subjects, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.real, b.real) and a.prompt == b.prompt for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a.real, b.real) for a, b in zip(first, other, strict=True))


def test_the_real_render_shows_the_background_that_is_asked_for(archive: SubjectArchive) -> None:
    judge = BackgroundJudge()
    requests = single_requests(archive, held_out_subjects(archive, 10))
    named = [judge.name(request.real, request.boxes) == request.background for request in requests]
    assert np.mean(named) > 0.9
    names = {judge.name(request.real, request.boxes) for request in requests}
    assert len(names) > 5


def test_another_hue_keeps_the_shape_and_changes_the_colour_of_grey_things_too(archive: SubjectArchive) -> None:
    grey = np.full((8, 8, 4), 128, np.uint8)
    turned = in_another_hue(grey, 0.5)
    assert np.array_equal(turned[..., 3], grey[..., 3])
    assert np.abs(turned[..., :3].astype(int) - 128).max() > 30


def test_a_gallery_holds_the_subject_hard_negatives_and_strangers(archive: SubjectArchive) -> None:
    torch.manual_seed(0)
    judges = Judges(
        IdentityJudge().eval(),
        SegmentLoss(
            UNet2DModel(
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
                block_out_channels=(8,),
                norm_num_groups=4,
            )
        ),
    )
    subjects = held_out_subjects(archive, 3)
    galleries = Galleries(archive, judges, subjects)
    gallery = galleries.of(subjects[0])
    assert gallery.shape[0] == GALLERY
    strangers = {tuple(code) for code in gallery[1 + HARD_NEGATIVES :].tolist()}
    assert len(strangers) == GALLERY - 1 - HARD_NEGATIVES
    assert len({other.family for other in galleries.others}) == len(galleries.others)


def test_boxes_of_things_are_found_largest_first_and_specks_are_passed_over() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[0:8, 0:8] = True
    mask[32:64, 16:48] = True
    mask[20, 60] = True
    assert boxes_of_things(mask) == [(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.125, 0.125)]
    assert box_iou(boxes_of_things(mask)[0], (0.25, 0.5, 0.75, 1.0)) == 1.0


def test_missing_judges_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected identity/ and segment/"):
        Judges.load(tmp_path)
