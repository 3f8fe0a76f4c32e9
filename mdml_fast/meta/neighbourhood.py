"""How far rows lie from the normals: as they are, from their centre, and in embeddings."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, Views
from mdml_fast.meta.encoders import Encoders
from mdml_fast.meta.neighbours import References


@dataclass(frozen=True)
class NeighbourhoodConfig:
    """How many neighbours count, and among how many normals they are sought."""

    # The anchor is the peer to beat, as people run it.
    anchor_neighbours: int = 5
    # Nearer neighbours see finer structure; two, and not one, so that a single stray normal hides nothing.
    neighbours: int = 2
    # Time and memory stop growing at so many normals: of the anchor, and of each embedding.
    anchor_references: int = 32_768
    references: int = 8_192
    # Of a family that was adapted to. Mostly some tens of rows, which are far apart: with further ones, anomalies are
    # as near as rows of its own. A stray row hides what is near to it.
    adapted_anchor_neighbours: int = 2
    adapted_neighbours: int = 1

    def of_adapted(self) -> NeighbourhoodConfig:
        """These constants, for a family that is adapted to."""
        return replace(self, anchor_neighbours=self.adapted_anchor_neighbours, neighbours=self.adapted_neighbours)


# What rows are scored by: the anchor first.
ANCHORS = ("knn", "mahalanobis")
SCORES = (*ANCHORS, *VIEWS)


class Placed(NamedTuple):
    """Rows [N, d], as they are in each view [4, N, d], and in the embedding of each encoder [E, N, d]."""

    rows: Tensor
    views: Tensor
    embedded: Tensor


class Neighbourhood:
    """The normals that rows are compared with.

    Args:
        config: the constants.
        views: the fitted views.
        encoders: E, each of one view.
        normals: float [n, d]; the first so many are used, so their order should be random.
        families: int [n]; a normal that is one of these rows itself is not compared with its own family.
        centre: what Mahalanobis distances are from, in the whitened view [d].
    """

    def __init__(
        self,
        config: NeighbourhoodConfig,
        views: Views,
        encoders: Encoders,
        normals: Tensor,
        families: Tensor,
        centre: Tensor,
    ) -> None:
        self.config, self.views, self.centre = config, views, centre
        self.normals = normals[: config.anchor_references]
        self.families = families[: config.anchor_references]
        self._anchors = References(self.normals.unsqueeze(0))
        self._embed_by(encoders)

    def embedded_by(self, encoders: Encoders) -> Neighbourhood:
        """The same normals, by other encoders."""
        other = copy(self)
        other._embed_by(encoders)
        return other

    def _embed_by(self, encoders: Encoders) -> None:
        self.encoders = encoders
        with torch.inference_mode():
            self._embedded = References(self.place(self.normals[: self.config.references]).embedded)

    @property
    def embedded(self) -> Tensor:
        """The first so many of the normals in each encoder's embedding [E, n, d]."""
        return self._embedded.embedded

    def order(self, rows: Tensor) -> Tensor:
        """Positions of rows [N, d] in an order in which they are compared faster: near ones follow each other [N]."""
        return self._anchors.order(rows)

    def place(self, rows: Tensor) -> Placed:
        """Rows [N, d] as `distances` takes them, of this or of another neighbourhood with these views and encoders."""
        views = self.views.transform(rows)
        return Placed(rows, views, self.encoders.embed(views))

    def distances(self, placed: Placed, families: Tensor | None = None) -> Tensor:
        """Distances [2 + E, N] of N rows from the normals: by `ANCHORS`, then in each encoder's embedding.

        The mean distance to the nearest normals as they are; the Mahalanobis distance of the clipped row from their
        centre; the mean distance to the nearest normals in each embedding.

        Args:
            placed: the rows.
            families: int [N], where the rows are normals of these families themselves.
        """
        return torch.cat([self._from_anchors(placed, families), self.in_embeddings(placed.embedded, families)])

    def in_embeddings(self, embedded: Tensor, families: Tensor | None = None) -> Tensor:
        """The last of `distances` alone [E, N], of rows in each encoder's embedding [E, N, d]."""
        own = self.families[: self.embedded.shape[1]]
        return self._embedded.distances(embedded, self.config.neighbours, families=families, reference_families=own)

    def _from_anchors(self, placed: Placed, families: Tensor | None) -> Tensor:
        """The first of `distances` [2, N]."""
        rows, k = placed.rows.unsqueeze(0), self.config.anchor_neighbours
        knn = self._anchors.distances(rows, k, families=families, reference_families=self.families)
        from_centre = placed.views[VIEWS.index("whitened")] - self.centre
        mahalanobis = from_centre.norm(dim=-1, dtype=torch.float64).to(rows.dtype)
        return torch.cat([knn, mahalanobis.unsqueeze(0)])
