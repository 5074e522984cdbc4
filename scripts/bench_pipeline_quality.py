"""How well the dataset builder finds what scenes hold: entities, boxes and masks against the truth, stage by stage.

    python scripts/bench_pipeline_quality.py
    python scripts/bench_pipeline_quality.py --split heldout --scenes 100 stages.detect.proposals=24

The stages of the configuration see pictures and captions only. An entity is right if its box overlaps that of a thing
by an IoU of 0.5 or more and its phrase has the noun that the caption gives that thing. Bounds beside it: the nearest
proposed box for every thing, named by the truth; the true boxes, named by the detector; and the entities of each scene
against the truth of the next one, which must score far lower.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.arguments import positive
from data_pipeline.boxes import pairwise_iou
from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.steps import Item, Place, load_steps
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.images import prepare_picture
from data_pipeline.record import Drop
from data_pipeline.rules import RuleSettings, keep_boxes
from data_pipeline.settings import load_settings
from data_pipeline.sources.toybox_scenes import ToyboxSource
from data_pipeline.stages import NounChunk, Segmenter
from data_pipeline.stages.detect.clip_proposals import ClipProposalDetector, ClipProposalsSettings
from data_pipeline.stages.detect.region_proposals import propose_boxes
from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "data" / "toybox.yaml"
BARS = {"recall": 0.5, "precision": 0.7, "mask IoU": 0.6}
MATCH_IOU = 0.5
Truths = Sequence[Sequence[ToyboxEntity]]


@dataclass(frozen=True)
class Score:
    """Entities found against entities there are."""

    recall: float
    precision: float
    box_iou: float  # mean over matches, `mask_iou` too; nan without any
    mask_iou: float

    def line(self) -> str:
        return (
            f"recall {self.recall:.3f}  precision {self.precision:.3f}  "
            f"box IoU {self.box_iou:.3f}  mask IoU {self.mask_iou:.3f}"
        )


def score(found: Sequence[Sequence[Place]], truths: Truths) -> Score:
    """Match what was found in each scene with what is there; better scores choose first, each thing once."""
    box_ious: list[float] = []
    mask_ious: list[float] = []
    for places, truth in zip(found, truths, strict=True):
        free = list(truth)
        for place in sorted(places, key=lambda place: -place.score):
            named = [thing for thing in free if names(place.phrase, thing.noun)]
            overlaps = _overlaps(place.box_xyxy_px, named)
            if overlaps.max(initial=0) >= MATCH_IOU:
                thing = named[int(overlaps.argmax())]
                free = [other for other in free if other is not thing]
                box_ious.append(float(overlaps.max()))
                if place.mask is not None:
                    both, either = place.mask & thing.mask, place.mask | thing.mask
                    mask_ious.append(float(both.sum() / either.sum()))
    return Score(
        len(box_ious) / max(1, sum(map(len, truths))),
        len(box_ious) / max(1, sum(map(len, found))),
        _mean(box_ious),
        _mean(mask_ious),
    )


def names(phrase: str, noun: str) -> bool:
    """Whether a phrase has this noun: "red food item" names a food item, "cart" no car."""
    return re.search(rf"\b{re.escape(noun)}\b", phrase) is not None


def _overlaps(box: Sequence[float], things: Sequence[ToyboxEntity]) -> np.ndarray:
    """IoU of a box with each thing's: (N,)."""
    others = np.asarray([thing.box_xyxy_px for thing in things], float).reshape(-1, 4)
    return pairwise_iou(np.asarray([box], float), others)[0]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def run_stages(settings: DataSettings) -> tuple[list[Item], list[Any], float]:
    """Every scene of the source through the configured stages; the items, the steps, and seconds without loading."""
    source = settings.source.open()
    samples = [sample for unit in source.units() for sample in source.samples(unit)]
    pictures = [
        Item(sample, prepare_picture(sample.image, settings.images))
        for sample in samples
        if not isinstance(sample, Drop)
    ]
    steps = load_steps(settings, "cpu")
    start = time.perf_counter()
    for first in range(0, len(pictures), settings.engine.window):
        for step in steps:
            step.run(pictures[first : first + settings.engine.window])
    return pictures, steps, time.perf_counter() - start


def true_scenes(settings: DataSettings) -> list[ToyboxScene]:
    """The scenes of the source, with what they hold, in its order."""
    source = settings.source.open()
    if not isinstance(source, ToyboxSource):
        raise UserError(
            f"source.kind={settings.source.kind}: only toybox scenes come with the truth; give kind: toybox"
        )
    return [source.world.scene(index) for index in range(source.settings.scenes)]


