"""The record as JSON: comes back equal, and what does not fit is refused by one line with file and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.record import Record
from data_pipeline.shards.record_json import entities_from_json, entities_to_json, record_from_json, record_to_json
from tests.data_pipeline.shards.small_shards import sample

WHERE = "00000.tar: k000000.json"


def test_a_record_comes_back_equal() -> None:
    record = sample(0).record
    assert record_from_json(record_to_json(record), WHERE) == record
    assert entities_from_json(entities_to_json(record)) == record.entities


def test_the_keys_are_the_fields_sorted() -> None:
    text = record_to_json(sample(0).record)
    assert list(json.loads(text)) == sorted(field.name for field in fields(Record))
    assert "\n" not in text and "été ☃" in text


def test_a_lone_surrogate_becomes_a_question_mark_and_spans_keep_their_place() -> None:
    record = sample(0).record
    entity = replace(record.entities[0], phrase="a \ud800 dog", caption_span=(2, 9))
    broken = replace(record, caption="\udfff a \ud800 dog", entities=(entity,))
    read = record_from_json(record_to_json(broken), WHERE)
    assert read.caption == "? a ? dog" and read.entities[0].phrase == "a ? dog"


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        part: Any = values
        for parent in parents:
            part = part[parent]
        if value is ...:
            del part[last]
        else:
            part[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("schema_version", 2, "schema_version=2: this program reads 1"),
        ("schema_version", ..., "schema_version=None"),
        ("caption", ..., "caption: missing"),
        ("url", ..., "url: missing"),
        ("entities.1.subject_id", ..., "entities.1.subject_id: missing"),
        ("mood", "fine", "mood: unknown key"),
        ("entities.0.colour", "red", "entities.0.colour: unknown key"),
        ("entities.0.mask.x", 1, "entities.0.mask.x"),
        ("entities", {}, "entities={}"),
        ("entities", [3], "entities.0=3"),
        ("width", "48", "width='48'"),
        ("width", True, "width=True"),
        ("width", 0, "width=0"),
        ("width", 2**40, "width="),
        ("key", "../k", "key='../k'"),
        ("key", "a.b", "key='a.b'"),
        ("key", "a" * 81, "key="),
        ("sha256", "xyz", "sha256='xyz'"),
        ("source_scores.punsafe", float("nan"), "source_scores.punsafe=nan"),
        ("provenance.detect.backend", 1, "provenance.detect.backend=1"),
        ("entities.1.id", 0, "entities.1.id=0: expected 1"),
        ("entities.0.noun", " ", "entities.0.noun: empty"),
        ("entities.0.caption_span", [0, 99], "outside of the caption"),
        ("entities.0.caption_span", [3, 3], "outside of the caption"),
        ("entities.0.caption_span", [1, 12], "not the phrase"),
        ("entities.0.box_xyxy_px", [3, 5, 49, 13], "not inside of the picture, 48 x 32"),
        ("entities.0.box_xyxy_px", [3, 5, 3, 13], "not inside of the picture"),
        ("entities.0.box_xyxy_px", [float("nan"), 5, 8, 13], "not inside of the picture"),
        ("entities.0.box_xyxy_px", [3, 5, 13], "box_xyxy_px.3"),
        ("entities.0.score", 1.5, "score=1.5"),
        ("entities.0.mask.size", [32, 47], "mask.size=(32, 47): expected (32, 48)"),
        ("entities.0.mask.counts", "00", "entities.0.mask: runs do not fill"),
        ("entities.0.mask_area_px", 41, "mask_area_px=41: the mask has 40"),
        ("entities.0.references", ["../../x.png"], "references: '../../x.png'"),
        ("entities.0.references", ["k000001.ref0.png"], "expected k000000.ref0.png"),
        ("entities.0.references", ["k000000.ref01.png"], "expected k000000.ref0.png"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_key(path: str, value: Any, told: str) -> None:
    values = json.loads(record_to_json(sample(0).record))
    _set(path, value)(values)
    with pytest.raises(UserError) as caught:
        record_from_json(json.dumps(values), WHERE)
    line = str(caught.value)
    assert line.startswith(f"{WHERE}: ") and told in line and "\n" not in line


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 5000, b"\xff\xfe", '{"schema_version": 1}'])
def test_text_that_is_no_record_is_refused_by_one_line(text: str | bytes) -> None:
    with pytest.raises(UserError, match="k000000.json: "):
        record_from_json(text, WHERE)
