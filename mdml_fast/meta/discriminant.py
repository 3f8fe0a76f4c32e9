"""Fisher's linear discriminant: what tells a family that is adapted to from the normals that were known before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS
from mdml_fast.meta.tails import Tails

# Beyond, the exponential would leave float32.
MOST_EXPONENT = 80.0


@dataclass(frozen=True)
class DiscriminantConfig:
    """How it is learned."""

    # Times the mean variance of a feature: little to hundreds of known normals, enough where there are many features.
    shrinkage: float = 0.1
    # Known normals that it is learned from, which bounds the time: it grows with their cube.
    known_normals: int = 1000


class Discriminant:
    """How little rows are on the family's side, from few rows: of all that distances ask it asks one thing only.

    The least squares solution for -1 in the family and 1 in the known normals, which both weigh the same, is Fisher's
    discriminant ("The use of multiple measurements in taxonomic problems", 1936); here with a ridge, in the view of
    clipped features. Anomalies of any class that are near the family in what it shares with other normals, and not in
    what sets it apart from them, are on the other side.

    Args:
        weights: of the features in that view, float64 [d].
        offset: added to their sum, float64 [].
        tails: of `distances` of the family's own rows, each by a discriminant that was learned without it.
    """

    def __init__(self, weights: Tensor, offset: Tensor, tails: Tails) -> None:
        self.weights, self.offset, self.tails = weights, offset, tails

    @classmethod
    def fit(cls, family: Tensor, known: Tensor, shrinkage: float) -> tuple[Self, Tensor]:
        """Learn from the family's rows and known normals in each view, [4, n, d] and [4, m, d], in closed form.

        Returns:
            The discriminant, and `distances` of the family's rows, each by one without it [1, n]: least squares tell
            these without learning again (Allen, "The relationship between variable selection and data augmentation and
            a method for prediction", 1974).
        """
        n, m = family.shape[1], known.shape[1]
        rows = torch.cat([family, known], dim=1)[VIEWS.index("clipped")].double()
        share = torch.cat([rows.new_full((n,), 0.5 / n), rows.new_full((m,), 0.5 / m)])
        side = torch.cat([-rows.new_ones(n), rows.new_ones(m)])
        middle = share @ rows
        root = share.sqrt()
        weighted = (rows - middle) * root.unsqueeze(1)
        ridge = (shrinkage * weighted.square().sum() / rows.shape[1]).clamp(min=torch.finfo(torch.float32).tiny)
        # By the products of rows, so that it may be of any number of features.
        inverse = torch.linalg.inv(weighted @ weighted.T + ridge * torch.eye(n + m).to(rows))
        by_row = inverse @ (root * side)
        weights = weighted.T @ by_row
        error = ridge * by_row / root
        leverage = share + 1 - ridge * inverse.diagonal()
        left_out = _distance(side - error / (1 - leverage))[:n].unsqueeze(0)
        return cls(weights, -middle @ weights, Tails.fit(left_out)), left_out

    def distances(self, views: Tensor) -> Tensor:
        """How far rows, in each view [4, N, d], are from the family's side: positive, as tails want it [1, N]."""
        clipped = views[VIEWS.index("clipped")].double()
        return _distance(clipped @ self.weights + self.offset).unsqueeze(0)

    def score(self, views: Tensor) -> Tensor:
        """Tail scores of rows in each view [4, N, d] -> [1, N]."""
        return self.tails.score(self.distances(views))

    def shares(self, seen: Tensor, others: Tensor) -> Tensor:
        """The share of each feature in `distances` of rows, compared with a normal for each [N, d].

        What raises the sum has a share in proportion. They sum to that of the distance which lies above the normal's.

        Args:
            seen: the rows in each view [4, N, d].
            others: the normals likewise.
        """
        clipped = VIEWS.index("clipped")
        raised = ((seen[clipped] - others[clipped]).double() * self.weights).clamp(min=0)
        above = (1 - self.distances(others) / self.distances(seen)).clamp(min=0).squeeze(0)
        parts = raised / raised.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (parts * above.unsqueeze(1)).to(seen)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name."""
        return {"weights": self.weights, "offset": self.offset, "left_out": self.tails.distances}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(tensors["weights"], tensors["offset"], Tails(tensors["left_out"]))


def _distance(sums: Tensor) -> Tensor:
    """Their exponential, float32: where the sum falls off exponentially, its tail is a Pareto law."""
    return sums.clamp(max=MOST_EXPONENT).exp().float()
