"""Learned words: placeholders in a prompt that stand for vectors of their own, one model's words together.

    ids = add_words(tokenizer, "z", 1); words = LearnedWords([LearnedWord.plain("z", ids, rows)])
    model.words = words; text = words.expand("a z on the beach")
`text_fusion.py` puts the vectors in place of their tokens; words whose vectors differ by cross-attention layer go on
through `layer_contexts.py`. Plain: Textual Inversion, arXiv 2208.01618; layerwise and adaptive: LASR (`lasr/`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTokenizer

from model.lasr.adaptive_embedding import AdaptiveEmbedding, AdaptiveRows
from model.lasr.static_embedding import StaticEmbedding
from model.prompt import PLACEHOLDER, PromptError
from model.text_fusion import WordRows

Mode = Literal["exact", "fast"]
ADAPTIVE_WEIGHT = 0.5
COMMON_WORD_LETTERS = 3


def word_tokens(placeholder: str, num_vectors: int) -> tuple[str, ...]:
    """The added tokens that a placeholder is written with, one a vector."""
    return tuple(f"<{placeholder.lower()}:{index}>" for index in range(num_vectors))


def add_words(
    tokenizer: CLIPTokenizer, placeholder: str, num_vectors: int = 1, common_words: Collection[str] = ()
) -> tuple[int, ...]:
    """Add the tokens of one placeholder to the tokenizer.

    Args:
        tokenizer: after `prompt.add_placeholder`, so that the new ids lie above that of `<subject>` and the embedding
            matrix keeps its stock shape.
        placeholder: the word that people will write.
        num_vectors: K.
        common_words: further words that cannot be taken, such as the nouns the base was trained on.
    Returns:
        K ids.
    Raises:
        PromptError: a placeholder that cannot be told from other words, or that was added before.
    """
    if num_vectors < 1:
        raise PromptError(f"placeholder {placeholder!r}: {num_vectors} vectors; give at least 1")
    _check_placeholder(tokenizer, placeholder, common_words)
    tokens = word_tokens(placeholder, num_vectors)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)


def _check_placeholder(tokenizer: CLIPTokenizer, placeholder: str, common_words: Collection[str]) -> None:
    added = tokenizer.get_added_vocab()
    if PLACEHOLDER not in added:
        raise ValueError(f"tokenizer: {PLACEHOLDER} is missing; call prompt.add_placeholder first")
    if not placeholder or placeholder.split() != [placeholder]:
        raise PromptError(f"placeholder {placeholder!r}: must be one word without blanks, like 'z'")
    if not any(letter.isalnum() for letter in placeholder):
        raise PromptError(f"placeholder {placeholder!r}: needs a letter or a digit, like 'z'")
    for token in (PLACEHOLDER, tokenizer.bos_token, tokenizer.eos_token):
        if token.lower() in placeholder.lower():
            raise PromptError(f"placeholder {placeholder!r}: contains the reserved token {token}; give another word")
    word = placeholder.lower()
    if word_tokens(word, 1)[0] in {token.lower() for token in added}:
        raise PromptError(f"placeholder {placeholder!r}: was added before; give another word")
    single = len(tokenizer.tokenize(word)) == 1 and len(word) >= COMMON_WORD_LETTERS
    if single or word in {common.lower() for common in common_words}:
        raise PromptError(
            f"placeholder {placeholder!r}: is an ordinary word that prompts need; give one that means nothing, like 'z'"
        )


class FixedRows(nn.Module):
    """Vectors that are learnt themselves."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().float().clone())  # (K, D) or (layers, K, D)

    def forward(self) -> Tensor:
        return self.rows


