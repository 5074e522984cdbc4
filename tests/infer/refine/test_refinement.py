"""The file of a refinement: everything comes back, other bases and pickled files are refused, other programs' load."""

from __future__ import annotations

import builtins
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from infer.refine.prompts import SUBJECT_TEMPLATES, composed, fill, read_templates
from infer.refine.refinement import Refinement, read_refinement, rename_placeholders, write_refinement

DOG = Refinement(
    "textual-inversion",
    "toybox",
    "ab" * 32,
    {"z": {"vectors": 2, "class_word": "dog"}},
    {"words.z": torch.arange(8.0).reshape(2, 4)},
    settings={"steps": 3},
    steps=3,
    preview=np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
)


def test_a_refinement_comes_back_from_its_file(tmp_path: Path) -> None:
    write_refinement(DOG, tmp_path / "dog.safetensors")
    again = read_refinement(tmp_path / "dog.safetensors")
    assert replace(again, tensors={}, preview=None, path=None) == replace(DOG, tensors={}, preview=None)
    assert torch.equal(again.tensors["words.z"], DOG.tensors["words.z"])
    assert DOG.preview is not None and again.preview is not None and (again.preview == DOG.preview).all()


def test_another_base_is_refused_with_both_names() -> None:
    with pytest.raises(UserError, match="made on base toybox .abab.*, this is sd15 .cdcd"):
        DOG.check_base("sd15", "cd" * 32)
    DOG.check_base("toybox renamed", "ab" * 32)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_files_are_refused_with_the_reason(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"learned_embeds{suffix}"
    torch.save({"<dog>": torch.zeros(4)}, path)
    with pytest.raises(UserError, match="pickled file, and reading one can run any code"):
        read_refinement(path)


def test_textual_inversion_files_of_diffusers_load(tmp_path: Path) -> None:
    save_file({"<dog>": torch.ones(4), "<cat>": torch.zeros(3, 4)}, tmp_path / "learned_embeds.safetensors")
    loaded = read_refinement(tmp_path / "learned_embeds.safetensors")
    assert loaded.method == "textual-inversion" and loaded.fingerprint == ""
    assert {name: word["vectors"] for name, word in loaded.words.items()} == {"<dog>": 1, "<cat>": 3}
    assert loaded.tensors["words.<dog>"].shape == (1, 4)


def test_a_damaged_file_and_one_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_refinement(tmp_path / "x.safetensors")
    save_file({"conv.weight": torch.zeros(2, 2, 3, 3)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="neither a refinement nor a textual-inversion file"):
        read_refinement(tmp_path / "y.safetensors")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dog.safetensors"
    write_refinement(DOG, path)
    before = path.read_bytes()
    real_open = builtins.open

    def full(name: Any, *rest: Any, **options: Any) -> Any:
        if str(name).endswith(".part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(name, *rest, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        write_refinement(replace(DOG, steps=9), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_placeholders_are_renamed_and_clashes_refused() -> None:
    renamed = rename_placeholders(DOG, [("z", "y")])
    assert set(renamed.words) == {"y"} and renamed.words["y"]["name"] == "z"
    with pytest.raises(UserError, match="has no placeholder 'q'; it has z"):
        rename_placeholders(DOG, [("q", "y")])


def test_templates_hold_the_subject_once_and_compose() -> None:
    assert all(template.count("{}") == 1 for template in SUBJECT_TEMPLATES)
    assert fill("a photo of a {}", "z", "very small ") == "a photo of a very small z"
    rng = np.random.default_rng(0)
    texts = {composed("a z", rng) for _ in range(50)}
    assert len(texts) > 20 and all(text.startswith("a z ") for text in texts)


def test_a_file_of_templates_is_checked_by_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a {}\n\na picture\n")
    with pytest.raises(UserError, match="t.txt:3: 'a picture': expected {} once"):
        read_templates(tmp_path / "t.txt")
