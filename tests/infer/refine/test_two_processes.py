"""`refine` under torchrun: two processes learn what one learns from batches of twice the size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infer.refine import command
from tests.infer.tiny_model import TinyModel

ROOT = Path(__file__).parents[3]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "infer.cli", "refine")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lasr", "custom-diffusion"])
def test_two_processes_write_the_file_of_one(method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")

    def told(output: str, batch: int) -> list[str]:
        compositions = [f"options.compositions={batch}"] if method == "lasr" else []
        return [
            "--method", method, "--images", str(tmp_path), "--class-word", "dog", "--base", str(tiny_model.subject),
            "--steps", "4", "--output", str(tmp_path / output), f"options.batch_size={batch}", *compositions,
            "options.warmup_steps=0", "options.learning_rate=0.001", f"runs_dir={tmp_path / output}-runs",
            "report.preview_steps=1", 'report.preview_prompts=["{}"]',
        ]  # fmt: skip

    command.main(told("one.safetensors", 4))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, *told("two.safetensors", 2)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 steps of 4 samples on cpu:0 x 2" in done.stdout and done.stdout.count("two.safetensors\n") == 1
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name != "preview":
            assert torch.allclose(two[name].float(), value.float(), atol=2e-4), name
