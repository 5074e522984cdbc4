"""AdamW over named groups of parameters, each with a factor of its own on the learning rate (arXiv 1711.05101).

The schedule (`schedule.py`) multiplies each group's `initial_lr`. 8-bit states: Dettmers et al., arXiv 2110.02861.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import UserError
from train.settings import OptimizerSettings

REST = "rest"  # name of the group of all that no pattern names


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser of the parameters that take gradients, on the device where they are.

    Its groups carry `name` (the pattern, or `rest`), `initial_lr` and `lr`.

    Raises:
        UserError: a pattern or factor that cannot be used; 8-bit Adam without bitsandbytes or without a GPU.
    """
    groups = parameter_groups(module, settings)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, **options, **({"fused": True} if on_gpu else {"foreach": True}))
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.kind=adamw8bit: needs bitsandbytes, which is not installed; pip install bitsandbytes, "
            "or set optimizer.kind=adamw"
        )
    if not on_gpu:
        raise UserError("optimizer.kind=adamw8bit: runs on an NVIDIA GPU only; set optimizer.kind=adamw")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Each trained parameter in the group of the first pattern that matches its whole name, else in the rest.

    Raises:
        UserError: no trained parameter; a pattern that is no regular expression or takes none; a factor not above 0.
    """
    left = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not left:
        raise UserError(
            "trained: no parameter takes gradients; name some by pattern in the model file or override.trained"
        )
    names = list(left)
    groups = []
    for pattern, factor in settings.groups.items():
        if factor <= 0:
            raise UserError(
                f"optimizer.groups: {pattern}: {factor:g}: a factor on the learning rate is above 0; "
                "what is not to be trained is left out of `trained`"
            )
        taken = _matching(pattern, names)
        mine = {name: left.pop(name) for name in taken if name in left}
        if not mine:
            why = "an earlier pattern takes all of its parameters" if taken else "no trained parameter has such a name"
            raise UserError(f"optimizer.groups: {pattern}: {why}; {_nearest(pattern, list(left) if taken else names)}")
        groups.append(_group(pattern, factor, mine, settings))
    return [*groups, _group(REST, 1.0, left, settings)] if left else groups


def _group(
    name: str, factor: float, parameters: dict[str, nn.Parameter], settings: OptimizerSettings
) -> dict[str, Any]:
    rate = factor * settings.learning_rate
    return {"params": list(parameters.values()), "name": name, "initial_lr": rate, "lr": rate}


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"optimizer.groups: {pattern}: is no regular expression ({error})") from error


def _nearest(pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern)
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
    return f"names like it: {', '.join(near)}" if near else "none is left"
