"""The checks `nsfw` (a tiny random ViT) and `faces` (a YuNet with weights made by hand)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from data_pipeline.errors import UserError
from data_pipeline.stages.checks.faces import FacesSettings, into_square
from data_pipeline.stages.checks.nsfw import NsfwSettings
from tests.data_pipeline.stages.tiny_faces import save_tiny_faces

LABELS = {0: "normal", 1: "nsfw", 2: "drawing"}


def save_tiny_classifier(folder: Path, problem_type: str | None = None) -> Path:
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
        initializer_range=0.5,
        problem_type=problem_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("networks") / "classifier")


@pytest.fixture(scope="module")
def yunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_faces(tmp_path_factory.mktemp("networks") / "yunet.onnx")


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((28, 28), (3, 90), (100, 30), (60, 60))]


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_nsfw_is_the_softmax_probability_of_the_label(classifier: Path) -> None:
    shown = pictures()[0]  # of the network's own size: nothing is resized
    pixels = torch.from_numpy(shown).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(classifier).eval()(pixels).logits.softmax(dim=-1)[0]
    for number, label in LABELS.items():
        found = NsfwSettings(model=str(classifier), label=label.upper()).load("cpu").score([shown])
        assert found == [pytest.approx(float(expected[number]), abs=1e-5)]


def test_a_classifier_of_independent_labels_is_asked_for_each_alone(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path / "several", "multi_label_classification")
    scores = [NsfwSettings(model=str(folder), label=label).load("cpu").score(pictures()) for label in LABELS.values()]
    assert not np.allclose(np.sum(scores, axis=0), 1)
    assert np.all((np.array(scores) >= 0) & (np.array(scores) <= 1))


def test_nsfw_in_a_batch_of_other_sizes_is_nsfw_alone(classifier: Path) -> None:
    check = NsfwSettings(model=str(classifier)).load("cpu")
    together = check.score(pictures())
    assert together == pytest.approx([check.score([picture])[0] for picture in pictures()], abs=1e-4)
    assert np.ptp(together) > 0.01
    assert check.score([]) == []


def test_nsfw_computes_in_the_dtype_asked_for(classifier: Path) -> None:
    check = NsfwSettings(model=str(classifier), dtype="bfloat16").load("cpu")
    assert check.network.dtype == torch.bfloat16
    assert check.score(pictures()) == pytest.approx(
        NsfwSettings(model=str(classifier)).load("cpu").score(pictures()), abs=0.1
    )


def test_nsfw_says_which_labels_there_are(classifier: Path) -> None:
    with pytest.raises(
        UserError, match=r"^checks\.nsfw\.model=.*knows no label 'porn'; give label= one of normal, nsfw, drawing$"
    ):
        NsfwSettings(model=str(classifier), label="porn").load("cpu")


def test_a_network_that_classifies_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"^checks\.nsfw\.model=.*: incomplete, lacks 2 weights such as classifier"):
        NsfwSettings(model=str(tmp_path / "vit")).load("cpu")


def test_faces_is_the_share_of_the_picture_that_the_largest_face_fills(yunet: Path) -> None:
    check = FacesSettings(model=yunet).load("cpu")
    one, two = black(640, 640), black(320, 640)
    one[320:352, 64:96] = 255  # a face of 64 x 64 around it
    two[128:160, 320:352] = 255
    two[0:32, 0:32] = 255  # its face of 64 x 64 is cut to 48 x 48 by the picture's edge
    assert check.score([one, two, black(480, 640)]) == pytest.approx(
        [64 * 64 / (640 * 640), 64 * 64 / (320 * 640), 0.0], abs=1e-4
    )
    two[128:160, 320:352] = 0
    assert check.score([two]) == pytest.approx([48 * 48 / (320 * 640)], abs=1e-4)


def test_a_large_picture_is_shrunk_and_a_small_one_is_not_enlarged(yunet: Path) -> None:
    check = FacesSettings(model=yunet).load("cpu")
    large, small = black(960, 1280), black(96, 128)
    large[256:320, 640:704] = 255
    small[32:64, 64:96] = 255
    assert check.score([large, small]) == pytest.approx([128 * 128 / (960 * 1280), 64 * 64 / (96 * 128)], abs=1e-4)
    assert 0 <= check.score([np.full((3, 3000, 3), 255, np.uint8)])[0] <= 1


def test_a_face_is_one_from_the_confidence_on(yunet: Path) -> None:
    grey = black(640, 640)
    grey[320:352, 64:96] = 153  # the network is sure of it to 0.6
    assert FacesSettings(model=yunet, confidence=0.55).load("cpu").score([grey]) == pytest.approx([0.01], abs=1e-4)
    assert FacesSettings(model=yunet, confidence=0.65).load("cpu").score([grey]) == [0.0]


def test_colours_reach_the_face_detector_in_its_own_order() -> None:
    red = np.full((2, 4, 3), (255, 0, 0), np.uint8)
    square, width, height = into_square(red)
    assert (width, height) == (4, 2)
    assert square[0, 0].tolist() == [0, 0, 255]  # BGR


def test_provenance_of_the_checks_names_model_and_content(classifier: Path, yunet: Path) -> None:
    nsfw = NsfwSettings(model=str(classifier)).load("cpu").provenance
    faces = FacesSettings(model=yunet).load("cpu").provenance
    assert (nsfw.backend, nsfw.model, faces.backend, faces.model) == ("nsfw", "classifier", "faces", "yunet.onnx")
    assert nsfw.revision.startswith("sha256:")
    assert faces.revision.startswith("sha256:")


def test_a_missing_or_wrong_file_of_the_face_detector_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_bytes(b"no network")
    for name, said in (("none.onnx", "no such file"), ("text.onnx", "cannot be loaded as YuNet")):
        with pytest.raises(UserError, match=rf"^checks\.faces\.model=.*{name}: {said}") as told:
            FacesSettings(model=tmp_path / name).load("cpu")
        assert "\n" not in str(told.value)


def test_limits_are_shares() -> None:
    for settings in (NsfwSettings, FacesSettings):
        with pytest.raises(ValidationError):
            settings.model_validate({"model": "x", "limit": 1.5})
    assert NsfwSettings().limit == 0.5
