"""A run to make human kits of: pictures on disk that carry, like real ones, the name of the method that drew them."""

from __future__ import annotations

from pathlib import Path

import pandas
from PIL import Image

from infer.evaluate.results import MethodFacts, Results
from infer.picture_file import PictureRecord, encode_picture

CONTENDERS = ("zeroshot", "finetuned", "textonly")
BOUNDS = ("copybound", "realbound")
NOUNS = ("cat", "dog", "mug", "tree", "boat")


def judged_results(folder: Path, contenders: tuple[str, ...] = CONTENDERS) -> Results:
    """Five subjects and a pair of two, two prompts each, answered by all contenders and two bounds."""
    groups = {f"{noun}-id": ("single", (noun,)) for noun in NOUNS} | {"cat-id+dog-id": ("pair", ("cat", "dog"))}
    references, rows, shade = {}, [], 0
    for group, (part, words) in groups.items():
        files = [f"references/{group}/{number}.png" for number in range(len(words))]
        for file in files:
            shade += 1
            write(folder / file, Image.new("RGBA", (16, 24), (shade, 80, 160, 200)))
        references[group] = tuple(files)
        for number, place in enumerate(("in the <snow>", "on a beach & pier")):
            case, prompt = f"{group}--{number}", f"a {' and a '.join(words)} {place}"
            for method in (*contenders, *BOUNDS):
                shade += 1
                picture = f"pictures/{method}/{group}/{case}.png"
                record = PictureRecord(prompt, 0, f"weights of {method}", {"method": method})
                write(folder / picture, Image.new("RGB", (16, 16), (shade, 255 - shade, 40)), record)
                rows.append((method, part, group, case, prompt, ", ".join(words), picture))
    return Results(
        name="finetuned against the rest",
        folder=folder,
        table=pandas.DataFrame(rows, columns=["method", "part", "group", "case", "prompt", "words", "picture"]),
        columns=(),
        methods=tuple(MethodFacts(name, "zero_shot", name in BOUNDS, {}) for name in (*contenders, *BOUNDS)),
        references=references,
    )


def write(path: Path, picture: Image.Image, record: PictureRecord | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_picture(picture, record))
