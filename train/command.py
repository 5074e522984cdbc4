"""`subject-diffusion train`: read the settings, run the loop.

subject-diffusion train --config configs/train/toybox/vae.yaml                 # one process, CPU or one GPU
torchrun --nproc_per_node 2 train/run.py --config configs/train/toybox/base.yaml   # several processes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import CommandParser
from data_pipeline.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line; returns the exit status."""
    parser = CommandParser("train", description="Train one model; resumes by itself.")
    parser.add_argument(
        "--config", action="append", type=Path, required=True, help="YAML file; may be repeated, later wins"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    arguments = parser.parse_args(argv)
    from train.loop import train  # torch and its libraries load only when they are needed
    from train.settings import TrainSettings

    train(load_settings(TrainSettings, arguments.config, arguments.overrides))
    return 0
