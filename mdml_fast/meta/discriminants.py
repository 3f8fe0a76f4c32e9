"""Fisher's linear discriminants: on which family's side a row lies, by what sets each apart from the other normals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mdml_fast.data.labelled import UNNAMED, Names
from mdml_fast.data.views import VIEWS
from mdml_fast.meta.tails import Tails

# Beyond, the exponential would leave float32.
MOST_EXPONENT = 80.0
TINY = torch.finfo(torch.float32).tiny
CLIPPED = VIEWS.index("clipped")


@dataclass(frozen=True)
class DiscriminantConfig:
    """How they are learned."""

    # Times the mean variance of a feature: little to hundreds of rows, enough where there are many features.
    shrinkage: float = 0.1
    # Normals that they are learned from; with all of them no table is found better by more than 0.001 AUROC.
    normals: int = 1000
    # Classes with fewer of them are taken for one, and for none where these are too few, too.
    least_rows: int = 20


class Discriminants:
    """How far rows are from the side of the family that they are most on the side of.

    A family's discriminant is the least squares solution for -1 in the family and 1 in other normals, which both weigh
    the same: Fisher's ("The use of multiple measurements in taxonomic problems", 1936), here with a ridge, in the view
    of clipped features. Anomalies of any class may be as near to a family as its own rows in what it shares with other
    normals. In what sets it apart they mostly are on the other side, and on no other family's.

    Args:
        weights: of the features in that view, for each of K families, float64 [K, d].
        offsets: added to their sums, float64 [K].
        tails: of `distances` of the families' rows, by discriminants that were learned without them.
        told: how much such ones tell of what side rows are on, from 0 to 1 []: of classes that differ in nothing, 0.
    """

    def __init__(self, weights: Tensor, offsets: Tensor, tails: Tails, told: Tensor) -> None:
        self.weights, self.offsets, self.tails, self.told = weights, offsets, tails, told

    @classmethod
    def of_classes(
        cls, learned: Tensor, labels: Names, held_out: Tensor, config: DiscriminantConfig
    ) -> tuple[Self, Tensor] | None:
        """Learn the side of each class of normals, against the others; None where there is one class only.

        Args:
            learned: normals to learn from in each view, in random order [4, n, d].
            labels: their classes [n]; those of none that is named take no part.
            held_out: other normals in each view [4, m, d].
            config: the constants.

        Returns:
            The discriminants, and `distances` of the normals that were held out [1, m].
        """
        named = np.flatnonzero(labels != UNNAMED)[: config.normals]
        labels = labels[named].astype(str)
        names, counts = np.unique(labels, return_counts=True)
        large = names[counts >= config.least_rows]
        families = [labels == name for name in large]
        small = ~np.isin(labels, large)
        if small.sum() >= config.least_rows:
            families.append(small)
        if len(families) < 2:
            return None
        rows = learned[CLIPPED, torch.as_tensor(named, device=learned.device)].double()
        owns = (torch.as_tensor(own, device=rows.device) for own in families)
        weights, offsets, left_out = zip(*(_least_squares(rows, own, config.shrinkage) for own in owns), strict=True)
        both = torch.stack(weights), torch.stack(offsets)
        distances = _distances(held_out, *both)
        return cls(*both, Tails.fit(distances), _told(*left_out)), distances

    @classmethod
    def of_family(cls, family: Tensor, known: Tensor, config: DiscriminantConfig) -> tuple[Self, Tensor]:
        """Learn the side of one family of few rows, against known normals, in each view [4, n, d] and [4, m, d].

        Returns:
            Its discriminant, and `distances` of the family's rows, each by one that was learned without it [1, n].
        """
        n = family.shape[1]
        rows = torch.cat([family[CLIPPED], known[CLIPPED]]).double()
        weights, offset, left_out = _least_squares(rows, torch.arange(len(rows)).to(rows) < n, config.shrinkage)
        distances = _exponential(left_out).unsqueeze(0)
        return cls(weights.unsqueeze(0), offset.unsqueeze(0), Tails.fit(distances), _told(left_out)), distances

    def distances(self, views: Tensor) -> Tensor:
        """How far rows, in each view [4, N, d], are from the nearest side: positive, as tails want it [1, N]."""
        return _distances(views, self.weights, self.offsets)

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
        nearest = _sums(seen, self.weights, self.offsets).argmin(1)
        raised = ((seen[CLIPPED] - others[CLIPPED]).double() * self.weights[nearest]).clamp(min=0)
        above = (1 - self.distances(others) / self.distances(seen)).clamp(min=0).squeeze(0)
        parts = raised / raised.sum(1, keepdim=True).clamp(min=TINY)
        return (parts * above.unsqueeze(1)).to(seen)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name."""
        return {
            "weights": self.weights,
            "offsets": self.offsets,
            "distances": self.tails.distances,
            "told": self.told,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(tensors["weights"], tensors["offsets"], Tails(tensors["distances"]), tensors["told"])


def _sums(views: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """About -1 on a family's side and 1 on the other, float64 [N, K]."""
    return views[CLIPPED].double() @ weights.T + offsets


def _distances(views: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """See `Discriminants.distances`."""
    return _exponential(_sums(views, weights, offsets).amin(1)).unsqueeze(0)


def _told(*left_out: Tensor) -> Tensor:
    """See `Discriminants`, from the sums of each family's rows by those without each: the mean of what these explain.

    Families count alike: directions that fit a small one by chance have the many others on their own side.
    """
    return (-torch.stack([own.mean() for own in left_out]).mean()).clamp(0, 1).float()


def _exponential(sums: Tensor) -> Tensor:
    """Float32: where sums fall off exponentially, the tail of this is a Pareto law."""
    return sums.clamp(max=MOST_EXPONENT).exp().float()


def _least_squares(rows: Tensor, own: Tensor, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [d] and offset [] for -1 in a family's own rows and 1 in the others, in closed form.

    Args:
        rows: float64 [n, d].
        own: which of them are the family's, bool [n].
        shrinkage: the ridge, as a part of the mean variance of a feature.

    Returns:
        Both, and what the sums of the family's own rows are by those without each: least squares tell it without
        learning again (Allen, "The relationship between variable selection and data augmentation and a method for
        prediction", 1974).
    """
    in_family, others = own.double(), (~own).double()
    share, side = (in_family / in_family.sum() + others / others.sum()) / 2, others - in_family
    middle, root = share @ rows, share.sqrt()
    weighted = (rows - middle) * root.unsqueeze(1)
    ridge = (shrinkage * weighted.square().sum() / rows.shape[1]).clamp(min=TINY)
    # By features or by rows, whichever are fewer.
    if rows.shape[1] < len(rows):
        inverse = torch.linalg.inv(weighted.T @ weighted + ridge * torch.eye(rows.shape[1]).to(rows))
        weights = inverse @ (weighted.T @ (root * side))
        leverage = ((weighted[own] @ inverse) * weighted[own]).sum(1)
    else:
        inverse = torch.linalg.inv(weighted @ weighted.T + ridge * torch.eye(len(rows)).to(rows))
        weights = weighted.T @ (inverse @ (root * side))
        leverage = 1 - ridge * inverse.diagonal()[own]
    offset = -middle @ weights
    error = -1 - rows[own] @ weights - offset
    return weights, offset, -1 - error / (1 - share[own] - leverage)
