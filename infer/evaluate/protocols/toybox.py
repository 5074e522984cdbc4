"""The small world's protocol: held-out subjects and pairs of them, each case with a real render that answers it.

Without a list of prompts the requests are those of `toybox_truth.py`, four a subject; of its references the first of a
subject serves all its cases, so that every method sees one. With a list (`configs/eval/prompts/toybox.yaml`) its
templates are asked for, which know more kinds.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.toybox.archive import SubjectArchive, ToyboxSubject
from data_pipeline.toybox.backgrounds import BACKGROUNDS
from data_pipeline.toybox.captions import colour_name, place_word, relation_word
from infer.evaluate.cases import Case, EvaluatedSubject, Part, Photo, Protocol
from infer.evaluate.protocols.crossing import choose, name_case, protocol_of, seed_of
from infer.evaluate.protocols.photos import subject_id
from infer.evaluate.protocols.prompts import Prompt, PromptList, fill, load_prompts
from infer.evaluate.settings import ProtocolSettings
from infer.evaluate.toybox_truth import (
    PROMPTS,
    Request,
    held_out_subjects,
    in_another_hue,
    request_of_pair,
    request_picture,
    requests_of_subject,
    tuning_scenes,
)
from infer.subjects import Subject, match_nouns

SUBJECTS = 40  # if the configuration names none
ANOTHER_SEED = 10_000  # between the seeds of one request; requests count on from 0
FIELDS = ("scene", "place", "relation", "colour")  # that a template may hold: true of the render
HUES = 6  # turns of the colour circle that are tried for another colour


def load(settings: ProtocolSettings) -> Protocol:
    """The protocol.

    Raises:
        UserError: an unknown subject, a list that cannot be used, a setting that has no meaning here.
    """
    if settings.folder is not None or settings.input_photos:
        raise UserError("protocol: the toybox renders its own pictures; leave out folder and input_photos")
    if settings.inputs > PROMPTS:
        raise UserError(f"protocol.inputs={settings.inputs}: the toybox has {PROMPTS} references of a subject")
    prompts = _written_prompts(settings.prompts) if settings.prompts else None
    world = _World(settings)
    choice = choose(settings, world.nouns, SUBJECTS)
    if prompts and choice.pairs and not prompts.pair:
        raise UserError(f"protocol.prompts={settings.prompts}: has no prompts for pairs; add a section 'pair'")
    groups = [[*world.singles(name, prompts)] for name in choice.singles]
    groups += [[*world.pairs(pair, prompts)] for pair in choice.pairs]
    return protocol_of("Toybox", groups, [])


def _written_prompts(path: Path) -> PromptList:
    """A list whose templates may hold `FIELDS`, each where it can be true."""
    prompts = load_prompts(path, FIELDS)
    one = [("{relation}", prompt.template) for prompt in (*prompts.object, *prompts.live)]
    for field, template in [*one, *(("{place}", prompt.template) for prompt in prompts.pair)]:
        if field in template:
            raise UserError(f"{path}: {template!r}: {{place}} tells where one subject is, {{relation}} how two stand")
    return prompts


class _World:
    """The archive's held-out subjects by name, and the cases of them."""

    def __init__(self, settings: ProtocolSettings) -> None:
        self.settings, self.archive = settings, SubjectArchive()
        subjects = held_out_subjects(self.archive, len(self.archive.subjects))
        self.subjects = {subject_id(subject.name): subject for subject in subjects}
        self.numbers = {name: number for number, name in enumerate(self.subjects)}
        self._seen: dict[str, tuple[EvaluatedSubject, tuple[Request, ...]]] = {}

    @cached_property
    def nouns(self) -> dict[str, str]:
        return {name: subject.noun for name, subject in self.subjects.items()}

    def singles(self, name: str, prompts: PromptList | None) -> Iterator[Case]:
        """Cases of one subject, in the order in which they are drawn."""
        subject, asked = self._evaluated(name)
        if prompts is None:
            for number, request in enumerate(asked):
                yield from self._cases("single", (subject,), number, "new scene", request, self.settings.seeds)
            return
        thing = self.subjects[name]
        for number, prompt in enumerate(prompts.of(thing.noun)):
            words = (thing.noun if number % 2 == 0 else thing.group_word,)
            request = self._written((thing,), words, (subject,), number, prompt)
            yield from self._cases(
                "single", (subject,), number, prompt.kind, request, self.settings.seeds, written=True
            )

    def pairs(self, names: tuple[str, str], prompts: PromptList | None) -> Iterator[Case]:
        """Cases of two subjects."""
        things = tuple(self.subjects[name] for name in names)
        both = tuple(self._evaluated(name)[0] for name in names)
        seeds = self.settings.pair_seeds
        if prompts is None:
            request = request_of_pair(self.archive, things[0], things[1], self.numbers[names[0]])
            yield from self._cases("pair", both, 0, "new scene", request, seeds)
            return
        for number, prompt in enumerate(prompts.pair):
            request = self._written(things, tuple(thing.noun for thing in things), both, number, prompt)
            yield from self._cases("pair", both, number, prompt.kind, request, seeds, written=True)

    def _evaluated(self, name: str) -> tuple[EvaluatedSubject, tuple[Request, ...]]:
        """A subject with the references of its requests as photos, and those requests."""
        if name not in self._seen:
            thing = self.subjects[name]
            asked = requests_of_subject(self.archive, thing, self.numbers[name])
            photos = tuple(
                Photo(f"{thing.name}, render {i}", partial(Image.fromarray, request.references[0]))
                for i, request in enumerate(asked)
            )
            scenes = tuning_scenes(self.archive, thing, asked, self.settings.tuning_photos, self.numbers[name])
            tuning = tuple(
                Photo(
                    f"{thing.name}, scene {i}",
                    partial(Image.fromarray, scene.picture),
                    partial(Image.fromarray, scene.mask),
                    scene.caption,
                )
                for i, scene in enumerate(scenes)
            )
            subject = EvaluatedSubject(name, thing.noun, photos, self.settings.inputs, self.settings.cutout, tuning)
            self._seen[name] = subject, asked
        return self._seen[name]

    def _cases(
        self,
        part: Part,
        subjects: tuple[EvaluatedSubject, ...],
        number: int,
        kind: str,
        request: Request,
        seeds: int,
        written: bool = False,
    ) -> Iterator[Case]:
        given = tuple(np.array(subject.photos[0].open()) for subject in subjects)
        match_nouns(request.prompt, [Subject(word, []) for word in request.words])  # as the pipeline will
        for draw in range(seeds):
            group, case_id = name_case(subjects, number, draw)
            seed = seed_of(case_id) if written else request.seed + draw * ANOTHER_SEED
            truth = replace(request, references=given, seed=seed)
            yield Case(case_id, group, part, request.prompt, kind, seed, subjects, request.words, request.boxes, truth)

    def _written(
        self,
        things: tuple[ToyboxSubject, ...],
        words: tuple[str, ...],
        subjects: Sequence[EvaluatedSubject],
        number: int,
        prompt: Prompt,
    ) -> Request:
        """The request that a template makes; what it says of places and colours is true of the render."""
        name = "+".join(subject.id for subject in subjects)
        rng = np.random.default_rng((2, zlib.crc32(name.encode()), number))
        background = str(rng.choice(list(BACKGROUNDS)))
        cutouts = [self.archive.cutout(thing.id) for thing in things]
        shown, colour = in_another_colour(cutouts[0], rng) if "{colour}" in prompt.template else (cutouts[0], "")
        request = request_picture(
            self.archive, things, words, rng, 0, background=background, shown=[shown, *cutouts[1:]]
        )
        said = {"scene": BACKGROUNDS[background].phrases[0], "place": place_word(request.boxes[0]), "colour": colour}
        if len(request.boxes) > 1:
            said["relation"] = relation_word(*request.boxes)
        template = prompt.template
        for field, word in said.items():
            template = template.replace(f"{{{field}}}", word)
        return replace(request, prompt=fill(template, words))


def in_another_colour(cutout: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A cut-out (h, w, 4) in another colour than its own, and the word for that colour."""
    own = colour_name(cutout)
    for turn in rng.permutation(HUES - 1) + 1:
        turned = in_another_hue(cutout, float(turn) / HUES)
        if colour_name(turned) != own:
            return turned, colour_name(turned)
    raise AssertionError("a turned hue has another name")
