"""From encoded rows to anomaly scores, and to what each feature adds to them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.data.encoding import Rows
from mdml_fast.data.labelled import Names
from mdml_fast.data.views import VIEWS
from mdml_fast.meta.discriminants import Discriminants
from mdml_fast.meta.distance_trees import asked_of
from mdml_fast.meta.ensemble import HALVES, Ensemble
from mdml_fast.meta.fusion import FusionConfig, JudgedHalf, fuse
from mdml_fast.meta.neighbourhood import ANCHORS, SCORES, Neighbourhood, Placed
from mdml_fast.meta.shares import centre_shares, distance_shares
from mdml_fast.meta.tails import LEAST_INDEX, Tails
from mdml_fast.meta.trees import TreeHead, grow, odds
from mdml_fast.threads import side_by_side

# Trees may find nothing at all in any normal. The head's tail is then this steep, so that one tree's doubt is no alarm.
LEAST_HEAD_INDEX = 0.5
# A smaller part of a score is not worth the walk through the trees that would share it.
LEAST_PART = 0.01
# Families are put on one scale where they begin to be strange, at this quantile of their rows; by a factor of two at
# most, as of some tens of rows that are mostly copies a few may seem to be anything.
OUTER_QUANTILE, MOST_SCALE = 0.9, 2.0


class NormalFamily(NamedTuple):
    """Normals that rows are compared with, and how they look themselves.

    Attributes:
        neighbourhood: the normals.
        tails: how their own distances, and the head's odds of them, are distributed.
        outer: the `OUTER_QUANTILE` of their fused scores, as new ones would score [].
        discriminants: what sets each class of them apart from the others, or an adapted family from the first; None
            where there is one class only.
    """

    neighbourhood: Neighbourhood
    tails: Tails
    outer: Tensor
    discriminants: Discriminants | None = None

    def scores(self, placed: Placed, distances: Tensor, by_head: Tensor) -> Tensor:
        """Tail scores of distances by `SCORES` from the family [6, N], of the head's odds [0 or 1, N], and of sides."""
        scores = self.tails.score(torch.cat([distances, by_head]))
        if self.discriminants is None:
            return scores
        return torch.cat([scores, self.discriminants.score(placed.views)])


def family_tails(distances: Tensor, shape: Tails | None = None) -> Tails:
    """Tails from distances by `SCORES`, each normal left out of its references, and the head's odds [6 or 7, n].

    Those of a family that is adapted to, mostly of few rows, take their shape from the tails of the first.
    """
    n_head = len(distances) - len(SCORES)
    least = distances.new_tensor([*[LEAST_INDEX] * len(SCORES), *[LEAST_HEAD_INDEX] * n_head])
    return Tails.fit(distances, least.unsqueeze(1), shape)


def outer(fused: Tensor) -> Tensor:
    """The `OUTER_QUANTILE` [] of fused scores [n]."""
    return fused.quantile(OUTER_QUANTILE)


def with_sides(weights: Tensor, discriminants: Discriminants | None, config: FusionConfig) -> Tensor:
    """Weights of sum 1 [C], and after them that of discriminants, where there are any: the more, the more they tell."""
    return weights if discriminants is None else torch.cat([weights, config.discriminants * discriminants.told[None]])


