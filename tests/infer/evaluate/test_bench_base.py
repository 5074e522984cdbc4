"""scripts/bench_base.py: the judges see in real renders what their captions say, and in other pictures they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import run_command
from data_pipeline.toybox.backgrounds import paint_background
from data_pipeline.toybox.world import ToyboxWorld
from scripts import bench_base


@pytest.fixture(scope="module")
def eyes() -> bench_base.Eyes:
    return bench_base.Eyes(seed=3)


def test_real_renders_show_the_background_and_the_count_of_their_captions(eyes: bench_base.Eyes) -> None:
    scenes = [ToyboxWorld("val", seed=3).scene(i) for i in range(40)]
    seen = eyes.see([Image.fromarray(scene.image) for scene in scenes])
    counts, places = [len(scene.entities) for scene in scenes], [scene.background for scene in scenes]
    assert bench_base.share(seen.backgrounds, places) > 0.9
    assert bench_base.share(seen.counts, counts) > 0.75 and bench_base.chance(seen.counts, counts) < 0.5


def test_groups_are_asked_for_equally_often_and_recognised_in_real_renders(eyes: bench_base.Eyes) -> None:
    scenes = bench_base.scenes_of_groups(seed=3, each=3)
    words = [scene.entities[0].noun for scene in scenes]
    assert words == [word for word in bench_base.GROUPS for _ in range(3)]
    assert all(word in scene.caption for word, scene in zip(words, scenes, strict=True))
    groups = eyes.see([Image.fromarray(scene.image) for scene in scenes]).groups
    assert bench_base.share(groups, words) > 0.6
    assert bench_base.share(groups[3:] + groups[:3], words) < 0.2


def test_nothing_is_seen_on_an_empty_background(eyes: bench_base.Eyes) -> None:
    seen = eyes.see([Image.fromarray(paint_background("beach", 0, 64))])
    assert seen == bench_base.Seen(["beach"], [0], [""])


def test_chance_holds_every_picture_against_every_caption() -> None:
    assert bench_base.chance(["a", "a", "b", "c"], ["a", "b", "b", "b"]) == pytest.approx((2 * 1 + 3) / 16)


def test_the_shipped_base_is_scored_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "base.png"
    assert run_command(bench_base.main, ["--captions", "10", "--steps", "2", "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    for name in ("base", "base, other captions", "real render"):
        assert re.search(rf"^\| {name} \| [01]\.\d\d \| [01]\.\d\d \| [01]\.\d\d \|$", printed, re.MULTILINE)
    assert re.search(r"^error where the thing stands, .* word: [+-]\d+\.\d %$", printed, re.MULTILINE)
    assert "10 captions as they fall, 10 of one thing; 2 steps, guidance 3; on " in printed
    with Image.open(sheet) as opened:
        assert opened.size == (6 * 204 + 6, 2 * 136 + 6)


def test_another_groups_word_takes_the_place_of_the_right_one_with_its_article() -> None:
    scenes = bench_base.scenes_of_groups(seed=3, each=8)
    for scene in scenes:
        word, caption = scene.entities[0].noun, bench_base.called_otherwise(scene)
        other = bench_base.GROUPS[(bench_base.GROUPS.index(word) + 1) % len(bench_base.GROUPS)]
        assert word not in caption and caption.count(other) == 1
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base", "nowhere"], "base nowhere: no such folder"),
        (["--captions", "0"], "--captions: expected a whole number from 1, got '0'"),
        (["--sheet", "base.jpg"], "ends in .png"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench_base.main, arguments) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
