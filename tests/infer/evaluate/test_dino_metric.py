"""DINO as an identity score, and the copy index, against computations by hand; what metrics there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from infer.evaluate.backbones import DinoBackbone, load_dino
from infer.evaluate.cases import Protocol
from infer.evaluate.crops import AskedPlaces
from infer.evaluate.metrics import METRICS, Drawn, check_metrics, load_metric
from infer.evaluate.metrics.dino import DinoMetric
from tests.infer.evaluate.small_cases import case, picture, settings, subject
from tests.infer.evaluate.tiny_backbones import save_tiny_dino


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dino(tmp_path_factory.mktemp("networks") / "dino")


@pytest.fixture(scope="module")
def dino(folder: Path) -> DinoBackbone:
    return load_dino(str(folder), "cpu")


def test_scores_are_cosines_with_the_given_photos_and_with_all(dino: DinoBackbone) -> None:
    photos = [picture(seed) for seed in (1, 2, 3)]
    (row,) = DinoMetric(dino, None).score([Drawn(case(subject("dog", photos)), picture(0))])
    a, b, c = (float(dino.images([picture(0)])[0] @ dino.images([photo])[0]) for photo in photos)
    assert row["dino"] == pytest.approx(a, abs=1e-6)
    assert row["dino_all"] == pytest.approx((a + b + c) / 3, abs=1e-6)
    assert row["copy"] == pytest.approx(a - (b + c) / 2, abs=1e-6)


def test_a_copied_photo_has_a_copy_index_above_that_of_another_photo(dino: DinoBackbone) -> None:
    dog = subject("dog", [picture(1), picture(2), picture(3)])
    copied, other = DinoMetric(dino, None).score([Drawn(case(dog), picture(1)), Drawn(case(dog), picture(2))])
    assert copied["dino"] == pytest.approx(1, abs=1e-5) and copied["copy"] > 0 > other["copy"]


def test_without_another_photo_there_is_no_copy_index(dino: DinoBackbone) -> None:
    alone, two = subject("dog", [picture(1)]), subject("cat", [picture(2), picture(3)])
    rows = DinoMetric(dino, None).score([Drawn(case(alone), picture(0)), Drawn(case(alone, two), picture(0))])
    (only_two,) = DinoMetric(dino, None).score([Drawn(case(two), picture(0))])
    assert "copy" not in rows[0] and rows[1]["copy"] == pytest.approx(only_two["copy"], abs=1e-6)


def test_bare_class_words_have_no_identity(dino: DinoBackbone) -> None:
    assert DinoMetric(dino, AskedPlaces()).score([Drawn(case(), picture(0))]) == [{}]


def test_every_metric_of_the_list_can_be_named_and_others_are_told(folder: Path) -> None:
    check_metrics(list(METRICS))
    with pytest.raises(UserError, match="metrics: no metric 'dyno'; expected some of clip, dino, diversity, toybox"):
        load_metric("dyno", settings(), Protocol("none", ()))
    loaded = load_metric("dino", settings(crops="asked", backbones={"dino": str(folder)}), Protocol("none", ()))
    assert [column.name for column in loaded.columns] == ["dino", "dino_all", "copy", "dino_crop"]
    assert [column.role for column in loaded.columns] == ["subject", "", "", ""]


def test_a_backbone_that_cannot_be_loaded_is_told_when_the_metric_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^backbones\.dino={tmp_path}/gone: no such folder"):
        load_metric("dino", settings(backbones={"dino": f"{tmp_path}/gone"}), Protocol("none", ()))
