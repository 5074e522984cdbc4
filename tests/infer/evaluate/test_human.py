"""The human kit: blinded, balanced, repeatable; and answers read back into win rates that say how sure they are."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from infer.evaluate.human import as_markdown, read_answers, write_kit
from infer.evaluate.human.pairs import Key, Pair, read_key
from infer.evaluate.human.win_rates import Rate, WinRates, fleiss_kappa, wilson
from infer.evaluate.results import Results
from tests.infer.evaluate.judged_results import BOUNDS, CONTENDERS, NOUNS, judged_results

Prefer = Callable[[Pair, str], str | None]  # (pair, question) -> the preferred method, "tie" or None
BOTH = ("subject", "text")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return judged_results(tmp_path_factory.mktemp("run"))


@pytest.fixture
def kit(results: Results, tmp_path: Path) -> Path:
    """Folder of a kit of two contenders: ten pairs and two repeats."""
    return write_kit(results, tmp_path / "kit", pairs=10, methods=CONTENDERS[:2]).parent


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="kit">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def write_answers(folder: Path, name: str, prefer: Prefer, **changes: Any) -> Path:
    """A rater's file, who prefers as told."""
    key = read_key(folder)
    answers = {}
    for pair in key.pairs:
        sides = {pair.a: "A", pair.b: "B", "tie": "tie", None: None}
        answers[pair.id] = {question: sides[prefer(pair, question)] for question in BOTH}
    path = folder.parent / f"answers-{name}.json"
    content = {"kit": key.kit, "session": f"session of {name}", "rater": name, "answers": answers, **changes}
    path.write_text(json.dumps(content))
    return path


def only(rates: tuple[Rate, ...], question: str = "subject", method: str = CONTENDERS[0]) -> Rate:
    (found,) = (rate for rate in rates if (rate.question, rate.method) == (question, method))
    return found


def by_case(key: Key) -> dict[str, int]:
    """Number of each pair that is not a repeat."""
    return {pair.case: number for number, pair in enumerate(pair for pair in key.pairs if pair.repeats is None)}


# the page


def test_nothing_on_the_page_names_a_method_a_case_or_the_evaluation(results: Results, tmp_path: Path) -> None:
    page = write_kit(results, tmp_path, methods=[*CONTENDERS, *BOUNDS])
    pictures = [base64.b64decode(uri.partition(",")[2]) for uri in page_data(page)["pictures"]]
    told = page.read_bytes() + b"".join(pictures)
    cases = [case for case in results.table["case"] if case.encode() in told]
    assert not cases and results.name.encode() not in told
    assert not [name for name in (*CONTENDERS, *BOUNDS, "weights of") if name.encode() in told]
    assert BOUNDS[0] in (tmp_path / "key.json").read_text()


