"""What a build would take, told before it starts (`--dry-run`): accelerator hours, money, bytes. All of it estimated.

Operations a picture come from `NETWORKS`, which `scripts/count_pipeline_flops.py` counts on the real networks; speeds
and prices are the assumptions written beside them. How many pictures the rules let through to detection and
segmentation is not known beforehand, so every figure has two ends: none of them, and all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from data_pipeline.build_settings import (
    CaptionSettings,
    CheckSettings,
    DataSettings,
    DetectSettings,
    EngineSettings,
    SegmentSettings,
    StageSettings,
)
from data_pipeline.rules import RuleSettings
from data_pipeline.stages.detect.grounding_dino import LookSettings

NOT_KNOWN = "not known, not counted"
ACCELERATORS_ASSUMED = 8  # that work at once, where the settings do not say


@dataclass(frozen=True)
class Accelerator:
    """What one is held to do, and to cost."""

    name: str
    peak_half: float  # TFLOP/s in bfloat16 or float16, dense, by its data sheet
    peak_float32: float  # TFLOP/s in float32 without TF32, which torch leaves off for matrix products
    dollars_per_hour: float  # assumed: rented by the hour, no discount; prices differ by a factor of three


ACCELERATORS = (Accelerator("A100", 312.0, 19.5, 2.0), Accelerator("H100", 989.0, 67.0, 3.0))
# Assumed: 40 % of a peak is what large batches of a ViT reach; published training of UNets reached 24-28 %. Small
# batches and decoding word by word, which waits for memory, stay far below: hence the advice.
SHARE_OF_PEAK = 0.4
ADVICE = "plan for 2 to 3 times as long"


@dataclass(frozen=True)
class NetworkFlops:
    """TFLOP of one network (a multiplication and an addition are 2), in two or three parts that add up."""

    picture: float  # for looking at a picture, once
    beam: float = 0.0  # for each beam of a caption's search, up to its first word
    piece: float = 0.0  # for each further token of a beam; for each box of a picture


# By (backend, model); grounding_dino_py by its `config`, segment_anything by its `model_type`. Counted at the size of
# picture that the network takes: BLIP-2 224 px, BLIP 384 px, SAM 1024 px; Grounding DINO 800 x 1066 and 8 phrases.
NETWORKS: dict[tuple[str, str], NetworkFlops] = {
    ("blip2", "Salesforce/blip2-opt-2.7b"): NetworkFlops(0.5336, 0.1667, 0.00531),
    ("blip", "Salesforce/blip-image-captioning-large"): NetworkFlops(0.3821, 0.0220, 0.000268),
    ("blip", "Salesforce/blip-image-captioning-base"): NetworkFlops(0.1110, 0.0166, 0.000268),
    ("grounding_dino", "IDEA-Research/grounding-dino-tiny"): NetworkFlops(0.6760),
    ("grounding_dino", "IDEA-Research/grounding-dino-base"): NetworkFlops(1.1185),
    ("grounding_dino_py", "swin_t"): NetworkFlops(0.6760),
    ("grounding_dino_py", "swin_b"): NetworkFlops(1.1185),
    ("sam", "facebook/sam-vit-base"): NetworkFlops(0.9721, piece=0.003625),
    ("sam", "facebook/sam-vit-large"): NetworkFlops(2.9857, piece=0.003625),
    ("sam", "facebook/sam-vit-huge"): NetworkFlops(5.9611, piece=0.003625),
    ("segment_anything", "vit_b"): NetworkFlops(0.9721, piece=0.003625),
    ("segment_anything", "vit_l"): NetworkFlops(2.9857, piece=0.003625),
    ("segment_anything", "vit_h"): NetworkFlops(5.9611, piece=0.003625),
    ("nsfw", "Falconsai/nsfw_image_detection"): NetworkFlops(0.0351),
}
COUNTED_SIDES = 800, 1066  # pixels at which Grounding DINO was counted

# Seconds of one core that stages without an accelerator take, measured on a busy Xeon: spaCy a caption of ten words,
# GrabCut a box of a 256 px scene; larger boxes take up to twice that.
SPACY_SECONDS = 0.0027
GRABCUT_SECONDS_A_BOX = 0.03

# Bits a pixel of an encoded picture by `images.jpeg_quality`: mean of eleven photos of 0.07-0.47 Mpx, full colour
# resolution as images.py writes it. At 95 they lie between 3.2 and 5.4.
ENCODED_QUALITY = (50, 75, 85, 90, 95, 98, 100)
ENCODED_BITS = (1.14, 1.74, 2.36, 2.93, 4.25, 6.10, 9.37)
# A JPEG of the web that is small enough is stored as it came. Published for laion-high-resolution (img2dataset's
# examples): 50 TB for 170 M pictures of 1024 px and more, shorter side cut to 1024, thus 294 kB for about 1024 x 1365.
FETCHED_BYTES = 50e12 / 170e6
WEB_BITS = 8 * FETCHED_BYTES / (1024 * 1365)
RECORD_BYTES = 8_000  # JSON with four masks of a 1024 px picture (4 kB), text, headers of the tar, row of the table


@dataclass(frozen=True)
class StageWork:
    """What one stage does for one picture that reaches it."""

    stage: str
    name: str  # backend and model
    half: float = 0.0  # TFLOP in bfloat16 or float16 …
    float32: float = 0.0  # … and in float32
    core_seconds: float = 0.0  # of stages on the CPU
    note: str = ""  # why it is not counted
    sure: bool = True  # every picture reaches it; if not, those that the rules let through

    @property
    def tflop(self) -> float:
        return self.half + self.float32

    def hours(self, pictures: int, accelerator: Accelerator) -> float:
        """Hours of one accelerator at the assumed share of its peak."""
        seconds = self.half / accelerator.peak_half + self.float32 / accelerator.peak_float32
        return pictures * seconds / SHARE_OF_PEAK / 3600


def estimate(settings: DataSettings, pictures: int) -> list[str]:
    """Lines for a person: the work of each stage, hours and dollars, bytes.

    Args:
        pictures: still to be built, bad ones and copies too; 0 (a source that cannot tell): a million.
    """
    told = f"{pictures:,} pictures" if pictures else "each million pictures (none is counted here)"
    pictures = pictures or 1_000_000
    work = works(settings)
    lines = [f"estimate for {told}, computed beforehand:"]
    lines += [_stage_line(one, pictures) for one in work]
    if any(one.tflop for one in work):
        at_once = accelerators_at_once(settings.engine)
        lines += [_sum_line(work, pictures, accelerator, at_once) for accelerator in ACCELERATORS]
        peaks = ", ".join(f"{a.name} {a.peak_half:g} TFLOP/s, {a.peak_float32:g} in float32" for a in ACCELERATORS)
        lines.append(f"  assumed: {SHARE_OF_PEAK:.0%} of the peak ({peaks}); {ADVICE}")
        if settings.engine.device == "cpu":
            lines.append("  engine.device=cpu: these are hours of accelerators; on processors it takes far longer")
    return [*lines, *_byte_lines(settings, pictures)]


def works(settings: DataSettings) -> list[StageWork]:
    """The stages that a build would run, in their order; not those whose answers the source gives."""
    source = settings.source
    known: tuple[str, ...] = ()
    if source.kind == "openimages":
        known = ("nouns", "detect")  # and the masks of some things
    elif source.kind == "toybox" and source.entities == "true":
        known = ("nouns", "detect", "segment")
    found = [_check(check) for check in settings.checks] + stage_works(settings.stages, settings.rules)
    return [one for one in found if one.stage not in known]


def stage_works(stages: StageSettings, rules: RuleSettings) -> list[StageWork]:
    """What each stage does for a picture; the segmenter for the most boxes that the rules let through."""
    found = [_caption(stages.caption)]
    if stages.nouns:
        found.append(StageWork("nouns", f"spacy {stages.nouns.model}", core_seconds=SPACY_SECONDS))
    if stages.detect:
        found.append(_detect(stages.detect))
    return [*found, _segment(stages.segment, rules.entities[1])]


def total_hours(work: Sequence[StageWork], pictures: int, accelerator: Accelerator) -> tuple[float, float]:
    """Hours of one accelerator if the rules let nothing through, and if they let everything through."""
    hours = [(one.sure, one.hours(pictures, accelerator)) for one in work]
    return sum(value for sure, value in hours if sure), sum(value for _, value in hours)


def accelerators_at_once(engine: EngineSettings) -> int:
    """How many the settings put to work."""
    if engine.kind == "ray":
        return max(1, ceil(engine.ray_workers * engine.ray_gpus)) if engine.ray_workers else ACCELERATORS_ASSUMED
    return engine.workers or ACCELERATORS_ASSUMED


def stored_bytes(settings: DataSettings) -> tuple[float, float]:
    """Bytes of a kept picture of the largest size, 4:3: if its JPEG is kept as it came, if it is encoded anew."""
    side = settings.images.max_side_px
    encoded = float(np.interp(settings.images.jpeg_quality, ENCODED_QUALITY, ENCODED_BITS)) / 8
    if settings.source.kind == "toybox":  # square, and no JPEG
        whole = min(side, settings.source.size) ** 2 * encoded + RECORD_BYTES
        return whole, whole
    pixels = side * side * 3 / 4
    return WEB_BITS / 8 * pixels + RECORD_BYTES, encoded * pixels + RECORD_BYTES


def _check(check: CheckSettings) -> StageWork:
    if check.check == "faces":
        return StageWork("checks", "faces", note="on the CPU, not counted")
    return _network("checks", "nsfw", check.model, check.dtype)


def _caption(caption: CaptionSettings) -> StageWork:
    if caption.backend == "alt_text":
        return StageWork("caption", "alt_text", note="no work to speak of")
    beams, further = caption.num_beams, caption.max_new_tokens - 1  # counted at its longest
    return _network("caption", caption.backend, caption.model, caption.dtype, beams=beams, pieces=beams * further)


def _detect(detect: DetectSettings) -> StageWork:
    if detect.backend == "clip_proposals":
        return StageWork("detect", f"clip_proposals {detect.model}", note=NOT_KNOWN, sure=False)
    scale = _looked_at(detect)
    if detect.backend == "grounding_dino_py":
        return _network("detect", detect.backend, detect.config, "float32", scale=scale, sure=False)
    return _network("detect", detect.backend, detect.model, detect.dtype, scale=scale, sure=False)


def _looked_at(detect: LookSettings) -> float:
    """Pixels of a 4:3 picture at these settings, as a multiple of those that were counted."""
    longer = min(detect.longest_side, detect.shortest_side * COUNTED_SIDES[1] / COUNTED_SIDES[0])
    return (longer / COUNTED_SIDES[1]) ** 2


def _segment(segment: SegmentSettings, boxes: int) -> StageWork:
    if segment.backend == "grabcut":
        return StageWork("segment", "grabcut", core_seconds=boxes * GRABCUT_SECONDS_A_BOX, sure=False)
    key = segment.model_type if segment.backend == "segment_anything" else segment.model
    work = _network("segment", segment.backend, key, segment.dtype, sure=False)
    if network := NETWORKS.get((segment.backend, key)):
        # prompts and masks are computed in float32, whatever the encoder's dtype
        work = replace(work, float32=work.float32 + boxes * network.piece)
    return work


def _network(
    stage: str,
    backend: str,
    model: str,
    dtype: str,
    *,
    beams: int = 0,
    pieces: int = 0,
    scale: float = 1.0,
    sure: bool = True,
) -> StageWork:
    name, flops = f"{backend} {model}", NETWORKS.get((backend, model))
    if flops is None:
        return StageWork(stage, name, note=NOT_KNOWN, sure=sure)
    tflop = scale * flops.picture + beams * flops.beam + pieces * flops.piece
    if dtype == "float32":
        return StageWork(stage, f"{name} in float32", float32=tflop, sure=sure)
    return StageWork(stage, name, half=tflop, sure=sure)


def _stage_line(work: StageWork, pictures: int) -> str:
    line = f"  {work.stage:8s} {work.name}: "
    if work.note:
        return line + work.note
    if work.core_seconds:
        return line + f"{duration(pictures * work.core_seconds / 3600)} of one CPU core"
    hours = ", ".join(f"{a.name} {duration(work.hours(pictures, a))}" for a in ACCELERATORS)
    return line + f"{work.tflop:.2f} TFLOP a picture, {hours}"


def _sum_line(work: Sequence[StageWork], pictures: int, accelerator: Accelerator, at_once: int) -> str:
    low, high = total_hours(work, pictures, accelerator)
    price = accelerator.dollars_per_hour
    without = [one.stage for one in work if one.note == NOT_KNOWN]
    return (
        f"  {accelerator.name}{' without ' + ', '.join(without) if without else ''}: "
        f"{duration(low)} if the rules let no picture through, {duration(high)} if all (how many is not known); "
        f"on {at_once} of them {duration(low / at_once)} to {duration(high / at_once)}; "
        f"{money(low * price)} to {money(high * price)} at an assumed {money(price)} an hour"
    )


def _byte_lines(settings: DataSettings, pictures: int) -> list[str]:
    kept, encoded = stored_bytes(settings)
    told = f"{size(encoded * pictures)}, {size(encoded)} a picture"
    if kept != encoded:
        told += f" (pictures of the web that are stored as they came: {size(kept * pictures)}, {size(kept)})"
    lines = [f"  written: at most about {told}, if all are let through"]
    if settings.source.kind == "laion":
        lines.append(f"  fetched: about {size(FETCHED_BYTES * pictures)}, {size(FETCHED_BYTES)} a picture")
    return lines


def duration(hours: float) -> str:
    """In the unit that a person would take."""
    for value, unit in ((hours, "h"), (hours * 60, "min"), (hours * 3600, "s")):
        if value >= 1:
            return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return "under 1 s" if hours else "0 s"


def money(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def size(number: float) -> str:
    """Bytes in the unit that a person would take."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= power:
            return f"{number / power:,.0f} {unit}" if number >= 10 * power else f"{number / power:.1f} {unit}"
    return f"{number / 1e3:,.0f} kB"
