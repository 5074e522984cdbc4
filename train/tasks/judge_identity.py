"""The identity judge: a self-supervised image encoder that tells subjects apart, for evaluation only.

Two separate renders of a subject, on two backgrounds, are a positive pair; all others in the batch are negatives
(SimCLR, arXiv 2002.05709, equation 1). Nothing of it, weights or batches, is shared with the models that it judges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import shufflenet_v2_x0_5

from data_pipeline.toybox.backgrounds import BACKGROUNDS
from data_pipeline.toybox.world import BACKGROUND_POOL, Placement, ToyboxScene, ToyboxWorld, compose
from train.pictures import save_grid
from train.scenes import SceneDataset, as_tensor, make_world
from train.settings import TrainSettings


class IdentityJudge(nn.Module):
    """torchvision's ShuffleNetV2 x0.5 with a small projection: (N, 3, H, W) in 0..1 -> (N, D) of unit length."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.network = shufflenet_v2_x0_5(num_classes=width)
        # Pictures are small: keep the full resolution of the first two stages.
        self.network.conv1[0].stride = (1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return functional.normalize(self.network(pictures * 2 - 1), dim=-1)


class PairLoss(nn.Module):
    """NT-Xent over pairs."""

    def __init__(self, judge: IdentityJudge, temperature: float) -> None:
        super().__init__()
        self.judge, self.temperature = judge, temperature

    def forward(
        self, batch: tuple[Tensor, Tensor], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch  # (N, 3, H, W) each, row i shows the same subject
        codes = self.judge(torch.cat([first, second]))  # (2N, D)
        count = len(first)
        logits = codes @ codes.T / self.temperature
        logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=logits.device), float("-inf"))
        partner = torch.arange(2 * count, device=logits.device).roll(count)
        found = (logits.argmax(dim=1) == partner).float().mean()
        return functional.cross_entropy(logits, partner), {"pairs_found": found}


class IdentityJudgeTask:
    """`options`: temperature."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        options: dict[str, Any] = {"temperature": 0.1} | settings.options
        self.loader_workers, self.device = settings.data.workers, device
        self.module = PairLoss(IdentityJudge(), options["temperature"])
        data = settings.data.model_copy(update={"references": (2, 2), "max_subjects": 1})
        self.dataset = SceneDataset(_single(data, None), self._pair, distinct=settings.data.distinct_scenes)
        unseen = SceneDataset(_single(data, "val"), self._pair)
        self.unseen = self.collate([unseen[i] for i in range(100)])

    def _pair(self, scene: ToyboxScene) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((scene.index % 2**62, 1))
        return tuple(_on_background(view, rng) for view in scene.entities[0].references)

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        first, second = zip(*items, strict=True)
        return torch.stack(first).to(self.device), torch.stack(second).to(self.device)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        first, second = self.unseen
        similarity = self.module.judge(first) @ self.module.judge(second).T
        nearest = similarity.argmax(dim=1)
        save_grid(
            [[first[i] for i in range(12)], [second[nearest[i]] for i in range(12)], [second[i] for i in range(12)]],
            picture,
        )
        return {
            "retrieval_at_1_of_100": float((nearest == torch.arange(len(first), device=nearest.device)).float().mean())
        }

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        judge = self.module.judge
        state = {name: value.detach().cpu().contiguous() for name, value in judge.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        config = {
            "architecture": "torchvision shufflenet_v2_x0_5, first stride 1",
            "width": judge.network.fc.out_features,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _single(data: Any, split: str | None) -> ToyboxWorld:
    world = make_world(data, split=split)
    world.shares = np.array([0.0, 1.0])  # always exactly one subject
    return world


def _on_background(view: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A reference view, large, at a random place of a random background."""
    size = view.shape[0]
    side = rng.uniform(0.6, 0.95)
    centre = tuple(rng.uniform(side / 2 - 0.05, 1.05 - side / 2, 2))
    name = str(rng.choice(list(BACKGROUNDS)))
    picture, _ = compose([Placement(view, centre, side)], name, int(rng.integers(BACKGROUND_POOL)), size)
    return as_tensor(picture)
