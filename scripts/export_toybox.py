"""Copy what `make toybox` trained into the package as fp16: model/weights/toybox and infer/examples.

    python scripts/export_toybox.py --runs ~/.cache/subject-diffusion/runs/toybox

The base is saved whole, the subject model as its trained parts, the judges for `scripts/bench_toybox.py`, the CLIP of
the data pipeline's detector as its own tensors; the total must stay under 24 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from data_pipeline.stages.detect.clip_folder import PARTS
from data_pipeline.toybox.archive import SubjectArchive
from model.saving import forget_origin
from train.model_card import replace_section
from train.tasks.region_clip import write_parts

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS = REPOSITORY / "model" / "weights" / "toybox"
EXAMPLES = REPOSITORY / "infer" / "examples"
TRIALS = REPOSITORY / "docs" / "toybox_trials.md"
LIMIT_MB = 24
EXAMPLE_NAMES = ("penguin", "turtle", "watermelon", "locomotive", "pancakes", "flamingo")  # held-out subjects


def halve(file: Path) -> None:
    """Rewrite a safetensors file in fp16; integers stay as they are."""
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def export_weights(runs: Path, target: Path) -> None:
    """Replace `target` by the exports of the runs base, subject, judges and region_clip."""
    shutil.rmtree(target, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(runs / "base" / "export", dtype=torch.float16)
    pipeline.save_pretrained(target / "base")
    forget_origin(target / "base")
    shutil.copytree(runs / "subject" / "export", target / "subject")
    for judge in ("identity", "segment"):
        shutil.copytree(runs / f"judge_{judge}" / "export", target / "judges" / judge)
    shutil.copytree(runs / "region_clip" / "export", target / "region_clip")
    for folder in ("subject", "judges", "region_clip"):
        for file in sorted((target / folder).rglob("*.safetensors")):
            halve(file)
    join_region_clip(target)


def join_region_clip(target: Path) -> None:
    """Let the CLIP of regions take its towers from the folders beside it, if they are those it was trained on."""
    folder = target / "region_clip"
    trained_on = read_parts(folder)
    write_parts(
        folder, target / "subject" / "image_encoder", target / "base" / "text_encoder", target / "base" / "tokenizer"
    )
    for name, part in read_parts(folder).items():
        if part["fingerprint"] != trained_on[name]["fingerprint"]:
            raise SystemExit(
                f"error: region_clip was trained on another {name} tower than {folder / part['folder']} holds; "
                "train it again: subject-diffusion train --config configs/train/toybox/region_clip.yaml"
            )


def read_parts(folder: Path) -> dict[str, dict[str, str]]:
    """The two towers that `parts.json` names."""
    parts = json.loads((folder / PARTS).read_text())
    return {name: parts[name] for name in ("image", "text")}


def complete_card(card: Path) -> None:
    """Add what was tried; `scripts/bench_toybox.py --card` adds the scores."""
    replace_section(card, "What was tried", TRIALS.read_text(encoding="utf-8"))


def export_examples(target: Path) -> None:
    """Cut-outs of some held-out subjects, for the demo and the README."""
    target.mkdir(parents=True, exist_ok=True)
    archive = SubjectArchive()
    by_name = {subject.name: subject for subject in archive.of_split("heldout")}
    for name in EXAMPLE_NAMES:
        Image.fromarray(archive.cutout(by_name[name].id)).save(target / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("~/.cache/subject-diffusion/runs/toybox"))
    arguments = parser.parse_args()
    export_weights(arguments.runs.expanduser(), WEIGHTS)
    complete_card(WEIGHTS / "subject" / "README.md")
    export_examples(EXAMPLES)
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) / 1e6
    print(f"{WEIGHTS}: {size:.1f} MB")
    if size > LIMIT_MB:
        raise SystemExit(f"error: {size:.1f} MB of weights, {LIMIT_MB} MB is the limit; make a model smaller")


if __name__ == "__main__":
    main()
