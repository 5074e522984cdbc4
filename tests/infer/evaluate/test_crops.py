"""Subjects looked for one by one: where they are taken to stand, and what a picture scores by its worst one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import UserError
from infer.evaluate.backbones import DinoBackbone, load_clip, load_dino
from infer.evaluate.cases import EvaluatedSubject
from infer.evaluate.crops import (
    AskedPlaces,
    DetectedPlaces,
    Places,
    crop,
    crop_scores,
    load_finder,
    phrases_of,
    place_subjects,
)
from infer.evaluate.metrics import Drawn
from infer.evaluate.metrics.clip import ClipMetric
from infer.evaluate.metrics.dino import DinoMetric
from infer.subjects import Box
from model.reference import MID_GREY
from tests.infer.evaluate.small_cases import case, picture, settings, subject
from tests.infer.evaluate.tiny_backbones import save_tiny_clip, save_tiny_detector, save_tiny_dino

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> DinoBackbone:
    return load_dino(str(save_tiny_dino(tmp_path_factory.mktemp("dino"))), "cpu")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("networks") / "detector")


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> DetectedPlaces:
    return DetectedPlaces(str(detector_folder), "cpu")


class Known:
    """Places that the test knows."""

    def __init__(self, *places: Places | None) -> None:
        self.places = [*places]

    def find(self, drawn: Sequence[Drawn]) -> list[Places | None]:
        return self.places


def side_by_side(left: int, right: int) -> Image.Image:
    joined = Image.new("RGB", (80, 40))
    joined.paste(picture(left, 40, 40), (0, 0))
    joined.paste(picture(right, 40, 40), (40, 0))
    return joined


def thing(noun: str, seed: int) -> EvaluatedSubject:
    return subject(noun, [picture(seed, 40, 40), picture(50 + seed)])


def alike(dino: DinoBackbone, first: int, second: int) -> float:
    return float(dino.images([picture(first, 40, 40)])[0] @ dino.images([picture(second, 40, 40)])[0])


def test_a_crop_is_what_stands_in_the_box_whole_on_a_grey_square() -> None:
    shown = np.asarray(crop(side_by_side(1, 2), (0.5, 0.25, 1.0, 0.75)))
    assert shown.shape == (40, 40, 3)
    assert np.array_equal(shown[10:30], np.asarray(picture(2, 40, 40))[10:30])
    assert (shown[:10] == MID_GREY).all() and (shown[30:] == MID_GREY).all()


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (0.3, 0.2, 0.3001, 0.9)])
def test_a_crop_is_never_empty(box: Box) -> None:
    assert min(crop(picture(0), box).size) >= 1


def test_at_asked_boxes_the_worst_subject_decides(dino: DinoBackbone) -> None:
    asked = case(thing("dog", 1), thing("cat", 2), boxes=(LEFT, RIGHT))
    good, bad = crop_scores([Drawn(asked, side_by_side(1, 2)), Drawn(asked, side_by_side(1, 3))], AskedPlaces(), dino)
    assert good == pytest.approx(1, abs=1e-5)
    assert bad == pytest.approx(alike(dino, 2, 3), abs=1e-5)


def test_several_given_photos_count_by_their_mean(dino: DinoBackbone) -> None:
    dog = subject("dog", [picture(seed, 40, 40) for seed in (2, 3, 4)], given=2)
    (score,) = crop_scores([Drawn(case(dog, boxes=(LEFT,)), side_by_side(1, 9))], AskedPlaces(), dino)
    assert score == pytest.approx((alike(dino, 1, 2) + alike(dino, 1, 3)) / 2, abs=1e-5)


def test_a_method_may_say_where_its_subjects_stand(dino: DinoBackbone) -> None:
    asked = case(thing("dog", 1), boxes=(LEFT,))
    told, silent = crop_scores(
        [Drawn(asked, side_by_side(2, 1), (RIGHT,)), Drawn(asked, side_by_side(2, 1))], AskedPlaces(), dino
    )
    assert told == pytest.approx(1, abs=1e-5) and silent == pytest.approx(alike(dino, 1, 2), abs=1e-5)


def test_without_any_box_there_is_no_crop_score(dino: DinoBackbone) -> None:
    (row,) = DinoMetric(dino, AskedPlaces()).score([Drawn(case(thing("dog", 1)), picture(0))])
    assert "dino_crop" not in row and "dino" in row


def test_a_subject_that_is_not_found_scores_zero(dino: DinoBackbone) -> None:
    shown = Drawn(case(thing("dog", 1), thing("cat", 2)), side_by_side(1, 2))
    assert crop_scores([shown], Known(Places((LEFT, None))), dino) == [0.0]
    assert crop_scores([shown], Known(Places((None, None))), dino) == [0.0]


def test_two_of_one_word_stand_where_they_look_most_alike(dino: DinoBackbone) -> None:
    shown = Drawn(case(thing("dog", 1), thing("dog", 2), words=("dog", "dog")), side_by_side(1, 2))
    swapped = (RIGHT, LEFT)
    (right,) = crop_scores([shown], Known(Places(swapped, alike=((0, 1),))), dino)
    (wrong,) = crop_scores([shown], Known(Places(swapped)), dino)
    assert right == pytest.approx(1, abs=1e-5) and wrong == pytest.approx(alike(dino, 1, 2), abs=1e-5)


def test_of_two_of_one_word_with_one_box_one_is_missing(dino: DinoBackbone) -> None:
    shown = Drawn(case(thing("dog", 1), thing("dog", 2), words=("dog", "dog")), side_by_side(1, 2))
    assert crop_scores([shown], Known(Places((RIGHT, None), alike=((0, 1),))), dino) == [0.0]
    assert crop_scores([shown], Known(Places((None, None), alike=((0, 1),))), dino) == [0.0]


BOXES = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.01, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0], [0.0, 0.6, 0.3, 1.0]])


def at(row: int) -> tuple[float, ...]:
    return tuple(BOXES[row].tolist())


def test_each_subject_takes_the_box_that_scores_best_for_its_word() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.1], [0.2, 0.8], [0.3, 0.3]])
    assert place_subjects(BOXES, scores, ("dog", "cat")) == Places((at(0), at(2)))


def test_two_subjects_never_share_a_box() -> None:
    both = torch.tensor([[0.9, 0.8], [0.0, 0.0], [0.5, 0.3], [0.0, 0.0]])
    # dog at 0 and cat at 2 sum to 1.2, dog at 2 and cat at 0 to 1.3
    assert place_subjects(BOXES, both, ("dog", "cat")).boxes == (at(2), at(0))
    only = torch.tensor([[0.9, 0.8], [0.0, 0.0], [0.0, 0.2], [0.0, 0.0]])
    assert place_subjects(BOXES, only, ("dog", "cat")).boxes == (at(0), None)


def test_two_boxes_around_one_thing_are_one() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.85], [0.1, 0.1], [0.1, 0.1]])
    assert place_subjects(BOXES, scores, ("dog", "cat")).boxes == (at(0), None)


def test_what_scores_below_the_threshold_is_not_found() -> None:
    assert place_subjects(BOXES, torch.full((4, 1), 0.24), ("dog",)) == Places((None,))
    assert place_subjects(BOXES[:1], torch.tensor([[0.26]]), ("dog",)).boxes == (at(0),)


def test_two_of_one_word_take_its_two_best_boxes_and_may_change_them() -> None:
    scores = torch.tensor([[0.5], [0.1], [0.9], [0.4]])
    places = place_subjects(BOXES, scores, ("Dog", "dog"))
    assert set(places.boxes) == {at(0), at(2)} and places.alike == ((0, 1),)


def test_a_subjects_word_is_looked_for_once_without_determiner_or_full_stop() -> None:
    words = ("Teddy  Bear", "cat", "a teddy bear", "St. Bernard")
    assert phrases_of(words) == ["teddy bear", "cat", "st bernard"]


def test_a_word_that_says_nothing_is_never_found(detector: DetectedPlaces) -> None:
    ((_, scores),) = detector.detect([picture(0, 80, 40)], phrases_of(("dog", "...")))
    assert scores.shape[1] == 2 and bool((scores[:, 0] > 0).all()) and bool((scores[:, 1] == 0).all())


@torch.no_grad()
def by_hand(detector: DetectedPlaces, shown: Image.Image) -> tuple[Tensor, Tensor]:
    """Scores of "dog" and "cat", and boxes in pixels by transformers' own postprocessing."""
    inputs = detector.processor(images=shown, text="dog. cat.", return_tensors="pt")
    output = detector.model(**inputs)
    letters = output.logits[0].sigmoid()  # [CLS] d o g . c a t . [SEP]
    scores = torch.stack([letters[:, 1:4].mean(dim=1), letters[:, 5:8].mean(dim=1)], dim=1)
    (found,) = detector.processor.post_process_grounded_object_detection(
        output, inputs.input_ids, threshold=0.0, target_sizes=[(shown.height, shown.width)]
    )
    return scores, found["boxes"]


