"""How well each noun chunk fits a box, from the logits that Grounding DINO (Liu et al., ECCV 2024) gives every token.

Its own decoding joins the tokens above a threshold into a label, which merges neighbours ("plant flower") and cuts word
pieces ("##van"). Here no text is decoded: the phrases are written one after the other, `a plant . a flower pot .`, the
tokenizer's offsets tell which tokens are whose, and a chunk's score comes from its own tokens alone. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 256  # what the detector was trained to read, [CLS] and [SEP] included
DETERMINERS = frozenset(
    "a an the this that these those some any each every either neither another both all several many few "
    "my your his her its our their".split()
)


@dataclass(frozen=True)
class PhraseText:
    """What a detector reads for one picture, and which phrase of it each chunk is."""

    text: str  # "dog . red sports car ."; empty: nothing to look for
    spans: tuple[tuple[int, int], ...]  # characters of each phrase in `text`
    slots: tuple[int | None, ...]  # for each chunk the index of its span; None: not in the text, scores 0


def clean_phrase(words: str) -> str:
    """A phrase as the detector was trained to read it: lower case, no leading determiner, no separator inside.

    Full stop and question mark separate phrases; left inside, they would cut a phrase in two ("st. bernard"). Lower
    case also keeps a "[SEP]" of the caption from being read as the token of that name. May be empty.
    """
    cleaned = words.lower().replace(".", " ").replace("?", " ").split()
    start = next((i for i, word in enumerate(cleaned) if word not in DETERMINERS), len(cleaned))
    return " ".join(cleaned[start:])


def phrase_text(chunks: Sequence[str], tokenizer: Any, max_tokens: int = MAX_TOKENS) -> PhraseText:
    """Write each distinct phrase of the chunks once, in order, as far as `max_tokens` reach.

    A phrase that would overrun them is left out, and so is one that has no tokens: their chunks score 0. Chunks of one
    phrase ("a dog", "the dog") share its scores.

    Args:
        chunks: texts of a caption's noun chunks.
        tokenizer: of the detector's text encoder (one that gives offsets).
        max_tokens: with [CLS] and [SEP].
    """
    phrases = [clean_phrase(chunk) for chunk in chunks]
    text, left = "", max_tokens - 2
    spans = dict[str, tuple[int, int]]()
    for phrase in dict.fromkeys(phrases):
        length = len(tokenizer(phrase, add_special_tokens=False).input_ids) if phrase else 0
        if 0 < length < left:
            start = len(text) + bool(text)
            spans[phrase] = start, start + len(phrase)
            text = f"{text} {phrase} ." if text else f"{phrase} ."
            left -= length + 1
    numbers = {phrase: number for number, phrase in enumerate(spans)}
    return PhraseText(text, tuple(spans.values()), tuple(numbers.get(phrase) for phrase in phrases))


def token_indices(spans: Sequence[tuple[int, int]], offsets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which tokens lie in each span of the text.

    Args:
        spans: first and last character (exclusive) of each phrase.
        offsets: (L, 2) the same of each token; equal where it stands for no character ([CLS], [SEP], padding).
    """
    return [
        [index for index, (first, last) in enumerate(offsets) if start <= first < last <= end] for start, end in spans
    ]


def score_chunks(logits: Tensor, indices: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """How well each chunk fits each box: the best of its own tokens' scores, and their mean.

    Args:
        logits: (Q, L) of each token in each box.
        indices: for each chunk its own tokens; none: it scores 0.
    Returns:
        token scores and chunk scores, both (Q, C), float32 0..1.
    """
    scores = logits.float().sigmoid()  # (Q, L)
    nothing = scores.new_zeros(len(scores))
    best = [scores[:, list(own)].amax(dim=1) if own else nothing for own in indices]
    mean = [scores[:, list(own)].mean(dim=1) if own else nothing for own in indices]
    if not indices:
        return scores[:, :0], scores[:, :0]
    return torch.stack(best, dim=1), torch.stack(mean, dim=1)  # (Q, C) each
