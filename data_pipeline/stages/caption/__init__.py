"""Backends that say what is in a picture, and what they share: how a text is tidied and how one is generated."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_JOINERS = "\u200c\u200d"  # format characters that belong to words: Persian and Indic letters, emoji families


def tidy(text: str) -> str:
    """The text on one line: blanks of all kinds collapsed, characters that cannot be seen or stored taken out."""
    kept = [letter if _is_visible(letter) else " " if letter.isspace() else "" for letter in text]
    return " ".join("".join(kept).split())


def first_line(text: str) -> str:
    """The first line that says something, tidied: captioners end at a line break, what comes after it is chatter."""
    return next((line for line in map(tidy, text.splitlines()) if line), "")


def plain_generation(given: Sequence[GenerationConfig], num_beams: int, max_new_tokens: int) -> GenerationConfig:
    """Greedy or beam search, the same text each time.

    Args:
        given: what the model brings along. Only the numbers of its special tokens are kept, since its other rules
            (sampling, penalties, lengths) would change captions without standing in our settings. The end of any one
            of them ends a caption: BLIP-2's outer model may name the line break and its language model "</s>".
        num_beams: 1 is greedy.
    """
    from transformers import GenerationConfig

    ends: list[int] = []
    for rules in given:
        found = rules.eos_token_id
        ends += found if isinstance(found, list) else [] if found is None else [found]
    numbers = {
        name: next((getattr(rules, name) for rules in given if getattr(rules, name) is not None), None)
        for name in ("bos_token_id", "pad_token_id", "decoder_start_token_id")
    }
    if numbers["pad_token_id"] is None and ends:
        numbers["pad_token_id"] = ends[0]
    return GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(dict.fromkeys(ends)) or None,
        **numbers,
    )


def _is_visible(letter: str) -> bool:
    """Neither a control or format character nor half of a surrogate pair."""
    return letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
