"""`gallery.html`: uncurated, everything of a sample to be seen, strangers' texts as text, one file of bounded size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.people import gallery
from data_pipeline.people.gallery import embedded, web_address, write_gallery
from data_pipeline.people.page_files import finished_shards
from data_pipeline.people.selection import DROPS_PER_REASON, choose, chosen_drops, chosen_samples, count_samples
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.reader import DecodedSample
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.people.built_folder import (
    ATTRIBUTE,
    FACTS,
    SCRIPT,
    build_counted,
    build_hostile,
    entity,
    png,
    sample,
)
from tests.data_pipeline.people.page_reader import PageReader, check_self_contained


def build_many(folder: Path | str, units: int = 3) -> None:
    """Ten kept and ten dropped in each unit."""
    for unit in range(units):
        items: list[Sample | Drop] = []
        for i in range(10):
            items.append(sample(f"k{unit}{i}", (60, 60), f"picture k{unit}{i}"))
            items.append(Drop(f"d{unit}{i}", "too_small" if i % 2 else "duplicate", f"detail {i}"))
        write_shard(folder, f"{unit:05d}", items, FACTS)


def keys(folder: Path | str, limit: int, seed: int | None) -> list[str]:
    return [one.record.key for one in chosen_samples(count_samples(finished_shards(folder)), limit, seed)]


def test_a_card_tells_all_of_a_sample(tmp_path: Path) -> None:
    build_counted(tmp_path)
    page = PageReader(write_gallery(tmp_path))
    for said in (
        "All 2 kept pictures; uncurated.",
        "1 a red ball 0.90",  # the label in the picture
        "a red ball (ball) 0.90 · mask 50 %",
        "a blue box (box) 0.50 · mask 100 %",
        "a · 100 × 50 · aesthetic 5.5 https://example.org/a.jpg",
        "b · 40 × 60",
        "too_few_nouns · 3 · fewer noun chunks than rules.nouns",
        "alt of a3 — 2 nouns",
        "of a a2 · http://example.org/a2.jpg",
    ):
        assert said in page.text, said
    assert '<mark class="e0">a red ball' in page.source and '<mark class="e1">a blue box' in page.source
    assert page.links == ["#kept", "#dropped", "https://example.org/a.jpg", "http://example.org/a2.jpg"]
    check_self_contained(page)
    assert str(tmp_path.parent) not in page.source


def test_references_are_shown_beside_their_entity(tmp_path: Path) -> None:
    thing = entity(0, "ball", "ball", (0, 0, 20, 30), 0.7, (40, 60), 3)
    thing = replace(thing, references=("b.ref0.png", "b.ref1.png"), subject_id="ball-7")
    pictures = {"b.ref0.png": png(), "b.ref1.png": png(200)}
    write_shard(tmp_path, "00000", [sample("b", (40, 60), "ball", [thing], references=pictures)], FACTS)
    page = PageReader(write_gallery(tmp_path))
    assert sum(load.startswith("data:image/webp") for load in page.loads) == 2
    assert "reference 2 of ball" in page.source


def test_hostile_text_stays_text_and_only_web_addresses_are_links(tmp_path: Path) -> None:
    build_hostile(tmp_path)
    page = PageReader(write_gallery(tmp_path))
    check_self_contained(page)
    assert set(page.links) == {"#kept", "#dropped", "https://example.org/good?a=1&b=2"}
    assert "img" not in page.tags  # there are no references: the only ones would be the hostile
    for said in (SCRIPT, ATTRIBUTE, f"{SCRIPT}reason", "javascript:alert(1)"):
        assert said in page.text, said


@pytest.mark.parametrize(
    "text", ["javascript:alert(1)", " https://a.b", "https://a.b/\nx", "//a.b", "ftp://a.b", "https://a.b/'x", "", None]
)
def test_what_is_no_plain_web_address_is_no_link(text: str | None) -> None:
    assert web_address(text) == ""


def test_the_first_samples_are_shown_or_a_draw_that_its_seed_decides(tmp_path: Path) -> None:
    build_many(tmp_path)
    assert keys(tmp_path, 12, None) == [f"k{i // 10}{i % 10}" for i in range(12)]
    drawn = keys(tmp_path, 12, 0)
    assert drawn == keys(tmp_path, 12, 0) == sorted(drawn) and len(set(drawn)) == 12
    assert drawn != keys(tmp_path, 12, 1) != keys(tmp_path, 12, None)
    assert len(keys(tmp_path, 60, 0)) == 30
    assert (
        "12 of 30 kept pictures, drawn at random (seed 0); uncurated." in PageReader(write_gallery(tmp_path, 12)).text
    )
    assert "12 of 30 kept pictures, the first ones; uncurated." in PageReader(write_gallery(tmp_path, 12, None)).text


def test_every_place_is_drawn_equally_often() -> None:
    drawn = Counter(place for seed in range(2000) for place in choose(10, 3, seed))
    assert set(drawn) == set(range(10)) and all(500 < times < 700 for times in drawn.values())


def test_an_object_store_gives_the_same_samples() -> None:
    build_many("memory://people/many")
    folder = "memory://people/many"
    assert keys(folder, 5, None) == [f"k0{i}" for i in range(5)]
    with fsspec.open(write_gallery(folder, 7), "rt") as file:
        page = file.read()
    assert [key for key in (f"k{u}{i}" for u in range(3) for i in range(10)) if f">{key}<" in page] == keys(
        folder, 7, 0
    )


def test_of_every_reason_some_drops_are_shown(tmp_path: Path) -> None:
    build_many(tmp_path)
    for seed in (None, 0, 1):
        found = chosen_drops(count_samples(finished_shards(tmp_path)), seed)
        assert [(one.reason, one.count, len(one.shown)) for one in found] == [
            ("duplicate", 15, DROPS_PER_REASON),
            ("too_small", 15, DROPS_PER_REASON),
        ]
        assert all(drop.reason == one.reason for one in found for drop in one.shown)
        assert len({drop.key for one in found for drop in one.shown}) == 2 * DROPS_PER_REASON
    assert [drop.key for drop in chosen_drops(count_samples(finished_shards(tmp_path)), None)[1].shown] == [
        "d01", "d03", "d05", "d07", "d09", "d11"
    ]  # fmt: skip


def test_pictures_give_way_to_the_size_of_the_page() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 700, 3), np.uint8)
    for budget in (150_000, 30_000, 4_000):
        assert len(embedded(noise, budget)) <= budget


def test_a_page_of_the_worst_pictures_stays_below_fifteen_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    noise, specks = draw.integers(0, 256, (512, 512, 3), np.uint8), draw.random((60, 128, 128)) > 0.5
    monkeypatch.setattr(gallery, "decode_sample", lambda one: DecodedSample(noise, specks, {}))
    caption = "word " * 2000
    thing = entity(0, "word", caption, (0, 0, 512, 512), 0.5, (512, 512), 512)
    card = gallery.card(sample("k", (512, 512), caption, [replace(thing, id=i) for i in range(60)]), 60)
    assert len(card.things) == 40 and card.left_out == 20
    assert 60 * (len(card.svg) + sum(len(piece.text) for piece in card.caption)) < 14_000_000


def test_a_dataset_of_which_nothing_was_kept_has_a_page(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", [Drop("a", "too_small")], FACTS)
    assert "No picture was kept." in PageReader(write_gallery(tmp_path)).text


@pytest.mark.parametrize("limit", [0, 301])
def test_a_page_of_no_or_too_many_pictures_is_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(UserError, match=f"limit={limit}: expected 1 to 300"):
        write_gallery(tmp_path, limit)


def test_a_folder_without_a_finished_shard_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shard"):
        write_gallery(tmp_path)
