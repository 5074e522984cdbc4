"""Subjects x prompts x seeds: which subjects and pairs a configuration names, and the cases they make.

A case's id says subject, number of the prompt and which of its seeds; its seed is a function of that id alone. So a
subset of the subjects, or more seeds, ask for the very same pictures as the whole does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, EvaluatedSubject, Part, Protocol
from infer.evaluate.protocols.photos import check_ids
from infer.evaluate.protocols.prompts import Prompt, PromptList, fill, nearest
from infer.evaluate.settings import ProtocolSettings
from infer.subjects import Subject, match_nouns

Build = Callable[[str, list[str]], EvaluatedSubject | None]  # (name, holes) -> the subject; None where it is a hole


@dataclass(frozen=True)
class Choice:
    """Who is asked for, by name."""

    singles: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every subject that takes part, once."""
        return tuple(dict.fromkeys([*self.singles, *(name for pair in self.pairs for name in pair)]))


def choose(settings: ProtocolSettings, nouns: Mapping[str, str], default: int | None = None) -> Choice:
    """The subjects and pairs of a configuration.

    Args:
        nouns: word of every subject there is, in the protocol's order.
        default: how many there are if the configuration names none; None: all.
    Raises:
        UserError: an unknown name, a name twice, no subject at all.
    """
    known = [*nouns]
    if not known:
        raise UserError(f"protocol.folder={settings.folder}: no subject found there")
    check_ids(known)
    _check_known(settings.input_photos, known, "protocol.input_photos")
    asked = default if settings.subjects is None else settings.subjects
    if isinstance(asked, tuple):
        _check_known(asked, known, "protocol.subjects")
        if len(set(asked)) < len(asked):
            raise UserError(f"protocol.subjects={', '.join(asked)}: a name stands there twice")
        names = asked
    else:
        if asked is not None and asked < 1:
            raise UserError(f"protocol.subjects={asked}: expected 1, 2, … or names")
        names = tuple(known[:asked])
    if isinstance(settings.pairs, int):
        pairs = neighbours(names, nouns)[: settings.pairs] if settings.pairs > 0 else ()
    else:
        pairs = settings.pairs
        _check_pairs(pairs, known)
    if not settings.seeds and not pairs:
        raise UserError("protocol: seeds=0 and no pairs; nothing is asked for")
    return Choice(names if settings.seeds else (), pairs)


def neighbours(names: Sequence[str], nouns: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Every subject with the next one of another word, the list read as a ring."""
    found = []
    for i, first in enumerate(names):
        second = next((name for name in [*names[i + 1 :], *names[:i]] if nouns[name] != nouns[first]), None)
        if second is not None:
            found.append((first, second))
    return tuple(found)


def _check_known(names: Mapping[str, str] | Sequence[str], known: Sequence[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: no subject {name!r}; did you mean {nearest(name, known)!r}?")


def _check_pairs(pairs: Sequence[tuple[str, str]], known: Sequence[str]) -> None:
    for first, second in pairs:
        _check_known((first, second), known, "protocol.pairs")
        if first == second:
            raise UserError(f"protocol.pairs: {first} with itself; a pair has two subjects")
    twice = next((pair for i, pair in enumerate(pairs) if pair in pairs[:i]), None)
    if twice:
        raise UserError(f"protocol.pairs: {' and '.join(twice)} stand there twice")


def cross(
    name: str, settings: ProtocolSettings, nouns: Mapping[str, str], prompts: PromptList, build: Build, holes: list[str]
) -> Protocol:
    """All cases of a protocol whose subjects are photos.

    Args:
        nouns: word of every subject there is, in the protocol's order.
        build: makes a subject of a name; only those that take part are made.
        holes: what is known to be missing; more is added.
    Raises:
        UserError: the configuration names what is not there, or nothing is left to ask for.
    """
    choice = choose(settings, nouns)
    if choice.pairs and not prompts.pair:
        raise UserError(f"protocol.prompts={settings.prompts}: has no prompts for pairs; add a section 'pair'")
    subjects = {name: build(name, holes) for name in choice.names}
    groups: list[Sequence[Case]] = []
    for one in choice.singles:
        subject = subjects[one]
        if subject is not None:
            groups.append([*_cases("single", (subject,), prompts.of(subject.noun), settings.seeds)])
    for pair in choice.pairs:
        both = tuple(subject for one in pair if (subject := subjects[one]) is not None)
        if len(both) == len(pair):
            groups.append([*_cases("pair", both, prompts.pair, settings.pair_seeds)])
        else:
            holes.append(f"pair {' and '.join(pair)}: a subject of it is missing; left out")
    if isinstance(settings.pairs, int) and len(choice.pairs) < min(settings.pairs, 1):
        holes.append(f"pairs={settings.pairs}: no two subjects with different words")
    return protocol_of(name, groups, holes)


def protocol_of(name: str, groups: Sequence[Sequence[Case]], holes: Sequence[str]) -> Protocol:
    """A protocol of cases by group.

    Raises:
        UserError: there is none.
    """
    cases = tuple(case for group in groups for case in group)
    if not cases:
        raise UserError(f"protocol {name}: nothing is left to ask for ({'; '.join(holes[:3]) or 'no prompts'})")
    return Protocol(name, cases, tuple(holes))


def _cases(part: Part, subjects: tuple[EvaluatedSubject, ...], prompts: Sequence[Prompt], seeds: int) -> Iterator[Case]:
    words = tuple(subject.noun for subject in subjects)
    for number, prompt in enumerate(prompts):
        text = fill(prompt.template, words)
        match_nouns(text, [Subject(word, []) for word in words])  # as the pipeline will
        for draw in range(seeds):
            group, case_id = name_case(subjects, number, draw)
            yield Case(case_id, group, part, text, prompt.kind, seed_of(case_id), subjects, words)


def name_case(subjects: Sequence[EvaluatedSubject], prompt: int, draw: int) -> tuple[str, str]:
    """Group and id of a case: `cat+dog` and `cat+dog--05--2`."""
    group = "+".join(subject.id for subject in subjects)
    return group, f"{group}--{prompt:02d}--{draw}"


def seed_of(case_id: str) -> int:
    """The seed of a case: its id decides alone, and no two cases share their noise."""
    return zlib.crc32(case_id.encode())
