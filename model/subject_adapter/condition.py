"""The value that travels through the UNet to every fuser: subject tokens and how strongly each row listens to them.

The stock UNet hands `cross_attention_kwargs["gligen"]["objs"]` to each fuser unchanged, so one dataclass is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from model.layer_contexts import LayerContexts


@dataclass
class SubjectCondition:
    """Subject tokens of B rows (B = rows of the UNet batch) and what the fusers need beside them."""

    tokens: Tensor  # (B, N, D) subject tokens of all subjects and references, zero where `keep` is False
    keep: Tensor | None  # (B, N) bool; None: every token of every computed row counts
    factor: Tensor  # (B,) 1 where the row has subjects, 0 where it has none: multiplies both residuals
    location: Tensor  # (B, 1, h, w) location mask at latent size: 0 inside boxes, 1 outside, 0 everywhere when null
    beta: float = 1.0  # scales both residuals
    log_strength: Tensor | None = None  # (B, N) added to the logits of the subject keys; None: strength 1
    token_places: Tensor | None = None  # (B, N, 64) features of where each patch lands, 0 where no place is known
    token_boxes: Tensor | None = None  # (B, N, 4) xyxy fractions; when given, a token is visible inside its box only
    active_rows: Tensor | None = None  # (A,) int64: inference skips all other rows; None computes every row
    key_values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # fuser name -> (A, N, C) each
    layer_contexts: LayerContexts | None = None  # of B rows, where learned words differ by cross-attention layer
