"""Learned words for the tiny model, with nothing left at the zeros it starts with."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer

from model.attention_maps import cross_attention_layers
from model.composition import SubjectDiffusionModel
from model.lasr.adaptive_embedding import AdaptiveEmbedding
from model.lasr.init_words import init_vectors
from model.lasr.layerwise_basis import LayerwiseBasis, basis_rank
from model.lasr.static_embedding import StaticEmbedding
from model.learned_words import LearnedWord, add_words
from tests.model.tiny import wake


def plain_word(
    model: SubjectDiffusionModel, tokenizer: CLIPTokenizer, placeholder: str, vectors: int = 1, seed: int = 0
) -> LearnedWord:
    """A word of random rows."""
    rows = torch.randn(vectors, model.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return LearnedWord.plain(placeholder, add_words(tokenizer, placeholder, vectors), rows)


def lasr_word(
    model: SubjectDiffusionModel,
    tokenizer: CLIPTokenizer,
    placeholder: str,
    vectors: int = 1,
    attention: bool = False,
    adaptive: bool = True,
    seed: int = 0,
) -> LearnedWord:
    """A LASR word that starts as "dog" and is then moved at random."""
    torch.manual_seed(seed)
    layers = [model.unet.get_submodule(name) for name in cross_attention_layers(model.unet)]
    start = init_vectors(tokenizer, model.text_encoder.embeddings.token_embedding, ["dog"])
    none = torch.zeros(0, start.vectors.shape[1])
    rank = basis_rank(2, len(start.vectors), 0)

    def basis() -> LayerwiseBasis:
        return LayerwiseBasis(start.vectors, none, rank, len(layers), vectors)

    adapting = AdaptiveEmbedding(
        basis(),
        [layer.to_q.in_features for layer in layers],
        model.unet.time_embedding.linear_2.out_features,
        [layer.to_q.out_features for layer in layers] if attention else None,
    )
    ids = add_words(tokenizer, placeholder, vectors)
    word = LearnedWord(placeholder, ids, StaticEmbedding(basis(), start.weights), adapting if adaptive else None)
    wake(word, seed)
    return word
