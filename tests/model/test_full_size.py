"""SD 1.5 and SD 2.1 as their config files describe them, with random weights: one training step, and through the disk.

About 15 GB of memory and two to five minutes a model on two cores.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.inputs import SubjectInputs
from model.saving import load_subject_model, save_subject_model
from model.subject_adapter import SubjectAdapter

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
# The image towers' widths: ViT-L-14 and ViT-H-14 at 224 px.
IMAGE_FEATURES = {
    "sd15": {"pooled_dim": 768, "patch_dim": 1024, "num_patches": 256},
    "sd21": {"pooled_dim": 1024, "patch_dim": 1280, "num_patches": 256},
}
TRAINED_MILLIONS = {"sd15": 350, "sd21": 580}

pytestmark = pytest.mark.slow


def read_config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def base(config: dict[str, Any]) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    torch.manual_seed(0)
    architecture = config["architecture"]
    return UNet2DConditionModel(**architecture["unet"]), CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"]))


def one_picture(vocabulary: int, features: dict[str, int]) -> SubjectInputs:
    """One subject with one reference, placed, in a prompt of random words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary - 2, (1, 77), generator=generator)
    ids[0, 10] = vocabulary  # the placeholder
    return SubjectInputs(
        input_ids=ids,
        plain_input_ids=ids.clamp(max=vocabulary - 1),
        empty_input_ids=torch.full((1, 77), vocabulary - 1),
        placeholder_positions=torch.tensor([[10]]),
        noun_ids=torch.tensor([[[5]]]),
        pooled=torch.randn(1, 1, features["pooled_dim"], generator=generator),
        patches=torch.randn(1, 1, 1, features["num_patches"], features["patch_dim"], generator=generator),
        reference_keep=torch.ones(1, 1, 1, dtype=torch.bool),
        subject_keep=torch.ones(1, 1, dtype=torch.bool),
        boxes=torch.tensor([[[0.2, 0.2, 0.8, 0.8]]]),
        location_keep=torch.ones(1, dtype=torch.bool),
        strength=torch.ones(1, 1),
    )


def train_one_step(model: SubjectDiffusionModel, inputs: SubjectInputs) -> None:
    """At 256 px, that is 32 x 32 latents, with the optimizer and learning rate of the recipe."""
    model.train()
    model.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 1, 4, 32, 32, generator=generator)
    loss = (model(latents, torch.tensor([500]), inputs) - noise).square().mean()
    loss.backward()
    assert loss.isfinite()
    optimizer.step()


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_it_is_built_trained_for_a_step_and_comes_back_from_disk(tmp_path, name):
    config, features = read_config(name), IMAGE_FEATURES[name]
    unet, text_encoder = base(config)
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=text_encoder.config.hidden_size, **features, **config["adapter"]
    )
    model = SubjectDiffusionModel(unet, text_encoder, adapter)
    trained = model.set_trainable(config["trained"])
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count / 1e6 == pytest.approx(TRAINED_MILLIONS[name], rel=0.03)
    train_one_step(model, one_picture(text_encoder.config.vocab_size, features))

    small = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 1, "head_width": 32}
    image_encoder = SubjectImageEncoder(embed_dim=32, vision_cfg=small)
    save_subject_model(tmp_path, model, base=config["base"], trained=trained, image_encoder=image_encoder, card="")
    expected = {n: p.detach().sum(dtype=torch.float64) for n, p in model.named_parameters()}
    del model, unet, text_encoder, adapter
    gc.collect()
    loaded = load_subject_model(tmp_path).compose(*base(config))
    assert {n: p.detach().sum(dtype=torch.float64) for n, p in loaded.named_parameters()} == expected
