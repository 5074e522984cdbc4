"""Cross Initialization: a word starts where learnt words end up (Pang et al., arXiv 2312.15905).

Learnt embeddings look more like the text encoder's output than like its input. So names are averaged by position, the
mean goes through the whole text encoder, and its states become the word's input embeddings:
    v_k = encoder([start, mean_1 … mean_K, end])_k,   loss = denoising error + 1e-5 mean_k |e_k - v_k|
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.errors import UserError
from infer.refine.method import Concept, MethodSettings, RefineBase, RefineBatch
from infer.refine.words import SpacedWords, WordMethod, WordModule, named_vectors, new_ids, training_nouns
from model.learned_words import LearnedWord, word_tokens
from model.prompt import encode_ids
from model.text_fusion import WordRows, encode_prompt
from train.draws import SampleDraws

STEPS = {"full": 320, "fast": 25}


class CrossInitSettings(MethodSettings):
    """`options` of cross-init."""

    preset: Literal["full", "fast"] = "full"  # 320 or 25 steps, where `steps` is not given
    steps: int = Field(STEPS["full"], gt=0)
    batch_size: int = Field(8, gt=0)
    learning_rate: float = Field(5e-3, gt=0)  # published: 6.25e-4 times the batch of 8
    weight_decay: float = Field(1e-2, ge=0)
    num_vectors: int = Field(2, gt=0)  # K
    names: Path | None = None  # to start from, one a line; null: the nouns that the toybox models were trained with
    init_words: SpacedWords = ()  # to start from these words instead of names
    distance_weight: float = Field(1e-5, ge=0)  # of the mean distance to the start

    @model_validator(mode="before")
    @classmethod
    def _steps_of_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and "steps" not in values:
            return {"steps": STEPS.get(str(values.get("preset")), STEPS["full"])} | values
        return values


class CrossInitModule(WordModule):
    """Words that are held near their start.

    Args:
        distance_weight: of the mean distance in the loss.
    """

    def __init__(self, base: RefineBase, words: Sequence[LearnedWord], distance_weight: float) -> None:
        super().__init__(base, words)
        self.distance_weight = distance_weight
        self.register_buffer("start", self.learned.static_rows().detach().clone())
        self.start: Tensor  # (N, D)

    def forward(self, batch: RefineBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        error, metrics = super().forward(batch, draws, step)
        distance = (self.learned.static_rows() - self.start).norm(dim=-1).mean()
        return error + self.distance_weight * distance, metrics | {"distance": distance.detach()}


class CrossInitialization(WordMethod):
    """See `RefineMethod`."""

    name = "cross-init"
    settings = CrossInitSettings

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: CrossInitSettings) -> CrossInitModule:
        words = []
        for concept in concepts:
            names = settings_names(settings.names, settings.init_words)
            if settings.init_words:
                named_vectors(base, settings.init_words)  # refuses what the tokenizer does not know
            ids = new_ids(base, concept, settings.num_vectors)
            rows = cross_initial_rows(base, concept.placeholder, ids, names)  # (K, D)
            words.append(LearnedWord.plain(concept.placeholder, ids, rows))
        return CrossInitModule(base, words, settings.distance_weight)


METHOD = CrossInitialization()


def settings_names(file: Path | None, init_words: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that a word starts from: those of the file, the init words as one name, or the training nouns.

    Raises:
        UserError: both are given, or the file cannot be read or is empty.
    """
    if file is not None and init_words:
        raise UserError("names and init_words: a word starts from one of them; leave the other out")
    if init_words:
        return (" ".join(init_words),)
    return training_nouns() if file is None else read_names(file)


def read_names(file: Path) -> tuple[str, ...]:
    """Names, one a line; empty lines are left out.

    Raises:
        UserError: the file cannot be read or holds no name.
    """
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names {file}: cannot be read as text ({error}); give a file with one name a line") from error
    names = tuple(line for line in lines if any(letter.isalnum() for letter in line))
    if not names:
        raise UserError(f"names {file}: holds no name; expected one a line, like 'Ada Lovelace'")
    return names


@torch.no_grad()
def mean_names(base: RefineBase, names: Sequence[str], num_vectors: int) -> Tensor:
    """Embeddings of names averaged by position: (K, D).

    The first of K positions takes each name's first token, the last its last; those between are spread evenly.
    """
    tokenizer, embedding = base.pipeline.tokenizer, base.pipeline.text_encoder.embeddings.token_embedding
    chosen = []
    for name in names:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(name))
        places = torch.linspace(0, len(ids) - 1, num_vectors).round().long()  # (K,)
        chosen.append(torch.tensor(ids)[places])
    return embedding(torch.stack(chosen).to(embedding.weight.device)).float().mean(dim=0)


@torch.no_grad()
def cross_initial_rows(base: RefineBase, placeholder: str, ids: Sequence[int], names: Sequence[str]) -> Tensor:
    """The text encoder's states at the mean name's positions: (K, D) float32 on the CPU.

    Args:
        ids: K, the tokens of the placeholder that will hold the rows.
        names: at least one.
    """
    text_encoder, tokenizer = base.pipeline.text_encoder, base.pipeline.tokenizer
    device = text_encoder.embeddings.token_embedding.weight.device
    written = encode_ids(tokenizer, "".join(word_tokens(placeholder, len(ids)))).to(device)  # (L,)
    rows = WordRows(torch.tensor(ids, device=device), mean_names(base, names, len(ids)))
    nowhere = torch.zeros(1, 0, dtype=torch.int64, device=device)
    states = encode_prompt(text_encoder, written[None], None, nowhere, words=rows)  # (1, L, D)
    return states[0, 1 : 1 + len(ids)].float().cpu()
