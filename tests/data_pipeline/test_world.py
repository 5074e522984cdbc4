"""The toybox world: what a scene is and what it must not give away."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest

from data_pipeline.toybox.archive import SubjectArchive
from data_pipeline.toybox.backgrounds import BACKGROUNDS, paint_background
from data_pipeline.toybox.captions import COLOURS, Mention, colour_name, place_word, relation_word, write_caption
from data_pipeline.toybox.procedural import procedural_subject, recolour
from data_pipeline.toybox.world import Placement, ToyboxScene, ToyboxWorld, box_of, compose, place


@pytest.fixture(scope="module")
def archive() -> SubjectArchive:
    return SubjectArchive()


@pytest.fixture(scope="module")
def scenes(archive: SubjectArchive) -> list[ToyboxScene]:
    world = ToyboxWorld(archive=archive)
    return [world.scene(i) for i in range(300)]


def test_a_scene_is_a_function_of_its_index(archive: SubjectArchive) -> None:
    first, second = ToyboxWorld(archive=archive), ToyboxWorld(archive=archive)
    second.scene(3)
    for index in (7, 1, -5):
        a, b = first.scene(index), second.scene(index)
        assert a.caption == b.caption and np.array_equal(a.image, b.image)
        for one, other in zip(a.entities, b.entities, strict=True):
            assert np.array_equal(one.mask, other.mask)
            assert all(np.array_equal(x, y) for x, y in zip(one.references, other.references, strict=True))
    assert not np.array_equal(first.scene(1).image, ToyboxWorld(seed=1, archive=archive).scene(1).image)


@pytest.mark.parametrize("size", [32, 64, 200])
def test_any_resolution(size: int, archive: SubjectArchive) -> None:
    scene = ToyboxWorld(size=size, reference_size=48, archive=archive).scene(11)
    assert scene.image.shape == (size, size, 3)
    for entity in scene.entities:
        assert entity.mask.shape == (size, size)
        assert all(reference.shape == (48, 48, 4) for reference in entity.references)


def test_boxes_are_tight_around_masks_and_masks_do_not_overlap(scenes: list[ToyboxScene]) -> None:
    for scene in scenes:
        covered = np.zeros(scene.image.shape[:2], int)
        for entity in scene.entities:
            x0, y0, x1, y1 = (int(value) for value in entity.box_xyxy_px)
            inside = entity.mask[y0:y1, x0:x1]
            assert inside.sum() == entity.mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), scene.index
            covered += entity.mask
        assert covered.max() <= 1


def test_at_least_six_tenths_of_every_subject_are_visible(archive: SubjectArchive) -> None:
    rng, cutouts = np.random.default_rng(2), [archive.cutout(s.id) for s in archive.of_split("train")[:80:20]]
    for _ in range(40):
        found = place(4, rng)
        placements = [Placement(cutout, centre, side) for cutout, (centre, side) in zip(cutouts, found, strict=True)]
        _, masks = compose(placements, "studio", 0, 64)
        for placement, mask in zip(placements, masks, strict=True):
            _, (alone,) = compose([placement], "studio", 0, 64)
            assert mask.sum() >= 0.6 * alone.sum()


@pytest.mark.parametrize("count", [8, 12])
def test_a_crowded_picture_gets_smaller_subjects(count: int) -> None:
    for seed in range(40):
        found = place(count, np.random.default_rng(seed))
        assert len(found) == count and min(side for _, side in found) > 0.05


def test_subjects_are_placed_inside_and_hardly_overlap() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 4):
        for _ in range(30):
            found = place(count, rng)
            for (x, y), side in found:
                assert -0.03 <= x - side / 2 and x + side / 2 <= 1.03 and -0.03 <= y - side / 2 and y + side / 2 <= 1.03
            for i, (a, side_a) in enumerate(found):
                for b, side_b in found[:i]:
                    gap = max(abs(a[0] - b[0]), abs(a[1] - b[1])) - (side_a + side_b) / 2
                    assert gap >= -min(side_a, side_b) / 8 - 1e-9


def test_references_differ_from_each_other(scenes: list[ToyboxScene]) -> None:
    several = [e for s in scenes for e in s.entities if len(e.references) > 1]
    assert len(several) > 50
    assert not any(np.array_equal(e.references[0], e.references[1]) for e in several)


def test_a_reference_is_not_the_target_cut_out(scenes: list[ToyboxScene]) -> None:
    def distance(target: np.ndarray, view: np.ndarray) -> float:
        """Mean difference in grey levels where both are opaque, the view fitted into the target's box."""
        x0, y0, x1, y1 = (int(value) for value in box_of(view[..., 3] > 127))
        fitted = cv2.resize(view[y0:y1, x0:x1], target.shape[1::-1])
        both = (target[..., 3] > 127) & (fitted[..., 3] > 127)
        return float(np.abs(target[both, :3].astype(float) - fitted[both, :3]).mean())

    rendered, copied = [], []
    for scene in scenes:
        for entity in scene.entities:
            x0, y0, x1, y1 = (int(value) for value in entity.box_xyxy_px)
            target = np.dstack([scene.image, entity.mask * np.uint8(255)])[y0:y1, x0:x1]
            if min(target.shape[:2]) >= 12:
                rendered.append(distance(target, entity.references[0]))
                copied.append(distance(target, cv2.resize(target, (64, 64))))
    assert len(rendered) > 300
    assert min(rendered) > max(copied) and np.median(rendered) > 5 * np.median(copied)


