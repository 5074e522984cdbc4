"""A built folder of two units so small that all its numbers can be counted by hand, and one full of hostile text."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.record import BoxPx, Drop, Entity, Provenance, Record, Sample
from data_pipeline.shards.masks import encode_mask
from data_pipeline.shards.writer import write_shard

FACTS = {"code_version": "0.1.0", "settings_sha256": "abc123"}
PROVENANCE = {"caption": Provenance("blip2", "Salesforce/blip2-opt-2.7b", "51572668"), "nouns": Provenance("spacy")}
SCRIPT = "<script>alert(1)</script>"
ATTRIBUTE = "\"'><img src=x onerror=alert(1)>"


def entity(place: int, phrase: str, caption: str, box: BoxPx, score: float, size: tuple[int, int], full: int) -> Entity:
    """An entity whose mask is the upper `full` rows of its box; `size` is (width, height) of the picture."""
    left, top, right, _ = map(int, box)
    mask = np.zeros(size[::-1], bool)
    mask[top : top + full, left:right] = True
    start = caption.find(phrase)
    span = (start, start + len(phrase)) if start >= 0 else None
    noun = phrase.split()[-1]
    return Entity(place, noun, phrase, span, box, score, encode_mask(mask), int(mask.sum()))


def sample(
    key: str,
    size: tuple[int, int],
    caption: str,
    entities: Sequence[Entity] = (),
    url: str | None = None,
    scores: dict[str, float] | None = None,
    references: dict[str, bytes] | None = None,
) -> Sample:
    picture = np.full((size[1], size[0], 3), 200, np.uint8)
    picture[: size[1] // 2] = (30, 120, 220)
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    digest = sha256(key.encode()).hexdigest()
    record = Record(key, digest, *size, caption, caption, tuple(entities), url, scores or {}, PROVENANCE)
    return Sample(record, jpeg, references or {})


def png(side: int = 20) -> bytes:
    """A red disc on nothing."""
    picture = np.zeros((side, side, 4), np.uint8)
    cv2.circle(picture, (side // 2, side // 2), side // 2 - 1, (0, 0, 255, 255), -1)
    return cv2.imencode(".png", picture)[1].tobytes()


def build_counted(folder: str | Path) -> None:
    """Six read, two kept with three entities; what each number should be stands in the tests."""
    first = "a red ball and a blue box"
    a = sample(
        "a",
        (100, 50),
        first,
        [
            entity(0, "a red ball", first, (0, 0, 50, 40), 0.9, (100, 50), 20),
            entity(1, "a blue box", first, (50, 0, 100, 50), 0.5, (100, 50), 50),
        ],
        url="https://example.org/a.jpg",
        scores={"aesthetic": 5.5},
    )
    write_shard(
        folder,
        "00000",
        [
            Drop("a1", "too_few_nouns", "1 noun"),
            a,
            Drop("a2", "duplicate", "of a", "http://example.org/a2.jpg"),
            Drop("a3", "too_few_nouns", "2 nouns", alt_text="alt of a3"),
        ],
        FACTS,
    )
    b = sample("b", (40, 60), "ball", [entity(0, "ball", "ball", (0, 0, 20, 30), 0.7, (40, 60), 3)])
    write_shard(folder, "00001", [b, Drop("b1", "too_few_nouns", "0 nouns")], FACTS)


def build_hostile(folder: str | Path) -> None:
    """Every text that a stranger may choose holds markup; addresses of every kind."""
    caption = f"{SCRIPT} and {ATTRIBUTE}"
    named = Entity(**{**vars(entity(0, SCRIPT, caption, (0, 0, 30, 30), 0.9, (60, 60), 30)), "noun": f"{SCRIPT}noun"})
    lost = Entity(**{**vars(entity(1, ATTRIBUTE, "", (30, 0, 60, 30), 0.9, (60, 60), 30)), "subject_id": ATTRIBUTE})
    addresses = [
        "javascript:alert(1)",
        "data:text/html,x",
        f"https://example.org/{ATTRIBUTE}",
        "JaVaScRiPt:alert(1)//https://example.org",
        "https://example.org/good?a=1&b=2",
    ]
    kept = [
        sample(f"k{i}", (60, 60), caption, [named, lost], url, {f"{SCRIPT}score": 1.0})
        for i, url in enumerate(addresses)
    ]
    drops = [Drop(f"d{i}", f"{SCRIPT}reason", ATTRIBUTE, url, "", caption) for i, url in enumerate(addresses)]
    write_shard(folder, "00000", [*kept, *drops], {SCRIPT: ATTRIBUTE})
    (Path(folder) / "settings.yaml").write_text(f"output: '</pre>{SCRIPT}'\n")
