"""The report: numbers that can be checked by hand, holes that are marked, pages that need nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from data_pipeline.errors import UserError
from infer.evaluate.report import write_report
from infer.evaluate.report.plots import by_kind, trade_off
from infer.evaluate.report.sheets import AT_LEAST, BUDGET, Album, extremes, sheets
from infer.evaluate.report.tables import looks, part_tables
from infer.evaluate.results import Results
from tests.browser import open_browser
from tests.infer.evaluate.tiny_results import BOUNDS, COLUMNS, CONTENDERS, HOLE, build_results

VOID = {"meta", "link", "img", "br", "input", "circle", "rect", "line", "polygon", "polyline"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return build_results(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(results: Results) -> dict[str, Path]:
    return {path.name: path for path in write_report(results)}


@pytest.fixture(scope="module")
def page(files: dict[str, Path]) -> str:
    return files["report.html"].read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that every element is closed, and collects what the page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids = Counter[str]()
        self.said: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for key in ("src", "href", "xlink:href") if (value := values.get(key))]
        self.ids.update([value] if (value := values.get("id")) else [])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.said.append(data.strip())


def rows_of(markdown: str, heading: str) -> dict[str, list[str]]:
    """Cells of a table by its first cell."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def tiny(results: Results, numbers: dict[str, dict[str, list[float]]], folder: Path) -> Results:
    """Results whose DINO scores are given by hand: method: group: pictures."""
    rows = [
        {"method": method, "group": group, "case": f"{group}--{i}", "dino": value, "clip_t": value, "copy": value / 2}
        for method, groups in numbers.items()
        for group, values in groups.items()
        for i, value in enumerate(values)
    ]
    same = {
        "part": "single",
        "prompt": "a thing",
        "words": "thing",
        "kind": "new scene",
        "seed": 0,
        "picture": "gone.png",
    }
    table = pandas.DataFrame(rows).assign(**same, seconds=0.5, memory_bytes=2_000_000, diversity=float("nan"))
    methods = tuple(method for method in results.methods if method.name in numbers)
    return replace(results, table=table, methods=methods, holes=(), references={}, class_drift={}, folder=folder)


def test_the_numbers_of_the_markdown_table_are_means_of_subjects(results: Results, tmp_path: Path) -> None:
    by_hand = {
        "ours": {"cat": [0.5, 0.7], "dog": [0.2, 0.2, 0.2, 0.2]},  # (0.6 + 0.2) / 2, not the mean of six pictures
        CONTENDERS[1]: {"cat": [0.1, 0.3], "dog": [0.2, 0.2, 0.2, 0.2]},
        "plain base": {"cat": [0.1, 0.1], "dog": [0.9, 0.9, 0.9, 0.9]},
    }
    write_report(tiny(results, by_hand, tmp_path))
    found = rows_of((tmp_path / "report.md").read_text(), "One subject")
    # With two subjects the interval reaches from the one to the other, and ± is half of it.
    assert found[""][:3] == ["DINO ↑", "copy index ↓", "CLIP-T ↑"]
    assert found["ours"] == [
        "**0.400 ± 0.200**", "0.200 ± 0.100", "**0.400 ± 0.200**", "0.5 s", "2 MB", "4", "0.25 s", "3 MB", "9 kB"
    ]  # fmt: skip
    assert found["ours, no boxes \\<b>"][:3] == ["0.200 ± 0.000", "**0.100 ± 0.000**", "0.200 ± 0.000"]
    assert found["*plain base* (bound)"][0] == "0.500 ± 0.400"  # the highest, but no contender


def test_all_files_are_written_beside_the_pictures(results: Results, files: dict[str, Path]) -> None:
    assert set(files) == {"report.html", "report.md", "images.html", "scores.parquet"}
    assert all(path.parent == results.folder for path in files.values())
    pandas.testing.assert_frame_equal(pandas.read_parquet(files["scores.parquet"]), results.table)


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(page: str) -> None:
    reader = Reader(page)
    outside = [link for link in reader.links if not link.startswith(("data:image/webp", "#"))]
    assert set(outside) == {"images.html"}
    assert "<script" not in page and "url(" not in page and "@import" not in page
    inside = {link[1:] for link in reader.links if link.startswith("#")}
    assert inside <= set(reader.ids) and max(reader.ids.values()) == 1
    assert len(page) < 8e6


def test_every_method_and_every_text_is_shown_and_escaped(page: str, results: Results) -> None:
    said = " ".join(Reader(page).said)
    for text in (*CONTENDERS, *BOUNDS, "Tiny & small", "a <small> one", "& <bright>", *(c.backbone for c in COLUMNS)):
        assert text in said
    assert "<b>," not in page and "<bright>" not in page and "<small>" not in page


