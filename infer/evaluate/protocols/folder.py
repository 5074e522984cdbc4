"""Any photos with any prompts: a folder of pictures, or of folders of pictures, called after what they show.

    FOLDER/dog.png                 one photo of a dog
    FOLDER/teddy bear/*.jpg        several photos of a teddy bear
    FOLDER/rex/*.jpg               with FOLDER/subjects.yaml that says {rex: dog}

Numbers at the end of a name and `_` are not part of its word: dog2, red_hat.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from data_pipeline.errors import UserError
from infer.evaluate.cases import EvaluatedSubject, Protocol
from infer.evaluate.protocols.crossing import cross
from infer.evaluate.protocols.photos import SUFFIXES, open_folder, photo_files, subject_of_files
from infer.evaluate.protocols.prompts import load_prompts
from infer.evaluate.settings import ProtocolSettings

NAMES = "subjects.yaml"  # {name of a file or folder: the word for what it shows}


def load(settings: ProtocolSettings) -> Protocol:
    """The protocol of the folder that the settings name.

    Raises:
        UserError: no such folder or list of prompts, or nothing of it is left.
    """
    folder = open_folder(settings, "pictures, or a folder of pictures for each subject")
    prompts = load_prompts(settings.prompts)
    places = _places(folder)
    words = _words(folder / NAMES)
    nouns = {name: words.get(name) or noun_of(name) for name in [*places, *(set(words) - set(places))]}
    nouns = dict(sorted(nouns.items()))

    def build(name: str, holes: list[str]) -> EvaluatedSubject | None:
        place = places.get(name, folder / name)
        files = [place] if place.is_file() else photo_files(place) if place.is_dir() else []
        return subject_of_files(name, nouns[name], files, settings, holes)

    return cross(folder.name, settings, nouns, prompts, build, [])


def noun_of(name: str) -> str:
    """The word in a file's or folder's name: "red_hat2" -> "red hat".

    Raises:
        UserError: there is none.
    """
    noun = " ".join(re.sub(r"[\d_\W]+$", "", name).replace("_", " ").split())
    if not noun:
        raise UserError(
            f"subject {name}: its name has no word for prompts; rename it, or say {{{name}: dog}} in {NAMES}"
        )
    return noun


def _places(folder: Path) -> dict[str, Path]:
    """File or folder of each subject, by name."""
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        is_photo = entry.is_file() and entry.suffix.lower() in SUFFIXES
        if entry.name.startswith(".") or not (entry.is_dir() or is_photo):
            continue
        name = entry.stem if is_photo else entry.name
        if name in found:
            raise UserError(f"{entry}: {found[name].name} is called the same; a subject has one file or one folder")
        found[name] = entry
    return found


def _words(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(content, dict) or not all(isinstance(word, str) and word.strip() for word in content.values()):
        raise UserError(f"{file}: expected a word for each subject, as rex: dog; got {content!r}")
    return {str(name): word.strip() for name, word in content.items()}
