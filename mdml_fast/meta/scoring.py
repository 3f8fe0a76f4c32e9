"""From encoded rows to anomaly scores, and to what each feature adds to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdml_fast.meta.fusion import FusionConfig, fuse
from mdml_fast.meta.neighbourhood import ANCHORS, Neighbourhood
from mdml_fast.meta.shares import TINY, distance_shares
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.trees import TreeHead, excess


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

    def scores(self, rows: Tensor) -> Tensor:
        """How far rows [N, d] lie from the family: tail scores by `SCORES` [6, N]."""
        return self.tails.score(self.neighbourhood.distances(rows))


class Scorer(NamedTuple):
    """What scores are made of: see `DefaultModel`."""

    families: list[NormalFamily]
    weights: Tensor
    fusion: FusionConfig
    head: TreeHead | None
    head_gain: Tensor

    def anomaly(self, rows: Tensor) -> Tensor:
        """The anomaly score [N] of rows [N, d]."""
        probability = self.head.probability(rows) if self.head else rows.new_zeros(rows.shape[0])
        first, *others = (self.of_family(family, family.scores(rows), probability) for family in self.families)
        for other in others:
            first = torch.minimum(first, other)
        return first

    def explain(self, rows: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """The anomaly score [N] of rows, and what each feature adds to it compared with a normal for each, both [N, d].

        What each distance adds is shared by the features as the distance is; the head's part by the splits on the
        trees' paths.
        """
        leaves = self.head.leaves(rows) if self.head else None
        probability = self.head.mean(leaves) if self.head and leaves is not None else rows.new_zeros(len(rows))
        scored = [self._amounts(family, rows, probability) for family in self.families]
        anomaly, closest = torch.stack([own for own, _ in scored]).min(0)
        centres = torch.stack([family.neighbourhood.centre for family in self.families])[closest]
        shares = distance_shares(self.families[0].neighbourhood, rows, normals, centres)
        place = torch.arange(len(rows), device=rows.device)
        chosen = torch.stack([amounts for _, amounts in scored])[closest, :, place]
        parts = torch.einsum("nc,cnd->nd", chosen, shares)
        if self.head and leaves is not None:
            gates = torch.stack([family.gate for family in self.families])[closest]
            parts = parts + self.head_gain * self.head.contributions(rows, normals, leaves, gates)
        return anomaly, parts

    def of_family(self, family: NormalFamily, scores: Tensor, probability: Tensor) -> Tensor:
        """How anomalous rows are to a family [N], of its scores [6, N] and the head's probability [N]."""
        return fuse(self.weights, scores, self.fusion) + self.head_gain * excess(probability, family.gate)

    def _amounts(self, family: NormalFamily, rows: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
        """How anomalous rows are to a family [N], and what each distance adds to that [2 + D, N].

        The fused score f = (Σ w s^p)^(1/p) is the sum of w s^p f^(1-p) over the scores s; what the mean of the
        directions' distances adds is shared by them as the sum is.
        """
        anchors, directions = family.neighbourhood.by_direction(rows)
        means = directions.mean(0)
        scores, power = family.tails.score(torch.cat([anchors, means])), self.fusion.power
        fused = fuse(self.weights, scores, self.fusion)
        parts = self.weights.unsqueeze(1) * scores.pow(power) * fused.pow(1 - power)
        shared = parts[len(ANCHORS) :] * directions / (len(directions) * means).clamp(min=TINY)
        return self.of_family(family, scores, probability), torch.cat([parts[: len(ANCHORS)], shared.flatten(0, 1)])
