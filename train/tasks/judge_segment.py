"""The segmenter: which pixels of a scene are subjects, for measuring placement; evaluation only.

A stock `UNet2DModel` at timestep 0 with one output channel, trained on the true masks with cross-entropy.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.toybox.world import ToyboxScene
from train.data.scenes import SceneDataset, as_tensor, make_world
from train.draws import SampleDraws
from train.pictures import save_grid
from train.settings import TrainSettings
from train.tasks.toybox_task import ToyboxTask


class SegmentLoss(nn.Module):
    """Pixel-wise cross-entropy."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def logits(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..1 -> (N, 1, H, W); above 0 is subject."""
        return self.unet(pictures * 2 - 1, 0).sample

    def forward(self, batch: tuple[Tensor, Tensor], draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, masks = batch
        logits = self.logits(pictures)
        return functional.binary_cross_entropy_with_logits(logits, masks), {"iou": mask_iou(logits > 0, masks > 0.5)}


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows of intersection over union of (N, 1, H, W) bool masks; two empty masks agree fully."""
    both = (first & second).flatten(1).sum(dim=1).float()
    either = (first | second).flatten(1).sum(dim=1).float()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both)).mean()


class SegmentJudgeTask(ToyboxTask):
    """`options`: none."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        size = settings.data.size
        unet = UNet2DModel(
            sample_size=size, in_channels=3, out_channels=1, block_out_channels=(16, 32, 48), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=8,
            add_attention=False,
        )  # fmt: skip
        self.module = SegmentLoss(unet)
        world = make_world(settings.data)
        self.dataset = SceneDataset(world, self._picture_and_mask, distinct=settings.data.distinct_scenes)
        unseen = make_world(settings.data, split="val", seed=settings.data.seed + 1)
        self.unseen = self.batch(self.collate([self._picture_and_mask(unseen.scene(i)) for i in range(64)]))

    def _picture_and_mask(self, scene: ToyboxScene) -> tuple[Tensor, Tensor]:
        masks = [torch.from_numpy(entity.mask) for entity in scene.entities]
        size = scene.image.shape[0]
        subject = torch.stack(masks).any(dim=0) if masks else torch.zeros(size, size, dtype=torch.bool)
        return as_tensor(scene.image), subject[None].float()

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pictures, masks = zip(*items, strict=True)
        return torch.stack(pictures), torch.stack(masks)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        pictures, masks = self.unseen
        logits = self.module.logits(pictures)
        rows = [
            [x for i in range(3 * y, 3 * y + 3) for x in (pictures[i], logits[i].sigmoid(), masks[i])] for y in range(5)
        ]
        save_grid(rows, picture)
        return {"iou": float(mask_iou(logits > 0, masks > 0.5))}

    def export(self, folder: Path) -> None:
        self.module.unet.save_pretrained(folder)
