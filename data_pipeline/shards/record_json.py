"""A record as text and back: sorted keys, the field names of `record.py`, and nothing that does not fit.

The types are checked by pydantic against the dataclasses themselves, strictly; what types cannot say (boxes inside
of the picture, areas that are those of the masks, spans that hold their phrase …) is checked below.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import UserError
from data_pipeline.record import SCHEMA_VERSION, Entity, Record
from data_pipeline.shards.masks import mask_area

KEY_PATTERN = r"[A-Za-z0-9_-]{1,80}"  # a dot would end the key for WebDataset; a tar name has 100 characters
MAX_PIXELS = 100_000_000  # of a stored picture; a decoder must not be asked for more

_KEY = re.compile(KEY_PATTERN)
_SHA256 = re.compile("[0-9a-f]{64}")
_RECORD = TypeAdapter(Record)
_ENTITIES = TypeAdapter(tuple[Entity, ...])
_RECORD_KEYS = {field.name for field in fields(Record)}
_ENTITY_KEYS = {field.name for field in fields(Entity)}


def record_to_json(record: Record) -> str:
    """The record as one line. Characters that UTF-8 cannot hold (lone surrogates) become question marks."""
    return plain_json(asdict(record))


def entities_to_json(record: Record) -> str:
    """The record's entities alone, as the table of a shard holds them."""
    return plain_json([asdict(entity) for entity in record.entities])


def entities_from_json(text: str) -> tuple[Entity, ...]:
    """Entities from a shard's table; pixels and masks are checked when the record itself is read."""
    return _ENTITIES.validate_json(text, strict=True, extra="forbid")


def plain_json(value: Any) -> str:
    """One line of JSON, the same for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return plain_text(text)


def plain_text(text: str) -> str:
    """The text as UTF-8 can hold it; its length stays, so that spans keep their place."""
    return text.encode("utf-8", "replace").decode("utf-8")


def record_from_json(text: str | bytes, where: str) -> Record:
    """Read and check a record.

    Args:
        where: file and member, begins every message.

    Raises:
        UserError: the first thing that does not fit, with its key.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({' '.join(str(error).split())[:120]})") from error
    _check_keys(raw, where)
    try:
        record = _RECORD.validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "record"
        raise UserError(f"{where}: {key}={first['input']!r:.80}: {first['msg']}") from error
    problem = _problem(record)
    if problem:
        raise UserError(f"{where}: {problem}")
    return record


def _check_keys(raw: Any, where: str) -> None:
    """Every key must be there, those with a default too: a record that lost one is damaged, not short."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected a record (keys and values), found a {type(raw).__name__}")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        advice = "use the version of this program that wrote it, or build the shard again"
        raise UserError(f"{where}: schema_version={version!r}: this program reads {SCHEMA_VERSION}; {advice}")
    entities = raw.get("entities")
    parts = [("", raw, _RECORD_KEYS)]
    if isinstance(entities, list):
        parts += [(f"entities.{i}.", entity, _ENTITY_KEYS) for i, entity in enumerate(entities)]
    for prefix, part, keys in parts:
        if isinstance(part, Mapping) and part.keys() != keys:
            unknown, missing = sorted(part.keys() - keys), sorted(keys - part.keys())
            told = f"{prefix}{unknown[0]}: unknown key" if unknown else f"{prefix}{missing[0]}: missing"
            raise UserError(f"{where}: {told}")


def _problem(record: Record) -> str | None:
    """The first thing about a well-typed record that cannot be, or None."""
    if not _KEY.fullmatch(record.key):
        return f"key={record.key!r:.100}: expected 1 to 80 letters, digits, _ or -"
    if not _SHA256.fullmatch(record.sha256):
        return f"sha256={record.sha256!r:.80}: expected 64 hexadecimal digits"
    if record.width < 1 or record.height < 1 or record.width * record.height > MAX_PIXELS:
        return f"width={record.width}, height={record.height}: expected 1 to {MAX_PIXELS} pixels"
    for name, value in record.source_scores.items():
        if not math.isfinite(value):
            return f"source_scores.{name}={value}: expected a finite number"
    for position, entity in enumerate(record.entities):
        problem = _entity_problem(record, position, entity)
        if problem:
            return f"entities.{position}.{problem}"
    return None


def _entity_problem(record: Record, position: int, entity: Entity) -> str | None:
    if entity.id != position:
        return f"id={entity.id}: expected {position}, its position"
    if not entity.noun.strip():
        return "noun: empty"
    if not entity.phrase.strip():
        return "phrase: empty"
    if entity.caption_span is not None:
        start, end = entity.caption_span
        if not 0 <= start < end <= len(record.caption):
            return f"caption_span={entity.caption_span}: outside of the caption, {len(record.caption)} characters"
        if record.caption[start:end] != entity.phrase:
            return f"caption_span={entity.caption_span}: holds {record.caption[start:end]!r:.80}, not the phrase"
    x0, y0, x1, y1 = entity.box_xyxy_px
    if not (0 <= x0 < x1 <= record.width and 0 <= y0 < y1 <= record.height):
        return f"box_xyxy_px={entity.box_xyxy_px}: not inside of the picture, {record.width} x {record.height}"
    if not 0 <= entity.score <= 1:
        return f"score={entity.score}: expected 0 to 1"
    if entity.mask.size != (record.height, record.width):
        return f"mask.size={entity.mask.size}: expected {(record.height, record.width)}, the picture's"
    try:
        area = mask_area(entity.mask)
    except ValueError as error:
        return f"mask: {error}"
    if area != entity.mask_area_px:
        return f"mask_area_px={entity.mask_area_px}: the mask has {area}"
    name_pattern = re.compile(re.escape(record.key) + r"\.ref(0|[1-9][0-9]{0,2})\.png")
    for name in entity.references:
        if not name_pattern.fullmatch(name):
            return f"references: {name!r:.100}: expected {record.key}.ref0.png, {record.key}.ref1.png …"
    return None
