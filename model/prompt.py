"""The prompt with subjects: "{caption}, the {noun} is <subject>, the {noun} is <subject> …", and where its tokens lie.

The placeholder `<subject>` is one added token; `text_fusion.py` replaces its embedding by the subject's concept.
`supervised_weights` selects the tokens whose attention maps are trained (`attention_maps.py`, `losses.py`).
Template: Subject-Diffusion, arXiv 2307.11410.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import CLIPTokenizer

PLACEHOLDER = "<subject>"
Span = tuple[int, int]


class PromptError(ValueError):
    """A caption or noun that cannot become a prompt, told in one line."""


@dataclass(frozen=True)
class SubjectPrompt:
    """One prompt of S subjects as L token ids. Positions index into `input_ids`; subjects are ordered as the nouns."""

    text: str  # the prompt with its suffix
    input_ids: Tensor  # (L,) int64, padded to the tokenizer's model_max_length
    plain_input_ids: Tensor  # (L,) int64, the caption without suffix
    placeholder_positions: tuple[int, ...]  # S
    noun_positions: tuple[tuple[int, ...], ...]  # S: every sub-token of the noun in the suffix
    caption_noun_positions: tuple[tuple[int, ...], ...]  # S: likewise in the caption, () where unknown
    noun_ids: tuple[tuple[int, ...], ...]  # S: token ids at noun_positions


def add_placeholder(tokenizer: CLIPTokenizer) -> int:
    """Add `<subject>` to the tokenizer; adding it again changes nothing.

    Returns:
        Its id: the number of tokens before it was added, that is the vocabulary size of the text encoder. The encoder's
        embedding matrix has no such row and needs none: the row is always replaced.
    """
    token = AddedToken(PLACEHOLDER, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return _placeholder_id(tokenizer)


def suffix_of(noun: str, *, first: bool = False) -> str:
    """What one subject adds to a prompt; `first`: to an empty one."""
    return f"{'' if first else ', '}the {noun} is {PLACEHOLDER}"


def build_prompt(
    tokenizer: CLIPTokenizer,
    caption: str,
    nouns: Sequence[str],
    *,
    spans: Sequence[Span | None] | None = None,
    shorten: bool = False,
) -> SubjectPrompt:
    """Write the prompt of one picture and find its tokens.

    Args:
        tokenizer: CLIP tokenizer after `add_placeholder`.
        caption: text without placeholder; may be empty.
        nouns: one a subject, may be several words; none gives the plain caption.
        spans: per subject, start and end of its noun in `caption` in characters, None where unknown.
        shorten: drop words from the end of a caption that is too long (nouns cut off lose their caption position);
            otherwise such a caption is refused.
    Raises:
        PromptError: too long; a special token in the caption or a noun; an empty noun; a span outside the caption.
    """
    _check_words(tokenizer, caption, nouns)
    spans = [None] * len(nouns) if spans is None else spans
    if len(spans) != len(nouns):
        raise PromptError(f"prompt: {len(spans)} spans for {len(nouns)} nouns; give one a noun, None where unknown")
    for noun, span in zip(nouns, spans, strict=True):
        if span is not None and not 0 <= span[0] < span[1] <= len(caption):
            raise PromptError(f"noun {noun!r}: span {tuple(span)} is outside the caption ({len(caption)} characters)")

    plain_input_ids = encode_ids(tokenizer, caption, shorten=shorten)  # (L,)
    if not nouns:
        return SubjectPrompt(caption, plain_input_ids, plain_input_ids, (), (), (), ())
    placeholder_id = _placeholder_id(tokenizer)
    caption = _fit(tokenizer, caption, nouns, shorten)
    text, noun_spans = _write(caption, nouns)
    ids, offsets = _tokenize(tokenizer, text)
    noun_positions = tuple(_tokens_within(offsets, span) for span in noun_spans)
    return SubjectPrompt(
        text=text,
        input_ids=_pad(tokenizer, ids),
        plain_input_ids=plain_input_ids,
        placeholder_positions=tuple(index for index, token in enumerate(ids) if token == placeholder_id),
        noun_positions=noun_positions,
        caption_noun_positions=tuple(
            _tokens_within(offsets, span) if span is not None and span[1] <= len(caption) else () for span in spans
        ),
        noun_ids=tuple(tuple(ids[position] for position in positions) for positions in noun_positions),
    )


def encode_ids(tokenizer: CLIPTokenizer, text: str, *, shorten: bool = False) -> Tensor:
    """Token ids of a text without subjects (a plain caption, the empty or the negative prompt).

    Returns:
        (L,) int64, start and end included, padded to the tokenizer's `model_max_length`.
    Raises:
        PromptError: too long and `shorten` False; or a special token in the text.
    """
    _check_words(tokenizer, text, ())
    return _pad(tokenizer, _tokenize(tokenizer, _fit(tokenizer, text, (), shorten))[0])  # (L,)


def supervised_weights(
    prompts: Sequence[SubjectPrompt],
    num_subjects: int,
    supervise: Collection[str],
) -> Tensor:
    """Averaging weights that turn attention to L tokens into attention to S subjects.

    Args:
        prompts: B prompts of at most `num_subjects` subjects.
        num_subjects: S, the padded number of subjects.
        supervise: which tokens count, every sub-token alike: any of "placeholder", "noun" (in the suffix) and "caption"
            (the noun in the caption, where its span is known).
    Returns:
        (B, S, L) float32; each row sums to 1, or to 0 where there is no subject or no supervised token.
    """
    if isinstance(supervise, str) or not set(supervise) <= {"placeholder", "noun", "caption"}:
        raise ValueError(f"supervise {supervise!r}: expected a list of 'placeholder', 'noun', 'caption'")
    length = prompts[0].input_ids.shape[0]
    weights = torch.zeros(len(prompts), num_subjects, length)
    for row, prompt in enumerate(prompts):
        for subject, placeholder in enumerate(prompt.placeholder_positions):
            positions = [placeholder] if "placeholder" in supervise else []
            if "noun" in supervise:
                positions += prompt.noun_positions[subject]
            if "caption" in supervise:
                positions += prompt.caption_noun_positions[subject]
            if positions:
                weights[row, subject, positions] = 1 / len(positions)
    return weights  # (B, S, L)


def _placeholder_id(tokenizer: CLIPTokenizer) -> int:
    try:
        return tokenizer.get_added_vocab()[PLACEHOLDER]
    except KeyError:
        raise ValueError(f"tokenizer: {PLACEHOLDER} is missing; call add_placeholder first") from None


def _write(caption: str, nouns: Sequence[str]) -> tuple[str, list[Span]]:
    """The prompt's text and where each noun of the suffix stands in it, in characters."""
    text, spans = caption, []
    for noun in nouns:
        text += suffix_of(noun, first=not text)
        start = len(text) - len(f"{noun} is {PLACEHOLDER}")
        spans.append((start, start + len(noun)))
    return text, spans


