"""From raters' files to votes: what was chosen, of whom, checked against the key of the kit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas

from data_pipeline.errors import UserError
from infer.evaluate.human.pairs import Key, Stored, read_key, read_stored
from infer.evaluate.human.win_rates import QUESTIONS, WinRates, win_rates

Choice = Literal["A", "tie", "B"]


class Given(Stored):
    """A rater's answers on one pair; None: not answered."""

    subject: Choice | None = None
    text: Choice | None = None


class AnswersFile(Stored):
    """`answers-NAME.json`, as the page writes it."""

    kit: str
    session: str  # one rater in one browser, whatever name was typed
    rater: str = ""
    answers: dict[str, Given]


def read_answers(folder: Path, files: Sequence[Path]) -> WinRates:
    """Win rates of a kit from its raters' files; also written to `folder/human.json`.

    What a rater left open is counted as unanswered. Of several files of one session the fullest counts.

    Args:
        folder: of the kit, with key.json.
    Raises:
        UserError: key.json or a file cannot be read, is no file of answers, belongs to another kit or names a pair that
            the kit does not have; no answer at all.
    """
    key = read_key(folder)
    sessions: dict[str, AnswersFile] = {}
    for path in files:
        given = _read(path, key)
        known = sessions.get(given.session)
        if known is None or _count(given) >= _count(known):
            sessions[given.session] = given
    if not any(_count(given) for given in sessions.values()):
        raise UserError(f"{', '.join(map(str, files)) or folder}: no answers; give files that raters have downloaded")
    rates = win_rates(key, _votes(key, list(sessions.values())))
    try:
        (folder / "human.json").write_text(rates.as_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / 'human.json'}: cannot be written ({error.strerror}); free the disk") from error
    return rates


def _read(path: Path, key: Key) -> AnswersFile:
    given = read_stored(AnswersFile, path, "an answers-NAME.json that the page of pairs has downloaded")
    if given.kit != key.kit:
        raise UserError(f"{path}: answers of another kit ({given.kit}); this folder holds kit {key.kit}")
    unknown = set(given.answers) - {pair.id for pair in key.pairs}
    if unknown:
        raise UserError(f"{path}: kit {key.kit} has no pair {sorted(unknown)[0]!r}; give the file as it was downloaded")
    return given


def _count(given: AnswersFile) -> int:
    return sum(getattr(answer, question) is not None for answer in given.answers.values() for question in QUESTIONS)


def _votes(key: Key, given: Sequence[AnswersFile]) -> pandas.DataFrame:
    """One row a rater, pair and question, those without an answer too (`choice` None)."""
    names = [one.rater or f"rater {one.session[:6]}" for one in given]
    names = [
        name if names.count(name) == 1 else f"{name} ({one.session[:6]})"
        for name, one in zip(names, given, strict=True)
    ]
    rows = [
        (name, pair.id, question, getattr(one.answers.get(pair.id, Given()), question))
        for name, one in zip(names, given, strict=True)
        for pair in key.pairs
        for question in QUESTIONS
    ]
    return pandas.DataFrame(rows, columns=["rater", "pair", "question", "choice"])
