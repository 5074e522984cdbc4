"""What the attention-map loss costs, and what the published way of computing it would: a UNet step with the adapter.

Ours: model/attention_maps.py. The published way (Subject-Diffusion, arXiv 2307.11410; localisation loss of
FastComposer, arXiv 2305.10431) computes softmax(Q K) V step by step and keeps the whole maps. Its code does so in the
cross-attention of the five supervised block groups; all other attention was unfused too with the torch of its time.
Text encoder and autoencoder stay outside: their tokens and latents are given.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional

from model.attention_maps import AttentionMapRecorder, install_recording, supervised_layers
from model.inputs import SubjectInputs
from model.losses import attention_map_loss
from model.subject_adapter import SubjectAdapter, SubjectCondition
from train.plan.measure import KeptTensors
from train.settings import load_model_settings

from . import turns

TEXT_TOKENS = 77
GATE = 0.5  # an untrained gate is 0: nothing behind it would get a gradient
LOSS_WEIGHT = 0.01  # published
CHECK_WEIGHT = 1000.0  # maps of random weights are flat: the loss on them is about a thousandth of the other
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of loss and gradients, relative to the largest of each tensor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SD21 = Path("configs/model/sd21.yaml")


@dataclass(frozen=True)
class UNetStep:
    """A UNet with the adapter attached, and one batch for it."""

    unet: UNet2DConditionModel
    adapter: SubjectAdapter
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    context: Tensor  # (B, L, D) text; takes gradients, as the output of the trained text encoder does
    inputs: SubjectInputs
    weights: Tensor  # (B, S, L) of the supervised tokens
    masks: Tensor  # (B, S, h, w)

    def output_loss(self, **attention: Any) -> Tensor:
        """Squared error of the prediction; `attention` goes to the attention processors."""
        timesteps = torch.full((len(self.latents),), 500, device=self.latents.device)
        predicted = self.unet(
            self.latents,
            timesteps,
            self.context,
            cross_attention_kwargs={"gligen": {"objs": self.condition()}, **attention},
            return_dict=False,
        )[0]
        return functional.mse_loss(predicted.float(), self.noise.float())

    def condition(self) -> SubjectCondition:
        return self.adapter.condition(self.inputs, (self.latents.shape[2], self.latents.shape[3]))

    def map_loss(self, maps: Mapping[str, Tensor]) -> Tensor:
        return attention_map_loss(maps, self.masks, self.inputs.subject_keep)

    def networks(self) -> Iterator[nn.Module]:
        yield from (self.unet, self.adapter)

    def gradients(self) -> dict[str, Tensor]:
        parameters = [pair for network in self.networks() for pair in network.named_parameters()]
        found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        assert self.context.grad is not None
        return found | {"context": self.context.grad}

    def forget_gradients(self) -> None:
        for network in self.networks():
            network.zero_grad(set_to_none=True)
        self.context.grad = None


@dataclass(frozen=True)
class SupervisedGroups(UNetStep):
    """The block groups whose maps are trained, each by itself on what it is given in a pass of the whole UNet."""

    calls: tuple[tuple[nn.Module, dict[str, Any]], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, step: UNetStep) -> SupervisedGroups:
        calls: list[tuple[nn.Module, dict[str, Any]]] = []

        def note(group: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(group.forward).bind(*args, **kwargs).arguments
            calls.append((group, {name: _as_leaf(name, value) for name, value in given.items()}))

        names = dict.fromkeys(_group(name) for name in supervised_layers(step.unet))
        handles = [step.unet.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in names]
        step.output_loss()
        for handle in handles:
            handle.remove()
        return cls(**vars(step), calls=tuple(calls))

    def output_loss(self, **attention: Any) -> Tensor:
        """Mean square of what the groups put out."""
        own = {"encoder_hidden_states": self.context}
        own["cross_attention_kwargs"] = {"gligen": {"objs": self.condition()}, **attention}
        outputs = [group(**{**kwargs, **own}) for group, kwargs in self.calls]
        # A group of the way down also returns what it hands across.
        states = [output[0] if isinstance(output, tuple) else output for output in outputs]  # (B, C, h, w)
        return torch.stack([state.float().square().mean() for state in states]).mean()

    def forget_gradients(self) -> None:
        super().forget_gradients()
        for _, kwargs in self.calls:
            for state in (kwargs["hidden_states"], *kwargs.get("res_hidden_states_tuple", ())):
                state.grad = None


def _as_leaf(name: str, value: Any) -> Any:
    """What comes from trained layers takes gradients; the embedding of the timestep does not."""
    if name == "hidden_states":
        return value.requires_grad_()
    return tuple(_as_leaf("hidden_states", each) for each in value) if name == "res_hidden_states_tuple" else value


def _group(layer: str) -> str:
    return layer.split(".attentions")[0]


def make_step(
    architecture: Mapping[str, Any],
    trained: Sequence[str],
    *,
    subjects: int,
    patches: int,
    patch_width: int,
    device: torch.device,
    dtype: torch.dtype,
    **adapter_options: Any,
) -> UNetStep:
    """Random weights and inputs: one picture whose subjects stand side by side, one reference each.

    Args:
        architecture: arguments of the UNet.
        trained: name patterns of a model file; those of the text encoder match nothing here.
        subjects, patches, patch_width: S, T and W of `SubjectInputs`.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**architecture)
    width, size, channels = unet.config.cross_attention_dim, unet.config.sample_size, unet.config.in_channels
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=width, pooled_dim=1, patch_dim=patch_width, num_patches=patches, **adapter_options
    )
    for name, parameter in adapter.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, GATE)
    for prefix, network in (("unet", unet), ("adapter", adapter)):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(any(re.fullmatch(pattern, f"{prefix}.{name}") for pattern in trained))
        network.to(device, dtype, memory_format=torch.channels_last).train()  # as the trainer has it
    adapter.attach(unet)
    install_recording(unet)
    weights = torch.zeros(1, subjects, TEXT_TOKENS)
    masks = torch.zeros(1, subjects, size, size)
    for subject in range(subjects):
        weights[0, subject, [10 + 6 * subject, 12 + 6 * subject]] = 0.5  # noun and placeholder of the suffix
        left, right = (round(size * (subject + share) / subjects) for share in (0.1, 0.9))
        masks[0, subject, size // 4 : -(size // 4), left:right] = 1
    random = partial(torch.randn, device=device, dtype=dtype)
    return UNetStep(
        unet,
        adapter,
        latents=random(1, channels, size, size),
        noise=random(1, channels, size, size),
        context=random(1, TEXT_TOKENS, width).requires_grad_(),
        inputs=_random_inputs(subjects, patches, patch_width).to(device, dtype),
        weights=weights.to(device),
        masks=masks.to(device),
    )


def _random_inputs(subjects: int, patches: int, patch_width: int) -> SubjectInputs:
    no_text = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
    left = torch.arange(subjects) / subjects  # (S,)
    corners = (left + 0.1 / subjects, torch.full_like(left, 0.25), left + 0.9 / subjects, torch.full_like(left, 0.75))
    return SubjectInputs(
        input_ids=no_text,
        plain_input_ids=no_text,
        empty_input_ids=no_text,
        placeholder_positions=12 + 6 * torch.arange(subjects)[None],
        noun_ids=torch.zeros(1, subjects, 1, dtype=torch.int64),
        pooled=torch.zeros(1, subjects, 1),
        patches=torch.randn(1, subjects, 1, patches, patch_width),
        reference_keep=torch.ones(1, subjects, 1, dtype=torch.bool),
        subject_keep=torch.ones(1, subjects, dtype=torch.bool),
        boxes=torch.stack(corners, dim=-1)[None],  # (1, S, 4)
        location_keep=torch.ones(1, dtype=torch.bool),
        strength=torch.ones(1, subjects),
    )


def without_map_loss(step: UNetStep) -> Tensor:
    return step.output_loss()


def ours(step: UNetStep, weight: float = LOSS_WEIGHT) -> Tensor:
    """Both losses; the maps are read out of fused attention."""
    recorder = AttentionMapRecorder(step.weights)
    error = step.output_loss(recorder=recorder)
    return error + weight * step.map_loss(recorder.maps)


def with_whole_maps(step: UNetStep, attentions: Sequence[str], weight: float = LOSS_WEIGHT) -> Tensor:
    """Both losses; the named attention layers run unfused, and their whole maps are kept until the end."""
    with whole_maps(step, attentions) as kept:
        error = step.output_loss()
    maps = {
        name: torch.einsum("bhql,bsl->bhsq", kept[name], step.weights.to(kept[name]))
        for name in supervised_layers(step.unet)
    }  # (B, heads, S, Q)
    return error + weight * step.map_loss(maps)


def attentions_of_supervised_groups(step: UNetStep) -> list[str]:
    """Names of all attention layers in the groups whose maps are trained; those of the adapter end in `.fuser`."""
    groups = tuple(f"{_group(name)}." for name in supervised_layers(step.unet))
    names = [name for name, module in step.unet.named_modules() if isinstance(module, Attention)]
    names += [name.replace("-", ".") + ".fuser" for name in step.adapter.fusers]
    return [name for name in names if name.startswith(groups)]


@contextmanager
def whole_maps(step: UNetStep, attentions: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside this context the named layers compute softmax(Q K), put it into the dictionary, then multiply by V."""
    kept: dict[str, Tensor] = {}  # layer -> (B, heads, Q, L)
    restore: list[Callable[[], object]] = []
    for name in attentions:
        if name.endswith(".fuser"):
            projections: Any = step.adapter.fusers[name.removesuffix(".fuser").replace(".", "-")].attn
            projections.attend = partial(_attend_unfused, projections, kept, name)
            restore.append(partial(delattr, projections, "attend"))
        else:
            attention: Any = step.unet.get_submodule(name)
            restore.append(partial(attention.set_processor, attention.processor))
            restore.append(partial(delattr, attention, "get_attention_scores"))
            attention.get_attention_scores = partial(_keep_scores, attention.get_attention_scores, kept, name)
            attention.set_processor(AttnProcessor())
    try:
        yield kept
    finally:
        for undo in restore:
            undo()


def _keep_scores(
    scores: Callable[..., Tensor], kept: dict[str, Tensor], name: str, query: Tensor, *rest: Tensor | None
) -> Tensor:
    probabilities = scores(query, *rest)  # (B heads, Q, L)
    kept[name] = probabilities[None]  # (1, heads, Q, L): one picture
    return probabilities


def _attend_unfused(
    projections: Any, kept: dict[str, Tensor], name: str, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    query, key, value = (projections.split(states) for states in (queries, keys, values))  # (B, heads, T, d)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    kept[name] = (scores if mask is None else scores + mask).softmax(dim=-1)
    return projections.to_out[0]((kept[name] @ value).transpose(1, 2).flatten(2))  # (B, T, C)


def kept_bytes(step: UNetStep, work: Callable[[], Tensor]) -> int:
    """Bytes that `work` leaves for its backward pass, each storage once, without the networks' own."""
    with _KeptTensors(nn.ModuleDict({"unet": step.unet, "adapter": step.adapter})) as kept:
        work()
    return kept.bytes


class _KeptTensors(KeptTensors):
    def _pack(self, tensor: Tensor) -> Tensor:
        # An output that its own node keeps would hold the node, and with it the whole pass, for good.
        return super()._pack(tensor).detach()


def largest_difference(step: UNetStep, attentions: Sequence[str]) -> float:
    """Between our way and whole maps: of the loss, the context's gradient and those of every `to_k`, relative.

    The attention-map loss weighs as much as the other one here, lest an error in it be lost.
    """
    results: list[dict[str, Tensor]] = []
    for way in (ours, partial(with_whole_maps, attentions=attentions)):
        loss = way(step, weight=CHECK_WEIGHT)
        loss.backward()
        chosen = {name: grad for name, grad in step.gradients().items() if name.endswith(("context", "to_k.weight"))}
        results.append({"loss": loss.detach()} | chosen)
        step.forget_gradients()
    mine, theirs = results
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def bench_loss(options: argparse.Namespace) -> Iterator[turns.Table]:
    """The whole UNet with the attention-map loss and without, and with the supervised groups unfused."""
    step = sd21_step(options.layers, options.subjects, torch.device(options.device), DTYPES[options.dtype])
    works: dict[str, Callable[[], Tensor]] = {
        "loss off": partial(without_map_loss, step),
        "loss on": partial(ours, step),
    }
    rows = _compare(step, works, options.rounds, "loss off")
    bars = (turns.Bar("attention-map loss on against off, time", rows["loss on"]["ratio"], 1.15),)
    yield turns.Table("attention", f"{_shapes(step, options)}; whole UNet, forward and backward", rows, bars)


def bench_published(options: argparse.Namespace) -> Iterator[turns.Table]:
    """The supervised block groups, as we compute them and with every attention unfused."""
    step = SupervisedGroups.of(
        sd21_step(options.layers, options.subjects, torch.device(options.device), DTYPES[options.dtype])
    )
    everything, cross = attentions_of_supervised_groups(step), supervised_layers(step.unet)
    difference = largest_difference(step, everything)
    if difference > TOLERANCE[options.dtype]:
        raise RuntimeError(f"published: loss or gradients differ by {difference:.2g}: not the same step")
    works: dict[str, Callable[[], Tensor]] = {
        "every attention unfused, maps kept": partial(with_whole_maps, step, everything),
        "ours": partial(ours, step),
        "only cross-attention unfused": partial(with_whole_maps, step, cross),
    }
    rows = _compare(step, works, options.rounds, "every attention unfused, maps kept")
    bars = (
        turns.Bar("our supervised step against the published way, time", rows["ours"]["ratio"], 0.95),
        turns.Bar("our supervised step against the published way, activations", rows["ours"]["kept ratio"], 0.8),
    )
    groups = ", ".join(dict.fromkeys(_group(name) for name in cross))
    shapes = (
        f"{_shapes(step, options)}; groups {groups} alone, forward and backward; "
        f"loss and gradients of both ways differ by {difference:.1g} at most"
    )
    yield turns.Table("published", shapes, rows, bars)


@functools.lru_cache(maxsize=1)
def sd21_step(layers: int, subjects: int, device: torch.device, dtype: torch.dtype) -> UNetStep:
    """SD 2.1 at 512 px with ViT-H-14's patch tokens, as its model file has it, but for `layers` a block."""
    model = load_model_settings(SD21)
    return make_step(
        {**model.architecture["unet"], "layers_per_block": layers},
        model.trained,
        subjects=subjects,
        patches=256,
        patch_width=1280,
        device=device,
        dtype=dtype,
        **model.adapter,
    )


def _compare(
    step: UNetStep, works: Mapping[str, Callable[[], Tensor]], rounds: int, against: str
) -> dict[str, dict[str, float]]:
    kept = {name: kept_bytes(step, work) for name, work in works.items()}
    timed = {name: partial(_with_backward, work) for name, work in works.items()}
    taken = turns.median_seconds(timed, rounds, step.latents.device, between=step.forget_gradients)
    return {
        name: {
            "seconds": taken[name].wall,
            "CPU seconds": taken[name].processor,
            "ratio": taken[name].wall / taken[against].wall,
            "CPU ratio": taken[name].processor / taken[against].processor,
            "kept MB": kept[name] / 1e6,
            "kept ratio": kept[name] / kept[against],
        }
        for name in works
    }


def _with_backward(work: Callable[[], Tensor]) -> None:
    work().backward()


def _shapes(step: UNetStep, options: argparse.Namespace) -> str:
    layers = options.layers
    depth = "as in the model file" if layers == 2 else f"with {layers} layer(s) a block instead of 2"
    return (
        f"SD 2.1 UNet {depth}, adapter in every block, trained parameters of the model file, {options.dtype}, batch 1, "
        f"latents {'x'.join(str(size) for size in step.latents.shape[1:])}, {TEXT_TOKENS} text tokens, "
        f"{step.inputs.patches.shape[1]} subjects of {step.inputs.patches.shape[3]} tokens"
    )
