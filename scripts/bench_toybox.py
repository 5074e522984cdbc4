"""How well held-out subjects are drawn: identity, place, background, for one and two subjects, beside bounds.

    python scripts/bench_toybox.py
    python scripts/bench_toybox.py --model ~/.cache/subject-diffusion/runs/toybox/subject/export --base … --judges …
    python scripts/bench_toybox.py --sheet docs/images/heldout.png --pair-sheet docs/images/pairs.png \\
        --card model/weights/toybox/subject/README.md

40 held-out subjects, one a family, in the archive's order; four prompts each without colour words, half of them with
the group word ("animal") in place of the noun; and 40 pairs. Every row answers the same requests:

    ours            one reference a subject, drawn in one pass
    no reference    the plain base, same prompts and seeds: what the text alone gives away
    real render     the toybox's own picture of the request: the judges' ceiling
    ... decoded     the same through the autoencoder: the ceiling of anything drawn in its latents
    copied          the reference itself, handed out as the picture

retrieval@1: the crop at the asked box is nearest to another render of its subject among 50 pictures, ten of them the
same thing in other hues. copy: similarity to the given reference minus that to the other render. IoU: box of what the
segmenter sees against the asked box; chance is the box of another request. background: share of pictures whose
background is recognised as the one asked for. both found: retrieval@1 at both boxes of a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipeline.errors import run_command
from data_pipeline.machine import processor_name
from data_pipeline.toybox.archive import SubjectArchive, ToyboxSubject
from infer.evaluate.judges import Judges, boxes_of_things
from infer.evaluate.scores import found_first, placement
from infer.evaluate.toybox_truth import (
    GALLERY,
    PROMPTS,
    SIZE,
    BackgroundJudge,
    Galleries,
    Request,
    held_out_subjects,
    pair_requests,
    single_requests,
)
from infer.loading import SHIPPED, hush_libraries
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject
from model.reference import prepare_reference
from train.model_card import replace_section
from train.pictures import to_uint8

BATCH = 16
FRAME = (0.05, 0.05, 0.95, 0.95)  # box of the subject in a prepared reference
BARS = {"share_of_ceiling": 0.5, "no_reference": 0.15, "placement": 0.6, "both_found": 0.7}


@dataclass(frozen=True)
class Row:
    """Mean scores of one way to answer the requests, shares of 1."""

    name: str
    retrieval: float
    copy: float
    placement: float
    background: float
    both_found: float
    pair_placement: float


class Scorer:
    """Holds the judges and the galleries of the subjects that are asked for."""

    def __init__(self, archive: SubjectArchive, judges: Judges, subjects: Sequence[ToyboxSubject]) -> None:
        self.judges, self.backgrounds = judges, BackgroundJudge()
        galleries = Galleries(archive, judges, subjects)
        self.galleries = {subject.id: galleries.of(subject) for subject in subjects}

    def found(self, pictures: Tensor, requests: Sequence[Request]) -> list[list[bool]]:
        """For each picture (N, 3, H, W), for each of its subjects, whether it is the nearest in its gallery."""
        return [
            [found_first(code, self.galleries[s.id]) for code, s in zip(codes, request.subjects, strict=True)]
            for codes, request in zip(self._codes(pictures, requests), requests, strict=True)
        ]

    def copying(self, pictures: Tensor, requests: Sequence[Request]) -> float:
        """Similarity to the given reference minus that to another render of the subject, mean over subjects."""
        values = []
        for codes, request in zip(self._codes(pictures, requests), requests, strict=True):
            for code, subject, given in zip(codes, request.subjects, self._given(request), strict=True):
                values.append(float(code @ given - code @ self.galleries[subject.id][0]))
        return sum(values) / len(values)

    def placement(self, pictures: Tensor, requests: Sequence[Request], shift: int = 0) -> float:
        """Mean IoU of asked boxes, or (`shift`) of those of another request, with the boxes seen."""
        masks = self.judges.subject_masks(pictures)
        asked = [requests[(i + shift) % len(requests)].boxes for i in range(len(requests))]
        values = [placement(boxes, boxes_of_things(mask)) for boxes, mask in zip(asked, masks, strict=True)]
        return sum(values) / len(values)

    def background(self, pictures: Tensor, requests: Sequence[Request]) -> float:
        """Share of pictures on the background that was asked for."""
        hits = [
            self.backgrounds.name(picture, request.boxes) == request.background
            for picture, request in zip(pictures, requests, strict=True)
        ]
        return sum(hits) / len(hits)

    def _codes(self, pictures: Tensor, requests: Sequence[Request]) -> list[Tensor]:
        return [
            self.judges.describe(picture.expand(len(request.boxes), -1, -1, -1), torch.tensor(request.boxes))
            for picture, request in zip(pictures, requests, strict=True)
        ]

    def _given(self, request: Request) -> Tensor:
        frames = torch.stack([prepare_reference(reference, SIZE) for reference in request.references])
        return self.judges.describe(frames, torch.tensor([FRAME]).expand(len(frames), -1))


def draw(
    pipeline: SubjectDiffusionPipeline, requests: Sequence[Request], options: argparse.Namespace, with_subjects: bool
) -> Tensor:
    """(N, 3, SIZE, SIZE) in 0..1: each request from its own seed."""
    parts = []
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        subjects = [
            [
                Subject(word, [Image.fromarray(reference)], box=box)
                for word, reference, box in zip(r.words, r.references, r.boxes, strict=True)
            ]
            for r in batch
        ]
        drawn = pipeline(
            [request.prompt for request in batch],
            subjects if with_subjects else None,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            subject_guidance_scale=options.subject_guidance,
            generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            output_type="pt",
        )
        parts.append(torch.as_tensor(drawn.images).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decoded(pipeline: SubjectDiffusionPipeline, pictures: Tensor) -> Tensor:
    """Pictures as the autoencoder gives them back."""
    latents = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mean
    return (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def copied(requests: Sequence[Request]) -> Tensor:
    """The first reference of each request as its picture."""
    return torch.stack([prepare_reference(request.references[0], SIZE) for request in requests])


def score(
    name: str,
    scorer: Scorer,
    singles: tuple[Tensor, list[Request]],
    pairs: tuple[Tensor, list[Request]],
    everywhere: bool = False,
) -> Row:
    """All scores of one way to answer; `everywhere`: the subject fills the picture, whatever box was asked for."""

    def looked_at(requests: list[Request]) -> list[Request]:
        return [replace(r, boxes=(FRAME,) * len(r.boxes)) for r in requests] if everywhere else requests

    alone = [found for (found,) in scorer.found(singles[0], looked_at(singles[1]))]
    both = [all(found) for found in scorer.found(pairs[0], looked_at(pairs[1]))]
    return Row(
        name=name,
        retrieval=sum(alone) / len(alone),
        copy=scorer.copying(singles[0], looked_at(singles[1])),
        placement=scorer.placement(*singles),
        background=scorer.background(*singles),
        both_found=sum(both) / len(both),
        pair_placement=scorer.placement(*pairs),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | retrieval@1 | copy | placement IoU | background | both found | IoU, two subjects |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row.retrieval, row.copy, row.placement, row.background, row.both_found, row.pair_placement)
        lines.append(f"| {row.name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    return "\n".join(lines)


def bars(ours: Row, nothing: Row, ceiling: Row) -> list[str]:
    """One line a bar: what was asked, what came, whether it is met."""
    share = ours.retrieval / max(ceiling.retrieval, 1e-9)
    checks = [
        ("judge's ceiling, retrieval@1 on real renders", ">=", 0.9, ceiling.retrieval),
        ("judge's ceiling, placement IoU on real renders", ">=", 0.9, ceiling.placement),
        ("retrieval@1 as a share of the ceiling", ">=", BARS["share_of_ceiling"], share),
        ("retrieval@1 without reference", "<", BARS["no_reference"], nothing.retrieval),
        ("placement IoU", ">=", BARS["placement"], ours.placement),
        ("both subjects found (asked of a GPU run)", ">=", BARS["both_found"], ours.both_found),
    ]
    return [
        f"bar: {name} {sign} {bar}: {value:.2f} "
        f"({'met' if (value >= bar if sign == '>=' else value < bar) else 'not met'})"
        for name, sign, bar, value in checks
    ]


def sheet(pictures: Tensor, requests: Sequence[Request], a_block: int, columns: int, path: Path) -> None:
    """Blocks of references and pictures: one reference and its pictures, or two references and theirs."""
    tile, gap = 80, 4
    font = ImageFont.load_default(10)
    blocks = [range(start, start + a_block) for start in range(0, len(requests), a_block)]
    width = (len(requests[0].references) + a_block) * (tile + gap) + 3 * gap
    height = tile + gap + 14
    rows = -(-len(blocks) // columns)
    canvas = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for number, block in enumerate(blocks):
        left, top = gap + (number // rows) * width, gap + (number % rows) * height
        shown = [prepare_reference(reference, SIZE) for reference in requests[block[0]].references]
        words = ["reference"] * len(shown) + [_short(requests[i]) for i in block]
        for i, picture in enumerate([*shown, *(pictures[i] for i in block)]):
            x = left + i * (tile + gap) + (2 * gap if i >= len(shown) else 0)
            canvas.paste(Image.fromarray(to_uint8(picture)).resize((tile, tile), Image.Resampling.BICUBIC), (x, top))
            pen.text((x + 1, top + tile), words[i][:15], fill="#444444", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _short(request: Request) -> str:
    word = request.words[0] if len(request.words) == 1 else "both"
    return f"{word}, {request.background}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="shipped name or folder of the subject model")
    parser.add_argument("--base", help="base folder, for trained parts elsewhere")
    parser.add_argument("--judges", type=Path, default=SHIPPED / "toybox" / "judges", help="identity/ and segment/")
    parser.add_argument("--subjects", type=int, default=40, help="how many held-out subjects")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--subject-guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="PNG of all subjects: reference, then its four pictures")
    parser.add_argument("--pair-sheet", type=Path, help="PNG of all pairs: two references, then the picture")
    parser.add_argument("--json", type=Path, help="scores as JSON")
    parser.add_argument("--card", type=Path, help="model card whose section of scores is written anew")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    hush_libraries()
    archive, judges = SubjectArchive(), Judges.load(options.judges)
    subjects = held_out_subjects(archive, options.subjects)
    pipeline = SubjectDiffusionPipeline.from_pretrained(options.model, options.base)
    pipeline.set_progress_bar_config(disable=True)
    scorer = Scorer(archive, judges, subjects)
    singles, pairs = single_requests(archive, subjects), pair_requests(archive, subjects)

    def answer(name: str, one: Tensor, two: Tensor, everywhere: bool = False) -> Row:
        return score(name, scorer, (one, singles), (two, pairs), everywhere)

    real, real_pairs = (torch.stack([request.real for request in asked]) for asked in (singles, pairs))
    drawn, drawn_pairs = (draw(pipeline, asked, options, True) for asked in (singles, pairs))
    rows = [
        answer("ours", drawn, drawn_pairs),
        answer("no reference", *(draw(pipeline, asked, options, False) for asked in (singles, pairs))),
        answer("real render", real, real_pairs),
        answer("real render, decoded", decoded(pipeline, real), decoded(pipeline, real_pairs)),
        answer("copied reference", copied(singles), copied(pairs), everywhere=True),
    ]
    chance = scorer.placement(real, singles, shift=PROMPTS)
    told = [
        table(rows),
        "",
        f"{len(subjects)} held-out subjects x {PROMPTS} prompts and {len(pairs)} pairs; {options.steps} steps, text "
        f"guidance {options.guidance:g}, subject guidance {options.subject_guidance:g}. Chance: retrieval@1 "
        f"{1 / GALLERY:.2f}, placement IoU {chance:.2f}.",
        "",
        *(f"- {line}" for line in bars(rows[0], rows[1], rows[2])),
    ]
    print("\n".join(told))
    print(f"{time.perf_counter() - start:.0f} s on {os.cpu_count()} cores, {processor_name()}")
    if options.card:
        replace_section(options.card, "Scores", "\n".join(["`python scripts/bench_toybox.py`:", "", *told]))
    if options.sheet:
        sheet(drawn, singles, PROMPTS, 4, options.sheet)
    if options.pair_sheet:
        sheet(drawn_pairs, pairs, 1, 5, options.pair_sheet)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
