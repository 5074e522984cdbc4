"""How well held-out subjects are drawn: identity, place, background, for one and two subjects, beside bounds and bars.

    python scripts/bench_toybox.py
    python scripts/bench_toybox.py --output FOLDER methods.ours.model=FOLDER_OF_A_MODEL
    python scripts/bench_toybox.py --sheet docs/images/heldout.png --pair-sheet docs/images/pairs.png \\
        --card model/weights/toybox/subject/README.md

The rows of `configs/eval/toybox.yaml` without its sweeps, run by the evaluator (`subject-diffusion evaluate` writes the
whole report of them), then read against the bars that trained weights must reach.

retrieval@1: the crop at the asked box is nearest to another render of its subject among 50 pictures, ten of them the
same thing in other hues. copy: similarity to the given reference minus that to the other render. IoU: box of what the
segmenter sees against the asked box; chance is the box of another request. background: share of pictures whose
background is recognised as the one asked for. both found: retrieval@1 at both boxes of a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from pandas import DataFrame
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.arguments import png_file, positive
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.machine import processor_name
from data_pipeline.settings import load_settings
from infer.evaluate.cases import Case
from infer.evaluate.gather import gather
from infer.evaluate.judges import Judges, boxes_of_things
from infer.evaluate.results import Results
from infer.evaluate.runner import Plan, Scope, execute, missing_pictures, process_count
from infer.evaluate.scores import placement
from infer.evaluate.settings import ClassDriftSettings, EvaluateSettings
from infer.evaluate.toybox_truth import GALLERY, PROMPTS
from infer.loading import SHIPPED, hush_libraries
from model.reference import prepare_reference
from train.model_card import replace_section
from train.pictures import to_uint8

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "eval" / "toybox.yaml"
BARS = {"share_of_ceiling": 0.5, "no_reference": 0.15, "placement": 0.6, "both_found": 0.7}
SCORES = {  # heading: part, column
    "retrieval@1": ("single", "found"),
    "copy": ("single", "identity_copy"),
    "placement IoU": ("single", "placement"),
    "background": ("single", "background"),
    "both found": ("pair", "found"),
    "IoU, two subjects": ("pair", "placement"),
}
Rows = dict[str, dict[str, float]]  # method: heading: mean


def means(results: Results) -> Rows:
    """Mean of each score over the pictures of each method."""
    table = results.table
    return {
        method.name: {
            heading: float(table[(table.method == method.name) & (table.part == part)][column].mean())
            for heading, (part, column) in SCORES.items()
        }
        for method in results.methods
    }


def as_markdown(rows: Rows) -> str:
    lines = [f"| | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[heading]:.2f}' for heading in SCORES)} |" for name, row in rows.items()]
    return "\n".join(lines)


def bars(rows: Rows) -> list[str]:
    """One line a bar: what was asked, what came, whether it is met."""
    ours, nothing, ceiling = (rows[name] for name in ("ours", "no reference", "real render"))
    share = ours["retrieval@1"] / max(ceiling["retrieval@1"], 1e-9)
    checks = [
        ("judge's ceiling, retrieval@1 on real renders", ">=", 0.9, ceiling["retrieval@1"]),
        ("judge's ceiling, placement IoU on real renders", ">=", 0.9, ceiling["placement IoU"]),
        ("retrieval@1 as a share of the ceiling", ">=", BARS["share_of_ceiling"], share),
        ("retrieval@1 without reference", "<", BARS["no_reference"], nothing["retrieval@1"]),
        ("placement IoU", ">=", BARS["placement"], ours["placement IoU"]),
        ("both subjects found (asked of a GPU run)", ">=", BARS["both_found"], ours["both found"]),
    ]
    return [
        f"bar: {name} {sign} {bar}: {value:.2f} "
        f"({'met' if (value >= bar if sign == '>=' else value < bar) else 'not met'})"
        for name, sign, bar, value in checks
    ]


@torch.no_grad()
def chance_placement(judges: Judges, cases: Sequence[Case]) -> float:
    """Mean IoU of what stands in real renders with the boxes of another subject's request."""
    seen = judges.subject_masks(torch.stack([case.truth.real for case in cases]))
    values = [
        placement(cases[(i + PROMPTS) % len(cases)].boxes or (), boxes_of_things(mask)) for i, mask in enumerate(seen)
    ]
    return sum(values) / len(values)


