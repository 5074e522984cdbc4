"""Pairs of pictures and texts: both ways to give them, what is refused, and samples by their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from infer.refine.pairs import PairSamples, read_pairs
from infer.refine.samples import collate
from infer.refine.subject_images import VariationSettings
from tests.model.tiny_tokenizer import tiny_tokenizer

STILL = VariationSettings(flip=0)
TEXTS = {"a.png": "a dog on the beach", "b.jpg": "a red mug", "inner/c.png": "a teddy bear"}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return tiny_tokenizer()


def picture(path: Path, colour: int = 0, size: tuple[int, int] = (40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(colour).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, (name, text) in enumerate(TEXTS.items()):
        picture(tmp_path / name, index)
        (tmp_path / name).with_suffix(".txt").write_text(text + "\n")
    return tmp_path


def metadata(folder: Path, *lines: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))


def test_texts_beside_pictures_are_read_by_name(folder: Path, tokenizer) -> None:
    pairs, warnings = read_pairs(folder, tokenizer)
    assert {str(pair.picture.relative_to(folder)): pair.text for pair in pairs} == TEXTS and not warnings


def test_metadata_comes_before_texts(folder: Path, tokenizer) -> None:
    metadata(
        folder, {"file_name": "inner/c.png", "text": "a  book", "seen": 3}, "", {"file_name": "a.png", "text": "x"}
    )
    pairs, _ = read_pairs(folder, tokenizer)
    assert [(pair.picture.name, pair.text) for pair in pairs] == [("c.png", "a book"), ("a.png", "x")]
    assert pairs[1].source.endswith("metadata.jsonl:3")


def test_a_picture_without_text_is_named_with_how_many_there_are(folder: Path, tokenizer) -> None:
    (folder / "b.txt").unlink()
    (folder / "inner/c.txt").unlink()
    with pytest.raises(UserError, match=r"b.jpg: has no text \(2 of 3 pictures have none\); write .* into b.txt"):
        read_pairs(folder, tokenizer)


def test_a_text_without_a_picture_is_left_out_with_a_warning(folder: Path, tokenizer) -> None:
    (folder / "lost.txt").write_text("a dog")
    pairs, warnings = read_pairs(folder, tokenizer)
    assert len(pairs) == 3 and warnings == [f"{folder / 'lost.txt'}: a text without a picture, left out"]


def test_texts_that_say_nothing_or_cannot_be_read_are_named(folder: Path, tokenizer) -> None:
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="a.txt: is empty; write what the picture shows"):
        read_pairs(folder, tokenizer)
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="a.txt: cannot be read as text"):
        read_pairs(folder, tokenizer)
    (folder / "a.txt").write_text("a dog, the dog is <subject>")
    with pytest.raises(UserError, match="a.txt: caption .* contains the reserved token <subject>"):
        read_pairs(folder, tokenizer)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r"metadata.jsonl:1: not valid JSON"),
        ({"file_name": "a.png"}, r"metadata.jsonl:1: expected \{\"file_name\": \"cat.png\", \"text\":"),
        ([1], r"metadata.jsonl:1: expected"),
        ({"file_name": "d.png", "text": "x"}, r"d.png is not in .*; correct the line or add the picture"),
        ({"file_name": "../../etc/hosts", "text": "x"}, r"\.\./\.\./etc/hosts lies outside"),
    ],
)
def test_metadata_that_cannot_be_is_refused_by_line(folder: Path, tokenizer, line: object, told: str) -> None:
    metadata(folder, line)
    with pytest.raises(UserError, match=told):
        read_pairs(folder, tokenizer)


def test_a_picture_named_twice_is_refused(folder: Path, tokenizer) -> None:
    metadata(folder, *({"file_name": "a.png", "text": "x"},) * 2)
    with pytest.raises(UserError, match=r"metadata.jsonl:2: a.png is there twice"):
        read_pairs(folder, tokenizer)


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match="no pictures there"):
        read_pairs(tmp_path, tokenizer)
    with pytest.raises(UserError, match="no such folder; give one with pictures and a .txt beside each"):
        read_pairs(tmp_path / "nowhere", tokenizer)


def test_a_text_that_is_too_long_loses_its_last_words(folder: Path, tokenizer) -> None:
    (folder / "a.txt").write_text(" ".join(["a dog on the beach"] * 20))
    pairs, warnings = read_pairs(folder, tokenizer)
    words = pairs[0].text.split()
    assert words == ("a dog on the beach " * 20).split()[: len(words)]
    assert len(tokenizer(pairs[0].text).input_ids) == tokenizer.model_max_length  # a word is a token here
    assert len(warnings) == 1 and warnings[0].startswith(f"{folder / 'a.txt'}: too long for the text encoder")


def test_every_pair_is_seen_once_a_pass_and_a_sample_depends_on_its_number_alone(folder: Path, tokenizer) -> None:
    pairs, _ = read_pairs(folder, tokenizer)
    samples, again = (PairSamples(pairs, 16, VariationSettings(flip=0.5, shrink=0.5), seed) for seed in (3, 3))
    assert {samples[number].prompt for number in range(6, 9)} == set(TEXTS.values())
    late = again[7]  # asked for first, here
    assert torch.equal(late.pixels, samples[7].pixels) and late.prompt == samples[7].prompt and late.number == 7
    orders = {tuple(samples[3 * turn + place].prompt for place in range(3)) for turn in range(6)}
    assert len(orders) > 1 and len(samples) == 3
    other = PairSamples(pairs, 16, STILL, 4)
    assert any(other[number].prompt != samples[number].prompt for number in range(12))


def test_a_sample_is_the_picture_with_its_text(folder: Path, tokenizer) -> None:
    Image.new("RGB", (32, 16), (255, 0, 51)).save(folder / "a.png")
    pairs, _ = read_pairs(folder, tokenizer)
    samples = PairSamples(pairs, 16, STILL, 0)
    shown = next(samples[number] for number in range(3) if samples[number].prompt == TEXTS["a.png"])
    assert torch.allclose(shown.pixels[:, 3, 5], torch.tensor([1.0, 0.0, 0.2])) and not shown.prior
    assert torch.equal(shown.valid, torch.ones(1, 16, 16)) and shown.class_prompt == shown.prompt
    batch = collate([samples[0], samples[1]])
    assert batch.pixels.shape == (2, 3, 16, 16) and len(batch.prompts) == 2


def test_pictures_are_checked_by_file(folder: Path, tokenizer) -> None:
    picture(folder / "b.jpg", 1, (80, 40))
    pairs, _ = read_pairs(folder, tokenizer)
    warnings = PairSamples(pairs, 16, STILL, 0).check_pictures()
    assert warnings == [f"{folder / 'b.jpg'}: 80 x 40 pixels, cropped to the middle square"]
    (folder / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b.jpg: not a picture that can be read"):
        PairSamples(pairs, 16, STILL, 0).check_pictures()