def test_about_half_of_the_references_stand_on_a_background(scenes: list[ToyboxScene]) -> None:
    shown = [behind is not None for s in scenes for e in s.entities for behind in e.reference_backgrounds]
    assert 0.4 < np.mean(shown) < 0.6


def test_scenes_hold_none_to_four_subjects(scenes: list[ToyboxScene]) -> None:
    counts = Counter(len(scene.entities) for scene in scenes)
    assert set(counts) == {0, 1, 2, 3, 4} and counts[1] > counts[2] > counts[4]


def test_at_least_a_third_of_training_subjects_are_procedural_or_recoloured(archive: SubjectArchive) -> None:
    world, originals, total = ToyboxWorld(archive=archive), 0, 0
    known = {subject.id for subject in archive.subjects}
    rng = np.random.default_rng(0)
    for _ in range(400):
        subject, cutout = world._subject(rng)
        total += 1
        originals += subject.id in known and np.array_equal(cutout, archive.cutout(subject.id))
    assert originals / total < 2 / 3


def test_no_held_out_family_appears_in_the_training_world(scenes: list[ToyboxScene], archive: SubjectArchive) -> None:
    kept_back = {s.family for split in ("heldout", "val") for s in archive.of_split(split)}
    drawn = [entity.subject for scene in scenes for entity in scene.entities]
    world, rng = ToyboxWorld(archive=archive), np.random.default_rng(1)
    drawn += [world._subject(rng)[0] for _ in range(1700)]
    assert len(drawn) >= 2000
    assert not any(subject.family in kept_back for subject in drawn)


def test_a_recoloured_subject_is_another_one_of_the_same_noun(archive: SubjectArchive) -> None:
    known = {subject.id: subject for subject in archive.of_split("train")}
    world, rng = ToyboxWorld(procedural_share=1.0, archive=archive), np.random.default_rng(3)
    drawn = [subject for subject, _ in (world._subject(rng) for _ in range(60)) if "recoloured" in subject.id]
    assert len({subject.id for subject in drawn}) == len(drawn) > 10
    for subject in drawn:
        original = known[subject.id.split("-recoloured-")[0]]
        assert subject.noun == original.noun and subject.family == original.family and subject.split == "train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_subjects": 3, "max_subjects": 2}, "min_subjects=3, max_subjects=2: expected 0 <= min_subjects"),
        ({"max_subjects": 13}, "max_subjects=13: expected .* <= 12"),
        ({"references": (0, 2)}, "references=\\(0, 2\\): expected"),
        ({"references": (3, 2)}, "references=\\(3, 2\\): expected"),
        ({"procedural_share": 1.5}, "procedural_share=1.5: expected a share"),
        ({"colour_share": -0.1}, "colour_share=-0.1: expected a share"),
    ],
)
def test_a_world_that_cannot_be_is_refused(arguments: dict[str, Any], message: str, archive: SubjectArchive) -> None:
    with pytest.raises(ValueError, match=message):
        ToyboxWorld(archive=archive, **arguments)


def test_other_splits_show_only_their_own_subjects(archive: SubjectArchive) -> None:
    for split in ("val", "heldout"):
        world, own = ToyboxWorld(split, archive=archive), {subject.id for subject in archive.of_split(split)}
        drawn = {entity.subject.id for i in range(40) for entity in world.scene(i).entities}
        assert drawn and drawn <= own, "procedural or recoloured ones appear only when asked for"
    with pytest.raises(ValueError, match="expected train, val or heldout"):
        ToyboxWorld("test", archive=archive)


def test_captions_name_a_colour_in_at_most_a_third_and_the_group_word_for_at_least_half(
    archive: SubjectArchive,
) -> None:
    rng = np.random.default_rng(0)
    subjects = archive.of_split("train")
    coloured = captions = grouped = entities = 0
    for _ in range(1000):
        chosen = [subjects[int(rng.integers(len(subjects)))] for _ in range(int(rng.integers(1, 5)))]
        boxes = [(0.1 * i, 0.2, 0.1 * i + 0.3, 0.6) for i in range(len(chosen))]
        mentions = [
            Mention(s.noun, s.group_word, colour_name(archive.cutout(s.id)), box)
            for s, box in zip(chosen, boxes, strict=True)
        ]
        caption = write_caption(mentions, str(rng.choice(list(BACKGROUNDS))), rng)
        captions += 1
        coloured += any(re.search(rf"\b{colour}\b", caption.text) for colour in COLOURS)
        grouped += sum(noun == s.group_word for noun, s in zip(caption.nouns, chosen, strict=True))
        entities += len(chosen)
    assert 0.1 < coloured / captions <= 1 / 3
    assert 0.5 <= grouped / entities < 0.8


