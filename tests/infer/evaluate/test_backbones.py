"""CLIP and DINO as rulers: what they are shown, what they answer, and what is said when they cannot be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, ViTModel

from data_pipeline.errors import UserError
from infer.evaluate import backbones
from infer.evaluate.backbones import ClipBackbone, DinoBackbone, against_photos, as_picture
from infer.evaluate.cases import EvaluatedSubject, Photo
from model.reference import MID_GREY
from tests.infer.evaluate.small_cases import picture, subject
from tests.infer.evaluate.tiny_backbones import SIZE, save_tiny_clip, save_tiny_dino

Loader = Callable[[str, str], object]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dino(tmp_path_factory.mktemp("networks") / "dino")


@pytest.fixture
def dino(dino_folder: Path) -> DinoBackbone:
    return DinoBackbone(str(dino_folder), "cpu")


@pytest.fixture
def clip(clip_folder: Path) -> ClipBackbone:
    return ClipBackbone(str(clip_folder), "cpu")


def by_hand(image: Image.Image, shorter: int, mean: list[float], deviation: list[float]) -> Tensor:
    """Pillow's bicubic to a shorter side, the middle 28 pixels, normalised: (1, 3, 28, 28)."""
    width, height = image.size
    scale = shorter / min(width, height)
    small = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - SIZE) // 2, (small.height - SIZE) // 2
    pixels = np.asarray(small.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    pixels = (pixels - np.array(mean, np.float32)) / np.array(deviation, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@torch.no_grad()
def test_dino_is_the_cls_token_after_resize_256_bicubic_and_crop_224(dino: DinoBackbone, dino_folder: Path) -> None:
    shown = picture(0, 80, 40)  # its shorter side becomes 28 * 256 / 224 = 32
    network = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    pixels = by_hand(shown, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = network(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(dino.features([shown]), expected)
    torch.testing.assert_close(dino.images([shown]), functional.normalize(expected, dim=-1))


@torch.no_grad()
def test_clip_is_the_projection_after_resize_224_bicubic_and_crop(clip: ClipBackbone, clip_folder: Path) -> None:
    shown = picture(0, 80, 40)
    network = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = by_hand(shown, 28, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    expected = network.visual_projection(network.vision_model(pixels).pooler_output)
    torch.testing.assert_close(clip.images([shown]), functional.normalize(expected, dim=-1))


@torch.no_grad()
def test_texts_are_clips_own_whatever_they_are_padded_with(clip: ClipBackbone, clip_folder: Path) -> None:
    texts = ["a dog", "a teddy bear next to a fire engine in the snow"]
    network = CLIPModel.from_pretrained(clip_folder).eval()
    alone = [clip.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    expected = torch.cat([network.text_projection(network.text_model(tokens).pooler_output) for tokens in alone])
    torch.testing.assert_close(clip.texts(texts), functional.normalize(expected, dim=-1))


def test_a_text_too_long_for_clip_loses_its_end(clip: ClipBackbone) -> None:
    codes = clip.texts(["dog " * 100, "dog " * 120])
    torch.testing.assert_close(codes[0], codes[1])


def test_pictures_are_looked_at_in_batches_with_the_same_answer(
    dino: DinoBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [picture(seed) for seed in range(5)]
    whole = dino.features(shown)
    monkeypatch.setattr(backbones, "BATCH", 2)
    torch.testing.assert_close(dino.features(iter(shown)), whole)
    assert whole.shape == (5, 16)


def test_the_same_pictures_are_measured_once_and_others_anew(dino: DinoBackbone) -> None:
    shown = [picture(0), picture(1)]
    first = dino.images(shown)
    assert dino.images(list(shown)) is first
    assert not torch.equal(dino.images([picture(2), picture(3)]), first)
    assert torch.equal(dino.images(shown), first)


def test_photos_of_a_subject_are_opened_once(dino: DinoBackbone) -> None:
    opened = []

    def opening() -> Image.Image:
        opened.append(1)
        return picture(0)

    thing = EvaluatedSubject("dog", "dog", (Photo("0", opening), Photo("1", opening)))
    assert dino.photos(thing).shape == (2, 16) and dino.photos(thing) is dino.photos(thing)
    assert len(opened) == 2


def test_against_photos_is_the_mean_cosine_by_hand(dino: DinoBackbone) -> None:
    photos = [picture(seed) for seed in range(5)]
    dog, cat = subject("dog", photos[:3], given=2), subject("cat", photos[3:])
    a, b, c, d, e = (float(dino.images([picture(9)])[0] @ dino.images([photo])[0]) for photo in photos)
    given, everything = against_photos(dino.images([picture(9)])[0], [dog, cat], dino)
    assert given == pytest.approx(((a + b) / 2 + d) / 2, abs=1e-6)
    assert everything == pytest.approx(((a + b + c) / 3 + (d + e) / 2) / 2, abs=1e-6)


def test_a_cut_out_stands_on_mid_grey() -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[5:15, 5:15] = (255, 0, 0, 255)
    pixels[..., 1] = 200  # hidden colour where nothing is opaque
    shown = np.asarray(as_picture(Photo("dog", lambda: Image.fromarray(pixels))))
    assert shown.shape == (512, 512, 3)
    assert (shown[0] == MID_GREY).all() and tuple(shown[256, 256]) == (255, 200, 0)
    assert ((shown[..., 0] > 250).any(axis=0)).sum() / 512 == pytest.approx(0.9, abs=0.01)


def test_a_photo_with_an_alpha_channel_that_hides_nothing_is_a_photo() -> None:
    photo = picture(0)
    shown = as_picture(Photo("dog", lambda: photo.convert("RGBA")))
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(photo))


def test_an_empty_cut_out_is_named() -> None:
    with pytest.raises(UserError, match=r"dog\.png: the cut-out is empty"):
        as_picture(Photo("dog.png", lambda: Image.new("RGBA", (8, 8))))


def test_a_backbone_is_called_by_its_folder_or_hub_id(dino: DinoBackbone) -> None:
    assert dino.name == "dino" and backbones.title("facebook/dino-vits16") == "facebook/dino-vits16"


@pytest.mark.parametrize("load", [ClipBackbone, DinoBackbone])
def test_a_folder_that_is_not_there_is_told(load: Loader, tmp_path: Path) -> None:
    key = "clip" if load is ClipBackbone else "dino"
    with pytest.raises(
        UserError, match=rf"^backbones\.{key}={tmp_path}/gone: no such folder; give a folder or a hub id"
    ):
        load(f"{tmp_path}/gone", "cpu")


def test_a_folder_of_another_network_is_told(clip_folder: Path, dino_folder: Path) -> None:
    with pytest.raises(UserError, match="holds a network of type 'vit'; expected 'clip'"):
        ClipBackbone(str(dino_folder), "cpu")
    with pytest.raises(UserError, match="holds a network of type 'clip'; expected 'vit'"):
        DinoBackbone(str(clip_folder), "cpu")


def test_a_folder_without_weights_or_with_pickled_ones_is_told(tmp_path: Path) -> None:
    folder = save_tiny_dino(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded .*safetensors"):
        DinoBackbone(str(folder), "cpu")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded .*safetensors"):
        DinoBackbone(str(folder), "cpu")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny_dino(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"incomplete, lacks \d+ weights such as \S*layers?\.2"):
        DinoBackbone(str(folder), "cpu")


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^backbones\.dino=nobody/nothing: cannot be loaded") as told:
        DinoBackbone("nobody/nothing", "cpu")
    assert "\n" not in str(told.value)
