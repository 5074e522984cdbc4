"""`subject-diffusion train export`: the averaged weights of one checkpoint as the plain parts that the pipeline loads.

subject-diffusion train export --config configs/train/sd21.yaml                      # the newest checkpoint
subject-diffusion train export --config … --checkpoint RUN/checkpoints/step-00010000 --out FOLDER

Nothing is trained and no process group is opened: whatever strategy wrote the checkpoint, one process reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import CommandParser, UserError
from data_pipeline.settings import load_settings

if TYPE_CHECKING:
    from train.settings import TrainSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Export from the command line; returns the exit status."""
    parser = CommandParser("train export", description="Write the averaged weights of a checkpoint as plain parts.")
    parser.add_argument(
        "--config", action="append", type=Path, required=True, help="YAML file of the run; may be repeated, later wins"
    )
    parser.add_argument("--checkpoint", type=Path, help="folder step-…; default: the newest of the run")
    parser.add_argument("--out", type=Path, help="folder to write; default: export, in the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    arguments = parser.parse_args(argv)
    from train.settings import TrainSettings

    settings = load_settings(TrainSettings, arguments.config, arguments.overrides)
    print(f"{settings.name}: weights in {export_checkpoint(settings, arguments.checkpoint, arguments.out)}")
    return 0


def export_checkpoint(settings: TrainSettings, checkpoint: Path | None = None, out: Path | None = None) -> Path:
    """Build the task without training it, give it the weights of `checkpoint`, and let it export itself.

    Returns:
        The folder that was written.
    Raises:
        UserError: no such checkpoint, or one of another model.
    """
    import torch

    from train.engine.checkpoints import list_checkpoints, read_averaged_weights
    from train.tasks import build_task

    if checkpoint is None:
        checkpoint = next(reversed(list_checkpoints(settings.folder / "checkpoints")), None)
        if checkpoint is None:
            raise UserError(
                f"{settings.folder / 'checkpoints'}: holds no checkpoint; train first, or give --checkpoint"
            )
    out = out or settings.folder / "export"
    weights = read_averaged_weights(checkpoint)
    task = build_task(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    trained = {name: parameter for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    for name in sorted(trained.keys() | weights.keys()):
        found = list(weights[name].shape) if name in weights else "missing"
        wanted = list(trained[name].shape) if name in trained else "not trained"
        if found != wanted:
            raise UserError(
                f"{checkpoint}: does not fit the model of these settings ({name}: {found} in the checkpoint, {wanted} "
                "in the model); give the settings of its run"
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    task.module.eval()
    task.export(out)
    return out
