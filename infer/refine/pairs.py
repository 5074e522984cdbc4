"""Fine-tuning on a small set of pictures with texts: `--pairs FOLDER`, the second task of arXiv 2303.18181.

A text stands beside its picture (`cat.png`, `cat.txt`), or all of them in `metadata.jsonl`, one line a picture:
{"file_name": "cat.png", "text": "a cat on a chair"}, as the imagefolder convention has it. Item n of `PairSamples` is a
pure function of n.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from infer.refine.samples import RefineSample
from infer.refine.subject_images import PICTURES, SubjectPicture, VariationSettings, read_pictures, vary
from model.prompt import PromptError, encode_ids

METADATA = "metadata.jsonl"
KEPT_BYTES = 256_000_000  # of decoded pictures; a larger set is decoded anew each time


@dataclass(frozen=True)
class Pair:
    """A picture and what it shows."""

    picture: Path
    text: str
    source: str  # where the text stands, for messages: FILE, or FILE:LINE


def read_pairs(folder: Path, tokenizer: CLIPTokenizer) -> tuple[list[Pair], list[str]]:
    """The pairs of a folder, pictures of inner folders among them, in the order of their names or of the metadata.

    Args:
        tokenizer: of the base; texts that are too long for it lose their last words.
    Returns:
        The pairs, and a warning for each text that was shortened or has no picture.
    Raises:
        UserError: no folder, no pairs, a picture without text, a text that cannot be used; each by file.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"pairs {folder}: no such folder; give one with pictures and a .txt beside each, or {METADATA}")
    listed = folder / METADATA
    pairs, warnings = _from_metadata(folder, listed) if listed.is_file() else _from_texts(folder)
    if not pairs:
        raise UserError(f"pairs {folder}: no pictures there ({', '.join(PICTURES)})")
    fitting = []
    for pair in pairs:
        text = _fitted(tokenizer, pair)
        if text != pair.text:
            warnings.append(f"{pair.source}: too long for the text encoder, shortened to {text!r}")
        fitting.append(Pair(pair.picture, text, pair.source))
    return fitting, warnings


class PairSamples(Dataset[RefineSample]):
    """Training samples of pairs; each pair once a pass, every pass in an order of its own."""

    def __init__(self, pairs: Sequence[Pair], size: int, variation: VariationSettings, seed: int) -> None:
        """
        Args:
            size: side of the pictures in pixels.
        """
        self.pairs, self.size, self.variation, self.seed = pairs, size, variation, seed
        self._kept: dict[int, SubjectPicture] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> RefineSample:
        turn, position = divmod(number, len(self.pairs))
        seed = self.seed % 2**63
        index = int(np.random.default_rng((seed, turn, 1)).permutation(len(self.pairs))[position])
        shown = vary(self.picture(index), self.variation, np.random.default_rng((seed, number)))
        text = self.pairs[index].text
        return RefineSample(shown.pixels, shown.valid, text, text, False, number, shown.resized)

    def check_pictures(self) -> list[str]:
        """Read every picture once: what they lose by being made square, by file.

        Raises:
            UserError: a file that is no picture.
        """
        return [line for index in range(len(self.pairs)) for line in self._read(index)[1]]

    def picture(self, index: int) -> SubjectPicture:
        """The picture of a pair."""
        known = self._kept.get(index)
        return self._read(index)[0] if known is None else known

    def _read(self, index: int) -> tuple[SubjectPicture, list[str]]:
        path = self.pairs[index].picture
        (picture,), warnings = read_pictures([path], self.size)
        if (len(self._kept) + 1) * picture.rgba.nbytes <= KEPT_BYTES:
            self._kept[index] = picture
        return picture, warnings[:-1]  # the last says that it was read alone


def _from_texts(folder: Path) -> tuple[list[Pair], list[str]]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    pairs = []
    for picture in pictures:
        beside = picture.with_suffix(".txt")
        if not beside.is_file():
            missing = sum(not other.with_suffix(".txt").is_file() for other in pictures)
            raise UserError(
                f"{picture}: has no text ({missing} of {len(pictures)} pictures have none); write what it shows into "
                f"{beside.name} beside it, or give {METADATA}"
            )
        pairs.append(Pair(picture, _text_of(beside), str(beside)))
    named = {picture.with_suffix("") for picture in pictures}
    texts = sorted(path for path in folder.rglob("*.txt") if path.with_suffix("") not in named) if pairs else []
    return pairs, [f"{path}: a text without a picture, left out" for path in texts]


def _text_of(file: Path) -> str:
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
    if not text:
        raise UserError(f"{file}: is empty; write what the picture shows")
    return text


def _from_metadata(folder: Path, file: Path) -> tuple[list[Pair], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
    pairs = [_pair(folder, line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    seen: set[Path] = set()
    for pair in pairs:
        if pair.picture in seen:
            raise UserError(f"{pair.source}: {pair.picture.name} is there twice; give each picture one line")
        seen.add(pair.picture)
    return pairs, []


def _pair(folder: Path, line: str, source: str) -> Pair:
    try:
        told = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not valid JSON ({error.msg})") from error
    fields = told if isinstance(told, dict) else {}
    name, text = fields.get("file_name"), fields.get("text")
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        raise UserError(f'{source}: expected {{"file_name": "cat.png", "text": "a cat on a chair"}}')
    picture = (folder / name).resolve()
    if not picture.is_relative_to(folder.resolve()):
        raise UserError(f"{source}: {name} lies outside {folder}; copy it there")
    if not picture.is_file():
        raise UserError(f"{source}: {name} is not in {folder}; correct the line or add the picture")
    return Pair(picture, " ".join(text.split()), source)


def _fitted(tokenizer: CLIPTokenizer, pair: Pair) -> str:
    """As many of its first words as the text encoder takes."""
    try:
        encode_ids(tokenizer, pair.text, shorten=True)
    except PromptError as error:
        raise UserError(f"{pair.source}: {error}") from error
    words = pair.text.split()[: tokenizer.model_max_length]  # a word takes at least one token
    while words:
        try:
            encode_ids(tokenizer, " ".join(words))
            return " ".join(words)
        except PromptError:
            words.pop()
    raise UserError(f"{pair.source}: its first word alone is too long for the text encoder")
