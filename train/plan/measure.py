"""What a training pass keeps and computes, measured on tensors without values: no GPU, no weights, no network.

Kept for the backward pass: every storage that autograd packs, weights aside. Attention runs through the fused kernels'
own operators, which keep q, k, v, output and log-sum-exp: torch's stand-in for other devices keeps the probabilities.
Autocast is torch's own CUDA policy on fake CUDA tensors, which know their dtype and device but hold nothing.
FLOPs: torch's FlopCounterMode; a multiplication and an addition are 2, the fused backward's recomputation is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from train.data.frozen_encoders import PICTURES_A_CALL, PIXELS_A_CALL
from train.network_options import hold_frozen_weights_in
from train.plan.networks import Networks, build_networks, training_loss
from train.settings import TrainSettings

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINTED = (
    ResnetBlock2D,
    BasicTransformerBlock,
    CLIPEncoderLayer,
)  # what the stock classes recompute, one at a time
CHECKPOINT_BY = "_gradient_checkpointing_func"  # their attribute: called with the layer's work and its inputs
BOTH_PARTS = ("unet", "text_encoder")
WIDEST_FLASH_HEAD = 256
ATEN = torch.ops.aten


class FusedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` as a GPU does it: flash; with masks, float32, wide heads memory-efficient."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if torch.is_autocast_enabled("cuda") and query.device.type == "cuda":
            half = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(half), key.to(half), value.to(half)
            attn_mask = attn_mask.to(half) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= WIDEST_FLASH_HEAD:
            return ATEN._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]  # fmt: skip
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return ATEN._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]


def _attention_backward(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Four products, twice the forward's two; the kernels' fifth recomputes the probabilities."""
    return 2 * sdpa_flop_count(*args[1:4])


FUSED_BACKWARD = {
    ATEN._scaled_dot_product_flash_attention_backward: _attention_backward,
    ATEN._scaled_dot_product_efficient_attention_backward: _attention_backward,
}


