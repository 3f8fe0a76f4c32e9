"""Heads that need more than an embedding: their logits depend on the episode's support rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """Logits by distance to the episode's own support rows: bounded, so a row far from all of them is never normal.

    ``ℓ_k = -|z - c_k|² / 2τ²`` with the support's embeddings as the centres c, K = n of them. The gradient flows
    through z and through the centres.

    Args:
        variance: τ², positive; a buffer, which an engine with directions stacks [D] for the caller to fill.
    """

    # MetaEngine passes the support's embeddings to a head that says so.
    takes_support = True
    variance: Tensor

    def __init__(self, variance: float = 1.0) -> None:
        super().__init__()
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance}")
        self.register_buffer("variance", torch.tensor(float(variance)))

    def forward(self, z: Tensor, support_z: Tensor) -> Tensor:
        """Logits [N, K] of embeddings z [N, z] for the embeddings support_z [K, z] of the support rows."""
        half_squares = (z.square().sum(-1, keepdim=True) + support_z.square().sum(-1)) / 2
        return (z @ support_z.mT - half_squares) / self.variance
