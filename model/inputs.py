"""What one picture is conditioned on, as tensors, and the table that drops conditions.

`SubjectInputs` is built by the trainer from scenes and by the pipeline from references; `drop_conditions` turns it into
the unconditional, image-only and full branches. Training and inference share both, so that every inference branch is a
training case (classifier-free guidance with two conditions, InstructPix2Pix, arXiv 2211.09800, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor


class Drop(IntEnum):
    """Which conditions one sample loses. The value is the code used in the `drop` tensor of `drop_conditions`."""

    NOTHING = 0  # full: text, subjects, location            -> eps_t at inference
    TEXT = 1  # empty prompt; subject tokens and mask stay   -> eps_i at inference
    LOCATION = 2  # mask 0 everywhere, null box feature
    SUBJECTS = 3  # no suffix, no tokens, no mask: plain text-to-image
    ALL = 4  # empty prompt, no tokens, no mask              -> eps_u at inference


@dataclass(frozen=True)
class SubjectInputs:
    """Conditions of B pictures with up to S subjects, each with up to R references.

    Subjects that a row does not have are padded with zeros and marked False in `subject_keep`.
    """

    input_ids: Tensor  # (B, L) int64, prompt with suffix; the placeholder's id is the size of the vocabulary
    plain_input_ids: Tensor  # (B, L) int64, the caption without suffix (used when subjects are dropped)
    empty_input_ids: Tensor  # (B, L) int64, the empty (or negative) prompt
    placeholder_positions: Tensor  # (B, S) int64 index into L, -1 where there is none
    noun_ids: Tensor  # (B, S, K) int64 token ids of the suffix noun, -1 padding
    pooled: Tensor  # (B, S, P) image CLS, averaged over references
    patches: Tensor  # (B, S, R, T, W) image patch tokens
    reference_keep: Tensor  # (B, S, R) bool
    subject_keep: Tensor  # (B, S) bool
    boxes: Tensor  # (B, S, 4) xyxy as fractions of the picture to be drawn, 0..1
    location_keep: Tensor  # (B,) bool, False: no boxes known, mask 0 everywhere and the null box feature
    strength: Tensor  # (B, S) float, 1 = as trained, 0 = subject off

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SubjectInputs:
        """Move every tensor; floating tensors are cast to `dtype` when it is given."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if dtype is not None and value.is_floating_point() else None)

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def repeat_rows(self, times: int) -> SubjectInputs:
        """Rows [r0..rB, r0..rB, …]: the layout of guidance batches."""
        return replace(
            self,
            **{
                f.name: getattr(self, f.name).repeat(times, *[1] * (getattr(self, f.name).dim() - 1))
                for f in fields(self)
            },
        )


def drop_conditions(inputs: SubjectInputs, drop: Tensor) -> SubjectInputs:
    """Apply one `Drop` code per row.

    Args:
        inputs: conditions of B pictures.
        drop: (B,) int64 `Drop` codes.
    Returns:
        Conditions of the same shapes. Rows without subjects have `subject_keep` all False and placeholders at -1.
    """
    no_text = (drop == Drop.TEXT) | (drop == Drop.ALL)  # (B,)
    no_subjects = (drop == Drop.SUBJECTS) | (drop == Drop.ALL)
    no_location = no_subjects | (drop == Drop.LOCATION)
    ids = torch.where(no_subjects[:, None], inputs.plain_input_ids, inputs.input_ids)  # (B, L)
    ids = torch.where(no_text[:, None], inputs.empty_input_ids, ids)
    no_placeholder = (no_text | no_subjects)[:, None]
    return replace(
        inputs,
        input_ids=ids,
        placeholder_positions=inputs.placeholder_positions.masked_fill(no_placeholder, -1),
        subject_keep=inputs.subject_keep & ~no_subjects[:, None],
        location_keep=inputs.location_keep & ~no_location,
    )


def draw_drops(uniform: Tensor, table: dict[Drop, float]) -> Tensor:
    """Turn one random number a sample into one `Drop`, by `table`.

    Args:
        uniform: (B,) numbers in [0, 1).
        table: shares that sum to at most 1; the rest is `Drop.NOTHING`.
    Returns:
        (B,) int64 codes.
    Raises:
        ValueError: shares negative or summing to more than 1.
    """
    if min(table.values(), default=0.0) < 0 or sum(table.values()) > 1 + 1e-6:
        raise ValueError(f"condition dropout {table}: shares must be at least 0 and sum to at most 1")
    codes = torch.full_like(uniform, int(Drop.NOTHING), dtype=torch.int64)
    start = 0.0
    for kind, share in table.items():
        codes[(uniform >= start) & (uniform < start + share)] = int(kind)
        start += share
    return codes
