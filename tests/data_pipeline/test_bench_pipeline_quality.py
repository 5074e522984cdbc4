"""scripts/bench_pipeline_quality.py: it measures what it says, against the truth that the stages never see."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.engine.steps import Place
from data_pipeline.errors import run_command
from data_pipeline.stages import NounChunk
from data_pipeline.toybox.world import ToyboxEntity, ToyboxWorld
from scripts.bench_pipeline_quality import Score, main, names, noun_recall, score, verdict


def thing(noun: str, box: tuple[float, float, float, float]) -> ToyboxEntity:
    mask = np.zeros((20, 20), bool)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    entity = ToyboxWorld("val", size=20, min_subjects=1, max_subjects=1).scene(0).entities[0]
    return replace(entity, noun=noun, box_xyxy_px=box, mask=mask, span=(2, 2 + len(noun)))


def place(phrase: str, box: tuple[float, float, float, float], score: float = 0.9) -> Place:
    return Place(phrase.split()[-1], phrase, None, box, score, thing("", box).mask)


def test_a_match_needs_box_and_noun() -> None:
    truths = [[thing("dog", (0, 0, 10, 10)), thing("cat", (10, 10, 20, 20))]]
    found = [[place("red dog", (0, 0, 8, 10)), place("dog", (10, 10, 20, 20)), place("cat", (0, 10, 10, 20))]]
    assert score(found, truths) == Score(recall=0.5, precision=pytest.approx(1 / 3), box_iou=0.8, mask_iou=0.8)


def test_a_thing_is_found_once_by_the_better_score() -> None:
    found = [[place("dog", (0, 0, 10, 10), 0.5), place("dog", (0, 0, 8, 10), 0.7)]]
    assert score(found, [[thing("dog", (0, 0, 10, 10))]]) == Score(1.0, 0.5, 0.8, 0.8)


def test_two_things_of_one_noun_are_told_apart_by_their_boxes() -> None:
    boxes = (0.0, 0.0, 10.0, 10.0), (10.0, 10.0, 20.0, 20.0)
    found = [[place("another dog", box) for box in boxes]]
    assert score(found, [[thing("dog", box) for box in reversed(boxes)]]) == Score(1.0, 1.0, 1.0, 1.0)


def test_nothing_found_is_no_error() -> None:
    nothing = score([[]], [[thing("dog", (0, 0, 9, 9))]])
    assert (nothing.recall, nothing.precision) == (0, 0) and np.isnan(nothing.mask_iou)


def test_nouns_are_whole_words() -> None:
    assert names("red food item", "food item") and names("dolls", "dolls")
    assert not names("cart", "car")


def test_a_noun_counts_as_found_where_it_stands() -> None:
    truths = [[thing("dog", (0, 0, 9, 9))], [thing("cat", (0, 0, 9, 9))]]
    assert noun_recall([(NounChunk("dog", "dog", (2, 5)),), (NounChunk("cat", "cat", (9, 12)),)], truths) == 0.5


def test_the_verdict_names_each_bar() -> None:
    told = verdict(Score(0.6, 0.69, 0.8, 0.7))
    assert "recall 0.60 >= 0.5 (met)" in told and "precision 0.69 >= 0.7 (not met)" in told


def test_with_the_shipped_weights_things_are_found_and_scores_fall_with_another_truth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--scenes", "40"]) == 0
    rows = {
        line[:36].strip(): [float(number) for number in re.findall(r"(\d\.\d+|nan)", line)][:2]
        for line in capsys.readouterr().out.splitlines()
        if "recall" in line and "precision" in line
    }
    recall, precision = rows["all stages"]
    assert recall > 0.45 and precision > 0.5  # of few scenes: below the bars by what chance may take
    assert max(rows["all stages, truth of the next scene"]) < 0.1
    assert rows["proposals, named by the truth"][0] > recall


def test_other_detectors_and_sources_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["stages.detect={backend: grounding_dino}"]) == 2
    assert "stages.detect" in capsys.readouterr().err
