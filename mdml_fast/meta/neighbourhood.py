"""How far rows lie from the normals: as they are, from their centre, and in each direction's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, FoldViews
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


# What is fused: the anchor first.
SCORES = ("knn", "mahalanobis", *VIEWS)


class Neighbourhood:
    """The normals that rows are compared with.

    Args:
        config: the constants.
        views: the fitted views, of each fold.
        ensemble: the trained encoders, D directions: one for each view of each fold.
        normals: float [n, d]; the first so many are used, so their order should be random.
        families: int [n]; a normal that is one of these rows itself is not compared with its own family.
        centres: what Mahalanobis distances are from, in each fold's whitened view [F, d].
    """

    def __init__(
        self,
        config: NeighbourhoodConfig,
        views: FoldViews,
        ensemble: Ensemble,
        normals: Tensor,
        families: Tensor,
        centres: Tensor,
    ) -> None:
        self.config, self.views, self.ensemble, self.centres = config, views, ensemble, centres
        self.normals = normals[: config.anchor_references]
        self.families = families[: config.anchor_references]
        with torch.inference_mode():
            self._embedded = ensemble.embed(views.transform(self.normals[: config.references]))

    def distances(self, rows: Tensor, families: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """Distances [2 + V, N] of rows [N, d] from the normals, by `SCORES`.

        The mean distance to the nearest normals as they are; the Mahalanobis distance of the clipped row from their
        centre; the mean distance to the nearest normals in the embeddings of each kind of view.

        Args:
            rows: float [N, d].
            families: int [N], where the rows are normals of these families themselves.
            counted: which directions shall judge each row, bool [D, N]: those that learned nothing from it. Distances
                are averaged over the folds that count; over all where none does, or where it is None.
        """
        config, n_embedded = self.config, self._embedded.shape[1]
        views = self.views.transform(rows)
        anchor = neighbour_distances(
            rows.unsqueeze(0),
            self.normals.unsqueeze(0),
            config.anchor_neighbours,
            families=families,
            reference_families=self.families,
        )
        whitened = views[VIEWS.index("whitened") :: len(VIEWS)]
        mahalanobis = (whitened - self.centres.unsqueeze(1)).norm(dim=-1)
        directions = neighbour_distances(
            self.ensemble.embed(views),
            self._embedded,
            config.neighbours,
            families=families,
            reference_families=self.families[:n_embedded],
        )
        shape = (len(self.views.folds), len(VIEWS), len(rows))
        by_fold = torch.cat([mahalanobis.unsqueeze(1), directions.view(shape)], dim=1)
        means = by_fold.mean(0) if counted is None else _mean_where(by_fold, counted.view(shape))
        return torch.cat([anchor, means])


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over folds of values [F, 1 + V, N], of those whose direction counts, bool [F, V, N] -> [1 + V, N].

    The first value belongs to the fold as a whole: it counts where any direction does.
    """
    chosen = torch.cat([counted.any(1, keepdim=True), counted], dim=1)
    chosen = (chosen | ~chosen.any(0)).to(values.dtype)
    return (chosen * values).sum(0) / chosen.sum(0)