def test_the_page_needs_nothing_but_itself(kit: Path) -> None:
    links: list[tuple[str, str | None]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend((name, value) for name, value in attrs if name in ("src", "href"))

    page = (kit / "index.html").read_text()
    Reader().feed(page)
    assert links == [("href", "data:,")]
    assert not re.search(r"https?:|@import|url\(", page)
    assert sorted(path.name for path in kit.iterdir()) == ["index.html", "key.json"]


def test_a_pair_shows_its_prompt_its_references_and_two_different_pictures(kit: Path, results: Results) -> None:
    prompts = dict(zip(results.table["case"], results.table["prompt"], strict=True))
    data = page_data(kit / "index.html")
    for shown, pair in zip(data["pairs"], read_key(kit).pairs, strict=True):
        assert (shown["id"], shown["prompt"]) == (pair.id, prompts[pair.case])
        assert len(shown["references"]) == len(shown["words"]) == (2 if pair.part == "pair" else 1)
        assert len({shown["a"], shown["b"], *shown["references"]}) == 2 + len(shown["words"])


def test_every_two_methods_meet_equally_often_and_on_either_side(results: Results, tmp_path: Path) -> None:
    write_kit(results, tmp_path, pairs=31)
    pairs = [pair for pair in read_key(tmp_path).pairs if pair.repeats is None]
    assert set(Counter(frozenset((pair.a, pair.b)) for pair in pairs).values()) == {10}
    assert set(Counter((pair.a, pair.b) for pair in pairs).values()) == {5}
    assert len({pair.id for pair in pairs}) == 30


def test_no_subject_comes_a_second_time_before_all_have_come(results: Results, tmp_path: Path) -> None:
    write_kit(results, tmp_path, pairs=len(NOUNS) + 1, methods=CONTENDERS[:2])
    groups = [pair.group for pair in read_key(tmp_path).pairs if pair.repeats is None]
    assert sorted(groups) == sorted(results.references)


def test_some_pairs_come_again_much_later_with_sides_swapped(results: Results, tmp_path: Path) -> None:
    write_kit(results, tmp_path, pairs=30)
    pairs = read_key(tmp_path).pairs
    places = {pair.id: place for place, pair in enumerate(pairs)}
    repeats = [pair for pair in pairs if pair.repeats is not None]
    assert len(repeats) == 3
    for pair in repeats:
        first = pairs[places[pair.repeats or ""]]
        assert (pair.a, pair.b, pair.case) == (first.b, first.a, first.case)
        assert places[pair.id] - places[first.id] >= 10


def test_the_same_seed_gives_the_same_kit_and_another_seed_another(results: Results, tmp_path: Path) -> None:
    pages = [write_kit(results, tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    keys = [read_key(page.parent) for page in pages]
    assert keys[0] == keys[1] and keys[0].kit != keys[2].kit
    assert [pair.case for pair in keys[0].pairs] != [pair.case for pair in keys[2].pairs]


def test_bounds_come_when_named_or_where_a_contender_would_be_alone(results: Results, tmp_path: Path) -> None:
    write_kit(results, tmp_path / "plain")
    assert read_key(tmp_path / "plain").methods == CONTENDERS
    write_kit(results, tmp_path / "named", methods=["zeroshot", "realbound"])
    assert read_key(tmp_path / "named").methods == ("zeroshot", "realbound")
    write_kit(judged_results(tmp_path / "run", ("zeroshot",)), tmp_path / "alone")
    assert read_key(tmp_path / "alone").methods == ("zeroshot", *BOUNDS)


def test_values_of_sweeps_are_judged_only_when_named(results: Results, tmp_path: Path) -> None:
    swept = replace(results.methods[1], sweep=("guidance", "scale", 2.0))
    run = replace(results, methods=(results.methods[0], swept, *results.methods[2:]))
    write_kit(run, tmp_path / "plain")
    assert read_key(tmp_path / "plain").methods == ("zeroshot", "textonly")
    write_kit(run, tmp_path / "named", methods=["zeroshot", "finetuned"])
    assert read_key(tmp_path / "named").methods == ("zeroshot", "finetuned")


def test_what_cannot_be_compared_is_one_line(results: Results, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no method 'zerosho'; did you mean 'zeroshot'?"):
        write_kit(results, tmp_path, methods=["zerosho"])
    with pytest.raises(UserError, match="only zeroshot has pictures; a comparison needs two methods"):
        write_kit(results, tmp_path, methods=["zeroshot", "zeroshot"])
    with pytest.raises(UserError, match="2 pairs are too few, 3 methods meet in 3 ways; give at least 3"):
        write_kit(results, tmp_path, pairs=2)
    apart = results.table[(results.table["method"] != "zeroshot") | (results.table["group"] == "cat-id")]
    apart = apart[(apart["method"] != "textonly") | (apart["group"] == "dog-id")]
    with pytest.raises(UserError, match="'zeroshot' and 'textonly' have answered no case in common"):
        write_kit(replace(results, table=apart), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = judged_results(tmp_path / "run")
    for path in (tmp_path / "run" / "pictures" / "textonly").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"textonly/.*\.png: a picture that cannot be read"):
        write_kit(run, tmp_path / "kit")


def test_a_kit_is_written_again_but_never_over_another(results: Results, kit: Path) -> None:
    before = read_key(kit)
    write_kit(results, kit, pairs=10, methods=CONTENDERS[:2])
    with pytest.raises(UserError, match=f"holds another kit \\({before.kit}\\).* move or remove the folder"):
        write_kit(results, kit, pairs=8, methods=CONTENDERS[:2])
    assert read_key(kit) == before


# the answers


def test_wins_ties_and_losses_are_those_that_were_given(kit: Path) -> None:
    place = by_case(read_key(kit))

    def prefer(pair: Pair, question: str) -> str:
        if question == "text":
            return "finetuned"
        return "zeroshot" if place[pair.case] < 6 else "tie" if place[pair.case] < 9 else "finetuned"

    rates = read_answers(kit, [write_answers(kit, "anna", prefer)])
    subject = only(rates.pairs)
    assert (subject.other, subject.wins, subject.ties, subject.losses) == ("finetuned", 6, 3, 1)
    assert subject.rate == pytest.approx(0.75)
    assert subject.interval == "Wilson"
    assert (subject.low, subject.high) == pytest.approx(wilson(0.75, 10))
    assert only(rates.methods, method="finetuned").rate == pytest.approx(0.25)
    text = only(rates.pairs, "text")
    assert (text.wins, text.ties, text.losses, text.rate) == (0, 0, 10, 0)
    assert [agreement.self_agreement for agreement in rates.agreement] == [1, 1]
    assert json.loads((kit / "human.json").read_text())["pairs"][0]["wins"] == 6


def test_a_method_stands_at_the_mean_over_its_opponents(results: Results, tmp_path: Path) -> None:
    write_kit(results, tmp_path / "kit", pairs=30)

    def prefer(pair: Pair, question: str) -> str:
        both = {pair.a, pair.b}
        return "zeroshot" if "zeroshot" in both else "tie"

    rates = read_answers(tmp_path / "kit", [write_answers(tmp_path / "kit", "anna", prefer)])
    found = {rate.method: (rate.rate, rate.wins, rate.ties, rate.losses) for rate in rates.methods[:3]}
    assert found == {"zeroshot": (1, 20, 0, 0), "finetuned": (0.25, 0, 10, 10), "textonly": (0.25, 0, 10, 10)}


def test_the_interval_of_several_raters_knows_how_much_they_differ(kit: Path) -> None:
    files = [write_answers(kit, name, lambda pair, question, name=name: name) for name in CONTENDERS[:2]]
    rates = read_answers(kit, files)
    rate = only(rates.pairs)
    assert (rate.rate, rate.low, rate.high, rate.interval) == (0.5, 0, 1, "bootstrap")
    agreement = rates.agreement[0]
    assert (agreement.kappa, agreement.judged) == (pytest.approx(-1), 10)
    assert (agreement.self_agreement, agreement.repeats) == (1, 4)


def test_the_interval_of_several_raters_knows_how_much_subjects_differ(kit: Path) -> None:
    def prefer(pair: Pair, question: str) -> str:
        return "zeroshot" if pair.group in ("cat-id", "dog-id", "cat-id+dog-id") else "finetuned"

    rates = read_answers(kit, [write_answers(kit, name, prefer) for name in ("anna", "bo", "cem")])
    rate = only(rates.pairs)
    assert rate.interval == "bootstrap" and rate.rate is not None and rate.low is not None and rate.high is not None
    # Six subjects that are all won or all lost: less is known than from ten or thirty answers of their own.
    low, high = wilson(rate.rate, 10)
    assert rate.low < low and rate.high > high
    assert rates.agreement[0].kappa == pytest.approx(1)


def test_raters_of_one_mind_get_wilsons_interval_over_cases_not_over_answers(kit: Path) -> None:
    files = [write_answers(kit, name, lambda pair, question: "zeroshot") for name in ("anna", "bo")]
    rates = read_answers(kit, files)
    rate = only(rates.pairs)
    assert (rate.wins, rate.rate, rate.interval) == (20, 1, "Wilson")
    assert (rate.low, rate.high) == pytest.approx(wilson(1, 10))


def test_self_agreement_is_the_share_of_repeats_answered_alike(kit: Path) -> None:
    key = read_key(kit)
    changed = next(pair.id for pair in key.pairs if pair.repeats is not None)

    def prefer(pair: Pair, question: str) -> str:
        return "finetuned" if pair.id == changed and question == "text" else "zeroshot"

    rates = read_answers(kit, [write_answers(kit, "anna", prefer)])
    assert [(one.question, one.self_agreement, one.repeats) for one in rates.agreement] == [
        ("subject", 1, 2),
        ("text", 0.5, 2),
    ]
    assert only(rates.pairs, "text").wins == 10, "of a repeated pair only the first answer counts"


def test_wilson_and_fleiss_give_the_published_values() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    # Fourteen raters, ten items, five choices: the worked example of Wikipedia's "Fleiss' kappa".
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(np.array(counts, float)) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[2.0, 0.0], [3.0, 0.0]])) is None


def test_what_a_rater_left_open_is_counted_and_nothing_else(kit: Path) -> None:
    place = by_case(read_key(kit))

    def prefer(pair: Pair, question: str) -> str | None:
        return "zeroshot" if question == "subject" and pair.repeats is None and place[pair.case] < 4 else None

    rates = read_answers(kit, [write_answers(kit, "anna", prefer)])
    (rater,) = rates.raters
    assert (rater.name, rater.answered, rater.unanswered) == ("anna", 4, 20)
    assert only(rates.pairs).wins == 4
    text = only(rates.pairs, "text")
    assert (text.rate, text.low, text.interval) == (None, None, "")
    assert rates.agreement[0].self_agreement is None
    assert "| zeroshot | 100% [51, 100] 4/0/0 | — |" in as_markdown(rates)


def test_of_several_files_of_one_session_the_fullest_counts(kit: Path) -> None:
    halfway = write_answers(kit, "half", lambda pair, question: "tie" if question == "text" else None, session="x")
    whole = write_answers(kit, "whole", lambda pair, question: "zeroshot", session="x")
    for files in ([halfway, whole], [whole, halfway], [whole, whole]):
        rates = read_answers(kit, files)
        assert [rater.name for rater in rates.raters] == ["whole"]
        assert only(rates.pairs, "text").wins == 10


def test_raters_of_one_name_or_none_are_told_apart(kit: Path) -> None:
    names = [("anna", "s1"), ("anna", "s2"), ("", "s3")]
    files = [
        write_answers(kit, session, lambda pair, question: "tie", rater=rater, session=session)
        for rater, session in names
    ]
    rates = read_answers(kit, files)
    assert [rater.name for rater in rates.raters] == ["anna (s1)", "anna (s2)", "rater s3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kit": "0123456789ab"}, r"answers of another kit \(0123456789ab\); this folder holds kit"),
        ({"answers": {"zzz": {"text": "A"}}}, "has no pair 'zzz'; give the file as it was downloaded"),
        ({"answers": {"zzz": {"text": "C"}}}, r"answers.zzz.text: .*'A', 'tie' or 'B'"),
        ({"answers": {"zzz": {"colour": "A"}}}, "answers.zzz.colour: Extra inputs"),
        ({"answers": []}, "answers: .*expected an answers-NAME.json that the page of pairs has downloaded"),
        ({"answers": {}}, "no answers; give files that raters have downloaded"),
    ],
)
def test_a_file_that_does_not_belong_here_is_one_line(kit: Path, change: dict[str, Any], message: str) -> None:
    path = write_answers(kit, "anna", lambda pair, question: "tie", **change)
    with pytest.raises(UserError, match=r"answers-anna\.json.*" + message) as error:
        read_answers(kit, [path])
    assert "\n" not in str(error.value)
    assert not (kit / "human.json").exists()


