"""A small byte-pair vocabulary in CLIP's own format, trained from captions.

`train_tokenizer` writes a folder that `CLIPTokenizer.from_pretrained` reads; `model/prompt.py` builds prompts with it.
Byte-pair encoding: Sennrich et al., arXiv 1508.07909; order of the vocabulary as in CLIP (arXiv 2103.00020): bytes,
bytes at the end of a word, merges, start, end. The end token must be the highest id: open_clip pools there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int,
    folder: Path,
    model_max_length: int = 77,
) -> CLIPTokenizer:
    """Learn merges from captions and save the tokenizer.

    The same captions always give the same files. Few captions may not hold `vocab_size` different pieces, so the
    vocabulary can end smaller: read `len(tokenizer)`.

    Args:
        captions: texts to learn from; an iterator is read once.
        vocab_size: largest number of tokens, bytes (512) and the two special tokens included.
        folder: where `tokenizer.json` and `tokenizer_config.json` are written; made when missing.
        model_max_length: tokens of a prompt, start and end included (the text encoder's context length).
    Returns:
        The tokenizer, equal to `CLIPTokenizer.from_pretrained(folder)`. Its end-of-text token has the highest id.
    Raises:
        ValueError: `vocab_size` too small to hold every byte.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_tokens = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    if vocab_size < len(byte_tokens) + 2:
        raise ValueError(f"vocab_size {vocab_size}: must be at least {len(byte_tokens) + 2} to hold every byte")
    merges = _learn_merges(captions, alphabet, vocab_size - 2)
    # Two different merges can produce the same piece: it enters the vocabulary once.
    pieces = dict.fromkeys([*byte_tokens, *(left + right for left, right in merges), START, END])
    tokenizer = CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=model_max_length,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _learn_merges(captions: Iterable[str], alphabet: list[str], vocab_size: int) -> list[tuple[str, str]]:
    """Merges in the order they were learned, as (left, right) pieces."""
    stock = CLIPTokenizer().backend_tokenizer  # its normaliser and splitting are what the finished tokenizer will use
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = stock.normalizer
    learner.pre_tokenizer = stock.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix=WORD_END,
        initial_alphabet=alphabet,
        # Ties between pairs are broken by the ids of their pieces. Left to itself the trainer numbers the word-end
        # bytes in the order of a randomly seeded hash map; given here, they have fixed ids and so have the merges.
        special_tokens=[byte + WORD_END for byte in alphabet],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
