"""Where the subjects of a picture stand, and how much each of them there looks like itself.

A picture may please a whole-picture score by showing one of two subjects well; its crops tell. The places are those
that were asked for, or what an open-vocabulary detector finds (Grounding DINO, Liu et al., ECCV 2024): phrases are
scored by the mean over their own tokens, as in the dataset builder, and each subject gets one box (Hungarian
assignment). A subject that is not found scores 0; the picture scores as its worst subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, nms
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from data_pipeline.stages.detect.chunk_scores import clean_phrase, phrase_text, score_chunks, token_indices
from infer.drawing import usable_device
from infer.evaluate.backbones import Backbone, are_the_same, load_network, located, only_local
from infer.evaluate.metrics import Drawn
from infer.evaluate.settings import EvaluateSettings
from infer.loading import one_line_errors
from infer.subjects import Box
from model.reference import MID_GREY

THRESHOLD = 0.25  # a phrase's score from which on it counts as found
OVERLAP = 0.7  # IoU from which on two boxes are the same thing
BATCH = 4  # pictures that the detector looks at at once


@dataclass(frozen=True)
class Places:
    """Where the subjects of one picture stand."""

    boxes: tuple[Box | None, ...]  # one a subject, in their order; None: not found
    alike: tuple[tuple[int, ...], ...] = ()  # subjects whose boxes may be the other's: looks decide


class Finder(Protocol):
    """Looks for subjects in pictures."""

    def find(self, drawn: Sequence[Drawn]) -> list[Places | None]:
        """Places in each picture; None where nothing is known of them."""
        ...


class AskedPlaces:
    """The places that were asked for."""

    def find(self, drawn: Sequence[Drawn]) -> list[Places | None]:
        return [Places(one.places) if one.places else None for one in drawn]


class DetectedPlaces:
    """The places where a detector sees what the prompt calls the subjects."""

    def __init__(self, source: str, device: str) -> None:
        self.device = device
        self.model = load_network(AutoModelForZeroShotObjectDetection, source, "detector", "grounding-dino").to(device)
        with one_line_errors(f"backbones.detector={source}"):
            place = located(source, "detector")
            self.processor = AutoProcessor.from_pretrained(place, local_files_only=only_local(place))
        # each phrase sees itself alone by a mask of truth values, which "eager" would add to the logits as 0 and 1
        self.model.model.text_backbone.set_attn_implementation("sdpa")
        self._last: tuple[tuple[Drawn, ...], list[Places | None]] = (), []

    def find(self, drawn: Sequence[Drawn]) -> list[Places | None]:
        """The last answer is remembered: several metrics look at the same pictures."""
        before, places = self._last
        if not are_the_same(before, drawn):
            places = self._find(drawn)
            self._last = tuple(drawn), places
        return places

    def _find(self, drawn: Sequence[Drawn]) -> list[Places | None]:
        places: list[Places | None] = [None] * len(drawn)
        like: dict[tuple[Any, ...], list[int]] = {}  # pictures of one size and wording go together: nothing is padded
        for number, one in enumerate(drawn):
            if one.case.words:
                like.setdefault((one.picture.size, one.case.words), []).append(number)
        for (_, words), numbers in like.items():
            phrases = phrases_of(words)
            for start in range(0, len(numbers), BATCH):
                some = numbers[start : start + BATCH]
                for number, (boxes, scores) in zip(
                    some, self.detect([drawn[i].picture for i in some], phrases), strict=True
                ):
                    places[number] = place_subjects(boxes, scores, words)
        return places

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """In each picture all boxes (Q, 4), xyxy as fractions, and the score of each phrase there (Q, P), 0..1."""
        asked = phrase_text(phrases, self.processor.tokenizer, self.model.config.max_text_len)
        texts = [asked.text] * len(pictures)
        tokens = self.processor.tokenizer(texts, return_offsets_mapping=True, return_tensors="pt")
        own = token_indices(asked.spans, tokens.pop("offset_mapping")[0].tolist())
        indices = [own[slot] if slot is not None else [] for slot in asked.slots]  # of each phrase
        pixels = self.processor.image_processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        output = self.model(**tokens.to(self.device), **pixels.to(self.device))
        boxes = box_convert(output.pred_boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)  # (N, Q, 4)
        by_phrase = [score_chunks(logits, indices)[1] for logits in output.logits.cpu()]  # N of (Q, P)
        return list(zip(boxes, by_phrase, strict=True))


@lru_cache(maxsize=1)
def _detector(source: str, device: str) -> DetectedPlaces:
    return DetectedPlaces(source, usable_device(device))


def load_finder(settings: EvaluateSettings) -> Finder | None:
    """What `settings.crops` names; None where nothing is to be cropped. All metrics share one detector.

    Raises:
        UserError: the detector cannot be loaded.
    """
    if settings.crops == "none":
        return None
    return AskedPlaces() if settings.crops == "asked" else _detector(settings.backbones.detector, settings.device)


def phrases_of(words: Sequence[str]) -> list[str]:
    """What to look for: each word once, as the detector was trained to read it."""
    return list(dict.fromkeys(clean_phrase(word) for word in words))


def place_subjects(boxes: Tensor, scores: Tensor, words: Sequence[str]) -> Places:
    """Give each subject a box of its own, so that the scores of all together are highest.

    Args:
        boxes: (Q, 4) xyxy as fractions.
        scores: (Q, P) of each of `phrases_of(words)`, 0..1.
        words: one a subject.
    """
    phrases = phrases_of(words)
    slots = [phrases.index(clean_phrase(word)) for word in words]
    best = scores.amax(dim=1)  # (Q,)
    kept = nms(boxes, best, OVERLAP)  # of several boxes around one thing the best, whatever it is called
    kept = kept[best[kept] >= THRESHOLD]
    value = scores[kept][:, slots].T  # (subjects, boxes)
    value = torch.where(value >= THRESHOLD, value, 0.0)
    found: list[Box | None] = [None] * len(words)
    for subject, column in zip(*linear_sum_assignment(value.numpy(), maximize=True), strict=True):
        if value[subject, column] > 0:
            x0, y0, x1, y1 = boxes[kept[column]].tolist()
            found[subject] = (x0, y0, x1, y1)
    groups = [tuple(i for i, slot in enumerate(slots) if slot == phrase) for phrase in range(len(phrases))]
    return Places(tuple(found), tuple(group for group in groups if len(group) > 1))


def crop(picture: Image.Image, box: Box) -> Image.Image:
    """What stands in a box (fractions), whole, in the middle of a mid-grey square."""
    width, height = picture.size
    x0, y0 = min(math.floor(box[0] * width), width - 1), min(math.floor(box[1] * height), height - 1)
    part = picture.crop((x0, y0, max(math.ceil(box[2] * width), x0 + 1), max(math.ceil(box[3] * height), y0 + 1)))
    side = max(part.size)
    square = Image.new("RGB", (side, side), (MID_GREY,) * 3)
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square


def crop_scores(drawn: Sequence[Drawn], finder: Finder, backbone: Backbone) -> list[float | None]:
    """Of each picture the worst subject's similarity to its given photos; None where no place is known."""
    places = finder.find(drawn)
    cropped = [
        (number, subject, crop(one.picture, box))
        for number, (one, place) in enumerate(zip(drawn, places, strict=True))
        for subject, box in enumerate(place.boxes if place else ())
        if box is not None
    ]
    codes = dict[tuple[int, int], Tensor]()
    if cropped:
        features = torch.nn.functional.normalize(backbone.features(part for _, _, part in cropped), dim=-1)
        codes = {(number, subject): code for (number, subject, _), code in zip(cropped, features, strict=True)}
    scores: list[float | None] = []
    for number, (one, place) in enumerate(zip(drawn, places, strict=True)):
        if place is None:
            scores.append(None)
            continue
        count = len(one.case.subjects)
        table = np.zeros((count, count))  # similarity of subject (row) to what stands in the box of another (column)
        for row, subject in enumerate(one.case.subjects):
            given = backbone.photos(subject)[: subject.given]  # (G, D)
            for column in range(count):
                if (number, column) in codes:
                    table[row, column] = float((given @ codes[number, column]).mean())
        scores.append(min(_own_boxes(table, place)))
    return scores


def _own_boxes(table: np.ndarray, place: Places) -> list[float]:
    """The similarity of each subject to its own box; subjects of one word stand where they look most alike, in sum."""
    scores = [float(table[i, i]) for i in range(len(table))]
    for group in place.alike:
        seen = [i for i in group if place.boxes[i] is not None]
        rows, columns = linear_sum_assignment(table[np.ix_(group, seen)], maximize=True)
        for i in group:
            scores[i] = 0.0
        for row, column in zip(rows, columns, strict=True):
            scores[group[row]] = float(table[group[row], seen[column]])
    return scores
