"""Encoders that start as the identity: one in training, and many that are trained."""

from __future__ import annotations

import torch
from mdml_kernels.native import encoders as native
from mdml_kernels.native import loader
from torch import Tensor, nn

# The parameters of a residual encoder, A, b, B and s, in the order in which the kernels take them.
PARTS = ("inner.weight", "inner.bias", "outer.weight", "log_scale")


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


class Encoders:
    """E trained residual encoders; encoder e takes rows in view e % V.

    Args:
        weights: by parameter name, each [E, …].
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def averaged(self, n_views: int) -> Encoders:
        """One encoder for each of V views, whose embedding is the mean of those of the view's encoders.

        It is a residual encoder with the hidden units of all of them.
        """
        inner, bias, outer, log_scale = (
            part.reshape(-1, n_views, *part.shape[1:]) for part in (self.weights[name] for name in PARTS)
        )
        parts = (
            inner.transpose(0, 1).flatten(1, 2),
            bias.transpose(0, 1).flatten(1, 2),
            outer.permute(1, 2, 0, 3).flatten(2) / len(outer),
            log_scale.double().exp().mean(0).log().to(log_scale.dtype),
        )
        return Encoders({name: part.contiguous() for name, part in zip(PARTS, parts, strict=True)})

    def embed(self, rows: Tensor) -> Tensor:
        """Embeddings [E, N, d] of rows in each view [V, N, d], computed in float64 and rounded once."""
        # `ResidualEncoder`, written out: a module lends its parameters to one thread at a time only.
        parts = [self.weights[name] for name in PARTS]
        if loader.serves(rows, *parts):
            return native.residual_encoders(rows, *parts)
        inner, bias, outer, log_scale = (part.double() for part in parts)
        x = self._for_each(rows).double()
        hidden = torch.baddbmm(bias.unsqueeze(1), x, inner.mT).relu()
        z = torch.addcmul(hidden @ outer.mT, x, log_scale.exp().unsqueeze(1))
        return z.to(rows.dtype)

    def pull_back(self, rows: Tensor, steps: Tensor) -> Tensor:
        """What the coordinates of a step s in view add to |z(x) - z(x - s)|², z each encoder's embedding [E, N, d].

        The squared distance is the product of s with it: between two rows an encoder is linear but for the relu, and
        that is linear in its own two values (the rescale rule of Shrikumar, Greenside, Kundaje, "Learning important
        features through propagating activation differences", 2017).

        Args:
            rows: x in each view [V, N, d].
            steps: s in it [V, N, d].
        """
        inner, bias, outer, log_scale = parts = [self.weights[name] for name in PARTS]
        if loader.serves(rows, steps, *parts):
            return native.pull_back(rows, steps, *parts)
        rows, steps = self._for_each(rows), self._for_each(steps)
        scale = log_scale.exp().unsqueeze(1)
        at_row = torch.baddbmm(bias.unsqueeze(1), rows, inner.mT)
        change = steps @ inner.mT
        slope = torch.where(change.abs() > native.NO_CHANGE, (at_row.relu() - (at_row - change).relu()) / change, 0.5)
        difference = torch.addcmul((slope * change) @ outer.mT, steps, scale)
        return torch.addcmul((slope * (difference @ outer)) @ inner, difference, scale)

    def _for_each(self, rows: Tensor) -> Tensor:
        """What each encoder takes of rows in each view."""
        times = len(self.weights["log_scale"]) // len(rows)
        return rows.repeat(times, 1, 1) if times > 1 else rows
