"""Textual Inversion: the K vectors of a new word are all that is learnt (Gal et al., arXiv 2208.01618, equation 2).

They start as the embeddings of words, or as the subject model's zero-shot prediction. Defaults: the paper's code for
Stable Diffusion. `export_embeddings` writes the files that diffusers' `load_textual_inversion` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from infer.refine.method import Concept, MethodSettings, RefineBase
from infer.refine.refinement import Refinement
from infer.refine.words import SpacedWords, WordMethod, WordModule, new_ids, word_start, word_states
from infer.refine.zero_shot_start import Start, zero_shot_vector
from model.learned_words import LearnedWord

EXPORT_NAME = "learned_embeds"


class TextualInversionSettings(MethodSettings):
    """`options` of textual-inversion."""

    steps: int = Field(6100, gt=0)
    batch_size: int = Field(2, gt=0)
    learning_rate: float = Field(5e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    num_vectors: int = Field(1, gt=0)  # K; the paper found one best
    init_words: SpacedWords = ()  # to start from: K of them, one a vector, or any number whose mean each vector takes;
    # none: the class word
    start: Start = "words"  # or the subject model's prediction from the pictures


class TextualInversion(WordMethod):
    """See `RefineMethod`."""

    name = "textual-inversion"
    settings = TextualInversionSettings

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: TextualInversionSettings) -> WordModule:
        words = []
        for concept in concepts:
            if settings.start == "zero_shot":
                rows = zero_shot_vector(base, concept).repeat(settings.num_vectors, 1)  # (K, D)
            else:
                rows = word_start(base, concept, settings.init_words, settings.num_vectors)  # (K, D)
            ids = new_ids(base, concept, settings.num_vectors)
            words.append(LearnedWord.plain(concept.placeholder, ids, rows))
        return WordModule(base, words)


METHOD = TextualInversion()


def export_embeddings(refinement: Refinement, folder: Path) -> list[Path]:
    """Write each word of a refinement as diffusers keeps them: `learned_embeds.safetensors`, placeholder -> vectors.

    Args:
        folder: made when missing. Several words give one file each, `learned_embeds-PLACEHOLDER.safetensors`.

    Raises:
        UserError: words that differ by layer, which diffusers cannot hold; no word; the files cannot be written.
    """
    states = word_states(refinement)
    if not states:
        raise UserError(f"{refinement.label}: holds no learned word; {refinement.method} learns weights, not words")
    layerwise = [
        word for word, state in states.items() if set(state) != {"static.rows"} or state["static.rows"].dim() != 2
    ]
    if layerwise:
        raise UserError(
            f"{refinement.label}: {layerwise[0]!r} differs by cross-attention layer, which no textual-inversion file "
            "can hold; export words of textual-inversion or cross-init"
        )
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for word, state in states.items():
            suffix = f"-{word}" if len(states) > 1 else ""
            path = folder / f"{EXPORT_NAME}{suffix}.safetensors"
            rows = state["static.rows"]  # (K, D)
            save_file({word: (rows[0] if len(rows) == 1 else rows).contiguous()}, path, metadata={"format": "pt"})
            written.append(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be written ({reason}); give another folder") from error
    return written