def test_every_section_is_in_the_contents(page: str) -> None:
    sections = re.findall(r'<section id="([\w-]+)">', page)
    assert sections == re.findall(r'<a href="#([\w-]+)">', page.split("<nav")[1].split("</nav>")[0])
    assert {"scores", "pictures", "trade-off", "time", "kinds", "differences", "sweeps", "cases", "drift"} < set(
        sections
    )


def test_a_hole_is_marked_in_the_table_in_the_pictures_and_listed(page: str, results: Results) -> None:
    assert any(hole.startswith(HOLE.split(" GROUP")[0]) for hole in results.holes)
    said = Reader(page).said
    assert "20 of 24 pictures" in said  # in its row
    assert said.count("hole") == 1  # in the row of that subject
    assert "metric toybox: there are no judges" in said
    assert "1 left out" in said  # of the differences


def test_a_method_of_which_nothing_was_drawn_keeps_its_row(results: Results, tmp_path: Path) -> None:
    lost = results.table[results.table["method"] != CONTENDERS[1]]
    write_report(replace(results, table=lost, folder=tmp_path))
    row = rows_of((tmp_path / "report.md").read_text(), "One subject")["ours, no boxes \\<b> (hole: nothing was drawn)"]
    assert set(row) == {"—"}
    assert "hole: nothing was drawn" in Reader((tmp_path / "report.html").read_text()).said


def test_many_holes_are_counted_and_folded_away(results: Results, tmp_path: Path) -> None:
    write_report(replace(results, holes=tuple(f"ours, subject {i}: lost" for i in range(25)), folder=tmp_path))
    said = Reader((tmp_path / "report.html").read_text()).said
    assert "15 more" in said and "ours, subject 24: lost" in said
    assert "- 15 more, listed in report.html" in (tmp_path / "report.md").read_text()


def test_a_bound_without_an_answer_to_pairs_says_so(page: str, files: dict[str, Path]) -> None:
    assert "has no answer here" in Reader(page).said
    assert "*real render* (bound) (has no answer here)" in rows_of(files["report.md"].read_text(), "Two subjects")


def test_a_run_in_which_nothing_was_drawn_still_has_a_report(results: Results, tmp_path: Path) -> None:
    nothing = pandas.DataFrame([]).reindex(columns=results.table.columns)
    empty = replace(results, table=nothing, folder=tmp_path, class_drift={}, holes=("ours: no weights",))
    write_report(empty)
    said = Reader((tmp_path / "report.html").read_text()).said
    assert "ours: no weights" in said and "hole: nothing was drawn" in said and "nothing was drawn" in said


