"""How far rows lie from the normals: as they are, from their centre, and in each direction's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, Views
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


class Neighbourhood:
    """The normals that rows are compared with.

    Args:
        config: the constants.
        views: the fitted views.
        ensemble: the trained encoders, D directions.
        normals: float [n, d]; the first so many are used, so their order should be random.
        families: int [n]; a normal that is one of these rows itself is not compared with its own family.
        centre: what Mahalanobis distances are from, in the whitened view [d].

    Attributes:
        embedded: the first so many of the normals in each direction's embedding [D, n, d].
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
            self.embedded = ensemble.embed(views.transform(self.normals[: config.references]))

    def distances(self, rows: Tensor, families: Tensor | None = None) -> Tensor:
        """Distances [2 + D, N] of rows [N, d] from the normals.

        The mean distance to the nearest normals as they are; the Mahalanobis distance of the clipped row from their
        centre; the mean distance to the nearest normals in each embedding.

        Args:
            rows: float [N, d].
            families: int [N], where the rows are normals of these families themselves.
        """
        config, n_embedded = self.config, self.embedded.shape[1]
        views = self.views.transform(rows)
        anchor = neighbour_distances(
            rows.unsqueeze(0),
            self.normals.unsqueeze(0),
            config.anchor_neighbours,
            families=families,
            reference_families=self.families,
        )
        mahalanobis = (views[VIEWS.index("whitened")] - self.centre).norm(dim=-1, dtype=torch.float64).to(rows.dtype)
        directions = neighbour_distances(
            self.ensemble.embed(views),
            self.embedded,
            config.neighbours,
            families=families,
            reference_families=self.families[:n_embedded],
        )
        return torch.cat([anchor, mahalanobis.unsqueeze(0), directions])

    def extended(self, normals: Tensor, families: Tensor) -> Neighbourhood:
        """With further normals [n, d] of families [n]."""
        rows = torch.cat([self.normals, normals.to(self.normals)])
        codes = torch.cat([self.families, families.to(self.families)])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).to(rows.device)
        return Neighbourhood(self.config, self.views, self.ensemble, rows[order], codes[order], self.centre)

    @property
    def n_families(self) -> int:
        """Family codes from here on are free."""
        return int(self.families.max()) + 1
