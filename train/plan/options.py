"""What a dry run has to be told beside the settings; light, so that the command line is read before torch loads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from data_pipeline.errors import UserError
from train.engine.gpus import GPUS, find_gpu

ASSUMED_SHARE = 0.3  # of the peak; published training of SD 2 reached 0.28 on A100 (README, "Train at scale")


@dataclass(frozen=True)
class PlanOptions:
    """What the settings do not say."""

    gpus: int = 8  # processes, one a GPU
    gpu: str = "a100"
    share_of_peak: float = ASSUMED_SHARE
    price: float | None = None  # dollars of one GPU hour
    as_json: bool = False


def check_options(options: PlanOptions) -> None:
    """Refuse what makes no sense, before anything is built."""
    find_gpu(options.gpu)
    if options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: expected at least 1")
    if not 0 < options.share_of_peak <= 1:
        raise UserError(f"--mfu {options.share_of_peak:g}: expected a share of the peak above 0, at most 1, like 0.3")
    if options.price is not None and options.price < 0:
        raise UserError(f"--price {options.price:g}: expected dollars of one GPU hour, at least 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The dry run's part of the command line."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="estimate memory, hours and cost, train nothing")
    group.add_argument("--gpus", type=int, default=PlanOptions.gpus, metavar="N", help="one process each (%(default)s)")
    group.add_argument("--gpu", default=PlanOptions.gpu, metavar="NAME", help=f"{', '.join(GPUS)} (%(default)s)")
    group.add_argument(
        "--mfu", type=float, default=ASSUMED_SHARE, metavar="SHARE", help="of the peak that is reached (%(default)s)"
    )
    group.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU hour; without it no cost is told")
    group.add_argument("--json", action="store_true", help="print the estimate as JSON")


def options_of(arguments: argparse.Namespace) -> PlanOptions:
    """From a command line that `add_arguments` has added to."""
    return PlanOptions(arguments.gpus, arguments.gpu, arguments.mfu, arguments.price, arguments.json)