def test_the_detector_is_read_as_transformers_reads_it(detector: DetectedPlaces) -> None:
    shown = [picture(seed, 80, 40) for seed in range(3)]
    for one, (boxes, scores) in zip(shown, detector.detect(shown, ["dog", "cat"]), strict=True):
        expected_scores, expected_boxes = by_hand(detector, one)
        torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)
        pixels = torch.tensor([80.0, 40.0, 80.0, 40.0])
        torch.testing.assert_close(boxes * pixels, expected_boxes.clamp(torch.zeros(4), pixels), atol=1e-2, rtol=1e-4)


def test_pictures_of_several_sizes_and_wordings_are_found_as_if_alone(detector: DetectedPlaces) -> None:
    dog, cat = thing("dog", 1), thing("cat", 2)
    drawn = [
        Drawn(case(dog, cat), picture(0, 80, 40)),
        Drawn(case(dog), picture(1, 80, 40)),
        Drawn(case(), picture(2)),
        Drawn(case(dog, cat), picture(3, 48, 48)),
        Drawn(case(dog, cat), picture(4, 80, 40)),
    ]
    together = detector.find(drawn)
    assert together[2] is None
    for one, place in zip(drawn, together, strict=True):
        (alone,) = detector.find([one])
        assert (alone is None) == (place is None)
        for box, other in zip(alone.boxes if alone else (), place.boxes if place else (), strict=True):
            assert (box is None) == (other is None)
            assert box is None or other is None or box == pytest.approx(other, abs=1e-4)
    assert any(box is not None for place in together if place for box in place.boxes)


