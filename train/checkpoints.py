"""Checkpoints that a kill at any moment cannot spoil: written beside, renamed into place, then old ones removed.

One checkpoint is a folder `step-00001000/` with everything that resumes; the position in the data is the step itself
(arithmetic, not history), so no loader state is stored.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import UserError


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.name.endswith(".part"))


def write_checkpoint(
    folder: Path, step: int, module: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Save model, EMA and optimiser of `step` as safetensors, then remove all but the newest `keep`.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    target = folder / f"step-{step:08d}"
    part = folder / f"{target.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(_contiguous(dict(module.state_dict())), part / "model.safetensors")
        save_file(_contiguous(ema), part / "ema.safetensors")
        tensors, plain = _flatten_optimizer(optimizer)
        save_file(tensors, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, "optimizer": plain}))
        for file in part.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error.strerror}); free the disk and rerun") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def read_checkpoint(folder: Path, module: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint in place.

    Returns:
        The number of steps done; 0 where there is no checkpoint.
    Raises:
        UserError: the checkpoint was written by another model shape.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    state = json.loads((newest / "state.json").read_text())
    try:
        module.load_state_dict(load_file(newest / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(
            f"{newest}: does not fit this model ({str(error).splitlines()[-1].strip()}); "
            "give another `name` or remove it"
        ) from error
    for name, value in load_file(newest / "ema.safetensors").items():
        ema[name].copy_(value)
    _restore_optimizer(optimizer, load_file(newest / "optimizer.safetensors"), state["optimizer"])
    return int(state["step"])


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    tensors = {f"{index}.{key}": value for index, entry in state["state"].items() for key, value in entry.items()}
    return _contiguous(tensors), state["param_groups"]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
