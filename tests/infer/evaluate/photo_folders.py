"""Tiny data sets in the published layouts, for tests of protocols."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"backpack": "backpack", "cat": "cat", "pink_sunglasses": "glasses", "bear_plushie": "stuffed animal"}
OBJECT_PROMPTS = (
    "a {0} {1} in the jungle",
    "a {0} {1} on top of green grass with sunflowers around it",
    "a red {0} {1}",
)
LIVE_PROMPTS = ("a {0} {1} in the jungle", "a {0} {1} wearing a red hat", "a {0} {1} in a police outfit")


def write_photo(file: Path, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    """A thing in the middle of a plain background."""
    random = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 235, np.uint8)
    pixels += random.integers(0, 12, pixels.shape, dtype=np.uint8)
    pixels[size[1] // 4 : -size[1] // 4, size[0] // 4 : -size[0] // 4] = random.integers(0, 120, 3, dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def write_dreambench(folder: Path, photos: int = 2) -> Path:
    """Four subjects as github.com/google/dreambooth has thirty."""
    lines = ["Classes", "", "subject_name,class", *(f"{name},{noun}" for name, noun in CLASSES.items()), "", "Prompts"]
    for heading, prompts in (("Object Prompts", OBJECT_PROMPTS), ("Live Subject Prompts", LIVE_PROMPTS)):
        quoted = [f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts]
        lines += ["", heading, "", "prompt_list = [", ",\n".join(quoted), "]"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines) + "\n")
    for seed, name in enumerate(CLASSES):
        for number in range(photos):
            write_photo(folder / name / f"{number:02d}.jpg", 10 * seed + number)
    return folder


def write_openimages(folder: Path, classes: Sequence[str] = ("Apple", "Drill (Tool)"), boxes_each: int = 4) -> Path:
    """Pictures of 100 x 80 with a box each, a quarter of the area; the first of a class is occluded."""
    names, boxes, masks = [], [], []
    for i, name in enumerate(classes):
        label = f"/m/0{i}"
        names.append(f"{label},{name}")
        for k in range(boxes_each):
            image = f"{i}{k}abc"
            write_photo(folder / "images" / f"{image}.jpg", 10 * i + k, (100, 80))
            boxes.append(f"{image},xclick,{label},1,0.25,0.75,0.25,0.75,{int(k == 0)},0,0,0,0")
            mask = np.zeros((80, 100), np.uint8)
            mask[30:50, 40:60] = 255
            name = f"{image}_m0{i}_b{k}.png"
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).convert("1").save(folder / "masks" / name)
            # The box of a mask is the annotated one up to rounding.
            masks.append(f"{name},{image},{label},b{k},0.250977,0.749023,0.250000,0.750000,0.9,")
    (folder / "class-descriptions-boxable.csv").write_text("\n".join(names) + "\n")
    head = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    (folder / "test-annotations-bbox.csv").write_text("\n".join([head, *boxes]) + "\n")
    head = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    (folder / "test-annotations-object-segmentation.csv").write_text("\n".join([head, *masks]) + "\n")
    return folder
