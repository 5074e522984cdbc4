"""What the autoencoder sees of a refinement's pictures: each once, those in a new size together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infer.refine.task import RefineTask, method_settings
from scripts.bench_refine import refine_settings

ALL = range(8)


def task_of(folder: Path, **variation: float) -> RefineTask:
    settings = refine_settings("textual-inversion", folder, {"variation": variation}, steps=1)
    return RefineTask(settings, method_settings(settings), torch.device("cpu"))


@pytest.mark.parametrize(("shrink", "calls"), [(0.0, [1] * 4), (1.0, [8])])
def test_pictures_in_a_new_size_are_encoded_together_and_the_others_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shrink: float, calls: list[int]
) -> None:
    task = task_of(tmp_path, flip=0.0, shrink=shrink)
    vae, seen = task.base.pipeline.vae, list[int]()
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1])
    task.batch(task.collate([task.dataset[number] for number in ALL]))
    assert seen == calls


def test_each_row_is_the_latents_of_its_picture(tmp_path: Path) -> None:
    task = task_of(tmp_path, shrink=0.5)
    samples = [task.dataset[number] for number in ALL]
    assert {sample.resized for sample in samples} == {False, True}
    latents = task.batch(task.collate(samples)).latents  # (8, C, h, w)
    vae = task.base.pipeline.vae
    with torch.no_grad():
        alone = [vae.encode(sample.pixels[None] * 2 - 1).latent_dist.mean for sample in samples]
    expected = torch.cat(alone) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
