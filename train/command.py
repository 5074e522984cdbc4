"""`subject-diffusion train`: read the settings, run the loop; `cache` and `export` under it.

subject-diffusion train --config configs/train/toybox/vae.yaml                            # one process
torchrun --nproc_per_node 8 train/run.py --config configs/train/sd21.yaml                 # several
subject-diffusion train --config configs/train/sd21.yaml --dry-run --gpus 32 --gpu a100   # what it would take
subject-diffusion train cache --config configs/train/sd15_24gb.yaml                       # latents and features, once
subject-diffusion train export --config configs/train/sd21.yaml                           # a checkpoint's weights
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import CommandParser
from data_pipeline.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train`, or one of the commands under it; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["cache"]:
        from train.cache_command import main as build_cache

        return build_cache(arguments[1:])
    if arguments[:1] == ["export"]:
        from train.export_command import main as export

        return export(arguments[1:])
    return _train(arguments)


def _train(argv: Sequence[str]) -> int:
    from train.plan.options import add_arguments, options_of
    from train.settings import TrainSettings

    parser = CommandParser("train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", action="append", type=Path, required=True, help="YAML file; may be repeated, later wins"
    )
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    arguments = parser.parse_args(argv)
    settings = load_settings(TrainSettings, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from train.plan.dry_run import print_plan  # torch and its libraries load only when they are needed

        print_plan(settings, options_of(arguments))
        return 0
    from train.loop import train

    train(settings)
    return 0
