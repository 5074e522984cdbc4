"""What training costs: the attention-map loss, the trainer around it, its data, and a step on a GPU.

    python scripts/bench_train.py                                        # all that this machine can run
    python scripts/bench_train.py --only attention published --layers 1  # SD 2.1: 9 GB of memory, with one layer 7
    python scripts/bench_train.py --only overhead cache wait             # the real loop on toybox scenes
    python scripts/bench_train.py --only gpu --json OUT.json             # images/s, memory, MFU by batch size

What one table compares runs in one process, turn about; ratios are of medians. Beside each bar stands pass or fail.

    attention  SD 2.1 UNet at 512 px: attention-map loss on against off
    published  its supervised block groups: maps read out of fused attention against softmax(Q K) V with whole maps kept
    overhead   the trainer's loop against forward, backward and optimiser on the same batches in memory
    cache      images/s with cached and with live latents and features
    wait       share of the time in which the loop waits for data, toybox scenes and shards
    precision  images/s of the loop in float32 and in bf16, here
    gpu        a whole SD 2.1 subject step with random weights in bf16, compiled and not, with our loss and without
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.machine import processor_name
from infer.loading import hush_libraries

if (root := str(Path(__file__).resolve().parent.parent)) not in sys.path:
    sys.path.insert(0, root)  # started as a file, Python sees its folder alone

PARTS = {
    "overhead": ("trainer", "bench_overhead"),
    "cache": ("trainer", "bench_cache"),
    "wait": ("trainer", "bench_wait"),
    "precision": ("trainer", "bench_precision"),
    "attention": ("attention", "bench_loss"),
    "published": ("attention", "bench_published"),
    "gpu": ("gpu", "bench_gpu"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_train.py"
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"of: {' '.join(PARTS)}")
    parser.add_argument("--rounds", type=positive, default=5, help="medians are taken over them")
    parser.add_argument("--layers", type=positive, default=2, help="attention, published: layers a block; SD 2.1 has 2")
    parser.add_argument("--subjects", type=positive, default=2, help="attention, published, gpu: subjects of a picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="attention, published: where")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="attention, published: of everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    names = options.only or [name for name in PARTS if gpu or name != "gpu"]
    if not gpu and ("gpu" in names or options.device == "cuda"):
        raise UserError("bench_train: torch finds no GPU here; leave out --device cuda and --only gpu")
    hush_libraries()
    print(f"{processor_name()}, {torch.get_num_threads()} threads; medians of {options.rounds} rounds", flush=True)
    tables: list[Any] = []
    for name in names:
        module, function = PARTS[name]
        for table in getattr(import_module(f"scripts.bench_train_parts.{module}"), function)(options):
            print(table, flush=True)
            tables.append(table)
    if options.json:
        machine = {"processor": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        options.json.write_text(
            json.dumps({"machine": machine, "tables": [table.as_json() for table in tables]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