class KeptTensors:
    """Bytes that autograd keeps while this context is open, each storage once, without the parameters' own.

    What torch's checkpoint would keep is told from the same pass: layers that are set to recompute their activations
    run as they are meanwhile, but what they keep inside counts for `bytes` alone, their inputs for `bytes_recomputing`.
    """

    def __init__(self, network: nn.Module, counter: FlopCounterMode | None = None) -> None:
        self.network, self.counter = network, counter
        self.bytes = 0
        self.bytes_recomputing = 0  # equal to `bytes` where no layer recomputes
        self.largest_segment = 0  # bytes kept inside one of `CHECKPOINTED`
        self.segment_flops = dict.fromkeys(BOTH_PARTS, 0)  # forward, inside all of them
        self._held: dict[int, Any] = {}  # storages by address, held so that no address is used twice
        self._held_recomputing: dict[int, Any] = {}
        self._recomputed = False  # whether a layer that recomputes is running

    def __enter__(self) -> KeptTensors:
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            self._held[tensor.untyped_storage()._cdata] = tensor
        self._held_recomputing.update(self._held)
        self._context = ExitStack()
        self._context.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        for name, module in self.network.named_modules():
            if isinstance(module, CHECKPOINTED):
                self._follow(module, name.split(".")[0])
            if getattr(module, "gradient_checkpointing", False):  # diffusers' and transformers' way
                self._context.callback(setattr, module, CHECKPOINT_BY, getattr(module, CHECKPOINT_BY))
                setattr(module, CHECKPOINT_BY, self._run_recomputed)
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.close()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage
            self.bytes += storage.nbytes()
        if not self._recomputed:
            self._keep_recomputing(storage)
        return tensor

    def _keep_recomputing(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._held_recomputing:
            self._held_recomputing[storage._cdata] = storage
            self.bytes_recomputing += storage.nbytes()

    def _run_recomputed(self, work: Callable[..., Any], *inputs: Any) -> Any:
        """In the place of torch's checkpoint, which keeps all tensors among the inputs."""
        for value in inputs:
            if torch.is_tensor(value):
                self._keep_recomputing(value.untyped_storage())
        self._recomputed = True
        try:
            return work(*inputs)
        finally:
            self._recomputed = False

    def _follow(self, module: nn.Module, part: str) -> None:
        start = [0, 0]

        def before(module: nn.Module, args: Any) -> None:
            start[:] = self.bytes, self._flops()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.largest_segment = max(self.largest_segment, self.bytes - start[0])
            self.segment_flops[part] += self._flops() - start[1]

        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
            self._context.callback(handle.remove)

    def _flops(self) -> int:
        return self.counter.get_total_flops() if self.counter else 0


class LivePeak(TorchDispatchMode):
    """Most bytes alive at once of what is made in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in inputs | self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return output

    def _gone(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


@dataclass(frozen=True)
class Activations:
    """Bytes that one process holds at the height of a training pass, beside weights, gradients and optimiser."""

    fixed: int  # whatever the batch: autocast's copies of weights
    per_sample: int

    def of(self, batch_size: int) -> int:
        return self.fixed + self.per_sample * batch_size


@dataclass(frozen=True)
class FrozenNetwork:
    """A network that only looks: autoencoder's encoder, image tower."""

    parameters: int  # autoencoder: with its decoder, which validation needs
    flops: int  # of one picture
    work_bytes: int  # alive at once beside the weights, for one picture
    pictures_a_call: int


@dataclass(frozen=True)
class Measured:
    """Everything that is measured of a run; bytes and FLOPs of the fullest batch."""

    networks: Networks  # on meta
    ddp: dict[bool, Activations]  # by whether activations are recomputed; frozen weights held in half precision
    zero: dict[bool, Activations]  # all weights of one type
    forward_flops: int  # of one sample, trained networks
    backward_flops: int
    recomputed_flops: dict[str, int]  # what checkpointing of each part adds, at most
    vae: FrozenNetwork
    tower: FrozenNetwork | None


def measure(settings: TrainSettings, recomputed: Sequence[str] = BOTH_PARTS) -> Measured:
    """Build the run's networks without weights and look at one and two samples.

    Args:
        recomputed: parts whose activations are recomputed in the second of each pair of measurements.
    """
    dtype = DTYPES[settings.engine.precision]
    with torch.device("meta"):
        networks = build_networks(settings)
        with FlopCounterMode(display=False, custom_mapping=FUSED_BACKWARD) as counter, FusedAttention():
            with KeptTensors(networks.trainable, counter) as kept:
                loss = training_loss(networks, settings, 1)
            forward = counter.get_total_flops()
            loss.backward()
        networks.trainable.zero_grad(set_to_none=True)
        backward = counter.get_total_flops() - forward
        vae, tower = _frozen(settings, networks, dtype)
        if dtype == torch.float32:
            ddp = zero = _activations(networks, settings, recomputed)[0]
    if dtype != torch.float32:
        with FakeTensorMode(), torch.device("cuda"), cuda_autocast(dtype):
            ddp, zero = _activations(build_networks(settings), settings, recomputed)
    return Measured(networks, ddp, zero, forward, backward, kept.segment_flops, vae, tower)


def _activations(
    networks: Networks, settings: TrainSettings, recomputed: Sequence[str]
) -> tuple[dict[bool, Activations], dict[bool, Activations]]:
    """With weights as `ddp` and as ZeRO hold them; a batch of two beside one of one tells what grows with it."""
    dtype, network = DTYPES[settings.engine.precision], networks.trainable
    if settings.engine.precision == "fp16":
        _hold_in(network, torch.float16)
    of_zero = _heights(networks, settings, recomputed, 1)
    _hold_in(network, torch.float32)
    if dtype != torch.float32:
        for part in (network.unet, network.text_encoder):
            hold_frozen_weights_in(part, dtype)
    of_one, of_two = (_heights(networks, settings, recomputed, size) for size in (1, 2))
    ddp, zero = {}, {}
    for again, one, two in zip((False, True), of_one, of_two, strict=True):
        ddp[again] = Activations(fixed=max(0, 2 * one - two), per_sample=two - one)
        zero[again] = Activations(fixed=max(0, of_zero[again] - (two - one)), per_sample=two - one)
    return ddp, zero


def _hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    # By `data`: `Module.to` exchanges tensors, which fake ones do not allow.
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _heights(
    networks: Networks, settings: TrainSettings, recomputed: Sequence[str], batch_size: int
) -> tuple[int, int]:
    """Bytes at the height of a pass: all that is kept; with recomputation, that and the largest segment made again."""
    networks.checkpoint_activations(recomputed)
    with FusedAttention(), KeptTensors(networks.trainable) as kept:
        training_loss(networks, settings, batch_size)
    torch.clear_autocast_cache()
    networks.checkpoint_activations(())
    return kept.bytes, kept.bytes_recomputing + kept.largest_segment


@torch.no_grad()
def _frozen(
    settings: TrainSettings, networks: Networks, dtype: torch.dtype
) -> tuple[FrozenNetwork, FrozenNetwork | None]:
    """Called with meta as the current device."""
    vae, encoder, side = networks.vae, networks.image_encoder, settings.data.size
    _hold_in(vae, dtype)
    seen = _look(lambda: vae.encode(torch.empty(1, 3, side, side, dtype=dtype)), vae, side)
    if encoder is None:
        return seen, None
    _hold_in(encoder, dtype)
    frame = encoder.image_size
    return seen, _look(lambda: encoder(torch.empty(1, 3, frame, frame, dtype=dtype)), encoder, frame)


def _look(work: Callable[[], Any], network: nn.Module, side: int) -> FrozenNetwork:
    with FlopCounterMode(display=False) as counter, LivePeak() as live, FusedAttention():
        work()
    count = sum(parameter.numel() for parameter in network.parameters())
    at_once = max(1, min(PICTURES_A_CALL, PIXELS_A_CALL // side**2))
    return FrozenNetwork(count, counter.get_total_flops(), live.peak, at_once)


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda", dtype)`, which switches itself off on machines without a GPU."""
    before: Mapping[str, Any] = {
        "enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")
    }  # fmt: skip
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before["enabled"])
        torch.set_autocast_dtype("cuda", before["dtype"])
