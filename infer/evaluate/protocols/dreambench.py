"""DreamBench: 30 subjects x 25 prompts x 4 seeds, and pairs of them, from the data set's folder as it is published.

Ruiz et al., DreamBooth, CVPR 2023; github.com/google/dreambooth: `prompts_and_classes.txt` beside a folder of photos a
subject. Its prompts `'a {0} {1} in the jungle'.format(unique_token, class_token)` are asked without the unique token,
with the article that the class word wants.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.errors import UserError
from infer.evaluate.cases import EvaluatedSubject, Protocol
from infer.evaluate.protocols.crossing import cross
from infer.evaluate.protocols.photos import open_folder, photo_files, subject_of_files
from infer.evaluate.protocols.prompts import Prompt, PromptList, check_template, load_prompts
from infer.evaluate.settings import ProtocolSettings

LIST = "prompts_and_classes.txt"
HEADINGS = {"Object Prompts": "object", "Live Subject Prompts": "live"}
LIVE_CLASSES = frozenset(("cat", "dog"))
TOKENS = "{0} {1}"  # unique token, class
_LINE = re.compile(r"""(['"])(?P<template>.*)\1\.format\(""")
_CLASS = re.compile(r"(?P<name>\w+),(?P<noun>[\w ]+)")


def load(settings: ProtocolSettings) -> Protocol:
    """The protocol of the folder that the settings name.

    Raises:
        UserError: no such folder or list, or nothing of it is left.
    """
    folder = open_folder(settings, f"{LIST} and a folder of photos for each subject")
    nouns, published = read_list(folder / LIST)
    prompts = load_prompts(settings.prompts) if settings.prompts else published
    holes: list[str] = []

    def build(name: str, holes: list[str]) -> EvaluatedSubject | None:
        if not (folder / name).is_dir():
            holes.append(f"subject {name}: no folder {folder / name}; left out")
            return None
        return subject_of_files(name, nouns[name], photo_files(folder / name), settings, holes)

    return cross("DreamBench", settings, nouns, prompts, build, holes)


def read_list(file: Path) -> tuple[dict[str, str], PromptList]:
    """Class word of every subject, and the prompts; those for pairs are made from the object prompts.

    Raises:
        UserError: the file is missing, or has no classes or prompts in the published layout.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); expected DreamBench's list of classes and prompts"
        ) from error
    nouns: dict[str, str] = {}
    lists: dict[str, list[Prompt]] = {"object": [], "live": []}
    heading = "Classes"
    for line in lines:
        if line in HEADINGS or line == "Prompts":
            heading = HEADINGS.get(line, "")
        elif heading == "Classes" and (entry := _CLASS.fullmatch(line)) and line != "subject_name,class":
            nouns[entry["name"]] = entry["noun"]
        elif heading in lists and (found := _LINE.match(line)):
            template = found["template"].replace(TOKENS, "{}")
            check_template(template, 1, str(file))
            lists[heading].append(Prompt(template, kind_of(template)))
    for what, found_any in (("classes", nouns), ("object prompts", lists["object"]), ("live prompts", lists["live"])):
        if not found_any:
            raise UserError(f"{file}: no {what} found; expected DreamBench's list as it is published")
    pairs = tuple(Prompt(for_two(prompt.template), prompt.kind) for prompt in lists["object"])
    return nouns, PromptList(tuple(lists["object"]), tuple(lists["live"]), pairs, LIVE_CLASSES)


def kind_of(template: str) -> str:
    """What a published prompt asks for: what it wears, what it is like, what it stands on, or where it is."""
    if re.search(r"\{\} (wearing|in an? .*outfit)\b", template):
        return "accessory"
    if template.endswith("{}"):
        return "property change"
    return "relation" if "{} on top of" in template else "new scene"


def for_two(template: str) -> str:
    """A prompt for two subjects: both get its article and adjectives, "a red {}" -> "a red {} and a red {}"."""
    before, after = template.split("{}")
    return f"{before}{{}} and {before}{{}}{after}".replace("around it", "around them")
