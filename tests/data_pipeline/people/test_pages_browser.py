"""Both pages in a real browser, light and dark, on desk and phone: they fit, complain of nothing, ask for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from data_pipeline.people.gallery import write_gallery
from data_pipeline.people.statistics_page import write_statistics
from data_pipeline.record import Entity
from data_pipeline.shards.masks import encode_mask
from data_pipeline.shards.writer import write_shard
from data_pipeline.toybox.world import ToyboxWorld
from tests.browser import open_browser
from tests.data_pipeline.people.built_folder import FACTS, build_counted, build_hostile, sample

pytestmark = pytest.mark.browser
SIZES = {"desk": (1280, 800), "phone": (390, 844)}

# Labels whose text leaves its own field, whose field leaves the picture, or whose field covers another one.
BAD_LABELS = """() => [...document.querySelectorAll(".picture svg")].flatMap((svg) => {
    const frame = svg.getBoundingClientRect(), labels = [...svg.querySelectorAll("rect.label")];
    const fields = labels.map((label) => label.getBoundingClientRect());
    const across = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1;
    const inside = (a, b) => across(a, b) && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
    const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    return labels.map((label) => label.nextElementSibling).filter((text, i) =>
        !inside(fields[i], frame) || !across(text.getBoundingClientRect(), fields[i])
            || fields.some((other, j) => i < j && touch(fields[i], other))
    ).map((text) => text.textContent);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def build_scenes(folder: Path) -> None:
    """Toybox scenes with their true boxes and masks."""
    world = ToyboxWorld("val", size=128, min_subjects=2, max_subjects=8)
    kept = []
    for i in range(6):
        scene = world.scene(i)
        entities = [
            Entity(n, e.noun, e.noun, e.span, e.box_xyxy_px, 0.5, encode_mask(e.mask), int(e.mask.sum()))
            for n, e in enumerate(scene.entities)
        ]
        made = sample(f"s{i}", (128, 128), scene.caption, entities, "https://example.org/" + "long/" * 40)
        jpeg = cv2.imencode(".jpg", np.ascontiguousarray(scene.image[..., ::-1]))[1].tobytes()
        kept.append(type(made)(made.record, jpeg))
    write_shard(folder, "00000", kept, FACTS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, build in {"counted": build_counted, "hostile": build_hostile, "scenes": build_scenes}.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder)
        found[f"{name} statistics"], found[f"{name} gallery"] = write_statistics(folder), write_gallery(folder)
    return found


def open_page(browser: Browser, path: str, size: str = "desk", scheme: str = "light") -> tuple[Page, list[str]]:
    """The page, and a list that fills with whatever it complains about or asks of a network."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    complaints = list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
    page.on("request", lambda one: complaints.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
    page.goto(Path(path).as_uri())
    return page, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_the_screen_follow_its_colours_and_complain_of_nothing(
    browser: Browser, pages: dict[str, str], size: str, scheme: str
) -> None:
    for name, path in pages.items():
        page, complaints = open_page(browser, path, size, scheme)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= SIZES[size][0], name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in ground[4:-1].split(",")) / 3
        assert light > 200 if scheme == "light" else light < 60
        assert not complaints, name
        page.close()


def test_no_label_leaves_its_picture_or_covers_another(browser: Browser, pages: dict[str, str]) -> None:
    for size in SIZES:
        page, _ = open_page(browser, pages["scenes gallery"], size)
        assert page.locator("rect.label").count() >= 12
        assert page.evaluate(BAD_LABELS) == []
        page.close()


@pytest.mark.parametrize(
    ("toggle", "drawn"), [("boxes", ".box.e0"), ("masks", ".mask.e0"), ("labels", "rect.label.e0")]
)
def test_a_toggle_hides_its_kind_alone_and_shows_it_again(
    browser: Browser, pages: dict[str, str], toggle: str, drawn: str
) -> None:
    page, _ = open_page(browser, pages["counted gallery"])
    kinds = [".box.e0", ".mask.e0", "rect.label.e0"]

    def shown() -> set[str]:
        return {kind for kind in kinds if page.locator(f".picture {kind}").first.is_visible()}

    assert shown() == set(kinds)
    page.get_by_label(toggle, exact=True).uncheck()
    assert shown() == set(kinds) - {drawn}
    page.get_by_label(toggle, exact=True).check()
    assert shown() == set(kinds)
    page.close()


def test_a_mask_lies_where_its_thing_is(browser: Browser, pages: dict[str, str]) -> None:
    page, _ = open_page(browser, pages["counted gallery"])
    frame, mask = (page.locator(f".card:first-child {part}").first.bounding_box() for part in ("svg", ".mask.e0"))
    assert frame and mask
    # The upper 20 of 50 rows, the left 50 of 100 columns; an outline of a pixel is drawn around.
    assert mask["width"] / frame["width"] == pytest.approx(0.5, abs=0.02)
    assert mask["height"] / frame["height"] == pytest.approx(0.4, abs=0.02)
    assert mask["x"] == pytest.approx(frame["x"], abs=2) and mask["y"] == pytest.approx(frame["y"], abs=2)
    page.close()
