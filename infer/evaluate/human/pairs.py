"""Which two pictures a rater compares, and the key that says whose they are.

Every two methods meet equally often, each as often on the left as on the right, on as many subjects as there are; some
pairs come again with sides swapped, to see whether a rater agrees with himself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, zip_longest
from pathlib import Path
from random import Random
from typing import TypeVar

import pandas
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import UserError


class Stored(BaseModel):
    """Base of what is stored as JSON: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pair(Stored):
    """Two methods' answers to one case."""

    id: str  # opaque: all that the page and the answers say of a pair
    a: str  # method on the left
    b: str  # method on the right
    part: str
    group: str
    case: str
    repeats: str | None = None  # id of the earlier pair that this one shows again, sides swapped


class Key(Stored):
    """`key.json`: what a kit's opaque ids stand for. Raters must not see it."""

    kit: str  # fingerprint of the pairs and of their pictures
    name: str  # of the evaluation
    methods: tuple[str, ...]
    pairs: tuple[Pair, ...]  # in the order of the page


StoredType = TypeVar("StoredType", bound=Stored)


def read_stored(cls: type[StoredType], path: Path, expected: str) -> StoredType:
    """A JSON file as an object of `cls`.

    Args:
        expected: what the file should be and where it comes from, for the message.
    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        return cls.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        found = " ".join(first["msg"].split())[:160]
        raise UserError(f"{path}: {where + ': ' if where else ''}{found}; expected {expected}") from error


def read_key(folder: Path) -> Key:
    """The key of the kit in a folder."""
    return read_stored(Key, folder / "key.json", "the key that evaluate --human writes beside index.html")


@dataclass(frozen=True, order=True)
class _Asked:
    part: str
    group: str
    case: str


def choose_pairs(table: pandas.DataFrame, methods: Sequence[str], count: int, random: Random) -> tuple[Pair, ...]:
    """Up to `count` different pairs in random order, and a tenth as many repeated ones among the last third.

    Args:
        table: of `Results`; only cases with subjects count.
        methods: at least two.
        count: rounded down to what every two methods can meet equally often.
    Raises:
        UserError: too few pairs are asked for, or two methods share no case.
    """
    meetings = list(combinations(methods, 2))
    if count < len(meetings):
        raise UserError(
            f"human kit: {count} pairs are too few, {len(methods)} methods meet in {len(meetings)} ways; "
            f"give at least {len(meetings)} or name fewer methods"
        )
    answered = {
        name: {_Asked(*row) for row in rows[["part", "group", "case"]].itertuples(index=False)}
        for name, rows in table[table["part"] != "class"].groupby("method")
    }
    shared = {}
    for first, second in meetings:
        both = sorted(answered.get(first, set()) & answered.get(second, set()))
        if not both:
            raise UserError(
                f"human kit: {first!r} and {second!r} have answered no case in common; draw both, or name others"
            )
        shared[first, second] = both
    each = min(count // len(meetings), *(len(both) for both in shared.values()))
    chosen = []
    for (first, second), both in shared.items():
        for asked, swap in zip(_spread(both, random), _half(each, random), strict=False):
            a, b = (second, first) if swap else (first, second)
            chosen.append(Pair(id="", a=a, b=b, part=asked.part, group=asked.group, case=asked.case))
    random.shuffle(chosen)
    ids = iter(random.sample(range(16**6), 2 * len(chosen)))
    chosen = [pair.model_copy(update={"id": f"{next(ids):06x}"}) for pair in chosen]
    # From the first third into the last one: nobody remembers a picture for so long.
    third = len(chosen) // 3
    again = random.sample(chosen[:third], min(third, max(2, round(len(chosen) / 10))))
    repeats = [
        pair.model_copy(update={"id": f"{next(ids):06x}", "a": pair.b, "b": pair.a, "repeats": pair.id})
        for pair in again
    ]
    late = chosen[len(chosen) - third :] + repeats
    random.shuffle(late)
    return (*chosen[: len(chosen) - third], *late)


def _half(number: int, random: Random) -> list[bool]:
    """As many True as False, in random order; of an odd number, chance says which there is one more of."""
    first = random.randint(0, 1)
    return random.sample([index % 2 == first for index in range(number)], number)


def _spread(cases: Sequence[_Asked], random: Random) -> list[_Asked]:
    """All cases in random order, one of each group before the second of any."""
    groups: dict[tuple[str, str], list[_Asked]] = {}
    for asked in random.sample(cases, len(cases)):
        groups.setdefault((asked.part, asked.group), []).append(asked)
    return [asked for asked in chain.from_iterable(zip_longest(*groups.values())) if asked is not None]
