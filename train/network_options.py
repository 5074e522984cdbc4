"""What the section `engine` changes in the networks of the tasks base and subject, none of it their results.

Recomputed activations (Chen et al., arXiv 1604.06174), compiled transformer blocks, and frozen weights held in the
precision that autocast gives them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from train.settings import EngineSettings

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS_A_BLOCK = 8  # variants of one block's code that may be compiled: recorded layers, numbers of subject tokens


def apply_engine(engine: EngineSettings, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Let the networks run as `engine` says; called when adapter, recorder and gradients are in place."""
    if "unet" in engine.checkpoint_activations:
        unet.enable_gradient_checkpointing()
    if "text_encoder" in engine.checkpoint_activations:
        text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    if engine.strategy == "ddp" and engine.precision in LOW:
        for network in (unet, text_encoder):
            hold_frozen_weights_in(network, LOW[engine.precision])
    if not torch.cuda.is_available():
        # In bf16 the backward pass of a CPU's fused attention takes nearly half of a step; plain products do not.
        torch.backends.cuda.enable_flash_sdp(engine.precision != "bf16")  # the CPU's too, whatever it is called
    if engine.compile:
        compile_blocks(unet)


def hold_frozen_weights_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers and convolutions in `dtype`: no cast at every step, and half the memory,
    1.7 GB less for the UNet of Stable Diffusion 1.5 or 2.1 (counted).

    Autocast rounds exactly these to `dtype` whenever they are used, so no result changes (equal to the bit on a CPU).
    Norms, biases and embeddings stay as they are. Under ZeRO all stays float32: DeepSpeed casts by rules of its own.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)


def compile_blocks(unet: UNet2DConditionModel, backend: str = "inductor") -> None:
    """`torch.compile` each kind of transformer block once, not the whole UNet: a minute instead of many.

    Layers that record attention are told apart by their names, so each has a graph of its own: more than the default
    limit, beyond which torch would quietly go on uncompiled.
    """
    blocks = sum(type(module).__name__ in unet._repeated_blocks for module in unet.modules())
    limit = max(torch._dynamo.config.recompile_limit, GRAPHS_A_BLOCK * blocks)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4 * limit)
    unet.compile_repeated_blocks(backend=backend)


def as_taken(values: Tensor, network: nn.Module) -> Tensor:
    """Float32 `values` as `network` takes them: autocast casts by itself, a network cast as a whole wants its dtype."""
    if torch.is_autocast_enabled(values.device.type):
        return values
    return values.to(next(network.parameters()).dtype)


@contextmanager
def evaluation(engine: EngineSettings, device: torch.device) -> Iterator[None]:
    """Without gradients, in the precision of training, and uncompiled: shapes seen once are not worth a graph."""
    low = LOW.get(engine.precision)
    with (
        torch.no_grad(),
        torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
