"""From encoded rows to anomaly scores, and to what each feature adds to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS
from mdml_fast.meta.fusion import FusionConfig, fuse
from mdml_fast.meta.neighbourhood import Neighbourhood
from mdml_fast.meta.shares import distance_shares
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.trees import TreeHead, excess

# What is fused: the anchor first.
SCORES = ("knn", "mahalanobis", *VIEWS)


class NormalFamily(NamedTuple):
    """Normals that rows are compared with, and how they look themselves.

    Attributes:
        neighbourhood: the normals.
        tails: how their own distances, each left out of its references, are distributed.
        gate: the probability of "anomaly" that the head must pass to be heard, a scalar.
    """

    neighbourhood: Neighbourhood
    tails: Tails
    gate: Tensor

    def scores(self, rows: Tensor, families: Tensor | None = None) -> Tensor:
        """How far rows [N, d] lie from the family: tail scores by `SCORES` [6, N]."""
        return self.by_view(self.neighbourhood.distances(rows, families))

    def by_view(self, distances: Tensor, counted: Tensor | None = None) -> Tensor:
        """Distances [2 + D, N] to scores [6, N]: the mean over the directions of a view that are counted [D, N]."""
        scores = self.tails.score(distances)
        anchors, directions = scores[:2], scores[2:]
        if counted is None:
            counted = torch.ones_like(directions, dtype=torch.bool)
        return torch.cat([anchors, self.neighbourhood.ensemble.view_means(directions, counted)])


class Scorer(NamedTuple):
    """What scores are made of: see `DefaultModel`."""

    families: list[NormalFamily]
    weights: Tensor
    fusion: FusionConfig
    head: TreeHead | None
    head_gain: Tensor

    def anomaly(self, rows: Tensor, families: Tensor | None = None) -> Tensor:
        """The anomaly score [N] of rows [N, d], which may be normals themselves, of these families [N]."""
        probability = self.head.probability(rows) if self.head else rows.new_zeros(rows.shape[0])
        first, *others = self.families
        anomaly = self._anomaly(first, first.scores(rows, families), probability)
        for family in others:
            anomaly = torch.minimum(anomaly, self._anomaly(family, family.scores(rows), probability))
        return anomaly

    def explain(self, rows: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """The anomaly score [N] of rows, and what each feature adds to it compared with a normal for each, both [N, d].

        What each distance adds is shared by the features as the distance is; the head's part by the splits on the
        trees' paths.
        """
        leaves = self.head.leaves(rows) if self.head else None
        probability = self.head.mean(leaves) if self.head and leaves is not None else rows.new_zeros(len(rows))
        scored = [self._amounts(family, rows, probability) for family in self.families]
        anomaly, closest = torch.stack([own for own, _ in scored]).min(0)
        centres = torch.stack([family.neighbourhood.centre for family in self.families])
        shares = distance_shares(self.families[0].neighbourhood, rows, normals, centres[closest])
        chosen = torch.stack([amounts for _, amounts in scored])[
            closest, :, torch.arange(len(rows), device=rows.device)
        ]
        parts = torch.einsum("nc,cnd->nd", chosen, shares)
        if self.head and leaves is not None:
            gates = torch.stack([family.gate for family in self.families])[closest]
            parts = parts + self.head_gain * self.head.contributions(rows, normals, leaves, gates)
        return anomaly, parts

    def _anomaly(self, family: NormalFamily, scores: Tensor, probability: Tensor) -> Tensor:
        """How anomalous rows are to a family [N], of its scores [6, N] and the head's probability [N]."""
        return fuse(self.weights, scores, self.fusion) + self.head_gain * excess(probability, family.gate)

    def _amounts(self, family: NormalFamily, rows: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
        """How anomalous rows are to a family [N], and what each distance adds to that [2 + D, N].

        The fused score f = (Σ w s^p)^(1/p) is the sum of w s^p f^(1-p) over the scores s; a view's part is shared by
        its directions.
        """
        distances, power = family.neighbourhood.distances(rows), self.fusion.power
        scores = family.by_view(distances)
        fused = fuse(self.weights, scores, self.fusion)
        parts = self.weights.unsqueeze(1) * scores.pow(power) * fused.pow(1 - power)
        place = self.places
        means = scores * place.bincount().unsqueeze(1)
        return self._anomaly(family, scores, probability), (parts / means)[place] * family.tails.score(distances)

    @property
    def places(self) -> Tensor:
        """The position in `SCORES` of each of the distances, int64 [2 + D]."""
        views = self.families[0].neighbourhood.ensemble.views
        return torch.cat([torch.arange(2, device=views.device), views + 2])
