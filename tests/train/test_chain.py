"""Every task trains on the exports of the ones before it and exports in a real format."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from model.saving import load_subject_model
from tests.train.tiny_runs import tiny_settings
from train.loop import train


def test_every_run_leaves_settings_a_log_a_validation_picture_and_an_export(chain: Path) -> None:
    for task in ("vae", "clip", "base", "subject"):
        run = chain / task
        assert (run / "settings.yaml").exists()
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert {"loss", "learning_rate", "samples_per_second", "data_wait_share"} <= set(rows[0])
        assert Image.open(run / "validation" / "step-00000003.png").size[0] > 100
        assert any((run / "export").iterdir())


def test_the_diffusion_tasks_tell_their_error_by_timestep_and_the_subject_task_where_attention_goes(
    chain: Path,
) -> None:
    bands = {f"{{}}_t{band}" for band in range(4)}
    for task, also in (("base", set()), ("subject", {"denoising", "attention"})):
        rows = [json.loads(line) for line in (chain / task / "log.jsonl").read_text().splitlines()]
        assert also | {name.format("denoising") for name in bands} <= {key for row in rows for key in row}
    last = json.loads((chain / "subject" / "validation.jsonl").read_text().splitlines()[-1])
    told = {"loss", "loss_without_subjects", "gain", "attention_inside", "attention_outside"}
    assert told | {name.format("loss") for name in bands} <= last.keys()


def test_the_autoencoder_loads_with_the_stock_class_and_its_latents_have_unit_spread(chain: Path) -> None:
    vae, info = AutoencoderKL.from_pretrained(chain / "vae" / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert vae.config.scaling_factor != 0.18215


def test_clip_loads_with_open_clip_itself(chain: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{chain / 'clip' / 'export'}")
    picture = torch.zeros(1, 3, 32, 32)
    assert model.encode_image(picture).shape == (1, 16)


def test_the_base_is_a_stock_stable_diffusion_folder(chain: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(chain / "base" / "export", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a thing on the beach", num_inference_steps=2, output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32)


def test_the_subject_model_is_saved_as_trained_parts_with_a_card(chain: Path) -> None:
    parts = load_subject_model(chain / "subject" / "export")
    assert parts.base == "tiny"
    assert all(name.startswith(("unet.", "text_encoder.")) for name in parts.trained)
    card = (chain / "subject" / "export" / "README.md").read_text()
    assert "3 of 4 samples (12 samples)" in card and "base_model: tiny" in card


def test_training_changed_what_it_should_and_nothing_else(chain: Path) -> None:
    before = load_file(chain / "base" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    parts = load_subject_model(chain / "subject" / "export")
    changed = {n for n, t in parts.trained.items() if n.startswith("unet.") and not torch.equal(t, before[n[5:]])}
    assert changed and all(name.endswith(("to_k.weight", "to_v.weight")) for name in changed)


@pytest.mark.parametrize("task", ["judge_identity", "judge_segment"])
def test_the_judges_train_and_export(task: str, tmp_path: Path) -> None:
    folder = train(tiny_settings(task, tmp_path, steps=1))
    if task == "judge_segment":
        assert UNet2DModel.from_pretrained(folder).config.out_channels == 1
    else:
        assert json.loads((folder / "config.json").read_text())["width"] == 128
        assert "network.fc.weight" in load_file(folder / "model.safetensors")
