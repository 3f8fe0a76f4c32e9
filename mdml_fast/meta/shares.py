"""Which features a distance comes from: those in which the row differs from its nearest normal."""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS
from mdml_fast.meta.neighbourhood import Neighbourhood

# Squared distances below this are of rows that agree.
TINY = 1e-12


def distance_shares(neighbourhood: Neighbourhood, rows: Tensor, normals: Tensor, centre: Tensor) -> Tensor:
    """The share of each feature in each of the distances of `Neighbourhood.distances` [2 + D, N, d].

    A squared distance between a row and a normal is exactly a sum over the features. Its parts are divided by it, so
    that they sum to 1; those of the Mahalanobis distance, which is from the centre, fall short of 1 by the normal's own
    squared distance. A feature in which both agree has no share.

    Args:
        neighbourhood: whose views and encoders count.
        rows: float [N, d].
        normals: what each is compared with, float [N, d].
        centre: what each Mahalanobis distance is from, in the whitened view [N, d].
    """
    views, ensemble = neighbourhood.views, neighbourhood.ensemble
    seen, others = views.transform(rows), views.transform(normals)
    steps, whitened = seen - others, VIEWS.index("whitened")

    anchor = (rows - normals).square()
    # |v|² - |u|² is the product of v - u with v + u.
    from_centre = seen[whitened] - centre
    mahalanobis = views.by_feature("whitened", steps, from_centre + others[whitened] - centre)
    weights = ensemble.pull_back(seen, steps)
    directions = [
        views.by_feature(VIEWS[view], steps, own) for view, own in zip(ensemble.views.tolist(), weights, strict=True)
    ]
    parts = torch.stack([anchor, mahalanobis, *directions])
    squared = parts.sum(-1, keepdim=True)
    squared[1] = from_centre.square().sum(-1, keepdim=True)
    return parts / squared.clamp(min=TINY)
