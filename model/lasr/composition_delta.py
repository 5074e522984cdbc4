"""The composition delta loss of LASR: a phrase added to the prompt must change the word's contexts as the class word's.

    delta = contexts(prompt with a phrase) - contexts(prompt);  loss = 1 - cos(delta_subject, stop(delta_class ** 3))
The third power makes the large changes of the class count for more. LASR, github.com/askerlee/AdaFace-dev; the idea of
comparing directions is StyleGAN-NADA's (arXiv 2108.00946, equation 2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def composition_delta_loss(
    subject_single: Tensor,
    subject_composed: Tensor,
    class_single: Tensor,
    class_composed: Tensor,
) -> Tensor:
    """Mean over samples, layers and tokens of 1 - cos.

    Args:
        subject_single, subject_composed: (B, layers, L, D) text states of the prompts with the word.
        class_single, class_composed: (B, layers or 1, L, D) of the same prompts with the class word, whose tokens
            should stand at the same positions; they take no gradient.
    Returns:
        Scalar. Tokens that a phrase does not change (those before it) count as 1 and give no gradient.
    """
    subject = (subject_composed - subject_single).float()  # (B, layers, L, D)
    change = (class_composed - class_single).detach().float()  # (B, layers or 1, L, D)
    # The cosine does not know the scale; third powers of small numbers would leave what fp32 can hold.
    target = (change / change.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)) ** 3
    product = (subject * target).sum(dim=-1)  # (B, layers, L)
    squares = subject.square().sum(dim=-1) * target.square().sum(dim=-1)  # (B, layers, L)
    # The square root of 0 has no finite gradient, so those tokens get another number under it.
    changed = squares > 0
    cosine = torch.where(changed, product / torch.where(changed, squares, 1).sqrt(), 0)
    return (1 - cosine).mean()
