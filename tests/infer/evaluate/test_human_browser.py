"""The page of pairs in a real browser, from the disk: a rater's whole way, by click and by key, on desk and phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from infer.evaluate.human import read_answers, write_kit
from infer.evaluate.human.pairs import Key, Pair, read_key
from tests.browser import open_browser
from tests.infer.evaluate.judged_results import CONTENDERS, judged_results

pytestmark = pytest.mark.browser
SIZES = {"desk": (1280, 800), "tablet": (800, 1100), "phone": (390, 844)}
KEYS = {("subject", "A"): "1", ("subject", "tie"): "2", ("subject", "B"): "3"} | {
    ("text", "A"): "4",
    ("text", "tie"): "5",
    ("text", "B"): "6",
}

UNNAMED = """() => [...document.querySelectorAll("button, input, img, progress, [role=group]")].filter((one) =>
    one.checkVisibility() && !(one.innerText || one.alt || one.ariaLabel || one.labels?.length
        || one.querySelector("img")?.alt || document.getElementById(one.getAttribute("aria-labelledby"))?.innerText)
    ).map((one) => one.outerHTML)"""
SMALL = """() => [...document.querySelectorAll("button")].filter((one) =>
    one.checkVisibility() && one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"""  # for a finger, px


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of two contenders: ten pairs and two repeats."""
    folder = tmp_path_factory.mktemp("human")
    return write_kit(judged_results(folder / "run"), folder / "kit", pairs=10, methods=CONTENDERS[:2])


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    yield opened
    opened.close()


def open_page(context: BrowserContext, path: Path) -> tuple[Page, list[str]]:
    """The page, and a list that fills with whatever it complains about or asks of a network."""
    page, complaints = context.new_page(), list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, complaints


def wanted(key: Key, pair: Pair) -> dict[str, str]:
    """What the rater of this test answers: the subject is zeroshot's on four of ten pairs; the text is always a tie."""
    order = [one.case for one in key.pairs if one.repeats is None]
    liked = "zeroshot" if order.index(pair.case) < 4 else "finetuned"
    return {"subject": "A" if pair.a == liked else "B", "text": "tie"}


def answer(page: Page, given: dict[str, str], by: str) -> None:
    for question, choice in given.items():
        if by == "key":
            page.keyboard.press(KEYS[question, choice])
        else:
            page.click(f"[data-question={question}][data-choice={choice}]")
        assert pressed(page, question) == choice


def pressed(page: Page, question: str) -> str | None:
    found = page.query_selector(f"[data-question={question}][aria-pressed=true]")
    return found.get_attribute("data-choice") if found else None


def test_a_rater_answers_goes_back_reloads_downloads_and_is_understood(
    context: BrowserContext, page_path: Path, tmp_path: Path
) -> None:
    page, complaints = open_page(context, page_path)
    key = read_key(page_path.parent)
    page.fill("#rater", "Anna B.")
    page.keyboard.press("Enter")
    for number, pair in enumerate(key.pairs):
        assert page.inner_text("#rating h1") == f"Pair {number + 1} of {len(key.pairs)}"
        given, by = wanted(key, pair), ("click", "key")[number % 2]
        if number == 3:  # answered wrongly, then mended after going on
            answer(page, {"subject": "tie", "text": "A"}, "key")
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowLeft")
            assert (pressed(page, "subject"), pressed(page, "text")) == ("tie", "A")
        answer(page, given, by)
        if number == 6:
            page.reload()
            assert page.inner_text("#rating h1") == f"Pair 7 of {len(key.pairs)}"
            assert {question: pressed(page, question) for question in given} == given
        if by == "key":
            page.keyboard.press("Enter")
        else:
            page.click("[data-next]")
    assert page.inner_text("[data-summary]").startswith("All 12 pairs are answered.")
    with page.expect_download() as started:
        page.click("#end [data-download]")
    assert started.value.suggested_filename == "answers-Anna-B.json"
    started.value.save_as(tmp_path / "answers.json")
    rates = read_answers(page_path.parent, [tmp_path / "answers.json"])
    assert [(rater.name, rater.answered, rater.unanswered) for rater in rates.raters] == [("Anna B.", 24, 0)]
    subject, text = rates.pairs
    assert (subject.method, subject.wins, subject.ties, subject.losses) == ("zeroshot", 4, 0, 6)
    assert (text.wins, text.ties, text.losses) == (0, 10, 0)
    assert [one.self_agreement for one in rates.agreement] == [1, 1]
    assert not complaints


def test_what_was_skipped_is_told_and_found_again_and_can_be_saved_half_way(
    context: BrowserContext, page_path: Path, tmp_path: Path
) -> None:
    page, complaints = open_page(context, page_path)
    page.click("#begin button")
    for _ in read_key(page_path.parent).pairs:
        skipped = page.inner_text("#rating h1").startswith("Pair 5 ")
        answer(page, {"subject": "B"} if skipped else {"subject": "B", "text": "A"}, "key")
        assert page.inner_text("[data-next-label]") == ("Skip" if skipped else "Next")
        page.keyboard.press("ArrowRight")
    assert page.inner_text("[data-summary]").startswith("1 of 12 pairs are not fully answered.")
    page.click("[data-missing]")
    assert page.inner_text("#rating h1") == "Pair 5 of 12"
    with page.expect_download() as started:
        page.click("#rating [data-download]")
    started.value.save_as(tmp_path / "answers.json")
    (rater,) = read_answers(page_path.parent, [tmp_path / "answers.json"]).raters
    assert started.value.suggested_filename == f"answers-{rater.name.removeprefix('rater ')}.json"
    assert (rater.answered, rater.unanswered) == (23, 1)
    assert not complaints


def test_someone_else_starts_with_nothing_answered(context: BrowserContext, page_path: Path) -> None:
    page, _ = open_page(context, page_path)
    page.fill("#rater", "Anna")
    page.click("#begin button")
    for _ in read_key(page_path.parent).pairs:
        answer(page, {"subject": "A", "text": "B"}, "key")
        page.keyboard.press("ArrowRight")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("[data-afresh]")
    assert page.input_value("#rater") == ""
    page.click("#begin button")
    assert (pressed(page, "subject"), pressed(page, "text")) == (None, None)


def test_a_picture_opens_large_and_keys_do_not_answer_behind_it(context: BrowserContext, page_path: Path) -> None:
    page, _ = open_page(context, page_path)
    page.click("#begin button")
    page.click("[data-side=b]")
    page.keyboard.press("1")
    assert page.get_attribute("#enlarged img", "src") == page.get_attribute("[data-side=b] img", "src")
    assert pressed(page, "subject") is None
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    assert pressed(page, "subject") == "A"


@pytest.mark.parametrize("size", SIZES)
def test_everything_fits_a_screen_and_has_a_name(browser: Browser, page_path: Path, size: str) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone")
    page, complaints = open_page(context, page_path)
    screens = ["start", *(f"pair {number}" for number in range(12)), "end"]
    for screen in screens:
        sizes = page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.scrollHeight]")
        assert sizes[0] <= width and sizes[1] <= height, f"{screen} does not fit {width} x {height}: {sizes}"
        assert page.evaluate(UNNAMED) == [], screen
        assert page.evaluate(SMALL) == [], screen
        page.click("#begin button") if screen == "start" else page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.tagName") == "H1", "a screen reader starts at the heading"
    assert not complaints
    context.close()