@pytest.mark.parametrize("told", [0.0, 1.0])
def test_captions_say_as_much_as_asked(archive: SubjectArchive, told: float) -> None:
    world = ToyboxWorld(min_subjects=1, group_share=1 - told, colour_share=told, archive=archive)
    for index in range(20):
        scene = world.scene(index)
        for entity in scene.entities:
            assert entity.noun == (entity.subject.noun if told else entity.subject.group_word)
        assert any(re.search(rf"\b{colour}\b", scene.caption) for colour in COLOURS) == bool(told)


def test_spans_point_at_the_nouns(scenes: list[ToyboxScene]) -> None:
    for scene in scenes:
        for entity in scene.entities:
            assert scene.caption[slice(*entity.span)] == entity.noun
        assert len({entity.span for entity in scene.entities}) == len(scene.entities)


def test_what_a_caption_says_of_places_and_relations_is_true(scenes: list[ToyboxScene]) -> None:
    places = r" (on the left|on the right|at the top|at the bottom|in the middle)"
    relations = r" (to the left of|to the right of|above|below)"
    seen: Counter[str] = Counter()
    for scene in scenes:
        centres = [np.add(e.box_xyxy_px[:2], e.box_xyxy_px[2:]) / 2 / len(scene.image) for e in scene.entities]
        for entity, (x, y) in zip(scene.entities, centres, strict=True):
            if said := re.match(places, scene.caption[entity.span[1] :]):
                seen[said[1]] += 1
                assert {
                    "on the left": x < 0.5, "on the right": x > 0.5, "at the top": y < 0.5, "at the bottom": y > 0.5,
                    "in the middle": max(abs(x - 0.5), abs(y - 0.5)) <= 0.1,
                }[said[1]], scene.caption  # fmt: skip
        if len(centres) == 2 and (said := re.match(relations, scene.caption[scene.entities[0].span[1] :])):
            seen[said[1]] += 1
            (ax, ay), (bx, by) = centres
            true = {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}
            assert true[said[1]], scene.caption
    assert len(seen) == 9 and min(seen.values()) >= 3


def test_place_and_relation_words() -> None:
    assert place_word((0.0, 0.3, 0.3, 0.6)) == "on the left" and place_word((0.4, 0.7, 0.6, 1.0)) == "at the bottom"
    assert place_word((0.4, 0.4, 0.6, 0.6)) == "in the middle"
    assert relation_word((0.6, 0.1, 0.9, 0.5), (0.0, 0.1, 0.4, 0.5)) == "to the right of"


def test_equal_nouns_are_told_apart() -> None:
    box = (0.1, 0.1, 0.4, 0.4)
    mentions = [Mention("dog", "dog", "red", box), Mention("dog", "dog", "red", box)]
    caption = write_caption(mentions, "beach", np.random.default_rng(0))
    assert "another" in caption.text


@pytest.mark.parametrize(("noun", "article"), [("socks", ""), ("dress", "a "), ("octopus", "an "), ("bus", "a ")])
def test_several_things_take_no_article(noun: str, article: str) -> None:
    mention = Mention(noun, noun, "", (0.1, 0.1, 0.4, 0.4))
    for seed in range(20):
        caption = write_caption([mention], "studio", np.random.default_rng(seed))
        before = caption.text[: caption.spans[0][0]]
        assert re.findall(r"\ban? $", before) == ([article] if article else [])


def test_backgrounds_are_many_distinct_and_the_same_at_any_size() -> None:
    assert len(BACKGROUNDS) >= 16
    small = {name: paint_background(name, 0, 64).astype(float) for name in BACKGROUNDS}
    for name, picture in small.items():
        large = paint_background(name, 0, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(large - picture).mean() < 14, name
        others = [np.abs(picture - other).mean() for key, other in small.items() if key != name]
        assert min(others) > 14, name


def test_a_procedural_subject_is_a_function_of_its_seed() -> None:
    first, second = procedural_subject(5)[1], procedural_subject(5)[1]
    assert np.array_equal(first, second) and not np.array_equal(first, procedural_subject(6)[1])
    assert first.shape == (128, 128, 4) and 0.05 < (first[..., 3] > 127).mean() < 0.95


def test_recolouring_keeps_the_outline_and_changes_the_colour(archive: SubjectArchive) -> None:
    for subject in archive.of_split("train")[:40:4]:
        before = archive.cutout(subject.id)
        after = recolour(before, 1)
        assert np.array_equal(before[..., 3], after[..., 3])
        opaque = before[..., 3] > 127
        assert np.abs(before[opaque, :3].astype(int) - after[opaque, :3]).mean() > 2, subject.name


def test_later_placements_stand_in_front(archive: SubjectArchive) -> None:
    cutout = np.full((16, 16, 4), 255, np.uint8)
    behind, front = Placement(cutout, (0.4, 0.5), 0.4), Placement(cutout, (0.6, 0.5), 0.4)
    _, masks = compose([behind, front], "beach", 0, 50)
    assert masks[1].sum() == 400 and masks[0].sum() == 200
