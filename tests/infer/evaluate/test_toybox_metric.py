"""The toybox's own scores: real renders near the judges' ceiling, copies told apart, numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, Protocol
from infer.evaluate.judges import boxes_of_things
from infer.evaluate.methods.copied_reference import FRAME
from infer.evaluate.metrics import Drawn, load_metric
from infer.evaluate.metrics.toybox import ToyboxMetric, load_truth, small_picture
from infer.evaluate.protocols import load_protocol
from infer.evaluate.scores import box_iou
from infer.evaluate.settings import ProtocolSettings
from model.reference import prepare_reference
from tests.infer.evaluate.small_cases import case, picture, settings
from train.pictures import to_uint8


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    """Two subjects, four prompts each, and one pair of them."""
    return load_protocol(ProtocolSettings.model_validate({"kind": "toybox", "subjects": 2, "pairs": 1}))


@pytest.fixture(scope="module")
def metric(protocol: Protocol) -> ToyboxMetric:
    made = load_metric("toybox", settings(protocol={"kind": "toybox"}, crops="asked"), protocol)
    assert isinstance(made, ToyboxMetric)
    return made


@pytest.fixture(scope="module")
def looking(protocol: Protocol) -> ToyboxMetric:
    """Looks where the segmenter sees things."""
    made = load_metric("toybox", settings(protocol={"kind": "toybox"}, crops="detected"), protocol)
    assert isinstance(made, ToyboxMetric)
    return made


def real(one: Case) -> Image.Image:
    return Image.fromarray(to_uint8(one.truth.real))


def copied(one: Case) -> Image.Image:
    return Image.fromarray(to_uint8(prepare_reference(one.truth.references[0], 64)))


def test_real_renders_are_found_in_place_on_their_background(protocol: Protocol, metric: ToyboxMetric) -> None:
    rows = metric.score([Drawn(one, real(one)) for one in protocol.cases])
    for name, least in (("identity", 0.5), ("found", 0.8), ("placement", 0.85), ("background", 0.99)):
        assert sum(row[name] for row in rows) / len(rows) > least, name
    assert set(rows[0]) == {column.name for column in metric.columns}


@pytest.mark.parametrize("number", [0, -1])
def test_identity_retrieval_and_copy_are_those_of_the_judges_codes_by_hand(
    protocol: Protocol, metric: ToyboxMetric, number: int
) -> None:
    one, judges = protocol.cases[number], metric.truth.judges
    for shown in (real(one), real(protocol.cases[5])):
        (row,) = metric.score([Drawn(one, shown)])
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
        identity, found, given = [], [], []
        for box, subject, reference in zip(one.truth.boxes, one.truth.subjects, one.truth.references, strict=True):
            code = judges.describe(pixels, torch.tensor([box]))[0]
            similarity = metric.truth.galleries(replace(one.truth, subjects=(subject,)))[0] @ code  # (50,)
            identity.append(float(similarity[0]))
            found.append(int(similarity.argmax()) == 0 and len(similarity) == 50)
            frame = prepare_reference(reference, 64)[None]
            given.append(float(judges.describe(frame, torch.tensor([(0.05, 0.05, 0.95, 0.95)]))[0] @ code))
        assert row["identity"] == pytest.approx(sum(identity) / len(identity), abs=1e-5)
        assert row["found"] == float(all(found))
        assert row["identity_copy"] == pytest.approx((sum(given) - sum(identity)) / len(given), abs=1e-5)


def test_place_and_background_are_held_against_what_was_asked(protocol: Protocol, metric: ToyboxMetric) -> None:
    one = protocol.cases[0]
    other = next(case for case in protocol.cases[1:4] if case.truth.background != one.truth.background)
    own, false = metric.score([Drawn(one, real(one)), Drawn(one, real(other), other.boxes)])
    mask = metric.truth.judges.subject_masks(small_picture(real(other))[None])[0]
    assert false["placement"] == pytest.approx(max(box_iou(one.boxes[0], box) for box in boxes_of_things(mask)))
    assert own["placement"] > 0.85 > false["placement"]
    assert (own["background"], false["background"]) == (1.0, 0.0)


def test_of_two_subjects_both_must_be_found(protocol: Protocol, metric: ToyboxMetric) -> None:
    one = protocol.cases[-1]
    first, second = one.truth.boxes
    right, wrong = metric.score([Drawn(one, real(one)), Drawn(one, real(one), (first, first))])
    assert (right["found"], wrong["found"]) == (1.0, 0.0)


def test_a_copied_reference_is_looked_for_where_it_stands(protocol: Protocol, metric: ToyboxMetric) -> None:
    one = protocol.cases[0]
    told, silent = metric.score([Drawn(one, copied(one), (FRAME,)), Drawn(one, copied(one))])
    assert told["identity"] + told["identity_copy"] == pytest.approx(1, abs=0.01)  # the reference is like itself
    assert told["identity"] > silent["identity"]


def test_subjects_are_found_where_the_segmenter_sees_them_in_whatever_order(
    protocol: Protocol, looking: ToyboxMetric
) -> None:
    nowhere = ((0.0, 0.0, 0.1, 0.1), (0.9, 0.9, 1.0, 1.0))
    rows = looking.score([Drawn(one, real(one), nowhere[: len(one.subjects)]) for one in protocol.cases])
    for name, least in (("identity", 0.5), ("found", 0.75), ("placement", 0.85)):
        assert sum(row[name] for row in rows) / len(rows) > least, name
    pair = protocol.cases[-1]
    assert rows[-1]["identity"] > 0.6
    swapped = replace(pair.truth, subjects=pair.truth.subjects[::-1], references=pair.truth.references[::-1])
    (turned,) = looking.score([Drawn(replace(pair, truth=swapped), real(pair))])
    assert turned["identity"] == pytest.approx(rows[-1]["identity"], abs=1e-6)


def test_a_subject_that_is_not_seen_scores_nothing(protocol: Protocol, looking: ToyboxMetric) -> None:
    single, pair = protocol.cases[0], protocol.cases[-1]
    grey = Image.new("RGB", (64, 64), (127, 127, 127))
    (empty,) = looking.score([Drawn(single, grey)])
    assert (empty["identity"], empty["found"]) == (0.0, 0.0) and "identity_copy" not in empty
    alone, own = looking.score([Drawn(pair, real(single)), Drawn(single, real(single))])
    assert alone["found"] == 0.0 and alone["identity"] == pytest.approx(own["identity"] / 2, abs=1e-5)


def test_a_larger_picture_is_judged_at_the_size_of_the_toybox(protocol: Protocol, metric: ToyboxMetric) -> None:
    one = protocol.cases[0]
    large = real(one).resize((256, 256), Image.Resampling.BICUBIC)
    same, drawn = metric.score([Drawn(one, real(one)), Drawn(one, large)])
    assert drawn["identity"] == pytest.approx(same["identity"], abs=0.05) and drawn["background"] == 1


def test_cases_without_toybox_truth_are_left_out(metric: ToyboxMetric) -> None:
    assert metric.score([Drawn(case(prompt="a dog"), picture(0))]) == [{}]


def test_the_judges_and_galleries_are_made_once_a_process(protocol: Protocol, metric: ToyboxMetric) -> None:
    again = load_metric("toybox", settings(protocol={"kind": "toybox"}), protocol)
    assert isinstance(again, ToyboxMetric) and again.truth is metric.truth is load_truth(None)


def test_columns_name_the_judges_and_their_axes(metric: ToyboxMetric) -> None:
    named = {column.name: (column.backbone, column.role) for column in metric.columns}
    assert named["identity"] == ("toybox judges", "subject") and named["background"] == ("", "prompt")


def test_what_it_cannot_judge_is_told(tmp_path: Path, protocol: Protocol) -> None:
    with pytest.raises(UserError, match="it can judge only protocol.kind=toybox, not folder"):
        load_metric("toybox", settings(), Protocol("photos", (case(),)))
    with pytest.raises(UserError, match=f"judges {tmp_path}: expected identity/ and segment/ with weights"):
        load_metric("toybox", settings(backbones={"judges": tmp_path}), protocol)
