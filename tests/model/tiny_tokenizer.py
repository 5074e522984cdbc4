"""A real CLIPTokenizer with a vocabulary of about 600 tokens, learned from a handful of captions."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

from model.prompt import add_placeholder
from model.tokenizer import train_tokenizer

CAPTIONS = (
    "a dog on the beach",
    "a teddy bear next to a fire engine in the snow",
    "the dog is left of the teddy bear",
    "a red mug on a wooden table",
    "a mug, a book and an apple on the grass",
)
VOCABULARY_TARGET = 600


def tiny_tokenizer(max_length: int = 32, placeholder: bool = True) -> CLIPTokenizer:
    """A fresh tokenizer (its own copy, so that a test may add tokens) of `max_length` tokens a prompt."""
    tokenizer = CLIPTokenizer.from_pretrained(_saved(max_length).name)
    if placeholder:
        add_placeholder(tokenizer)
    return tokenizer


@functools.cache
def _saved(max_length: int) -> tempfile.TemporaryDirectory[str]:
    """Kept for the whole run; removed with the process."""
    folder = tempfile.TemporaryDirectory()
    train_tokenizer(CAPTIONS, VOCABULARY_TARGET, Path(folder.name), model_max_length=max_length)
    return folder
