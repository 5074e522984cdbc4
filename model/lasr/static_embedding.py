"""The static part of LASR: one row a cross-attention layer, from coefficients that are learnt.

Stands in the prompt of layer l as e_l (`layerwise_basis.py`) with coefficients A_l = A_rand,l + A_comm: what all layers
share, and small noise that lets them part. Built from init words (`init_words.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.lasr.layerwise_basis import LayerwiseBasis

INIT_NOISE = 0.02  # std of A_rand in the columns of init words
EXTRA_NOISE = 0.1  # in the others
EXTRA_SHARE = 0.4  # of an init word's mean weight, what A_comm starts with in the other columns


class StaticEmbedding(nn.Module):
    """Rows (layers, K, D) of a word.

    Args:
        basis: made for the layers of one UNet.
        init_weights: (N,) how much of each init vector the word starts as; only their proportion counts.
    """

    def __init__(self, basis: LayerwiseBasis, init_weights: Tensor) -> None:
        super().__init__()
        num_init = basis.num_init
        if len(init_weights) != num_init:
            raise ValueError(f"init word weights: {len(init_weights)} for {num_init} init vectors; give one each")
        noise = torch.randn(basis.num_layers, basis.num_vectors, basis.rank)
        common = torch.full((basis.num_vectors, basis.rank), 1 / basis.rank)
        if num_init:
            noise[..., :num_init] *= INIT_NOISE
            noise[..., num_init:] *= EXTRA_NOISE
            common[:, :num_init] = init_weights.float() / init_weights.float().sum()
            common[:, num_init:] = EXTRA_SHARE / num_init
        self.basis = basis
        self.layer_coefficients = nn.Parameter(noise)  # (layers, K, r) A_rand
        self.common_coefficients = nn.Parameter(common)  # (K, r) A_comm

    @classmethod
    def shaped_like(cls, state: dict[str, Tensor]) -> StaticEmbedding:
        """An embedding of the shapes of a state, for `load_state_dict`."""
        basis = LayerwiseBasis.shaped_like(state, "basis.")
        return cls(basis, torch.ones(basis.num_init))

    def forward(self) -> Tensor:
        """(layers, K, D)."""
        return self.basis(self.layer_coefficients + self.common_coefficients)
