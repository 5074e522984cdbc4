"""model/tokenizer.py: a small CLIP vocabulary learned from captions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from model.tokenizer import END, START, train_tokenizer
from tests.model.tiny_tokenizer import CAPTIONS, tiny_tokenizer


def test_end_of_text_is_the_highest_id_and_not_two() -> None:
    tokenizer = tiny_tokenizer(placeholder=False)
    assert tokenizer.eos_token == END and tokenizer.bos_token == START
    assert tokenizer.eos_token_id == len(tokenizer) - 1 > 2
    assert tokenizer.bos_token_id == len(tokenizer) - 2


def test_words_of_the_captions_become_one_token_and_others_pieces() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.tokenize("the dog") == ["the</w>", "dog</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1


def test_any_text_can_be_written_and_read_back() -> None:
    tokenizer = tiny_tokenizer()
    text = "naïve 犬 №7 🐶"
    read = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert read.replace(" ", "") == text.replace(" ", "")


def test_the_saved_folder_loads_with_the_stock_classes(tmp_path: Path) -> None:
    made = train_tokenizer(CAPTIONS, 560, tmp_path, model_max_length=24)
    for loaded in (CLIPTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded("a dog in the snow!").input_ids == made("a dog in the snow!").input_ids
        assert loaded.model_max_length == 24


def test_the_vocabulary_is_as_large_as_asked_when_the_captions_allow(tmp_path: Path) -> None:
    assert len(train_tokenizer(CAPTIONS, 530, tmp_path)) == 530


def test_the_same_captions_give_the_same_file_in_every_process(tmp_path: Path) -> None:
    # Many pairs of equal frequency, so that every tie counts; hash seeds differ between processes.
    code = (
        "import sys, random; from pathlib import Path; from model.tokenizer import train_tokenizer;"
        "r = random.Random(0);"
        "words = [''.join(r.choices('abcdefgh', k=5)) for _ in range(300)];"
        "train_tokenizer(words, 700, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("first", "second"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_vocabulary_too_small_for_every_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 100: must be at least 514"):
        train_tokenizer(CAPTIONS, 100, tmp_path)
