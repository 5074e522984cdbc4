"""Hooks that let adapters read and add inside a stock UNet: x <- x + s · strength · adapter(what it reads).

Nothing is registered in the UNet: its parameters, state dict and processors stay as they are, and subject fusers,
IP-Adapter, LoRA and learned words work beside the hooks. A fuser stands between self- and cross-attention and counts to
the former, so that attn2i is what enters cross-attention.
To add at the input of a layer, the stream ahead of its norm is moved and its output likewise: x + norm and layer of the
moved x is the moved stream plus what the layer makes of it. All adapters of a block read what the base, with what was
added at earlier positions, puts there; so several work side by side, whatever their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from diffusers.models import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from model.efficient_adapters.adapters import EfficientAdapters, PlacedAdapter
from model.efficient_adapters.design import AdapterDesign, AdapterError

ATTRIBUTE = "efficient_adapters"
# norm ahead of a layer, layer, position that enters it, position that leaves it
STAGES = (
    ("norm1", "attn1", "attn1i", "attn1o"),
    ("norm2", "attn2", "attn2i", "attn2o"),
    ("norm3", "ff", "ffni", "ffno"),
)
Part = tuple[EfficientAdapters, PlacedAdapter]


def attach(unet: UNet2DConditionModel, sets: Sequence[EfficientAdapters]) -> None:
    """Let the UNet run with these adapters, and with no others that were attached before.

    Raises:
        AdapterError: adapters that were made for another architecture.
    """
    detach(unet)
    unet.__dict__[ATTRIBUTE] = _Attachment(unet, sets)


def detach(unet: UNet2DConditionModel) -> None:
    """Take all adapters out; nothing happens to a UNet without."""
    attachment = unet.__dict__.pop(ATTRIBUTE, None)
    if attachment is not None:
        for handle in attachment.handles:
            handle.remove()


def attached(unet: UNet2DConditionModel) -> tuple[EfficientAdapters, ...]:
    """The adapters that the UNet runs with."""
    attachment = unet.__dict__.get(ATTRIBUTE)
    return () if attachment is None else attachment.sets


class _Attachment:
    """Sets of adapters hooked into one UNet."""

    def __init__(self, unet: UNet2DConditionModel, sets: Sequence[EfficientAdapters]) -> None:
        self.sets = tuple(sets)
        parts: dict[str, list[Part]] = {}
        for one in self.sets:
            for placed in one:
                parts.setdefault(placed.path, []).append((one, placed))
        blocks = dict(unet.named_modules())
        unknown = next((path for path in parts if path not in blocks), None)
        if unknown is not None:
            raise AdapterError(f"adapters: made for another architecture; this UNet has no block {unknown}")
        self.handles: list[Any] = [unet.register_forward_pre_hook(self._follow, with_kwargs=True)]
        for path, own in parts.items():
            block = blocks[path]
            kind = _TransformerHooks if isinstance(block, BasicTransformerBlock) else _ResidualHooks
            self.handles += kind(block, own).handles

    def _follow(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adapters are no part of the UNet and do not move with it: they follow its input."""
        device = (args[0] if args else kwargs["sample"]).device
        for one in self.sets:
            if next(one.parameters()).device != device:
                one.to(device)


class _Deltas:
    """What the adapters of one block add, by position, in the pass that is running."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.values: dict[str, Tensor] = {}

    @property
    def positions(self) -> set[str]:
        """Where anything is read or added."""
        return {position for _, placed in self.parts for position in (placed.design.source, placed.design.target)}

    def clear(self, *ignored: Any) -> None:
        self.values = {}

    def read(self, position: str, x: Tensor) -> None:
        """Let the adapters look at a position."""
        for owner, placed in self.parts:
            if placed.design.source == position and owner.strength != 0:
                delta = adapter_delta(placed.module, placed.design, owner.strength, x)
                known = self.values.get(placed.design.target)
                self.values[placed.design.target] = delta if known is None else known + delta

    def added(self, position: str, x: Tensor, keep: bool = False) -> Tensor | None:
        """x with what is added at a position; None: nothing is.

        Args:
            keep: the same is added once more, to the layer's output.
        """
        delta = self.values.get(position) if keep else self.values.pop(position, None)
        return None if delta is None else x + delta


def adapter_delta(module: nn.Module, design: AdapterDesign, strength: float, x: Tensor) -> Tensor:
    """s · strength · adapter(x), in x's dtype."""
    dtype = next(module.parameters()).dtype
    return (design.scale * strength * module(x.to(dtype))).to(x.dtype)


class _TransformerHooks:
    """The adapters of one transformer block."""

    def __init__(self, block: BasicTransformerBlock, parts: Sequence[Part]) -> None:
        self.deltas = _Deltas(parts)
        positions = self.deltas.positions
        # Cleared first: checkpointing may leave a block before its end when it runs it once more.
        self.handles: list[Any] = [block.register_forward_pre_hook(self.deltas.clear)]
        for norm, layer, enters, leaves in STAGES:
            if enters in positions:
                self.handles.append(getattr(block, norm).register_forward_pre_hook(partial(self._enter, enters)))
            if enters in positions or leaves in positions:
                self.handles.append(getattr(block, layer).register_forward_hook(partial(self._leave, enters, leaves)))
        if "attn2c" in positions:
            self.handles.append(block.attn2.register_forward_pre_hook(self._adapt_context, with_kwargs=True))
        if "transo" in positions:
            self.handles.append(block.register_forward_hook(self._end))

    def _enter(self, position: str, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.deltas.read(position, args[0])
        moved = self.deltas.added(position, args[0], keep=True)  # (B, T, C)
        return None if moved is None else (moved, *args[1:])

    def _leave(self, enters: str, leaves: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        self.deltas.read(leaves, out)
        return self.deltas.added(enters, out)  # (B, T, C)

    def _end(self, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        self.deltas.read("transo", out)
        return self.deltas.added("transo", out)  # (B, T, C)

    def _adapt_context(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        # IP-Adapter sends (text, pictures).
        moved = (self._context(text[0]), *text[1:]) if isinstance(text, tuple) else self._context(text)
        changed = {"encoder_hidden_states": moved}
        if kwargs.get("layer_contexts") is not None:  # learned words: the processor asks for its text by itself
            changed["layer_contexts"] = self._after(kwargs["layer_contexts"])
        return args, kwargs | changed

    def _context(self, text: Tensor) -> Tensor:
        """(B, L, D) text of this block."""
        self.deltas.read("attn2c", text)
        moved = self.deltas.added("attn2c", text)
        return text if moved is None else moved

    def _after(self, contexts: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
        return lambda layer, hidden_states: self._context(contexts(layer, hidden_states))


class _ResidualHooks:
    """The adapters of one ResBlock."""

    def __init__(self, block: nn.Module, parts: Sequence[Part]) -> None:
        self.deltas = _Deltas(parts)
        self.handles: list[Any] = [
            block.register_forward_pre_hook(self._enter),
            block.register_forward_hook(self._leave),
        ]

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.deltas.clear()
        self.deltas.read("resi", args[0])
        moved = self.deltas.added("resi", args[0])  # (B, C, h, w)
        return None if moved is None else (moved, *args[1:])

    def _leave(self, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        self.deltas.read("reso", out)
        return self.deltas.added("reso", out)  # (B, C_out, h, w)
