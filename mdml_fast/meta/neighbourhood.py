"""How far rows lie from the normals: as they are, from their centre, and in each direction's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, Views
from mdml_fast.meta.ensemble import HALVES, Ensemble
from mdml_fast.meta.neighbours import References


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
ANCHORS = ("knn", "mahalanobis")
SCORES = (*ANCHORS, *VIEWS)


class Neighbourhood:
    """The normals that rows are compared with.

    Args:
        config: the constants.
        views: the fitted views.
        ensemble: the trained encoders of D directions.
        normals: float [n, d]; the first so many are used, so their order should be random.
        families: int [n]; a normal that is one of these rows itself is not compared with its own family.
        centre: what Mahalanobis distances are from, in the whitened view [d].
    """

    def __init__(
        self,
        config: NeighbourhoodConfig,
        views: Views,
        ensemble: Ensemble,
        normals: Tensor,
        families: Tensor,
        centre: Tensor,
    ) -> None:
        self.config, self.views, self.ensemble, self.centre = config, views, ensemble, centre
        self.normals = normals[: config.anchor_references]
        self.families = families[: config.anchor_references]
        with torch.inference_mode():
            self._anchors = References(self.normals.unsqueeze(0))
            self._directions = References(ensemble.embed(views.transform(self.normals[: config.references])))

    @property
    def embedded(self) -> Tensor:
        """The first so many of the normals in each direction's embedding [D, n, d]."""
        return self._directions.embedded

    def distances(self, rows: Tensor, families: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """Distances [6, N] of rows [N, d] from the normals, by `SCORES`.

        The mean distance to the nearest normals as they are; the Mahalanobis distance of the clipped row from their
        centre; of each view the mean, over its directions, of the mean distances to the nearest normals in their
        embeddings.

        Args:
            rows: float [N, d].
            families: int [N], where the rows are normals of these families themselves.
            counted: the directions that judge each row, bool [D, N]: those that learned nothing from it. Where none of
                a view does, or it is None, all do.
        """
        anchors, directions = self.by_direction(rows, families)
        if counted is None:
            return torch.cat([anchors, directions.mean(0)])
        chosen = counted.view(directions.shape)
        chosen = (chosen | ~chosen.any(0)).to(directions.dtype)
        return torch.cat([anchors, (chosen * directions).sum(0) / chosen.sum(0)])

    def by_direction(self, rows: Tensor, families: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The distances by `ANCHORS` [2, N], and those in each direction's embedding [2 halves, 4 views, N]."""
        config = self.config
        views = self.views.transform(rows)
        knn = self._anchors.distances(
            rows.unsqueeze(0), config.anchor_neighbours, families=families, reference_families=self.families
        )
        from_centre = views[VIEWS.index("whitened")] - self.centre
        mahalanobis = from_centre.norm(dim=-1, dtype=torch.float64).to(rows.dtype).unsqueeze(0)
        directions = self._directions.distances(
            self.ensemble.embed(views),
            config.neighbours,
            families=families,
            reference_families=self.families[: self.embedded.shape[1]],
        )
        return torch.cat([knn, mahalanobis]), directions.view(HALVES, len(VIEWS), rows.shape[0])
