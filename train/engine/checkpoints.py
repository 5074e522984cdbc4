"""Checkpoints of one format for every strategy and number of processes, which a kill at any moment cannot spoil.

A checkpoint is a folder `step-00001000/`, written beside, synced, renamed into place, and only then old ones removed:
`model.safetensors`, the trained parameters in float32 by name (frozen ones come from the base) and the buffers;
`ema.safetensors`; `optimizer.safetensors`, NAME.exp_avg and so on; `state.json`, everything else. The main process
reads and writes, the others hand in their pieces and get theirs, and all learn of a failure. Of the optimiser's
hyper-parameters the file keeps a record only: a run that resumes uses those of its own settings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import UserError
from train.engine.run_state import RunState, WholeTensors
from train.engine.strategies import zero_stage

FORMAT = 2
STATE, MODEL, EMA, OPTIMIZER = "state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.name.endswith(".part"))


def write_checkpoint(folder: Path, state: RunState, accelerator: Accelerator, keep: int) -> Path:
    """Save the run as it is after `state.step`, then remove all but the newest `keep`; all processes call it.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    target = folder / f"step-{state.step:08d}"
    part = folder / f"{target.name}.part"
    if _told(accelerator, target.is_dir()):  # written before a stop at this very step: complete, and the same
        return target
    whole = WholeTensors(state, accelerator)
    _main_does(accelerator, target, partial(_clear, folder, part))
    _main_does(accelerator, target, partial(_write_tensors, part / MODEL, _on_main(accelerator, whole.weights())))
    moments = _on_main(accelerator, whole.optimizer_tensors())
    _main_does(accelerator, target, partial(_write_tensors, part / OPTIMIZER, moments))
    averages = _on_main(accelerator, iter(state.ema.state_tensors().items()))
    _main_does(accelerator, target, partial(_write_tensors, part / EMA, averages))
    plain = _plain_state(state, whole, accelerator)

    def finish() -> None:
        with open(part / STATE, "w") as handle:
            json.dump(plain, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        _sync_folder(part)
        part.rename(target)
        _sync_folder(folder)
        for old in list_checkpoints(folder)[:-keep]:
            # Renamed first: a kill while it is removed must not leave a half that looks like a whole.
            shutil.rmtree(old.rename(old.with_name(old.name + ".part")), ignore_errors=True)

    _main_does(accelerator, target, finish)
    return target


def read_checkpoint(folder: Path, state: RunState, accelerator: Accelerator) -> int:
    """Put the newest checkpoint into `state`, prepared by `strategies.prepare`; all processes call it.

    Only the main process needs to see `folder`.

    Returns:
        The number of steps done; 0 where there is no checkpoint.
    Raises:
        UserError: the checkpoint does not fit the model or the optimiser, or is damaged.
    """
    whole = WholeTensors(state, accelerator)
    newest, plain, problem = None, None, None
    if accelerator.is_main_process:
        newest = next(reversed(list_checkpoints(folder)), None)
        try:
            if newest is not None:
                plain = _read_plain(newest)
                problem = _misfit(newest, plain, whole)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problem = f"{newest}: damaged ({error}); remove it, and the run goes on from the one before"
    newest, plain, problem = _told(accelerator, (newest, plain, problem))
    if problem:
        raise UserError(problem.replace("\n", " "))
    if newest is None or plain is None:
        return 0
    for name, value in _read_tensors(accelerator, newest / MODEL):
        whole.set_weight(name, value)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in _read_tensors(accelerator, newest / OPTIMIZER):
        parameter, key = name.rsplit(".", 1)
        moments.setdefault(parameter, {})[key] = value
        if len(moments[parameter]) == len(plain["optimizer"]["keys"]):
            whole.set_optimizer_state(parameter, moments.pop(parameter))
    state.ema.load_tensors({name: value.cpu() for name, value in _read_tensors(accelerator, newest / EMA)})
    whole.set_loss_scale(plain["loss_scale"])
    state.step, state.skipped, state.position = plain["step"], plain["skipped"], plain["position"]
    return state.step


def read_averaged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The EMA weights of one checkpoint by name, on the CPU.

    Raises:
        UserError: it is no checkpoint, or damaged.
    """
    try:
        _read_plain(checkpoint)
        with safe_open(checkpoint / EMA, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: no checkpoint, or a damaged one ({error})") from error


def _plain_state(state: RunState, whole: WholeTensors, accelerator: Accelerator) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in whole.inner.param_groups]
    return {
        "format": FORMAT,
        "step": state.step,
        "skipped": state.skipped,
        "position": state.position,
        "loss_scale": whole.loss_scale(),
        "optimizer": {"kind": type(whole.inner).__name__, "keys": whole.optimizer_keys(), "groups": groups},
        "written_under": {"zero_stage": zero_stage(accelerator), "processes": accelerator.num_processes},
    }


def _read_plain(checkpoint: Path) -> dict[str, Any]:
    """state.json, after a look at the other files' headers and lengths."""
    try:
        plain: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    except ValueError as error:
        raise ValueError(f"{STATE}: {error}") from error
    if plain.get("format") != FORMAT:
        raise ValueError(f"{STATE} is not of format {FORMAT}, but of another version of this program")
    for name in (MODEL, EMA, OPTIMIZER):
        try:
            with safe_open(checkpoint / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{name}: {error}") from error
    return plain


def _misfit(checkpoint: Path, plain: dict[str, Any], whole: WholeTensors) -> str | None:
    """What of the checkpoint does not fit the model or the optimiser: the first misfit, as one line."""
    advice = "give another `name`, or remove it"
    wanted = whole.shapes()
    for file, names in ((MODEL, wanted), (EMA, {name: wanted[name] for name in whole.trained})):
        with safe_open(checkpoint / file, "pt") as opened:
            found = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        for name in sorted(names.keys() | found.keys()):
            if names.get(name) != found.get(name):
                return (
                    f"{checkpoint}: does not fit this model ({file}, {name}: {found.get(name, 'missing')} in the "
                    f"checkpoint, {names.get(name, 'not trained')} in the model); {advice}"
                )
    kind = type(whole.inner).__name__
    if plain["optimizer"]["kind"] != kind:
        return f"{checkpoint}: written with the optimiser {plain['optimizer']['kind']}, this run has {kind}; {advice}"
    return None


def _on_main(accelerator: Accelerator, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Take part in gathering every tensor; the main process keeps them, in main memory."""
    kept = {}
    for name, value in tensors:
        if accelerator.is_main_process:
            kept[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _read_tensors(accelerator: Accelerator, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file, read by the main process, on the device of each."""
    if accelerator.num_processes == 1:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name).to(accelerator.device)
        return
    opened = safe_open(file, "pt") if accelerator.is_main_process else None
    names = _told(accelerator, list(opened.keys()) if opened else [])
    for name in names:
        value = opened.get_tensor(name).to(accelerator.device) if opened else None
        shape, dtype = _told(accelerator, (value.shape, value.dtype) if value is not None else None)
        if value is None:
            value = torch.empty(shape, dtype=dtype, device=accelerator.device)
        yield name, broadcast(value, from_process=0)


def _clear(folder: Path, part: Path) -> None:
    """An empty folder to write into, and nothing left over from writes that were killed."""
    for left in folder.glob("step-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)


def _main_does(accelerator: Accelerator, target: Path, work: Callable[[], None]) -> None:
    """Let the main process write; where it cannot, no process goes on."""
    problem = None
    if accelerator.is_main_process:
        try:
            work()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(target.with_name(target.name + ".part"), ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problem = f"{target}: cannot be written ({reason}); free the disk and rerun"
    problem = _told(accelerator, problem)
    if problem:
        raise UserError(problem.replace("\n", " "))


def _told(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on all."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