def found_places(items: Sequence[Item]) -> list[Sequence[Place]]:
    """What the shards hold of each scene: nothing of those that were dropped."""
    return [item.places or () if item.drop is None else () for item in items]


def noun_recall(chunks: Sequence[Sequence[NounChunk]], truths: Truths) -> float:
    """Share of things whose noun stands in a chunk of the caption."""
    return _mean(
        [
            float(any(chunk.span[0] <= thing.span[0] and thing.span[1] <= chunk.span[1] for chunk in found))
            for found, truth in zip(chunks, truths, strict=True)
            for thing in truth
        ]
    )


def named_by_truth(scene: ToyboxScene, limit: int) -> list[Place]:
    """The nearest of the proposed boxes for every thing: no detector on these proposals finds more."""
    boxes, _ = propose_boxes(scene.image, limit)
    places = []
    for thing in scene.entities if len(boxes) else ():
        nearest = boxes[pairwise_iou(np.asarray([thing.box_xyxy_px]), boxes).argmax()]
        places.append(Place(thing.noun, thing.noun, None, tuple(nearest.tolist()), 1.0))
    return places


def named_by_detector(
    scene: ToyboxScene, chunks: Sequence[NounChunk], detector: ClipProposalDetector, rules: RuleSettings
) -> list[Place]:
    """The true boxes, given to the chunks by the detector."""
    boxes = np.asarray([thing.box_xyxy_px for thing in scene.entities], np.float32).reshape(-1, 4)
    told = detector.score_boxes([scene.image], [boxes], [np.ones(len(boxes), np.float32)], [chunks])[0]
    return [
        Place(chunks[box.chunk].noun, chunks[box.chunk].text, None, box.box_xyxy_px, box.score)
        for box in keep_boxes(told, rules)
    ]


def cut_out(scene: ToyboxScene, places: Sequence[Place], segmenter: Segmenter) -> Sequence[Place]:
    """The places with masks."""
    if places:
        masks = segmenter.segment([scene.image], [[place.box_xyxy_px for place in places]])[0]
        for place, mask in zip(places, masks, strict=True):
            place.mask = mask
    return places


def verdict(whole: Score) -> str:
    """The bars, and whether they are met."""
    reached = {"recall": whole.recall, "precision": whole.precision, "mask IoU": whole.mask_iou}
    told = [
        f"{name} {reached[name]:.2f} >= {bar} ({'met' if reached[name] >= bar else 'not met'})"
        for name, bar in BARS.items()
    ]
    return "bars: " + ", ".join(told)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments: what cannot work is refused before anything is measured."""
    parser = CommandParser(
        "bench_pipeline_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.prog = "scripts/bench_pipeline_quality.py"
    parser.add_argument("--config", action="append", type=Path, help=f"of a build; {CONFIG.name} unless given")
    parser.add_argument("--split", choices=("train", "val", "heldout"), default="val", help="whose subjects are drawn")
    parser.add_argument("--scenes", type=positive, default=300)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    asked = [
        f"source.split={options.split}",
        f"source.scenes={options.scenes}",
        "source.entities=found",
        "output=nowhere",
    ]
    settings = load_settings(DataSettings, options.config or [CONFIG], [*asked, *options.overrides])
    detect = settings.stages.detect
    if not isinstance(detect, ClipProposalsSettings):
        raise UserError("stages.detect: the bounds are those of region proposals; give backend: clip_proposals")
    scenes = true_scenes(settings)
    truths = [scene.entities for scene in scenes]
    items, steps, seconds = run_stages(settings)
    whole = score(found_places(items), truths)
    print(
        f"{len(scenes)} scenes of split {options.split}, {sum(map(len, truths))} things, {seconds:.1f} s in the stages"
    )
    detector, segmenter = steps[-2].detector, steps[-1].segmenter
    named = [named_by_truth(scene, detect.proposals) for scene in scenes]
    told = [
        named_by_detector(scene, item.chunks, detector, settings.rules)
        for scene, item in zip(scenes, items, strict=True)
    ]
    rows = {"all stages": whole}
    for name, bound in (("proposals, named by the truth", named), ("true boxes, named by the detector", told)):
        masked = [cut_out(scene, places, segmenter) for scene, places in zip(scenes, bound, strict=True)]
        rows[name] = score(masked, truths)
    rows["all stages, truth of the next scene"] = score(found_places(items), truths[1:] + truths[:1])
    for name, row in rows.items():
        print(f"{name:36s} {row.line()}")
    print(f"things whose noun was found: {noun_recall([item.chunks for item in items], truths):.3f}")
    for reason, count in Counter(item.drop.reason for item in items if item.drop).most_common():
        print(f"scenes dropped as {reason}: {count}")
    print(verdict(whole))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