def sheet(table: DataFrame, folder: Path, cases: Sequence[Case], columns: int, path: Path) -> None:
    """Blocks of a group's references and its pictures, in the protocol's order."""
    tile, gap, font = 80, 4, ImageFont.load_default(10)
    pictures = dict(zip(table["case"], table["picture"], strict=True))
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    a_block = len(cases[0].subjects) + len(groups[cases[0].group])
    width, height = a_block * (tile + gap) + 3 * gap, tile + gap + 14
    rows = -(-len(groups) // columns)
    canvas = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for number, block in enumerate(groups.values()):
        left, top = gap + (number // rows) * width, gap + (number % rows) * height
        given = [to_uint8(prepare_reference(reference, tile)) for reference in block[0].truth.references]
        shown = [(Image.fromarray(reference), "reference") for reference in given]
        shown += [(Image.open(folder / pictures[case.id]), _short(case)) for case in block]
        for i, (picture, words) in enumerate(shown):
            x = left + i * (tile + gap) + (2 * gap if i >= len(given) else 0)
            canvas.paste(picture.convert("RGB").resize((tile, tile), Image.Resampling.BICUBIC), (x, top))
            pen.text((x + 1, top + tile), words[:15], fill="#444444", font=font)
    canvas.save(path, optimize=True)


def _short(case: Case) -> str:
    """Word and background, without accents: Pillow's own font has none."""
    text = f"{case.words[0] if len(case.words) == 1 else 'both'}, {case.truth.background}"
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench_toybox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_toybox.py"
    parser.add_argument("--subjects", type=positive, default=40, help="how many held-out subjects, and pairs")
    parser.add_argument(
        "--output", type=Path, help="folder of the run (as the configuration says); what is there stays"
    )
    parser.add_argument("--sheet", type=png_file, help="PNG of all subjects: reference, then its four pictures")
    parser.add_argument("--pair-sheet", type=png_file, help="PNG of all pairs: two references, then the picture")
    parser.add_argument("--json", type=Path, help="scores as JSON")
    parser.add_argument("--card", type=Path, help="model card whose section of scores is written anew")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    hush_libraries()
    counts = [f"protocol.subjects={options.subjects}", f"protocol.pairs={options.subjects}"]
    run = load_settings(EvaluateSettings, [CONFIG], [*counts, *options.overrides])
    run = run.model_copy(
        update={"sweeps": {}, "class_drift": ClassDriftSettings(), "output": options.output or run.output}
    )
    plan = Plan.of(run, Scope())
    asked, missing = missing_pictures(plan)
    print(f"{asked} pictures, {asked - missing} of them there", flush=True)
    results = gather(plan, execute(plan, Scope(), process_count(run), missing))
    if results.holes:
        raise UserError(f"the run has {len(results.holes)} holes, the first: {results.holes[0]}")
    rows = means(results)
    singles, pairs = ([case for case in plan.protocol.cases if case.part == part] for part in ("single", "pair"))
    judges = Judges.load(run.backbones.judges or SHIPPED / "toybox" / "judges")
    settings = run.methods["ours"]
    told = [
        as_markdown(rows),
        "",
        f"{options.subjects} held-out subjects x {PROMPTS} prompts and {len(pairs)} pairs; {settings['steps']} steps, "
        f"text guidance {settings['guidance_scale']:g}, subject guidance {settings['subject_guidance_scale']:g}. "
        f"Chance: retrieval@1 {1 / GALLERY:.2f}, placement IoU {chance_placement(judges, singles):.2f}.",
        "",
        *(f"- {line}" for line in bars(rows)),
    ]
    print("\n".join(told))
    print(f"on {processor_name()}")
    if options.card:
        replace_section(options.card, "Scores", "\n".join(["`python scripts/bench_toybox.py`:", "", *told]))
    ours = results.table[results.table.method == "ours"]
    if options.sheet:
        sheet(ours, run.output, singles, 4, options.sheet)
    if options.pair_sheet:
        sheet(ours, run.output, pairs, 5, options.pair_sheet)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
