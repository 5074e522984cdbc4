"""The toybox protocol and the configurations that ship: comparable to the bench, each case with a true answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from data_pipeline.toybox.archive import SubjectArchive
from data_pipeline.toybox.captions import COLOURS, colour_name, place_word, relation_word
from infer.evaluate.cases import Protocol
from infer.evaluate.methods import plan_methods
from infer.evaluate.protocols import load_protocol
from infer.evaluate.protocols.toybox import in_another_colour
from infer.evaluate.settings import EvaluateSettings, ProtocolSettings
from infer.evaluate.toybox_truth import SIZE, BackgroundJudge, held_out_subjects, pair_requests, single_requests
from infer.subjects import Subject, match_nouns
from train.data.scenes import as_tensor

CONFIGS = sorted(Path("configs/eval").glob("*.yaml"))
KINDS = Path("configs/eval/prompts/toybox.yaml")


@pytest.fixture(scope="module")
def shipped() -> Protocol:
    return load_protocol(load_settings(EvaluateSettings, [Path("configs/eval/toybox.yaml")], []).protocol)


@pytest.fixture(scope="module")
def kinds() -> Protocol:
    return load_protocol(ProtocolSettings(kind="toybox", subjects=6, pairs=6, prompts=KINDS))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_loads_with_its_methods(file: Path) -> None:
    run = load_settings(EvaluateSettings, [file], [])
    assert run.protocol.kind == ("toybox" if file.stem.startswith("refine_") else file.stem)
    assert run.protocol.prompts is None or run.protocol.prompts.exists()
    assert len(plan_methods(run)) >= len(run.methods)


def test_there_is_a_configuration_of_every_protocol() -> None:
    assert {"dreambench", "folder", "openimages", "toybox"} <= {file.stem for file in CONFIGS}


def test_the_dreambench_configuration_names_thirty_pairs_of_different_subjects() -> None:
    pairs = load_settings(EvaluateSettings, [Path("configs/eval/dreambench.yaml")], []).protocol.pairs
    assert isinstance(pairs, tuple) and len(pairs) == len(set(pairs)) == 30
    named = [name for pair in pairs for name in pair]
    assert sorted(named) == sorted([*set(named)] * 2) and len(set(named)) == 30


def test_the_shipped_configuration_asks_what_the_bench_asks(shipped: Protocol) -> None:
    archive = SubjectArchive()
    subjects = held_out_subjects(archive, 40)
    requests = [*single_requests(archive, subjects), *pair_requests(archive, subjects)]
    assert len(shipped.cases) == len(requests) == 200
    for case, request in zip(shipped.cases, requests, strict=True):
        assert (case.prompt, case.seed, case.boxes, case.words) == (
            request.prompt,
            request.seed,
            request.boxes,
            request.words,
        )
        assert torch.equal(case.truth.real, request.real) and case.truth.background == request.background
    firsts = {request.subjects[0].id: request.references[0] for request in reversed(requests[:160])}
    for case in shipped.cases:
        for subject, given in zip(case.truth.subjects, case.truth.references, strict=True):
            assert np.array_equal(given, firsts[subject.id])


def test_a_method_sees_the_reference_that_the_truth_knows(shipped: Protocol) -> None:
    for case in shipped.cases[::23]:
        for subject, given in zip(case.subjects, case.truth.references, strict=True):
            assert subject.given == 1 and len(subject.others) == 3
            assert np.array_equal(np.array(subject.photos[0].open()), given)
            assert subject.cutouts[0].mode == "RGBA"


def test_groups_stand_together_and_ids_are_unique(shipped: Protocol) -> None:
    groups = [group[0].group for group in shipped.groups()]
    assert len(groups) == len(set(groups)) == 80
    assert len({case.id for case in shipped.cases}) == 200
    assert shipped.cases[0].id == "mouse_face--00--0" and shipped.cases[160].id == "mouse_face+hamster--00--0"


def test_a_subset_or_more_seeds_ask_for_the_same_pictures(shipped: Protocol) -> None:
    every = {case.id: case.seed for case in shipped.cases}
    names = ("sloth", "otter")
    some = load_protocol(ProtocolSettings(kind="toybox", subjects=names, pairs=[names], seeds=2, pair_seeds=2))
    seeds = {case.id: case.seed for case in some.cases}
    assert {key: seed for key, seed in seeds.items() if key.endswith("--0")}.items() <= every.items()
    assert len(seeds) == 2 * 4 * 2 + 2
    assert seeds["sloth--01--1"] == seeds["sloth--01--0"] + 10_000


def test_a_list_of_prompts_brings_kinds_that_are_true_of_the_render(kinds: Protocol) -> None:
    assert {case.kind for case in kinds.cases} == {"new scene", "relation", "property change"}
    for case in kinds.cases:
        match_nouns(case.prompt, [Subject(word, []) for word in case.words])
        named = [colour for colour in COLOURS if f" {colour} " in case.prompt]
        assert len(named) == (case.kind == "property change")
        if case.kind == "relation":
            assert case.boxes is not None
            said = place_word(case.boxes[0]) if case.part == "single" else relation_word(*case.boxes)
            assert said in case.prompt


def test_a_property_change_shows_another_colour_than_the_reference(kinds: Protocol) -> None:
    archive = SubjectArchive()
    for case in kinds.cases:
        if case.kind != "property change":
            continue
        archive_id = case.truth.subjects[0].id
        assert f" {colour_name(archive.cutout(archive_id))} " not in case.prompt
        assert case.boxes is not None
        x0, y0, x1, y1 = (round(64 * value) for value in case.boxes[0])
        shown = case.truth.real[:, y0:y1, x0:x1].reshape(3, -1).mean(dim=1)
        reference = case.truth.references[0]
        own = torch.from_numpy(reference[reference[..., 3] > 127][:, :3].mean(axis=0) / 255)
        assert (shown - own).abs().max() > 0.05


def test_another_colour_has_another_name() -> None:
    green = np.full((8, 8, 4), (153, 200, 60, 255), np.uint8)
    assert colour_name(green) == "green"
    for seed in range(20):
        turned, word = in_another_colour(green, np.random.default_rng(seed))
        assert colour_name(turned) == word != "green"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"subjects": ("slots",)}, "no subject 'slots'; did you mean 'sloth'"),
        ({"folder": Path("photos")}, "leave out folder"),
        ({"inputs": 5}, "the toybox has 4 references"),
    ],
)
def test_what_the_toybox_does_not_know_is_told(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_protocol(ProtocolSettings(kind="toybox", **settings))


@pytest.mark.parametrize(
    "text", ["object: {relation: ['a {} {relation} a house']}", "pair: {relation: ['a {} {place} a {}']}"]
)
def test_a_template_that_cannot_be_true_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(text if text.startswith("object") else f"object: {{relation: ['a {{}} {{place}}']}}\n{text}")
    with pytest.raises(UserError, match="prompts.yaml: .* tells where one subject is"):
        load_protocol(ProtocolSettings(kind="toybox", subjects=2, pairs=1, prompts=file))


def test_scenes_to_tune_from_are_on_backgrounds_that_no_case_asks_for() -> None:
    more, fewer = (load_protocol(ProtocolSettings(kind="toybox", subjects=2, tuning_photos=count)) for count in (4, 2))
    archive, judge = SubjectArchive(), BackgroundJudge()
    for cases, same in zip(more.groups(), fewer.groups(), strict=True):
        subject = cases[0].subjects[0]
        scenes = [np.array(photo.open()) for photo in subject.tuning]
        assert [scene.shape for scene in scenes] == [(SIZE, SIZE, 3)] * 4 and len(subject.others) == 3
        assert all(np.array_equal(a, b.open()) for a, b in zip(scenes, same[0].subjects[0].tuning, strict=False))
        asked = {case.truth.background for case in cases}
        assert len(asked) == 4 and not asked & {judge.name(as_tensor(scene), ()) for scene in scenes}
        thing = archive.cutout(cases[0].truth.subjects[0].id)
        assert thing.shape[-1] == 4 and len({scene.tobytes() for scene in scenes}) == 4
