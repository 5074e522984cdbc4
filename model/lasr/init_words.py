"""Init words and negative words of LASR as vectors: the text encoder's own embeddings of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from model.prompt import PromptError

WORD_END = "</w>"


@dataclass(frozen=True)
class InitVectors:
    """What a word starts as."""

    vectors: Tensor  # (N, D) one a token
    weights: Tensor  # (N,) sum 1, or N = 0


def init_vectors(
    tokenizer: CLIPTokenizer,
    token_embedding: nn.Embedding,
    words: Sequence[str],
    weights: Sequence[float] | None = None,
) -> InitVectors:
    """Embeddings of words; a word of several tokens shares its weight among them.

    Args:
        words: single words, like "young", "dog"; none gives N = 0.
        weights: one a word, positive; None: all alike.
    Raises:
        PromptError: a word that the tokenizer can only spell in letters; weights that do not fit.
    """
    shares = [1.0] * len(words) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(words):
        raise PromptError(f"init word weights: {len(shares)} for {len(words)} words; give one a word")
    if any(not share > 0 for share in shares):
        raise PromptError(f"init word weights {list(shares)}: must all be above 0")
    ids: list[int] = []
    per_token: list[float] = []
    for word, share in zip(words, shares, strict=True):
        found = _known_tokens(tokenizer, word)
        ids += found
        per_token += [share / len(found)] * len(found)
    chosen = torch.tensor(ids, dtype=torch.int64, device=token_embedding.weight.device)
    normalised = torch.tensor(per_token, dtype=torch.float32)
    return InitVectors(token_embedding(chosen).detach().float(), normalised / max(float(normalised.sum()), 1e-12))


def _known_tokens(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    """Token ids of one word whose pieces say something: a word spelled in letters is unknown."""
    pieces = tokenizer.tokenize(word)
    bare = [piece.removesuffix(WORD_END) for piece in pieces]
    if not bare or len(word.split()) != 1 or any(len(piece) < 2 for piece in bare):
        spelled = f" (it would be spelled {' '.join(bare)})" if bare else ""
        raise PromptError(
            f"init word {word!r}: is unknown to this base's tokenizer{spelled}; give single common words like 'dog'"
        )
    return [int(index) for index in tokenizer.convert_tokens_to_ids(pieces)]
