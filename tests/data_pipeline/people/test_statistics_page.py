"""`stats.html`: numbers that were counted by hand, strangers' texts as text, nothing loaded from anywhere."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import UserError
from data_pipeline.people import tally as tally_module
from data_pipeline.people import wording
from data_pipeline.people.page_files import finished_shards
from data_pipeline.people.statistics_page import write_statistics
from data_pipeline.people.tally import Tally, count_shards
from data_pipeline.record import Drop
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.people.built_folder import FACTS, SCRIPT, build_counted, build_hostile
from tests.data_pipeline.people.page_reader import PageReader, check_self_contained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built")
    build_counted(path)
    (path / "settings.yaml").write_text("source:\n  kind: toybox\n")
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> PageReader:
    return PageReader(write_statistics(folder))


def count(folder: Path | str) -> Tally:
    return count_shards(finished_shards(folder))


def test_totals_drops_and_nouns_are_those_counted_by_hand(folder: Path) -> None:
    tally = count(folder)
    assert (tally.read, tally.kept, tally.dropped, tally.entities) == (6, 2, 4, 3)
    assert tally.drops == {"too_few_nouns": 3, "duplicate": 1}
    assert tally.nouns == {"ball": 2, "box": 1} and not tally.nouns_forgotten
    assert [(unit.name, unit.read, unit.kept, unit.entities, unit.commonest_drop) for unit in tally.units] == [
        ("00000", 4, 1, 2, "too_few_nouns"),
        ("00001", 2, 1, 1, "too_few_nouns"),
    ]


def test_boxes_masks_scores_captions_and_sizes_are_those_measured_by_hand(folder: Path) -> None:
    tally = count(folder)
    # Boxes: 50 x 40 and 50 x 50 of 100 x 50, 20 x 30 of 40 x 60. Masks: 20 of 40, 50 of 50, 3 of 30 rows of the box.
    assert (tally.box_share.low, tally.box_share.high) == (0.25, 0.5)
    assert tally.box_share.mean == pytest.approx((0.4 + 0.5 + 0.25) / 3)
    assert (tally.mask_share.low, tally.mask_share.high) == (0.1, 1.0)
    assert tally.mask_share.mean == pytest.approx((0.5 + 1 + 0.1) / 3)
    assert tally.score.mean == pytest.approx(0.7)
    assert (tally.entities_per_picture.low, tally.entities_per_picture.high) == (1, 2)
    assert (tally.words.low, tally.words.high) == (1, 7)  # "ball", "a red ball and a blue box"
    assert (tally.longer_side_px.low, tally.longer_side_px.high) == (60, 100)
    assert 2**tally.log2_aspect.low == pytest.approx(40 / 60) and 2**tally.log2_aspect.high == pytest.approx(2)
    assert tally.source_scores["aesthetic"].count == 1 and tally.source_scores["aesthetic"].mean == 5.5


def test_the_page_says_these_numbers(page: PageReader) -> None:
    for said in (
        "Of 6 pictures in 2 units, 2 were kept, with 3 entities.",
        "33 % share kept",
        "too_few_nouns fewer noun chunks than rules.nouns 3 50 %",
        "duplicate the same bytes as an earlier picture 1 17 %",
        "2 different nouns in 3 entities",
        "ball 2 67 %",
        "box 1 33 %",
        "00000 4 1 25 % 2",
        "3 boxes: median 40 %",
        "2 pictures: median 1, nine in ten from 1 to 2.",
        "caption blip2 · Salesforce/blip2-opt-2.7b · 51572668 2",
        "nouns spacy 2",
        "settings_sha256 abc123",
        "kind: toybox",
        "Rights and take-downs",
    ):
        assert said in page.text, said


def test_the_page_needs_nothing_else_and_says_nothing_of_the_machine(folder: Path, page: PageReader) -> None:
    check_self_contained(page)
    assert str(folder.parent) not in page.source


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    build_hostile(tmp_path)
    page = PageReader(write_statistics(tmp_path))
    check_self_contained(page)
    assert "img" not in page.tags
    for said in (f"{SCRIPT}reason", f"{SCRIPT}noun", f"{SCRIPT}score", f"</pre>{SCRIPT}"):
        assert said in page.text, said


def test_a_dataset_of_which_nothing_was_kept_has_a_page(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", [Drop("a", "too_small")], FACTS)
    assert "Of 1 picture in 1 unit, 0 were kept" in PageReader(write_statistics(tmp_path)).text


def test_units_that_are_not_finished_are_told_and_not_counted(tmp_path: Path) -> None:
    build_counted(tmp_path)
    (tmp_path / "00001_stats.json").unlink()
    page = PageReader(write_statistics(tmp_path))
    assert "Of 4 pictures in 1 unit" in page.text and "1 shard without its stats file" in page.text


def test_a_folder_behind_a_url_gives_the_same_page() -> None:
    build_counted("memory://dataset/built")
    assert write_statistics("memory://dataset/built") == "memory://dataset/built/stats.html"
    with fsspec.open("memory://dataset/built/stats.html", "rt") as file:
        assert "Of 6 pictures in 2 units" in file.read()


def test_a_folder_without_a_finished_shard_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shard"):
        write_statistics(tmp_path / "nothing")


def test_a_table_that_is_none_or_not_this_one_is_named(tmp_path: Path) -> None:
    build_counted(tmp_path)
    table = tmp_path / "00001.parquet"
    table.write_bytes((tmp_path / "00000.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"00001\.parquet: not the table of a finished shard \(.*data verify"):
        write_statistics(tmp_path)
    write_shard(tmp_path / "other", "00001", [Drop("x", "too_small")], FACTS)
    table.write_bytes((tmp_path / "other" / "00001.parquet").read_bytes())
    with pytest.raises(UserError, match=r"00001\.parquet: 0 samples kept, its stats file says 1"):
        write_statistics(tmp_path)
    table.unlink()
    with pytest.raises(UserError, match=r"00001\.parquet"):
        write_statistics(tmp_path)


def test_of_too_many_nouns_the_rare_ones_are_forgotten_and_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally_module, "MOST_NOUNS", 2)
    assert count(folder).nouns == {"ball": 2, "box": 1}
    monkeypatch.setattr(tally_module, "MOST_NOUNS", 1)  # after the first unit ball and box, once each, are forgotten
    tally = count(folder)
    assert tally.nouns == {"ball": 1} and tally.nouns_forgotten == 1
    assert "may be too low by up to 1." in PageReader(write_statistics(folder)).text


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 3, "33 %"),
        (1, 30, "3.3 %"),
        (1, 10**6, "< 0.01 %"),
        (999_999, 10**6, "99.99 %"),
        (0, 0, "—"),
    ],
)
def test_shares_never_round_to_nothing_or_to_all(part: int, whole: int, said: str) -> None:
    assert wording.share(part, whole) == said


@pytest.mark.parametrize(
    ("log2_aspect", "said"),
    [(0, "1:1"), (1, "2:1"), (-1, "1:2"), (0.58496, "3:2"), (-0.8301, "9:16"), (0.1375, "1.1:1")],
)
def test_aspects_are_said_as_people_say_them(log2_aspect: float, said: str) -> None:
    assert wording.ratio(log2_aspect) == said
