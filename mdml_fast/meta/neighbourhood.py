"""How far rows lie from the normals: as they are, from their centre, and in each direction's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, LearnerViews
from mdml_fast.meta.ensemble import Ensemble
from mdml_fast.meta.neighbours import neighbour_distances


@dataclass(frozen=True)
class NeighbourhoodConfig:
    """How many neighbours count, and among how many normals they are sought."""

    # The anchor is the peer to beat, as people run it.
    anchor_neighbours: int = 5
    # Nearer neighbours see finer structure; two, and not one, so that a single stray normal hides nothing.
    neighbours: int = 2
    # Time and memory stop growing at so many normals: of the anchor, and of each direction's embedding.
    anchor_references: int = 32_768
    references: int = 8_192


# What rows are measured by: the anchor first.
SCORES = ("knn", "mahalanobis", *VIEWS)


class Neighbourhood:
    """The normals that rows are compared with.

    Args:
        config: the constants.
        views: the fitted views, of L learners.
        ensemble: the trained encoders, D directions: one for each view of each learner.
        normals: float [n, d]; the first so many are used, so their order should be random.
        families: int [n]; a normal that is one of these rows itself is not compared with its own family.
        centres: what Mahalanobis distances are from, in each learner's whitened view [L, d].

    Attributes:
        embedded: the first so many of the normals in each direction's embedding [D, n, d].
    """

    def __init__(
        self,
        config: NeighbourhoodConfig,
        views: LearnerViews,
        ensemble: Ensemble,
        normals: Tensor,
        families: Tensor,
        centres: Tensor,
    ) -> None:
        self.config, self.views, self.ensemble, self.centres = config, views, ensemble, centres
        self.normals = normals[: config.anchor_references]
        self.families = families[: config.anchor_references]
        with torch.inference_mode():
            self.embedded = ensemble.embed(views.transform(self.normals[: config.references]))

    def distances(self, rows: Tensor, families: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """Distances [6, N] of rows [N, d] from the normals, by `SCORES`.

        The mean distance to the nearest normals as they are; the Mahalanobis distance of the clipped row from their
        centre; the mean distance to the nearest normals in the embeddings of each kind of view. All but the first are
        means over the learners.

        Args:
            rows: float [N, d].
            families: int [N], where the rows are normals of these families themselves.
            counted: the directions that judge each row, bool [D, N]: those that learned nothing from it. Where none
                does, or it is None, all do.
        """
        anchor, by_learner = self.by_learner(rows, families)
        if counted is None:
            return torch.cat([anchor, by_learner.mean(0)])
        chosen = counted.view(len(by_learner), len(VIEWS), -1)
        # The first value belongs to the learner as a whole.
        chosen = torch.cat([chosen.any(1, keepdim=True), chosen], dim=1)
        chosen = (chosen | ~chosen.any(0)).to(by_learner.dtype)
        return torch.cat([anchor, (chosen * by_learner).sum(0) / chosen.sum(0)])

    def by_learner(self, rows: Tensor, families: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The distances by `SCORES`: the first [1, N], and those that each learner finds [L, 5, N]."""
        config, n_embedded = self.config, self.embedded.shape[1]
        views = self.views.transform(rows)
        anchor = neighbour_distances(
            rows.unsqueeze(0),
            self.normals.unsqueeze(0),
            config.anchor_neighbours,
            families=families,
            reference_families=self.families,
        )
        from_centre = self.views.whitened(views) - self.centres.unsqueeze(1)
        mahalanobis = from_centre.norm(dim=-1, keepdim=True, dtype=torch.float64).to(rows.dtype).mT
        directions = neighbour_distances(
            self.ensemble.embed(views),
            self.embedded,
            config.neighbours,
            families=families,
            reference_families=self.families[:n_embedded],
        )
        return anchor, torch.cat([mahalanobis, directions.view(len(self.centres), len(VIEWS), rows.shape[0])], dim=1)
