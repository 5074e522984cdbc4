"""The identity judge: a self-supervised image encoder that tells subjects apart, for evaluation only.

Two separate renders of a subject, cut from two scenes, are a positive pair; all others in the batch are negatives
(SimCLR, arXiv 2002.05709, equation 1). Nothing of it, weights or batches, is shared with the models that it judges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import shufflenet_v2_x0_5

from data_pipeline.toybox.backgrounds import BACKGROUNDS
from data_pipeline.toybox.world import BACKGROUND_POOL, Placement, ToyboxScene, box_of, compose
from train.data.crops import crop_to_boxes
from train.data.scenes import SceneDataset, as_tensor, make_world
from train.draws import SampleDraws
from train.pictures import save_grid
from train.settings import TrainSettings
from train.tasks.toybox_task import ToyboxTask

SIDES = (0.34, 0.9)  # longer side of the subject, share of the picture
JITTER = 0.06  # of the box edges, share of that side
UNSEEN_SCENES = 150  # whose different subjects the judge is validated on
BLUR_SHARE = 0.5  # of pictures are blurred, so that sharpness tells nothing


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

    def forward(self, batch: tuple[Tensor, Tensor], draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch  # (N, 3, H, W) each, row i shows the same subject
        codes = self.judge(torch.cat([first, second]))  # (2N, D)
        count = len(first)
        logits = codes @ codes.T / self.temperature
        logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=logits.device), float("-inf"))
        partner = torch.arange(2 * count, device=logits.device).roll(count)
        found = (logits.argmax(dim=1) == partner).float().mean()
        return functional.cross_entropy(logits, partner), {"pairs_found": found}


class IdentityJudgeTask(ToyboxTask):
    """`options`: temperature."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        options: dict[str, Any] = {"temperature": 0.1} | settings.options
        self.module = PairLoss(IdentityJudge(), options["temperature"])
        pairs = {"references": (2, 2), "min_subjects": 1, "max_subjects": 1}
        data = settings.data.model_copy(update={"toybox": settings.data.toybox.model_copy(update=pairs)})
        self.dataset = SceneDataset(make_world(data), self._pair, distinct=settings.data.distinct_scenes)
        world = make_world(data, split="val")
        one_each = {scene.entities[0].subject.id: scene for scene in map(world.scene, range(UNSEEN_SCENES))}
        self.unseen = self.batch(self.collate([self._pair(scene) for scene in one_each.values()]))

    def _pair(self, scene: ToyboxScene) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((scene.index % 2**62, 1))
        return tuple(_seen_in_a_scene(view, rng) for view in scene.entities[0].references)

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        first, second = zip(*items, strict=True)
        return torch.stack(first), torch.stack(second)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        first, second = self.unseen
        similarity = self.module.judge(first) @ self.module.judge(second).T
        nearest = similarity.argmax(dim=1)
        save_grid(
            [[first[i] for i in range(12)], [second[nearest[i]] for i in range(12)], [second[i] for i in range(12)]],
            picture,
        )
        found = (nearest == torch.arange(len(first), device=nearest.device)).float().mean()
        return {"retrieval_at_1": float(found), "gallery": len(first)}

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


def _seen_in_a_scene(view: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A reference view in a scene, cut out by its box, as drawn ones will be: some small and coarse, some blurred."""
    size = view.shape[0]
    side = rng.uniform(*SIDES)
    centre = tuple(rng.uniform(side / 2 - 0.05, 1.05 - side / 2, 2))
    name = str(rng.choice(list(BACKGROUNDS)))
    picture, masks = compose([Placement(view, centre, side)], name, int(rng.integers(BACKGROUND_POOL)), size)
    box = np.asarray(box_of(masks[0])) / size + rng.uniform(-JITTER, JITTER, 4) * side
    if rng.random() < BLUR_SHARE:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.2))
    return crop_to_boxes(as_tensor(picture)[None], torch.from_numpy(box)[None], size)[0]