def test_clip_and_dino_share_one_look_of_the_detector(
    detector_folder: Path, dino: DinoBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(crops="detected", backbones={"detector": str(detector_folder)})
    looks = []
    detect = DetectedPlaces.detect

    def counted(self: DetectedPlaces, pictures: list[Image.Image], phrases: list[str]) -> list[tuple[Tensor, Tensor]]:
        looks.append(len(pictures))
        return detect(self, pictures, phrases)

    monkeypatch.setattr(DetectedPlaces, "detect", counted)
    clip = load_clip(str(save_tiny_clip(tmp_path)), "cpu")
    drawn = [Drawn(case(thing("dog", 1), seed=seed), picture(seed)) for seed in range(2)]
    rows = ClipMetric(clip, load_finder(asked)).score(drawn), DinoMetric(dino, load_finder(asked)).score(drawn)
    assert all("clip_i_crop" in row for row in rows[0]) and all("dino_crop" in row for row in rows[1])
    assert looks == [2]


def test_crops_none_looks_nowhere_and_a_detector_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert load_finder(settings(crops="none")) is None
    with pytest.raises(UserError, match=rf"^backbones\.detector={tmp_path}/gone: no such folder"):
        load_finder(settings(crops="detected", backbones={"detector": f"{tmp_path}/gone"}))
    with pytest.raises(UserError, match="holds a network of type 'vit'; expected 'grounding-dino'"):
        load_finder(settings(crops="detected", backbones={"detector": str(save_tiny_dino(tmp_path / "dino"))}))
