"""The two forms of an adapter; the factor s and the addition are the attachment's (`attachment.py`).

    tokens:   W_up act(W_down x + b) + b'
    ResBlock: conv3x3_up(act(conv3x3_down(SiLU(GroupNorm(x)))))        (arXiv 2303.18181, section 3.3)
The last layer starts at zero, so that an untrained adapter changes nothing. The published code leaves it at torch's
default and starts from a disturbed base.
"""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class TokenAdapter(nn.Module):
    """A bottleneck over the channels of each token."""

    def __init__(self, channels: int, width: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.activation = ACTIVATION_LAYERS[activation]()
        self.up = nn.Linear(width, channels)
        _start_at_zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.up(self.activation(self.down(x)))


class ResidualAdapter(nn.Module):
    """A bottleneck over the channels of each 3 x 3 neighbourhood."""

    def __init__(self, channels: int, out_channels: int, width: int, activation: str, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.silu = nn.SiLU()
        self.down = nn.Conv2d(channels, width, 3, padding=1)
        self.activation = ACTIVATION_LAYERS[activation]()
        self.up = nn.Conv2d(width, out_channels, 3, padding=1)
        _start_at_zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C_out, h, w)."""
        return self.up(self.activation(self.down(self.silu(self.norm(x)))))


def _start_at_zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
