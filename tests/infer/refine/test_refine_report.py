"""The report that `refine` writes beside its file: the file against zero-shot and the plain base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infer.picture_file import read_record
from infer.refine.command import refine
from infer.refine.report import write_report
from infer.refine.settings import RefineSettings
from tests.infer.evaluate.small_cases import picture
from tests.infer.tiny_model import TinyModel

PROMPTS = "object: {new scene: ['a {} on the beach', 'a {} in the snow']}\n"


@pytest.fixture
def settings(tmp_path: Path, tiny_model: TinyModel) -> RefineSettings:
    """Two steps of textual inversion on two pictures."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        cutout = Image.new("RGBA", (64, 64))
        cutout.paste(picture(i, 40, 40), (12, 12))
        cutout.save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return RefineSettings.model_validate(
        {
            "method": "textual-inversion",
            "model": str(tiny_model.subject),
            "concepts": {"z": {"images": [tmp_path / "photos"], "class_word": "dog"}},
            "output": tmp_path / "z.safetensors",
            "runs_dir": tmp_path / "runs",
            "options": {"steps": 2, "batch_size": 1, "learning_rate": 0.5},
            "report": {
                "preview_prompts": ["{}"],
                "preview_steps": 2,
                "evaluate": {"metrics": ["clip"], "prompts": tmp_path / "prompts.yaml"},
            },
        }
    )


def changed(settings: RefineSettings, **changes: Any) -> RefineSettings:
    return RefineSettings.model_validate({**settings.model_dump(), **changes})


def test_it_stands_beside_the_file_with_every_row(settings: RefineSettings, tmp_path: Path) -> None:
    file = refine(settings)
    folder = tmp_path / "z-report"
    rows = {row.name: row for row in (folder / "pictures").iterdir()}
    assert set(rows) == {"textual-inversion", "zero-shot", "plain_base"}
    drawn = {
        name: [np.asarray(Image.open(one), int) for one in sorted(row.rglob("*.png"))] for name, row in rows.items()
    }
    assert {len(pictures) for pictures in drawn.values()} == {2}
    for name in ("zero-shot", "plain_base"):
        assert max(np.abs(a - b).max() for a, b in zip(drawn["textual-inversion"], drawn[name], strict=True)) > 2
    first = sorted(rows["textual-inversion"].rglob("*.png"))[0]
    assert (first.parent.name, read_record(first).prompt) == ("z", "a dog on the beach")  # shown by its class word
    assert "metric clip" in (folder / "report.md").read_text()  # its weights are not there: a hole, and the page is

    (folder / "note.txt").write_text("mine")
    again = write_report(settings, file)  # replaces the pictures, and nothing that is not its own
    assert again == folder / "report.html" and (folder / "note.txt").exists()


def test_a_plain_base_and_a_style_have_no_zero_shot_row(
    settings: RefineSettings, tmp_path: Path, tiny_model: TinyModel
) -> None:
    style = {"z": {"images": [tmp_path / "photos"], "class_word": "painting", "kind": "style"}}
    report = {**settings.report.model_dump(), "evaluate": {"metrics": ["clip"]}}
    refine(changed(settings, model=str(tiny_model.base), plain=True, concepts=style, report=report))
    shown = {row.name for row in (tmp_path / "z-report" / "pictures").iterdir()}
    assert shown == {"textual-inversion", "plain_base"}
    prompts = [read_record(file).prompt for file in (tmp_path / "z-report" / "pictures" / "plain_base").rglob("*.png")]
    assert len(prompts) == 12 and all(prompt.endswith("in the style of painting") for prompt in prompts)
