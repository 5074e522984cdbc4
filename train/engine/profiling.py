"""A window of torch.profiler in the middle of a run: `report.profile_at=200` and `profile_steps=3`.

The step at `profile_at` warms the profiler up, those after it are recorded. The main process writes
`profile/trace.json.gz` (open it at ui.perfetto.dev or chrome://tracing) and `profile/table.txt` into the run's folder.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

from data_pipeline.errors import UserError
from train.settings import RunSettings

TABLE_ROWS = 40


class ProfileWindow:
    """Nothing at all while `report.profile_at` is not set."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator) -> None:
        """
        Raises:
            UserError: the run ends before the window does.
        """
        report = settings.report
        first = report.profile_at if accelerator.is_main_process else None
        self.first, self.last = first, None if first is None else first + report.profile_steps
        self.folder = settings.folder / "profile"
        self._steps = report.profile_steps
        self._profiler: torch.profiler.profile | None = None
        if report.profile_at is not None and report.profile_at + report.profile_steps >= settings.steps:
            raise UserError(
                f"report.profile_at={report.profile_at}: a step of warm-up and {report.profile_steps} recorded ones "
                f"do not fit into a run of {settings.steps} steps; give an earlier step"
            )

    def before(self, step: int) -> None:
        """Called before each step (0-based)."""
        if step == self.first:
            schedule = {"wait": 0, "warmup": 1, "active": self._steps, "repeat": 1}
            self._profiler = ProfileKwargs(
                schedule_option=schedule, on_trace_ready=self._write, record_shapes=True
            ).build()
            self._profiler.start()

    def after(self, step: int) -> None:
        """Called after each step."""
        if self._profiler is not None:
            self._profiler.step()
            if step == self.last:
                self.close()

    def close(self) -> None:
        """Called when the run ends; a window that is still open is written as far as it is."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=TABLE_ROWS)
        (self.folder / "table.txt").write_text(table + "\n")
