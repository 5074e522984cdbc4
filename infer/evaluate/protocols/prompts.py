"""Lists of prompts by kind, read from YAML, and their templates filled with nouns.

    object:                         # for things, and for all that has no list of its own
      new scene: ["a {} in the jungle"]
    live: {…}                       # for animals and people
    pair:                           # for two subjects
      relation: ["a {} on top of a {}"]
    live nouns: [cat, dog]          # whose words use the list `live`

`{}` is filled with the bare noun; a or an before it follows its sound, and a plural loses it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from data_pipeline.toybox.captions import is_plural
from infer.evaluate.cases import KINDS

SECTIONS = {"object": 1, "live": 1, "pair": 2}  # subjects in each of their prompts
LIVE_NOUNS = "live nouns"
# Words that end a noun phrase: what stands before them is no adjective of the noun after them.
_BREAKS = "a|an|the|of|on|in|at|by|to|as|and|or|with|for|from|like|into|onto|under|over|near|beside|between|wearing"
_PHRASE = re.compile(rf"(?P<head>.*?)\ban? (?P<adjectives>(?:(?!(?:{_BREAKS})\b)[\w-]+ )*)", re.IGNORECASE)
_SOUNDS_LIKE_YOU = ("uni", "use", "usu", "ute", "eu", "one", "uku", "ufo")
_SILENT_H = ("hour", "heir", "honest", "honor", "honour")


@dataclass(frozen=True)
class Prompt:
    """A prompt before it knows its subjects."""

    template: str  # `{}` once for each subject
    kind: str  # one of KINDS


@dataclass(frozen=True)
class PromptList:
    """Prompts for things, for living ones and for two subjects, each numbered from 0."""

    object: tuple[Prompt, ...]
    live: tuple[Prompt, ...] = ()
    pair: tuple[Prompt, ...] = ()
    live_nouns: frozenset[str] = frozenset()

    def of(self, noun: str) -> tuple[Prompt, ...]:
        """Prompts for a subject of that word."""
        return self.live if self.live and noun.lower() in self.live_nouns else self.object


def load_prompts(path: Path | None, fields: Iterable[str] = ()) -> PromptList:
    """Read a list.

    Args:
        path: YAML as in the module's docstring.
        fields: other names in braces that templates may hold, besides `{}`.
    Raises:
        UserError: no such list, an unknown section or kind, a template that does not name its subjects.
    """
    if path is None:
        raise UserError(
            "protocol.prompts: missing; give a list of prompts, for example configs/eval/prompts/general.yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"protocol.prompts={path}: cannot be read ({error.strerror}); give a list of prompts"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected the sections {', '.join(SECTIONS)}, each with prompts by kind")
    nouns = content.pop(LIVE_NOUNS, None) or []
    if not isinstance(nouns, list):
        raise UserError(f"{path}: {LIVE_NOUNS}: expected a list of words, got {nouns!r}")
    for name in content:
        if name not in SECTIONS:
            raise UserError(
                f"{path}: unknown section {name!r}; did you mean {nearest(name, [*SECTIONS, LIVE_NOUNS])!r}?"
            )
    lists = {name: _section(content.get(name) or {}, name, path, frozenset(fields)) for name in SECTIONS}
    if not lists["object"]:
        raise UserError(
            f"{path}: no prompts in section 'object'; it serves all subjects that have no list of their own"
        )
    return PromptList(**lists, live_nouns=frozenset(str(noun).lower() for noun in nouns))


def _section(content: Any, section: str, path: Path, fields: frozenset[str]) -> tuple[Prompt, ...]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: {section}: expected kinds of prompts with a list each, got {content!r}")
    found = []
    for kind, templates in content.items():
        if kind not in KINDS:
            raise UserError(
                f"{path}: {section}: unknown kind of prompt {kind!r}; did you mean {nearest(kind, KINDS)!r}? "
                f"The kinds are {', '.join(KINDS)}"
            )
        if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
            raise UserError(f"{path}: {section}: {kind}: expected a list of texts, got {templates!r}")
        for template in templates:
            check_template(template, SECTIONS[section], f"{path}: {section}: {kind}", fields)
            found.append(Prompt(template, kind))
    return tuple(found)


def check_template(template: str, subjects: int, where: str, fields: Iterable[str] = ()) -> None:
    """Make sure that a template names its subjects.

    Raises:
        UserError: another number of `{}`, or a name in braces that is not among `fields`.
    """
    names, stray = re.findall(r"\{([^{}]*)\}", template), re.sub(r"\{[^{}]*\}", "", template)
    if names.count("") != subjects or set(stray) & set("{}"):
        times = "once" if subjects == 1 else f"{subjects} times"
        raise UserError(f"{where}: {template!r}: expected {{}} {times}, where the subject's word goes")
    for name in names:
        if name and name not in fields:
            known = ", ".join(f"{{{field}}}" for field in ("", *fields))
            raise UserError(f"{where}: {template!r}: nothing is known of {{{name}}}; expected {known}")


def fill(template: str, nouns: Sequence[str]) -> str:
    """A template with its nouns: "a {}" -> "an owl", "a red {}" -> "red socks", the same noun again "another owl"."""
    *pieces, end = template.split("{}")
    text = ""
    for i, (piece, noun) in enumerate(zip(pieces, nouns, strict=True)):
        phrase = _PHRASE.fullmatch(piece)
        if phrase:
            piece = phrase["head"] + _determiner(noun, phrase["adjectives"], noun in nouns[:i]) + phrase["adjectives"]
        text += piece + noun
    return text + end


def with_article(noun: str) -> str:
    """The noun as a prompt names one of them."""
    return fill("a {}", [noun])


def _determiner(noun: str, adjectives: str, again: bool) -> str:
    if is_plural(noun):
        return "more " if again else ""
    if again:
        return "another "
    word = (adjectives + noun).lower()
    vowel = word.startswith(("a", "e", "i", "o", "u")) and not word.startswith(_SOUNDS_LIKE_YOU)
    return "an " if vowel or word.startswith(_SILENT_H) else "a "


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is most like the given one."""
    names = list(known)
    return (difflib.get_close_matches(str(name), names, n=1, cutoff=0.0) or names)[0]
