"""All adapters that one refinement adds to a UNet, as one module; the UNet itself stays stock.

    adapters = EfficientAdapters(unet, [AdapterDesign("attn2o", "ffni")]); attach(unet, [adapters])
They are trained and saved by themselves: `tensors` names them by the block they stand in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffusers.models import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from model.efficient_adapters.bottleneck import ResidualAdapter, TokenAdapter
from model.efficient_adapters.design import CONTEXT, AdapterDesign, AdapterError


@dataclass(frozen=True)
class PlacedAdapter:
    """One adapter in one block."""

    path: str  # of the block in the UNet: down_blocks.0.attentions.0.transformer_blocks.0
    design: AdapterDesign
    module: nn.Module

    @property
    def name(self) -> str:
        return f"{self.path}.{self.design.label}"


class EfficientAdapters(nn.Module):
    """Adapters of some designs in all blocks of a UNet.

    Args:
        unet: read for its shapes; `attachment.attach` hooks the adapters in.
        designs: each once a transformer block, or once a ResBlock; those of one block work side by side.
    Raises:
        AdapterError: a design given twice; no block for one; blocks that are built otherwise.
    """

    def __init__(self, unet: UNet2DConditionModel, designs: Sequence[AdapterDesign]) -> None:
        super().__init__()
        labels = [design.label for design in designs]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None or not labels:
            raise AdapterError(f"adapters: {twice} is given twice; a wider one does the same" if twice else _NONE)
        self.designs = tuple(designs)
        self.strength = 1.0  # factor on all that they add; 0 draws as the base does
        self.each = nn.ModuleDict()
        self._placed: list[PlacedAdapter] = []
        for design in self.designs:
            built = {path: _built(block, path, design) for path, block in adapted_blocks(unet, design).items()}
            if not built:
                raise AdapterError(f"adapter {design.label}: this UNet has no block for it")
            for path, module in built.items():
                self._placed.append(PlacedAdapter(path, design, module))
                self.each[f"{path}-{design.label}".replace(".", "-")] = module  # a module's name can hold no dot

    def __iter__(self) -> Iterator[PlacedAdapter]:
        return iter(self._placed)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """BLOCK.INPUT-OUTPUT.KEY -> values, on the CPU, for a file."""
        return {
            f"{placed.name}.{key}": value.detach().cpu().clone()
            for placed in self
            for key, value in placed.module.state_dict().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` of equal adapters gave.

        Raises:
            AdapterError: a tensor is missing, left over, or of another shape.
        """
        expected = {f"{p.name}.{key}": value for p in self for key, value in p.module.state_dict().items()}
        odd = sorted(set(expected) ^ set(tensors))
        if odd:
            kind = "missing" if odd[0] in expected else "of no block of this UNet"
            raise AdapterError(f"adapter tensor {odd[0]}: {kind}; they were made for another base")
        for name, value in expected.items():
            if tensors[name].shape != value.shape:
                raise AdapterError(
                    f"adapter tensor {name}: shape {tuple(tensors[name].shape)}, this base needs {tuple(value.shape)}; "
                    "they were made for another base"
                )
        for placed in self:
            keys = placed.module.state_dict()
            placed.module.load_state_dict({key: tensors[f"{placed.name}.{key}"] for key in keys})


_NONE = "adapters: none given; give at least one input and output, like attn2o and ffni"


def adapted_blocks(unet: UNet2DConditionModel, design: AdapterDesign) -> dict[str, nn.Module]:
    """The blocks that get an adapter of this design, by path."""
    kind = ResnetBlock2D if design.in_residual_block else BasicTransformerBlock
    return {path: module for path, module in unet.named_modules() if isinstance(module, kind)}


def _built(block: nn.Module, path: str, design: AdapterDesign) -> nn.Module:
    """An untrained adapter for a block.

    Raises:
        AdapterError: a block whose values do not have the shapes that the design needs.
    """
    if isinstance(block, ResnetBlock2D):
        if block.upsample is not None or block.downsample is not None:
            raise AdapterError(f"adapter {design.label}: {path} changes the size of its picture, and cannot carry it")
        norm = block.norm1 if design.source == "resi" else block.norm2
        channels = block.in_channels if design.source == "resi" else block.out_channels
        out_channels = block.in_channels if design.target == "resi" else block.out_channels
        return ResidualAdapter(channels, out_channels, design.width, design.activation, norm.num_groups)
    assert isinstance(block, BasicTransformerBlock)
    if block.norm_type != "layer_norm" or block.attn2 is None:
        raise AdapterError(f"adapter {design.label}: {path} is no block of Stable Diffusion's UNet")
    if design.source in CONTEXT:
        return TokenAdapter(block.attn2.cross_attention_dim, design.width, design.activation)
    return TokenAdapter(block.norm3.normalized_shape[0], design.width, design.activation)