def _fit(tokenizer: CLIPTokenizer, caption: str, nouns: Sequence[str], shorten: bool) -> str:
    """The caption, without trailing blanks, cut so that the whole prompt fits; PromptError where it cannot."""
    caption = caption.rstrip()
    allowed = _max_length(tokenizer)

    def tokens_of(words: str) -> int:
        return len(_tokenize(tokenizer, _write(words, nouns)[0])[0])

    used = tokens_of(caption)
    if used > allowed and not shorten:
        raise PromptError(f"prompt too long: {used} tokens used, {allowed} allowed; shorten {_excerpt(caption)!r}")
    if used > allowed:
        # A word takes at least one token, so no more words than tokens can stay: start there for very long texts.
        num_words = min(len(caption.split()), allowed)
        while num_words > 0 and used > allowed:
            num_words -= 1
            caption = _first_words(caption, num_words)
            used = tokens_of(caption)
    if used > allowed:
        raise PromptError(f"prompt too long: the nouns {', '.join(nouns)} alone use {used} tokens, {allowed} allowed")
    return caption


def _first_words(text: str, count: int) -> str:
    """The first `count` words with the spaces between them as they are, so that spans into the text stay true."""
    rest = text.split(maxsplit=count)[count:]
    return text[: len(text) - len(rest[0])].rstrip() if rest else text.rstrip()


def _tokenize(tokenizer: CLIPTokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Ids with start and end token, and the characters each id covers (start and end cover none)."""
    # Positions are read off the offsets of the whole text, because pieces can merge across the seam: "beach!" + ", the"
    # has the one token "!,". `verbose=False`: the length is checked here, with a better message.
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _tokens_within(offsets: Sequence[Span], span: Span) -> tuple[int, ...]:
    """Positions of the tokens that share at least one character with the span."""
    return tuple(i for i, (start, end) in enumerate(offsets) if max(start, span[0]) < min(end, span[1]))


def _pad(tokenizer: CLIPTokenizer, ids: list[int]) -> Tensor:
    padding = [tokenizer.pad_token_id] * (_max_length(tokenizer) - len(ids))
    return torch.tensor(ids + padding, dtype=torch.int64)  # (L,)


def _max_length(tokenizer: CLIPTokenizer) -> int:
    length = tokenizer.model_max_length
    if length > 100_000:  # what transformers reports when the folder states none
        raise ValueError("tokenizer: model_max_length is not set; set it to the text encoder's max_position_embeddings")
    return length


def _check_words(tokenizer: CLIPTokenizer, caption: str, nouns: Sequence[str]) -> None:
    """Refuse text that the tokenizer would read as a placeholder, a start or an end, and nouns that say nothing."""
    for name, text in [("caption", caption), *(("noun", noun) for noun in nouns)]:
        for token in (PLACEHOLDER, tokenizer.bos_token, tokenizer.eos_token):  # padding may be "!", as in SD 2.1
            if token.lower() in text.lower():
                raise PromptError(f"{name} {_excerpt(text)!r}: contains the reserved token {token}; remove it")
    for noun in nouns:
        if not noun.strip():
            raise PromptError("noun '': is empty; give the word that names the subject, like 'dog'")


def _excerpt(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
