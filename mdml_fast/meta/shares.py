"""Which features a distance comes from: those in which the row differs from its nearest normal."""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS
from mdml_fast.meta.neighbourhood import Neighbourhood, Placed

# Squared distances below this are of rows that agree.
TINY = 1e-12


def distance_shares(
    neighbourhood: Neighbourhood, placed: Placed, normals: Placed, nearest: Tensor, centres: Tensor
) -> Tensor:
    """The share of each feature in each distance of `Neighbourhood.distances` [6, N, d].

    A squared distance between a row and a normal is exactly a sum over the features. Its parts are divided by it, so
    that they sum to 1; those of the Mahalanobis distance, which is from the centre, fall short of 1 by the normal's own
    squared distance. A feature in which both agree has no share.

    Args:
        neighbourhood: whose views and encoders count.
        placed: the rows.
        normals: n of them, placed likewise.
        nearest: which of them each row is compared with, int [N].
        centres: what each Mahalanobis distance is from, in the whitened view [N, d].
    """
    views, whitened = neighbourhood.views, VIEWS.index("whitened")
    seen, others = placed.views, normals.views[:, nearest]
    steps, weights = seen - others, neighbourhood.encoders.pull_back(seen, seen - others)
    from_centre = seen[whitened] - centres
    # |v|² - |u|² is the product of v - u with v + u.
    around_centre = from_centre + others[whitened] - centres
    squared = from_centre.square().sum(-1, keepdim=True).clamp(min=TINY)
    shares = [
        _normalised((placed.rows - normals.rows[nearest]).square()),
        views.by_feature("whitened", steps, around_centre) / squared,
    ]
    shares += [_normalised(views.by_feature(view, steps, weight)) for view, weight in zip(VIEWS, weights, strict=True)]
    return torch.stack(shares)


def _normalised(parts: Tensor) -> Tensor:
    return parts / parts.sum(-1, keepdim=True).clamp(min=TINY)
