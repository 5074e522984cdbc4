"""Detection by a CLIP: open_clip folders whole and in parts, chances, batches. Real classes with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import UserError
from data_pipeline.rules import RuleSettings, keep_boxes
from data_pipeline.stages import NounChunk
from data_pipeline.stages.detect.clip_folder import CONFIG, PARTS, WEIGHTS, fingerprint, image_tower, text_tower
from data_pipeline.stages.detect.clip_proposals import ClipProposalDetector, ClipProposalsSettings
from model.open_clip_conversion import convert_text_tower
from tests.model.tiny_tokenizer import tiny_tokenizer

OWN = ("visual.proj", "text_projection", "logit_scale")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as open_clip saves it, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(placeholder=False)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 32, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / WEIGHTS)
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture()
def parts(whole: Path, tmp_path: Path) -> Path:
    """The same model with its towers elsewhere: the image tower as it is, the text tower as transformers saves it."""
    config = json.loads((whole / CONFIG).read_text())["model_cfg"]
    clip = open_clip.CLIP(**config)
    state = load_file(whole / WEIGHTS)
    clip.load_state_dict(state)
    convert_text_tower(clip, config, tiny_tokenizer(placeholder=False)).save_pretrained(tmp_path / "text")
    shutil.copytree(whole, tmp_path / "image")
    folder = tmp_path / "heads"
    folder.mkdir()
    save_file({name: state[name] for name in OWN}, folder / WEIGHTS)
    shutil.copy(whole / CONFIG, folder / CONFIG)
    shutil.move(tmp_path / "image" / "tokenizer", tmp_path / "tokenizer")
    towers = {"image": image_tower(tmp_path / "image"), "text": text_tower(tmp_path / "text")}
    told = {name: {"folder": f"../{name}", "fingerprint": fingerprint(tower)} for name, tower in towers.items()}
    (folder / PARTS).write_text(json.dumps({**told, "tokenizer": "../tokenizer"}))
    return folder


def load(folder: Path, **changes: object) -> ClipProposalDetector:
    return ClipProposalsSettings(model=str(folder), min_score=0.01, **changes).load("cpu")  # type: ignore[arg-type]


def picture(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    found = np.full((120, 160, 3), generator.integers(80, 160, 3), np.uint8)
    for x in (40, 115):
        cv2.circle(found, (x, 60), int(generator.integers(18, 30)), generator.integers(0, 256, 3).tolist(), -1)
    return found


CHUNKS = (NounChunk("red ball", "ball", (2, 10)), NounChunk("green car", "car", (15, 24)))


def test_a_model_in_parts_is_the_whole_model(whole: Path, parts: Path) -> None:
    one, other = load(whole), load(parts)
    pictures, boxes = [picture(0)], [np.array([[20, 40, 60, 80], [0, 0, 160, 120]], np.float32)]
    assert torch.allclose(one.encode_regions(pictures, boxes)[0], other.encode_regions(pictures, boxes)[0], atol=1e-6)
    assert torch.allclose(one.encode_text("a red ball"), other.encode_text("a red ball"), atol=1e-6)
    assert (other.loaded.mean.flatten().tolist(), other.loaded.image_size) == (pytest.approx([0.5, 0.4, 0.3]), 32)


def test_parts_saved_in_fp16_are_the_same_parts(parts: Path) -> None:
    for file in parts.parent.rglob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    assert load(parts).encode_text("a ball").dtype == torch.float32


def test_other_towers_than_those_trained_on_are_refused(parts: Path) -> None:
    file = parts.parent / "image" / WEIGHTS
    state = load_file(file)
    save_file(state | {"visual.conv1.weight": state["visual.conv1.weight"] + 0.01}, file)
    with pytest.raises(UserError, match="are not those that this model was trained on"):
        load(parts)


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_folder_without_a_model_is_one_line(whole: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(whole, folder)
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing):
        load(folder)


def test_weights_that_do_not_fit_are_one_line(parts: Path) -> None:
    save_file({"visual.proj": torch.zeros(3, 3)}, parts / WEIGHTS)
    with pytest.raises(UserError, match="detect.model=.*cannot be loaded") as error:
        load(parts)
    assert "\n" not in str(error.value)


def test_what_is_neither_a_folder_nor_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="detect.model"):
        load(tmp_path / "nowhere")


def test_a_prompt_needs_a_place_for_the_phrase() -> None:
    with pytest.raises(ValueError, match="phrase"):
        ClipProposalsSettings(prompt="a photo")


def test_chances_are_a_softmax_of_cosines_over_phrases_and_negatives(whole: Path) -> None:
    detector = load(whole, negatives=("nothing",))
    codes = detector.encode_regions([picture(0)], [np.array([[20, 40, 60, 80]], np.float32)])[0]
    texts = ("a photo of a red ball", "a photo of a green car", "nothing")
    cosines = np.array([float(codes[0] @ detector.encode_text(text)) for text in texts])
    raised = np.exp(cosines / 0.07)  # open_clip's first temperature
    assert detector.chances(codes, CHUNKS)[0] == pytest.approx((raised / raised.sum())[:2], rel=1e-4)


def test_phrases_of_one_noun_share_their_chance(whole: Path) -> None:
    detector = load(whole)
    codes = detector.encode_regions([picture(0)], [np.array([[20, 40, 60, 80]], np.float32)])[0]
    chunks = (*CHUNKS, NounChunk("ball", "ball", (40, 44)))
    first, other, again = detector.chances(codes, chunks)[0]
    assert first == pytest.approx(again) and 0 < first + other < 1


def test_found_boxes_pass_the_rules_with_scores_from_0_to_1(whole: Path) -> None:
    found = load(whole).detect([picture(0)], [CHUNKS])[0]
    assert found.boxes_xyxy_px.dtype == np.float32 and len(found.boxes_xyxy_px) == 2
    assert found.token_scores.shape == found.chunk_scores.shape == (2, 2)
    assert ((found.chunk_scores > 0).sum(axis=1) == 1).all() and found.chunk_scores.max() <= 1
    rules = RuleSettings(min_token_score=0, min_chunk_score=0)
    assert {kept.chunk for kept in keep_boxes(found, rules)} == {0, 1}


def test_a_batch_gives_what_its_pictures_give_alone(whole: Path) -> None:
    detector = load(whole)
    pictures = [picture(0), np.full((50, 40, 3), 99, np.uint8), picture(2)]  # the second one has no regions
    chunks = [CHUNKS, CHUNKS[:1], CHUNKS[1:]]
    together = detector.detect(pictures, chunks)
    for shown, named, one in zip(pictures, chunks, together, strict=True):
        alone = detector.detect([shown], [named])[0]
        assert np.array_equal(one.boxes_xyxy_px, alone.boxes_xyxy_px)
        assert one.chunk_scores == pytest.approx(alone.chunk_scores, abs=1e-4)
    assert together[1].chunk_scores.shape == (0, 1)
    assert len(detector.detect([pictures[1]], [CHUNKS])[0].boxes_xyxy_px) == 0
