"""Find the exports of earlier runs that a run stands on."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import UserError
from train.settings import TrainSettings


def exported(settings: TrainSettings, name: str) -> Path:
    """Where the run of that name puts its export, whether it is there yet or not."""
    return settings.runs_dir.expanduser() / name / "export"


def input_folder(settings: TrainSettings, part: str) -> Path:
    """The folder of `settings.inputs[part]`, a run's name or a folder.

    Raises:
        UserError: the part is not named in the settings, or has not been trained yet.
    """
    if part not in settings.inputs:
        raise UserError(f"inputs.{part}: task {settings.task} needs it; give a run's name (toybox/{part}) or a folder")
    name = settings.inputs[part]
    for folder in (exported(settings, name), Path(name).expanduser()):
        if folder.is_dir():
            return folder
    raise UserError(f"inputs.{part}: neither {exported(settings, name)} nor the folder {name} exists; train it first")
