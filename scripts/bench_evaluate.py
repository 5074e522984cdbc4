"""How much the evaluator gains by drawing the prompts of a subject together, and by working in several processes.

    python scripts/bench_evaluate.py
    python scripts/bench_evaluate.py --repeats 5 --steps 50

Both ways answer the same toybox cases with the shipped model, in turn, in one run; the ratio is that of the medians.
Bar: together at least 1.5 times as fast as one by one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser, run_command
from data_pipeline.machine import processor_name
from infer.evaluate.cases import Case
from infer.evaluate.methods.zero_shot import MethodSettings, ZeroShot
from infer.evaluate.protocols import load_protocol
from infer.evaluate.runner import Plan, Scope, execute, missing_pictures
from infer.evaluate.settings import EvaluateSettings, ProtocolSettings

BAR = 1.5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bench_batches(method: ZeroShot, cases: Sequence[Case], repeats: int) -> tuple[float, float]:
    """Median seconds of a picture, one by one and together."""
    alone, together = [], []
    method.draw(cases[:1])  # features of the references are kept; neither way should pay for them
    for _ in range(repeats):
        alone.append(seconds(lambda: [method.draw([case]) for case in cases]))
        together.append(seconds(lambda: method.draw(cases)))
    return median(alone) / len(cases), median(together) / len(cases)


def bench_processes(steps: int, subjects: int, processes: int) -> float:
    """Seconds of a picture when `execute` draws and scores the first subjects from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        run = EvaluateSettings(
            name="bench",
            output=Path(folder),
            protocol=ProtocolSettings(kind="toybox", subjects=subjects),
            methods={"ours": {"kind": "zero_shot", "steps": steps}},
            metrics=("toybox",),
            processes=processes,
        )
        plan = Plan.of(run, Scope())
        asked, missing = missing_pictures(plan)
        return seconds(lambda: execute(plan, Scope(), processes, missing)) / asked


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench_evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_evaluate.py"
    parser.add_argument("--prompts", type=positive, default=16, help="of the subject that is drawn")
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--subjects", type=positive, default=16, help="of the run with one and with several processes")
    options = parser.parse_args(arguments)
    protocol = load_protocol(ProtocolSettings(kind="toybox", subjects=1, seeds=-(-options.prompts // 4)))
    cases = protocol.cases[: options.prompts]
    method = ZeroShot(MethodSettings(steps=options.steps), "cpu", "fp32")
    alone, together = bench_batches(method, cases, options.repeats)
    print(f"{len(cases)} prompts of one subject, {options.steps} steps, medians of {options.repeats}")
    print(f"one by one   {alone:.3f} s a picture\ntogether     {together:.3f} s a picture")
    met = "met" if alone / together >= BAR else "not met"
    print(f"bar: together >= {BAR} times as fast: {alone / together:.2f} ({met})")
    cores = os.cpu_count() or 1
    for processes in (1, cores):
        taken = bench_processes(options.steps, options.subjects, processes)
        print(f"whole run, {processes} process(es) of one thread   {taken:.3f} s a picture, start included")
    print(f"{torch.get_num_threads()} threads, {cores} cores, {processor_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