class Scorer(NamedTuple):
    """What scores are made of: see `DefaultModel`. Of several families that counts which a row is least strange to."""

    families: list[NormalFamily]
    weights: Tensor
    fusion: FusionConfig
    head: TreeHead | None

    def anomaly(self, rows: Tensor) -> Tensor:
        """The anomaly score [N] of rows [N, d]."""
        placed = self._place(rows)
        distances = [family.neighbourhood.distances(placed) for family in self.families]
        by_head = self._by_head(rows, distances[0])
        families = zip(self.families, distances, strict=True)
        fused = [
            fuse(self.weights_of(family.discriminants), family.scores(placed, own, by_head), self.fusion)
            for family, own in families
        ]
        scales = [self.scale(family) for family in self.families]
        return torch.stack([scale * own for scale, own in zip(scales, fused, strict=True)]).amin(0)

    def explain(self, rows: Tensor, normals: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """The anomaly score [N] of rows, and what each feature adds to it compared with a normal, both [N, d].

        What each distance adds is shared by the features as the distance is, that of sides too; the head's part by the
        splits on the trees' paths, where those that ask a distance are shared as it is.

        Args:
            rows: float [N, d].
            normals: float [n, d].
            nearest: which of them each row is compared with, int [N].
        """
        placed, others = self._place(rows), self._place(normals)
        distances = [family.neighbourhood.distances(placed) for family in self.families]
        first, by_head = self.families[0], self._by_head(rows, distances[0])
        families = zip(self.families, distances, strict=True)
        scored = [self._amounts(family, family.scores(placed, own, by_head)) for family, own in families]
        anomaly, closest = torch.stack([own for own, _ in scored]).min(0)
        centres = torch.stack([family.neighbourhood.centre for family in self.families])[closest]
        shares = distance_shares(first.neighbourhood, placed, others, nearest, centres)
        chosen = torch.stack([amounts[: len(self.weights)] for _, amounts in scored])
        chosen = chosen[closest, :, torch.arange(len(rows), device=rows.device)]
        parts = torch.einsum("nc,cnd->nd", chosen[:, : len(shares)], shares)
        for number, (family, (_, amounts)) in enumerate(zip(self.families, scored, strict=True)):
            if family.discriminants:
                own = closest == number
                by_side = family.discriminants.shares(placed.views[:, own], others.views[:, nearest[own]])
                parts[own] += amounts[-1, own].unsqueeze(1) * by_side
        if self.head:
            of_head = chosen[:, -1:]
            heard = of_head[:, 0] > LEAST_PART * anomaly
            if len(self.families) > 1:  # the trees ask how far it is from the first family's centre
                seen, centre = (placed.views, others.views[:, nearest]), first.neighbourhood.centre
                shares[ANCHORS.index("mahalanobis")] = centre_shares(first.neighbourhood.views, *seen, centre)
            asked = asked_of(rows[heard], first.tails, distances[0][:, heard])
            asked_of_normals = asked_of(normals, first.tails, first.neighbourhood.distances(others))
            by_asked = self.head.shares(asked, asked_of_normals, nearest[heard])
            by_feature, by_distance = by_asked.tensor_split([rows.shape[1]], dim=1)
            by_feature = by_feature + torch.einsum("nc,cnd->nd", by_distance, shares[:, heard])
            parts[heard] += of_head[heard] * by_feature
        return anomaly, parts

    def weights_of(self, discriminants: Discriminants | None) -> Tensor:
        """The weights of the `scores` of a family with these discriminants."""
        return with_sides(self.weights, discriminants, self.fusion)

    def scale(self, family: NormalFamily) -> Tensor:
        """What the family's scores are multiplied by, so that its stranger rows are as strange as the first's []."""
        return (self.families[0].outer / family.outer).clamp(1 / MOST_SCALE, MOST_SCALE)

    def _place(self, rows: Tensor) -> Placed:
        """Rows in the views and embeddings, which are those of all families."""
        return self.families[0].neighbourhood.place(rows)

    def _by_head(self, rows: Tensor, distances: Tensor) -> Tensor:
        """`head_odds` of rows at these distances from the first family, the one that the trees know."""
        return head_odds(self.head, rows, self.families[0].tails, distances)

    def _amounts(self, family: NormalFamily, scores: Tensor) -> tuple[Tensor, Tensor]:
        """How anomalous rows with a family's `scores` [C, N] are to it [N], and what each score adds to that [C, N].

        The fused score f = (Σ w s^p)^(1/p) is the sum of w s^p f^(1-p) over the scores s.
        """
        power, weights, scale = self.fusion.power, self.weights_of(family.discriminants), self.scale(family)
        fused = fuse(weights, scores, self.fusion)
        return scale * fused, scale * weights.unsqueeze(1) * scores.pow(power) * fused.pow(1 - power)


def scores_by_others(
    neighbourhood: Neighbourhood,
    ensemble: Ensemble,
    normals: Placed,
    distances: Tensor,
    families: Tensor,
    anomalies: Tensor,
    labels: Names,
) -> Tensor:
    """Tail scores by `SCORES` [6, M] of labelled anomalies, as if their classes had not been seen.

    In each view the directions score that were not trained on the row's family; where all were, all of them.

    Args:
        neighbourhood: what to compare with.
        ensemble: the directions.
        normals: n of them, which give the tails.
        distances: theirs as `neighbourhood` gives them; the first two are used, float [6 or 7, n].
        families: theirs, int [n].
        anomalies: float [M, d].
        labels: their classes [M].
    """
    by_direction = neighbourhood.embedded_by(ensemble.encoders)
    in_embeddings = by_direction.in_embeddings(ensemble.encoders.embed(normals.views), families)
    tails = Tails.fit(torch.cat([distances[: len(ANCHORS)], in_embeddings]))
    anchors, scores = tails.score(by_direction.distances(by_direction.place(anomalies))).tensor_split([len(ANCHORS)])
    scores = scores.view(HALVES, len(VIEWS), len(anomalies))
    judges = ensemble.never_saw(labels).to(scores.device).view_as(scores)
    judges = judges | ~judges.any(0)
    return torch.cat([anchors, (judges * scores).sum(0) / judges.sum(0)])


def head_odds(head: TreeHead | None, rows: Tensor, tails: Tails, distances: Tensor) -> Tensor:
    """The head's odds of "anomaly" [1, N] of rows [N, d], see `asked_of`; [0, N] without one."""
    if not head:
        return rows.new_empty(0, rows.shape[0])
    return odds(head.probability(asked_of(rows, tails, distances))).unsqueeze(0)


def judged_by_halves(
    normals: Rows, anomalies: Rows, labels: Names, judged: Tensor, n_trees: int, seed: int
) -> list[JudgedHalf]:
    """What trees that learned from half of the rows of each class make of the other half, and of held-out normals.

    Args:
        normals: float32 [n, d].
        anomalies: float32 [M, d].
        labels: their classes [M].
        judged: the held-out normals [k, d].
        n_trees: how many trees for each half.
        seed: of the trees.
    """
    # Alternately, class by class.
    half = np.empty(len(labels), dtype=np.intp)
    half[np.argsort(labels.astype(str), kind="stable")] = np.arange(len(labels)) % 2

    def judged_half(own: npt.NDArray[np.bool_]) -> JudgedHalf:
        head = TreeHead.of(grow(normals, anomalies[~own], n_trees, seed), judged.device)
        rows = torch.as_tensor(anomalies[own], device=judged.device)
        of_rows, of_normals = (odds(head.probability(some)).unsqueeze(0) for some in (rows, judged))
        tails = Tails.fit(of_normals, LEAST_HEAD_INDEX)
        return JudgedHalf(own, tails.score(of_rows)[0], tails.score(of_normals)[0])

    return side_by_side([partial(judged_half, half == which) for which in (0, 1)])