def test_a_file_that_is_no_json_or_not_there_is_one_line(kit: Path) -> None:
    path = write_answers(kit, "anna", lambda pair, question: "tie")
    for content in (path.read_bytes()[:100], b"", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"answers-anna\.json: .*expected an answers-NAME\.json"):
            read_answers(kit, [path])
    with pytest.raises(UserError, match=r"bo\.json: cannot be read \(No such file"):
        read_answers(kit, [kit / "bo.json"])
    with pytest.raises(UserError, match=r"key\.json: cannot be read .* the key that evaluate --human writes"):
        read_answers(kit.parent, [path])


def test_the_table_tells_rates_intervals_counts_and_how_far_to_trust_them(kit: Path) -> None:
    rates = WinRates(
        kit=(key := read_key(kit)).kit,
        name=key.name,
        shown=12,
        repeated=2,
        raters=read_answers(kit, [write_answers(kit, "anna", lambda pair, question: "tie")]).raters,
        pairs=(
            Rate("subject", "a|b", "c", 6, 3, 1, 0.75, 0.451, 0.914, "bootstrap"),
            Rate("text", "a|b", "c", 10, 0, 0, 1.0, 0.7225, 1.0, "Wilson"),
        ),
        methods=(),
        agreement=(),
    )
    told = as_markdown(rates)
    assert told.startswith("1 rater, 12 pairs (2 of them repeats), 24 of 24 questions answered. Win rate, ties half;")
    assert "| a\\|b against c | 75% [45, 91] 6/3/1 | 100% [72, 100]ᵂ 10/0/0 |" in told
    assert "bootstrap over raters and cases" in told and "Wilson" in told
