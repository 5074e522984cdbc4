"""What raters' votes say: who wins against whom and how surely, and whether raters agree with themselves and others.

A tie is half a win. Intervals are of 95 %: with several raters a bootstrap over raters and cases (by subject), both
resampled independently (Owen, "The pigeonhole bootstrap", 2007); with one rater, or where the bootstrap has nothing to
vary, Wilson's interval over the cases. Agreement between raters: Fleiss' kappa over A / tie / B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pandas
from numpy.typing import NDArray

from infer.evaluate.human.pairs import Key

QUESTIONS = {"subject": "same subject", "text": "fits the text"}
CHOICES = ("A", "tie", "B")
DRAWS = 2000
Z95 = 1.959964
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """How often a method was preferred; None where nobody answered."""

    question: str
    method: str
    other: str  # "": mean over all others, each with the same weight
    wins: int
    ties: int
    losses: int
    rate: float | None
    low: float | None
    high: float | None
    interval: str  # bootstrap | Wilson | ""


@dataclass(frozen=True)
class Agreement:
    """How far the answers to a question can be trusted."""

    question: str
    self_agreement: float | None  # share of repeated pairs that got the same answer again
    repeats: int  # such pairs, over all raters
    kappa: float | None  # Fleiss; None with one rater or where all answers are one choice
    judged: int  # pairs with at least two raters' answers


@dataclass(frozen=True)
class Rater:
    """One session of one person."""

    name: str
    answered: int  # questions
    unanswered: int


@dataclass(frozen=True)
class WinRates:
    """All that the raters of a kit have said."""

    kit: str
    name: str  # of the evaluation
    shown: int  # pairs on the page
    repeated: int  # of them
    raters: tuple[Rater, ...]
    pairs: tuple[Rate, ...]  # every two methods, once
    methods: tuple[Rate, ...]
    agreement: tuple[Agreement, ...]

    def as_json(self) -> str:
        """Content of `human.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def win_rates(key: Key, votes: pandas.DataFrame) -> WinRates:
    """Count the votes of a kit.

    Args:
        votes: rater, pair (id), question, choice (A, tie, B or None), one row for each that could have been given. Of
            a repeated pair the first answer counts.
    """
    told = votes[votes["choice"].notna()]
    by_question = {question: told[told["question"] == question] for question in QUESTIONS}
    rates = {question: _rates(key, answers, question) for question, answers in by_question.items()}
    return WinRates(
        kit=key.kit,
        name=key.name,
        shown=len(key.pairs),
        repeated=sum(pair.repeats is not None for pair in key.pairs),
        raters=tuple(
            Rater(str(name), int(rows["choice"].notna().sum()), int(rows["choice"].isna().sum()))
            for name, rows in votes.groupby("rater", sort=False)
        ),
        pairs=tuple(rate for meetings, _ in rates.values() for rate in meetings),
        methods=tuple(rate for _, means in rates.values() for rate in means),
        agreement=tuple(_agreement(key, answers, question) for question, answers in by_question.items()),
    )


def _rates(key: Key, told: pandas.DataFrame, question: str) -> tuple[list[Rate], list[Rate]]:
    """Of every two methods, and of each method over all others."""
    meetings = list(combinations(key.methods, 2))
    scored = _score(key, told, meetings)
    draws = _bootstrap(scored, len(meetings))  # (D, M)
    parts = [scored[scored["meeting"] == number] for number in range(len(meetings))]
    shares = np.array([part["points"].mean() for part in parts])  # (M,), NaN where nobody answered
    pairs = [
        _rate((question, *both), part, shares[[number]], draws[:, [number]])
        for number, (both, part) in enumerate(zip(meetings, parts, strict=True))
    ]
    means = []
    for method in key.methods:
        own = [number for number, both in enumerate(meetings) if method in both]
        second = np.array([meetings[number][1] == method for number in own])  # points are the first one's
        mine = pandas.concat(
            part.assign(points=1 - part["points"]) if turned else part
            for turned, part in zip(second, (parts[number] for number in own), strict=True)
        )
        share, drawn = (np.where(second, 1 - rates, rates) for rates in (shares[own], draws[:, own]))
        means.append(_rate((question, method, ""), mine, share, drawn))
    return pairs, means


def _score(key: Key, told: pandas.DataFrame, meetings: Sequence[tuple[str, str]]) -> pandas.DataFrame:
    """One row an answer: meeting (number), rater, group, pair (id), points (1, 0.5, 0) of the first of the two."""
    shown = {pair.id: pair for pair in key.pairs if pair.repeats is None}
    numbers = {frozenset(both): number for number, both in enumerate(meetings)}
    rows = []
    for vote in told[told["pair"].isin(list(shown))].itertuples():
        pair = shown[vote.pair]
        number = numbers[frozenset((pair.a, pair.b))]
        left = {"A": 1.0, "tie": 0.5, "B": 0.0}[vote.choice]
        rows.append((number, vote.rater, pair.group, pair.id, left if pair.a == meetings[number][0] else 1 - left))
    found = pandas.DataFrame(rows, columns=["meeting", "rater", "group", "pair", "points"])
    return found.astype({"meeting": int, "points": float})


def _bootstrap(scored: pandas.DataFrame, num_meetings: int) -> Floats:
    """Shares of the first methods in resampled votes, (D, M); no draws (0, M) with one rater."""
    rater, raters = pandas.factorize(scored["rater"])
    group, groups = pandas.factorize(scored["group"])
    if len(raters) < 2:
        return np.empty((0, num_meetings))
    sums = np.zeros((2, len(raters), num_meetings, len(groups)))  # points and answers
    np.add.at(sums[0], (rater, scored["meeting"], group), scored["points"])
    np.add.at(sums[1], (rater, scored["meeting"], group), 1)
    random = np.random.default_rng(0)
    times_rater = random.multinomial(len(raters), np.full(len(raters), 1 / len(raters)), DRAWS)  # (D, R)
    times_group = random.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), DRAWS)  # (D, G)
    points, answers = (np.einsum("dr,rmg,dg->dm", times_rater, part, times_group, optimize=True) for part in sums)
    return np.divide(points, answers, out=np.full_like(points, np.nan), where=answers > 0)


def _rate(names: tuple[str, str, str], scored: pandas.DataFrame, shares: Floats, draws: Floats) -> Rate:
    """Of the answers about a method: its share in each of its meetings (M,), and in resampled votes (D, M)."""
    wins, ties, losses = (int((scored["points"] == points).sum()) for points in (1, 0.5, 0))
    told = partial(Rate, *names, wins=wins, ties=ties, losses=losses)
    if scored.empty:
        return told(rate=None, low=None, high=None, interval="")
    share = float(np.nanmean(shares))
    answered = ~np.isnan(shares)
    drawn = draws[:, answered].mean(axis=1)
    drawn = drawn[~np.isnan(drawn)]  # without resamples in which two methods did not meet
    if len(drawn) and np.ptp(drawn) > 1e-9:
        low, high = np.percentile(drawn, [2.5, 97.5])
        return told(rate=share, low=float(low), high=float(high), interval="bootstrap")
    low, high = wilson(share, scored["pair"].nunique())
    return told(rate=share, low=low, high=high, interval="Wilson")


def wilson(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a share of `number` independent answers (Wilson, 1927)."""
    spread = Z95**2 / number
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def fleiss_kappa(counts: Floats) -> float | None:
    """Agreement beyond chance (Fleiss, 1971); None where all answers are of one choice.

    Args:
        counts: (N, K) how many raters gave item n the choice k; at least two raters an item, not always as many.
    """
    raters = counts.sum(axis=1)  # (N,)
    observed = np.mean(((counts**2).sum(axis=1) - raters) / (raters * (raters - 1)))
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return None if by_chance == 1 else float((observed - by_chance) / (1 - by_chance))


def _agreement(key: Key, told: pandas.DataFrame, question: str) -> Agreement:
    given = {(vote.rater, vote.pair): vote.choice for vote in told.itertuples()}
    swapped = {"A": "B", "tie": "tie", "B": "A"}
    again = [
        given[rater, pair.id] == swapped[given[rater, pair.repeats]]
        for pair in key.pairs
        for rater in dict.fromkeys(told["rater"])
        if pair.repeats is not None and {(rater, pair.id), (rater, pair.repeats)} <= given.keys()
    ]
    repeats = {pair.id for pair in key.pairs if pair.repeats is not None}
    choices = {pair.id: [0] * len(CHOICES) for pair in key.pairs if pair.id not in repeats}
    for (_, pair_id), choice in given.items():
        if pair_id in choices:
            choices[pair_id][CHOICES.index(choice)] += 1
    judged = np.array([row for row in choices.values() if sum(row) > 1], float)
    return Agreement(
        question=question,
        self_agreement=sum(again) / len(again) if again else None,
        repeats=len(again),
        kappa=fleiss_kappa(judged) if len(judged) else None,
        judged=len(judged),
    )


def as_markdown(rates: WinRates) -> str:
    """Tables for a README: each method over all others, every two methods, then how far the raters can be trusted."""
    answered = sum(rater.answered for rater in rates.raters)
    asked = answered + sum(rater.unanswered for rater in rates.raters)
    who = "1 rater" if len(rates.raters) == 1 else f"{len(rates.raters)} raters"
    kinds = {rate.interval for rate in (*rates.pairs, *rates.methods)} - {""}
    told = {
        "bootstrap": "95 % interval by bootstrap over raters and cases (by subject)",
        "Wilson": "95 % interval of Wilson over cases",
    }
    how = "; ".join(text for kind, text in told.items() if kind in kinds)
    if len(kinds) > 1:
        how += " (marked ᵂ: one rater, or all of one mind, leave a bootstrap nothing to vary)"
    mark = len(kinds) > 1
    lines = [
        f"{who}, {rates.shown} pairs ({rates.repeated} of them repeats), {answered:,} of {asked:,} questions answered. "
        f"Win rate, ties half; {how}; wins/ties/losses.",
        "",
        *_table("method, over all others", rates.methods, mark),
        "",
        *_table("method against method", rates.pairs, mark),
        "",
        "| agreement | self-agreement on repeated pairs | between raters (Fleiss' κ) |",
        "| --- | --- | --- |",
    ]
    for one in rates.agreement:
        own = "—" if one.self_agreement is None else f"{one.self_agreement:.0%} of {one.repeats}"
        between = "—" if one.kappa is None else f"{one.kappa:.2f} on {one.judged} pairs"
        lines.append(f"| {QUESTIONS[one.question]} | {own} | {between} |")
    return "\n".join(lines) + "\n"


def _table(title: str, rates: Sequence[Rate], mark: bool) -> list[str]:
    """One row a method or two, one column a question."""
    cells: dict[str, dict[str, str]] = {}
    for rate in rates:
        name = f"{rate.method} against {rate.other}" if rate.other else rate.method
        cells.setdefault(name.replace("|", "\\|"), {})[rate.question] = _cell(rate, mark)
    lines = [f"| {title} | {' | '.join(QUESTIONS.values())} |", f"| --- |{' --- |' * len(QUESTIONS)}"]
    return lines + [
        f"| {name} | {' | '.join(row[question] for question in QUESTIONS)} |" for name, row in cells.items()
    ]


def _cell(rate: Rate, mark: bool) -> str:
    if rate.rate is None or rate.low is None or rate.high is None:
        return "—"
    kind = "ᵂ" if mark and rate.interval == "Wilson" else ""
    interval = f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]{kind}"
    return f"{rate.rate:.0%} {interval} {rate.wins}/{rate.ties}/{rate.losses}"
