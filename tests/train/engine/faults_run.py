"""One of two processes that meet the faults of a long run; started by test_faults.py, which says which one falls ill.

RANK=0 WORLD_SIZE=2 … faults_run.py SCENARIO FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from accelerate import Accelerator

from data_pipeline.errors import run_command
from data_pipeline.settings import load_settings
from train.engine.faults import FaultWatch
from train.engine.processes import check_same_data
from train.engine.reporting import Report
from train.engine.strategies import open_accelerator
from train.settings import TrainSettings

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def main(arguments: Any) -> int:
    scenario, folder = arguments[0], Path(arguments[1])
    settings = load_settings(
        TrainSettings, [], ["task=vae", "name=run", f"runs_dir={folder}", "steps=100", "batch_size=2",
                            "optimizer.max_skipped=3", "report.trackers=[]"]
    )  # fmt: skip
    accelerator = open_accelerator(settings)
    with FaultWatch(settings, accelerator) as watch:
        if scenario == "together":
            told = {
                "row": logged_together(settings, accelerator),
                "skips": skipped_steps(accelerator, watch),
                "signal": met_by_a_signal(accelerator, watch),
            }
            (folder / f"{accelerator.process_index}.json").write_text(json.dumps(told))
        elif scenario == "end":
            for step in range(5):
                watch.after_step(step, False, passes(accelerator, bad_process=1))
        elif scenario == "data":
            shards = {"laion": {"contents": ["whole", "half"][accelerator.process_index]}, "own": {"contents": "a"}}
            check_same_data({"seed": 0, "sources": shards})
        elif scenario == "death":
            if accelerator.process_index == 1:
                raise MemoryError("this process is out of memory")
            watch.after_step(0, True, [])
    return 0


def passes(accelerator: Accelerator, bad_process: int | None) -> list[tuple[torch.Tensor, list[str]]]:
    index = accelerator.process_index
    second = BAD if index == bad_process else GOOD
    return [(GOOD, [f"laion/00000/{index}0"]), (second, [f"laion/00007/{index}1", f"laion/00007/{index}2"])]


def met_by_a_signal(accelerator: Accelerator, watch: FaultWatch) -> dict[str, Any]:
    """Process 1 is sent a signal in step 3."""
    for step in range(100):
        if step == 3 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        watch.after_step(step, True, [])
        if watch.stop:
            return {"step": step, "stop": watch.stop}
    return {}


def skipped_steps(accelerator: Accelerator, watch: FaultWatch) -> dict[str, Any]:
    """Step 1 has a loss that is not finite on process 1; in step 2 gradients alone are not."""
    taken = [
        watch.after_step(0, True, passes(accelerator, None)),
        watch.after_step(1, False, passes(accelerator, 1)),
        watch.after_step(2, False, passes(accelerator, None)),
        watch.after_step(3, True, passes(accelerator, None)),
        watch.after_step(4, False, passes(accelerator, 0)),
    ]
    watch.wait()
    return {"taken": taken, "skipped": watch.skipped}


def logged_together(settings: TrainSettings, accelerator: Accelerator) -> dict[str, Any]:
    """A row of two steps, with losses 1 and 2 on process 0, 3 and nothing on process 1."""
    report = Report(settings, accelerator, done=0)
    second = (torch.tensor(2.0), BAD)[accelerator.process_index]
    report.forward_pass({"loss": 1.0 + 2.0 * torch.tensor(accelerator.process_index)}, {"entities": 3})
    report.forward_pass({"loss": second}, {"entities": accelerator.process_index})
    return report.log(2, {"rest": 1e-3}, skipped=0, gradient_norm=1.0)


if __name__ == "__main__":
    status = run_command(main, sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # as a launcher would end it: without torch's farewell among processes
