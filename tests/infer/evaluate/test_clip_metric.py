"""CLIP-T and CLIP-I, each against a computation by hand from the network's own codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from infer.evaluate.backbones import ClipBackbone, load_clip
from infer.evaluate.cases import Protocol
from infer.evaluate.metrics import Drawn, load_metric
from infer.evaluate.metrics.clip import ClipMetric
from tests.infer.evaluate.small_cases import case, picture, settings, subject
from tests.infer.evaluate.tiny_backbones import SIZE, save_tiny_clip

PROMPTS = ("a dog on the beach", "a red mug on the grass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipBackbone:
    return load_clip(str(folder), "cpu")


def test_clip_t_is_the_raw_cosine_with_the_prompt(clip: ClipBackbone) -> None:
    drawn = [Drawn(case(prompt=prompt), picture(seed)) for seed, prompt in enumerate(PROMPTS)]
    rows = ClipMetric(clip, None).score(drawn)
    images, texts = clip.images([picture(0), picture(1)]), clip.texts(PROMPTS)
    assert [row["clip_t"] for row in rows] == pytest.approx((images * texts).sum(dim=1).tolist(), abs=1e-6)


class AsTorchmetricsKnowsIt(CLIPModel):
    """torchmetrics 1.9 was written for features that come as plain tensors."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return super().get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().get_text_features(input_ids, attention_mask).pooler_output


def test_clip_t_is_torchmetrics_clip_score_divided_by_a_hundred(clip: ClipBackbone, folder: Path) -> None:
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = CLIPProcessor(images, clip.tokenizer)
    network = AsTorchmetricsKnowsIt.from_pretrained(folder).eval().requires_grad_(False)
    theirs = CLIPScore(lambda: (network, processor))
    for seed, prompt in enumerate(PROMPTS):
        shown = picture(seed, 56, 56)
        value = theirs(torch.from_numpy(np.array(shown)).permute(2, 0, 1), prompt)
        (row,) = ClipMetric(clip, None).score([Drawn(case(prompt=prompt), shown)])
        assert float(value) > 1 and row["clip_t"] == pytest.approx(float(value) / 100, abs=1e-3)


def test_clip_i_is_told_against_the_given_photos_and_against_all(clip: ClipBackbone) -> None:
    photos = [picture(seed) for seed in (1, 2, 3)]
    (row,) = ClipMetric(clip, None).score([Drawn(case(subject("dog", photos, given=2)), picture(0))])
    a, b, c = (float(clip.images([picture(0)])[0] @ clip.images([photo])[0]) for photo in photos)
    assert row["clip_i"] == pytest.approx((a + b) / 2, abs=1e-6)
    assert row["clip_i_all"] == pytest.approx((a + b + c) / 3, abs=1e-6)


def test_of_two_subjects_a_whole_picture_scores_the_mean(clip: ClipBackbone) -> None:
    dog, cat = subject("dog", [picture(1)]), subject("cat", [picture(2)])
    metric = ClipMetric(clip, None)
    one, other, both = (
        metric.score([Drawn(case(*some), picture(0))])[0]["clip_i"] for some in ((dog,), (cat,), (dog, cat))
    )
    assert both == pytest.approx((one + other) / 2, abs=1e-6)


def test_a_copied_photo_is_as_similar_as_can_be(clip: ClipBackbone) -> None:
    (row,) = ClipMetric(clip, None).score([Drawn(case(subject("dog", [picture(1)])), picture(1))])
    assert row["clip_i"] == pytest.approx(1, abs=1e-5)


def test_bare_class_words_have_a_text_score_only(clip: ClipBackbone) -> None:
    (row,) = ClipMetric(clip, None).score([Drawn(case(prompt="a dog"), picture(0))])
    assert set(row) == {"clip_t"}


def test_columns_name_the_backbone_and_follow_the_crops_that_are_asked_for(folder: Path) -> None:
    nothing = Protocol("none", ())
    for crops, names in (("none", 3), ("asked", 4)):
        made = settings(crops=crops, backbones={"clip": str(folder)})
        metric = load_metric("clip", made, nothing)
        assert len(metric.columns) == names and {column.backbone for column in metric.columns} == {"clip"}
    assert [column.name for column in metric.columns if column.role] == ["clip_t"]
