"""What an adapter is: where it reads, where it adds, how wide it is and what bends it.

Ten positions to read at and seven to add at, by their names in the published configs; what is added must not have been
passed yet. A Closer Look at Parameter-Efficient Tuning in Diffusion Models, arXiv 2303.18181, section 3.

    attn1i SA_in · attn1o SA_out · attn2i CA_in · attn2o CA_out · attn2c CA_c · ffni FFN_in · ffno FFN_out ·
    transo Trans_out · resi Res_in · reso Res_out
An input is the residual stream ahead of the layer's norm, an output what the layer would add to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

STREAM = ("attn1i", "attn1o", "attn2i", "attn2o", "ffni", "ffno", "transo")  # in the order a transformer block runs
CONTEXT = ("attn2c",)  # the text that cross-attention looks at
RESIDUAL = ("resi", "reso")  # of a ResBlock
SOURCES = (*STREAM, *CONTEXT, *RESIDUAL)
TARGETS = ("attn1i", "attn2i", "ffni", "transo", "attn2c", "resi", "reso")
ACTIVATIONS = ("relu", "sigmoid", "silu", "identity")


class AdapterError(ValueError):
    """An adapter that cannot be, or does not fit, told in one line."""


@dataclass(frozen=True)
class AdapterDesign:
    """One adapter in each transformer block, or in each ResBlock."""

    source: str  # one of SOURCES
    target: str  # one of TARGETS, at or behind the source
    width: int = 60  # of the bottleneck
    activation: str = "relu"  # one of ACTIVATIONS
    scale: float = 1.0  # s, factor on what is added

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise AdapterError(f"adapter input {self.source!r}: no such position; expected one of {_list(SOURCES)}")
        if self.target not in TARGETS:
            raise AdapterError(f"adapter output {self.target!r}: nothing adds there; expected one of {_list(TARGETS)}")
        if self.target not in targets_of(self.source):
            passed = self.target in _line(self.source)
            reason = "is passed by then" if passed else f"holds other values than {self.source}"
            raise AdapterError(
                f"adapter {self.label}: {self.target} {reason}; what reads {self.source} can add at "
                f"{_list(targets_of(self.source))}"
            )
        if self.activation not in ACTIVATIONS:
            raise AdapterError(f"adapter {self.label}: activation {self.activation!r}; expected {_list(ACTIVATIONS)}")
        if self.width < 1:
            raise AdapterError(f"adapter {self.label}: width {self.width}; expected at least 1")

    @property
    def label(self) -> str:
        """As its published config is called."""
        return f"{self.source}-{self.target}"

    @property
    def in_residual_block(self) -> bool:
        return self.source in RESIDUAL


def targets_of(source: str) -> tuple[str, ...]:
    """Where an adapter that reads at `source` can add."""
    line = _line(source)
    return tuple(position for position in line[line.index(source) :] if position in TARGETS)


def _line(source: str) -> tuple[str, ...]:
    """The positions whose values have the shape of the source's, in the order of execution."""
    return next(line for line in (STREAM, CONTEXT, RESIDUAL) if source in line)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