class LearnedWord(nn.Module):
    """One placeholder and its K vectors: plain, layerwise, or layerwise and adaptive.

    Args:
        placeholder: the word that people write.
        ids: K token ids, from `add_words`.
        static: its forward gives rows (K, D), or (layers, K, D).
        adaptive: rows that follow features and time; needs layerwise static rows.
        adaptive_weight: w in (1 - w) static + w adaptive contexts.
        scale: factor on all vectors.
    """

    def __init__(
        self,
        placeholder: str,
        ids: Sequence[int],
        static: FixedRows | StaticEmbedding,
        adaptive: AdaptiveEmbedding | None = None,
        adaptive_weight: float = ADAPTIVE_WEIGHT,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        shape = tuple(static.rows.shape if isinstance(static, FixedRows) else static.basis.bias.shape)
        if len(shape) not in (2, 3) or shape[-2] != len(ids):
            raise ValueError(f"word {placeholder!r}: rows {shape} for {len(ids)} tokens; give one row a token")
        if adaptive is not None and tuple(adaptive.basis.bias.shape) != shape:
            raise ValueError(
                f"word {placeholder!r}: adaptive rows {tuple(adaptive.basis.bias.shape)}, static rows {shape}"
            )
        self.placeholder, self.ids = placeholder, tuple(ids)
        self.static, self.adaptive = static, adaptive
        self.adaptive_weight, self.scale = adaptive_weight, scale
        self.num_layers = shape[0] if len(shape) == 3 else None  # None: alike in all layers
        self.width = shape[-1]

    @classmethod
    def plain(cls, placeholder: str, ids: Sequence[int], rows: Tensor, scale: float = 1.0) -> LearnedWord:
        """A word of learnt rows (K, D), or (layers, K, D)."""
        return cls(placeholder, ids, FixedRows(rows), scale=scale)

    @property
    def num_vectors(self) -> int:
        return len(self.ids)

    def static_rows(self) -> Tensor:
        """(K, D), or (layers, K, D); scaled."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.static() * self.scale

    def state(self) -> dict[str, Tensor]:
        """Everything but placeholder and ids, as tensors on the CPU, for a file."""
        tensors = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return tensors | {"adaptive_weight": torch.tensor(self.adaptive_weight), "scale": torch.tensor(self.scale)}

    @classmethod
    def from_state(cls, placeholder: str, ids: Sequence[int], state: dict[str, Tensor]) -> LearnedWord:
        """The word of a `state`; placeholder and ids may be others than it was saved with.

        Raises:
            ValueError: tensors that make no word.
        """
        values = dict(state)
        try:
            weight, scale = float(values.pop("adaptive_weight", ADAPTIVE_WEIGHT)), float(values.pop("scale", 1.0))
            static: FixedRows | StaticEmbedding
            if "static.rows" in values:
                static = FixedRows(values["static.rows"])
            else:
                static = StaticEmbedding.shaped_like(_below(values, "static."))
            adapting = _below(values, "adaptive.")
            adaptive = AdaptiveEmbedding.shaped_like(adapting) if adapting else None
            word = cls(placeholder, ids, static, adaptive, weight, scale)
            word.load_state_dict(values)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"word {placeholder!r}: its tensors make no learned word ({reason})") from error
        return word


class LearnedWords(nn.Module):
    """All words of a model.

    Args:
        words: any number; placeholders and ids all different, layerwise ones of as many layers.
        mode: of adaptive words. `exact` encodes the prompt for each layer as the pass reaches it; `fast` encodes it for
            all layers at once from the features of the previous denoising step (`layer_contexts.py`).
    """

    def __init__(self, words: Iterable[LearnedWord], mode: Mode = "exact") -> None:
        super().__init__()
        if mode not in ("exact", "fast"):
            raise ValueError(f"learned words: mode {mode!r}; expected 'exact' or 'fast'")
        self.mode = mode
        modules = list(words)
        if not modules:
            raise ValueError("learned words: none given; leave the model's `words` at None")
        called = [word.placeholder.lower() for word in modules]
        twice = sorted({name for name in called if called.count(name) > 1})
        if twice:
            raise ValueError(f"learned words: the placeholder {twice[0]!r} is there twice; rename one")
        layers = {word.num_layers for word in modules} - {None}
        if len(layers) > 1 or len({word.width for word in modules}) > 1:
            raise ValueError("learned words: made for different bases; their layers or widths differ")
        self.each = nn.ModuleList(modules)
        self.num_layers: int | None = next(iter(layers), None)
        self.width = modules[0].width
        ids = torch.tensor([index for word in modules for index in word.ids])
        self.register_buffer("ids", ids, persistent=False)
        self.ids: Tensor  # (N,) of all words
        self._tokens = {
            word.placeholder.lower(): "".join(word_tokens(word.placeholder, len(word.ids))) for word in self
        }
        kept = [re.escape(tokens) for tokens in self._tokens.values()]  # what was expanded before stays as it is
        names = [re.escape(name) for name in sorted(self._tokens, key=len, reverse=True)]
        self._pattern = re.compile(rf"{'|'.join(kept)}|(?<!\w)({'|'.join(names)})(?!\w)", re.IGNORECASE)

    def __iter__(self) -> Iterator[LearnedWord]:
        for word in self.each:
            assert isinstance(word, LearnedWord)
            yield word

    def expand(self, text: str) -> str:
        """The text with the tokens of each placeholder (a whole word, in either case) in its place."""
        return self._pattern.sub(lambda found: self._tokens[found[1].lower()] if found[1] else found[0], text)

    def static_rows(self) -> Tensor:
        """Static rows of all words in the order of `ids`: (N, D), or (layers, N, D) where any word is layerwise."""
        if self.num_layers is None:
            return torch.cat([word.static_rows() for word in self])
        rows = [word.static_rows() for word in self]
        return torch.cat([row if row.dim() == 3 else row.expand(self.num_layers, -1, -1) for row in rows], dim=1)

    def word_rows(self, layer: int | None = None) -> WordRows:
        """Static rows with their ids, as `encode_prompt` takes them; `layer` is needed where any word is layerwise."""
        rows = self.static_rows()
        return WordRows(self.ids, rows if layer is None else rows[layer])

    def adaptive_words(self) -> list[tuple[int, LearnedWord]]:
        """Words that adapt, each with the place of its first vector in `ids`."""
        found, start = [], 0
        for word in self:
            if word.adaptive is not None and word.adaptive_weight != 0:
                found.append((start, word))
            start += word.num_vectors
        return found

    def adaptive_rows(self) -> list[AdaptiveRows]:
        """What makes the rows of the words that adapt; for as long as their weights stay as they are."""
        with torch.autocast(self.ids.device.type, enabled=False):
            return [word.adaptive.of_all_layers() for _, word in self.adaptive_words() if word.adaptive is not None]

    def holds_layerwise(self, input_ids: Tensor) -> Tensor:
        """Which prompts (B, L) hold a word that differs by layer: (B,) bool."""
        return self._is_layerwise(input_ids).any(dim=1)

    def first_layerwise(self, input_ids: Tensor) -> int:
        """The first position in any of the prompts (B, L), all of which hold one."""
        return int(self._is_layerwise(input_ids).int().argmax(dim=1).min())

    def _is_layerwise(self, input_ids: Tensor) -> Tensor:
        ids = [index for word in self if word.num_layers is not None for index in word.ids]
        return torch.isin(input_ids, torch.tensor(ids, dtype=torch.int64, device=input_ids.device))  # (B, L)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