def test_without_a_metric_for_one_axis_the_page_does_without_that_plot(results: Results, tmp_path: Path) -> None:
    write_report(replace(results, columns=tuple(c for c in COLUMNS if c.role != "prompt"), folder=tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert 'id="trade-off"' not in page and 'id="time"' in page
    write_report(replace(results, columns=(), folder=tmp_path))
    assert 'id="time"' not in (tmp_path / "report.html").read_text()


def test_a_metric_that_no_picture_has_is_named(results: Results, page: str) -> None:
    singles, pairs = part_tables(results)
    assert not singles.unmeasured and [column.name for column in pairs.unmeasured] == ["diversity"]
    assert "Without a number here: diversity." in page


def test_a_method_has_one_colour_in_all_plots_and_bounds_are_grey(results: Results) -> None:
    assert [look.colour for look in looks(results).values()] == ["c0", "c1", "cb", "cb", "cb"]
    assert len({look.shape for look in looks(results).values() if look.colour == "cb"}) == 3


def test_best_and_worst_are_chosen_by_the_subject_score_one_a_subject(results: Results) -> None:
    table = part_tables(results)[0]
    ours = extremes(results, table, Album(results.folder, 64))[0]
    scores = table.contenders[0].table
    assert ours.best[0].tiles[0].text == f"{scores['dino'].max():.3f}"
    assert ours.worst[0].tiles[0].text == f"{scores['dino'].min():.3f}"
    assert len({strip.subject for strip in ours.best}) == len(ours.best) == 3


def test_sheets_show_the_same_case_of_every_method_in_the_order_of_the_protocol(results: Results) -> None:
    singles, pairs = sheets(results, part_tables(results), Album(results.folder, 64))
    assert [strip.subject for strip in singles.first] == list(dict.fromkeys(results.table["words"]))[:6]
    assert [strip.seed for strip in singles.first] == [0, 1, 2, 3, 0, 1]  # case number n of subject number n
    assert [len(strip.references) for strip in pairs.first] == [2, 2, 2]
    assert all(len(strip.tiles) == 5 for strip in singles.first)


def test_large_pictures_leave_fewer_rows_but_never_too_few(results: Results) -> None:
    numbers = {"ours": {f"{i:02d}": [0.5] for i in range(30)}}
    many = tiny(results, numbers, results.folder)
    assert len(sheets(many, part_tables(many), Album(results.folder, 64))[0].more) == 20
    full = Album(results.folder, 64)
    full.used = BUDGET + 1
    (sheet,) = sheets(many, part_tables(many), full)
    assert len(sheet.first) + len(sheet.more) == AT_LEAST


def test_a_picture_that_is_gone_is_marked(results: Results, tmp_path: Path) -> None:
    write_report(tiny(results, {"ours": {"cat": [0.5, 0.7]}}, tmp_path))
    assert "unreadable" in Reader((tmp_path / "report.html").read_text()).said


def test_many_methods_are_numbered_in_plots_and_named_below(results: Results) -> None:
    names = [f"method {i}" for i in range(10)]
    methods = tuple(replace(results.methods[0], name=name) for name in names)
    rows = [results.table[results.table["method"] == "ours"].assign(method=name) for name in names]
    crowded = replace(results, methods=methods, table=pandas.concat(rows))
    table = part_tables(crowded)[0]
    (figure, *_) = trade_off(table)
    assert [(number, row.name) for number, row in figure.key] == list(enumerate(names, 1))
    assert "method 3</text>" not in figure.svg
    assert by_kind(table, COLUMNS[0]).key == figure.key
    assert not trade_off(part_tables(results)[0])[0].key


def test_a_folder_that_cannot_be_written_is_one_line(results: Results, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(replace(results, folder=tmp_path))


@pytest.mark.browser
def test_both_pages_fit_a_desktop_and_a_phone_without_errors(files: dict[str, Path]) -> None:
    with open_browser() as browser:
        for name, width in ((name, width) for name in ("report.html", "images.html") for width in (1280, 390)):
            page = browser.new_page(viewport={"width": width, "height": 844})
            complaints: list[str] = []
            page.on("console", lambda message, told=complaints: told.append(message.text))
            page.on("pageerror", lambda error, told=complaints: told.append(str(error)))
            asked: list[str] = []
            page.on("request", lambda request, told=asked: told.append(request.url))
            page.goto(files[name].as_uri())
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), f"{name} scrolls at {width}"
            assert not complaints and not [url for url in asked if url.startswith("http")]
            page.close()


@pytest.mark.browser
def test_pictures_of_the_report_show_and_labels_do_not_cover_each_other(files: dict[str, Path]) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(files["report.html"].as_uri())
        page.wait_for_function("[...document.images].every((image) => image.naturalWidth > 0)")
        overlaps = page.evaluate(
            """() => [...document.querySelectorAll("#trade-off svg, #time svg")].flatMap((svg) => {
              const texts = [...svg.querySelectorAll("text")];
              const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
              return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
                p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
                .map(([b]) => `${a} and ${b}`));
            })"""
        )
        sizes = page.evaluate(
            """() => [...document.querySelectorAll(".figures svg")].map((svg) =>
              parseFloat(getComputedStyle(svg.querySelector("text")).fontSize)
              * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
        )
        assert not overlaps
        assert min(sizes) > 10


@pytest.mark.browser
def test_all_pictures_can_be_filtered_sorted_and_shared(files: dict[str, Path], results: Results) -> None:
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(files["images.html"].as_uri())
        assert page.locator("#count").inner_text() == f"{len(results.table)} of {len(results.table)} pictures"
        assert page.locator("tbody tr").count() == 100
        page.get_by_role("button", name="Show more").click()
        assert page.locator("tbody tr").count() == len(results.table)
        page.get_by_label("method").select_option(CONTENDERS[1])
        assert page.locator("#count").inner_text().startswith("26 of")
        own = results.table[results.table["method"] == CONTENDERS[1]]
        page.get_by_role("button", name="DINO", exact=True).click()
        cells = page.locator("tbody td:nth-child(7)").all_inner_texts()
        assert cells == [f"{value:.3f}" for value in own["dino"].sort_values(ascending=False)]
        page.get_by_role("button", name="DINO", exact=True).click()
        assert page.locator("th[aria-sort=ascending]").inner_text().strip() == "DINO"
        assert page.locator("tbody td:nth-child(7)").first.inner_text() == f"{own['dino'].min():.3f}"
        page.wait_for_function("document.images[0].naturalWidth > 0")  # the picture beside the page
        page.get_by_role("button", name="diversity").click()
        page.get_by_role("button", name="diversity").click()
        assert page.locator("tbody td:nth-child(10)").last.inner_text() == "—"  # without a number: last either way
        again = browser.new_page()
        again.goto(page.url)
        assert again.locator("#count").inner_text().startswith("26 of")
        again.get_by_label("prompt contains").fill("snow")
        assert again.locator("#count").inner_text().startswith("8 of")
