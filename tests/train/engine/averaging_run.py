"""One process of a run under DeepSpeed whose average is compared with one worked out from the whole weights.

torchrun --nproc_per_node 2 averaging_run.py STRATEGY PRECISION OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, distributed, nn

from data_pipeline.settings import load_settings
from train.engine.averaging import AveragedWeights
from train.engine.strategies import finish_step, open_accelerator, plain_module, prepare
from train.settings import EmaSettings, TrainSettings


class Network(nn.Module):
    """Sizes that do not divide by the number of processes, a frozen layer, and a parameter of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(7, 13), nn.Linear(13, 13).requires_grad_(False), nn.Linear(13, 5)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.frozen(self.first(x.to(self.first.weight.dtype))))
        return (self.last(hidden) * self.gate).float().square().mean()


def main(strategy: str, precision: str, out: Path) -> None:
    settings = load_settings(
        TrainSettings,
        [],
        ["task=vae", "name=x", "steps=9", f"engine.strategy={strategy}", f"engine.precision={precision}"],
    )
    accelerator = open_accelerator(settings)
    torch.manual_seed(0)
    module = Network()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = prepare(accelerator, module, optimizer)
    average = AveragedWeights(module, EmaSettings(decay=0.5))
    by_hand: dict[str, Tensor] = {}
    for step in range(5):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(torch.randn(4, 7)))
        finish_step(accelerator, wrapped, optimizer, 1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter).cpu().clone()
                by_hand[name] = decay * by_hand.get(name, whole) + (1 - decay) * whole

    def whole_weights() -> dict[str, Tensor]:
        with plain_module(accelerator, wrapped):
            return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    state, before = average.state_tensors(), whole_weights()
    with average.averaged():
        inside = whole_weights()
    after = whole_weights()
    shared = [state]
    distributed.broadcast_object_list(shared)
    average.load_tensors({name: value + 1 for name, value in shared[0].items()})
    again = average.state_tensors()
    if accelerator.is_main_process:
        out.write_text(json.dumps({
            "numbers": sum(value.numel() for value in state.values()),
            "numbers_held": sum(shadow.numel() for shadow in average._ema.shadow_params),
            "from_the_weights_by_hand": max(float((state[n] - by_hand[n]).abs().max()) for n in by_hand),
            "inside_from_the_average": max(float((inside[n] - state[n].to(inside[n])).abs().max()) for n in by_hand),
            "weights_as_before": all(torch.equal(before[n], after[n]) for n in before),
            "loaded_as_saved": all(torch.equal(again[n], state[n] + 1) for n in state),
        }))  # fmt: skip
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
