"""Find the models that a run stands on: an earlier run's export, or any folder."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import UserError
from train.settings import TrainSettings


def input_folder(settings: TrainSettings, part: str) -> Path:
    """The folder of `settings.inputs[part]`.

    Raises:
        UserError: the part is not named in the settings, or has not been trained yet.
    """
    if part not in settings.inputs:
        raise UserError(f"inputs.{part}: task {settings.task} needs it; give a run's name (toybox/{part}) or a folder")
    name = settings.inputs[part]
    exported = settings.runs_dir.expanduser() / name / "export"
    for folder in (exported, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    raise UserError(f"inputs.{part}: neither {exported} nor the folder {name} exists; train it first")
