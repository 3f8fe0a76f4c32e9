"""Encoders that start as the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualEncoder(nn.Module):
    """Rescaled features plus a learned correction: ``z = x · exp(s) + B relu(A x + b)``, rows [n, d] to [n, d].

    It starts as the identity (s, b and B are 0), so a detector on its distances starts as one on the rows' distances.
    A is drawn from N(0, 1/d).

    Args:
        n_features: d.
        hidden: units of the correction.
    """

    def __init__(self, n_features: int, hidden: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(n_features))
        self.inner = nn.Linear(n_features, hidden)
        self.outer = nn.Linear(hidden, n_features, bias=False)
        nn.init.normal_(self.inner.weight, std=n_features**-0.5)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [n, d] of rows [n, d]."""
        correction: Tensor = self.outer(torch.relu(self.inner(rows)))
        return torch.addcmul(correction, rows, self.log_scale.exp())
