"""Which token a new subject borrows: one that hardly ever occurs, so that little has to be unlearnt.

DreamBooth, arXiv 2208.12242, section 3.2: a rare token of at most three characters, without blanks, that is no word
(there T5's ids 5000 to 10000, which fall with frequency). CLIP's byte pairs were merged in the order of their
frequency, so a later id is a rarer piece: taken are whole-word pieces of two or three consonants, not all alike, that
are no abbreviation in common use, the latest first. Custom Diffusion, arXiv 2212.04488, starts its token from one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from infer.refine.method import RefineBase

AUTO = "auto"
_ABBREVIATIONS = frozenset(
    (
        "bbc bbq bff bmw bmx brb btc btw cbd cd cds cfl cnn cpr css ctv dbz dc dj dkk dr dsl dvd fck fml ft gb gmt "
        "gps gt hbd hd hdd hdr hms hmv hp hr hrs jpg jr kb kfc kg km kph ktv lbs lcd lg ltd mb mc mg mk ml mlb mls mm "
        "mph mr mrs ms mtb mtv nbc nc nd nfl nhl nhs npr ns nt nth nz pc pcs pdf pgs phd php pkg pls plz png pr ps "
        "psd pst pt ptv pvc qr rb rd rgb rmb rn rpg rpm rps rss rt rts rv sf smh sms sql sr ss ssd ssh st std stl sw "
        "tbh tbs tbt td th thx tlc tnt ts tv tvc tvs tx vhs vpn vr vs vsc vw wb wc wd wtf wwf www xd xl xml xp xx xxl "
        "xxx"
    ).split()
)
_CONSONANTS = re.compile(r"([b-df-hj-np-tv-xz]{2,3})</w>")


@dataclass(frozen=True)
class RareToken:
    """A token, or the tokens of a word that a person gave."""

    word: str
    ids: tuple[int, ...]
    reason: str  # why this one, for a person


def choose_tokens(tokenizer: CLIPTokenizer, told: str, count: int) -> list[RareToken]:
    """So many tokens, one a concept.

    Args:
        told: `auto`, or words of one's own, joined by + where there are several: "sks+ktn".
    Raises:
        UserError: another number of words than concepts, a word that says nothing, or too small a vocabulary.
    """
    if told == AUTO:
        return rare_tokens(tokenizer, count)
    words = told.split("+")
    if len(words) != count:
        raise UserError(
            f"token {told!r}: {len(words)} given for {count} concepts; give one each, joined by + as in 'sks+ktn', "
            f"or {AUTO}"
        )
    return [_given(tokenizer, word) for word in words]


def rare_tokens(tokenizer: CLIPTokenizer, count: int) -> list[RareToken]:
    """The `count` rarest that fit the rule, the rarest first.

    Raises:
        UserError: the vocabulary has not so many.
    """
    vocabulary = tokenizer.get_vocab()
    found = []
    for piece, index in sorted(vocabulary.items(), key=lambda item: -item[1]):
        match = _CONSONANTS.fullmatch(piece)
        if match and _says_little(match[1]) and tokenizer.tokenize(match[1]) == [piece]:
            reason = (
                f"token {index} of {len(vocabulary)}, where a later one is rarer; {len(match[1])} consonants that make "
                "no word or usual abbreviation"
            )
            found.append(RareToken(match[1], (index,), reason))
            if len(found) == count:
                return found
    raise UserError(
        f"token {AUTO}: this vocabulary has {len(found)} rare tokens that are no words, {count} are needed; give words "
        "of your own, joined by +"
    )


def token_rows(base: RefineBase, token: RareToken) -> Tensor:
    """The base's embeddings of a token: (K, D) float32 on the CPU."""
    embedding = base.pipeline.text_encoder.embeddings.token_embedding.weight
    return embedding.detach()[list(token.ids)].float().cpu()


def tell(placeholders: Sequence[str], tokens: Sequence[RareToken], use: str) -> None:
    """Print which token each placeholder takes, and why."""
    for placeholder, token in zip(placeholders, tokens, strict=True):
        print(f"{placeholder}: {use} {token.word!r} ({token.reason})")


def _says_little(word: str) -> bool:
    return len(set(word)) > 1 and word not in _ABBREVIATIONS


def _given(tokenizer: CLIPTokenizer, word: str) -> RareToken:
    pieces = tokenizer.tokenize(word)
    if not pieces or word.split() != [word]:
        raise UserError(f"token {word!r}: must be one word without blanks, like 'sks'")
    ids = tuple(int(index) for index in torch.tensor(tokenizer.convert_tokens_to_ids(pieces)))
    reason = "as asked" if len(ids) == 1 else f"as asked; {len(ids)} tokens, a single rare one is learnt better"
    return RareToken(word, ids, reason)
