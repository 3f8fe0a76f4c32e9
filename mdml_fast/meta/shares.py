"""Which features a distance comes from: those in which the row differs from its nearest normal."""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_fast.data.views import VIEWS, Views
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
    views, seen, others = neighbourhood.views, placed.views, normals.views[:, nearest]
    steps = seen - others
    weights = neighbourhood.encoders.pull_back(seen, steps)
    shares = [
        _normalised((placed.rows - normals.rows[nearest]).square()),
        centre_shares(views, seen, others, centres),
    ]
    shares += [_normalised(views.by_feature(view, steps, weight)) for view, weight in zip(VIEWS, weights, strict=True)]
    return torch.stack(shares)


def centre_shares(views: Views, seen: Tensor, others: Tensor, centres: Tensor) -> Tensor:
    """The shares in the Mahalanobis distance alone [N, d].

    Args:
        views: the fitted views.
        seen: the rows in each [4, N, d].
        others: the normal that each row is compared with, likewise.
        centres: as in `distance_shares`, or one for all rows [d].
    """
    whitened = VIEWS.index("whitened")
    from_centre, from_others = seen[whitened] - centres, others[whitened] - centres
    # |v|² - |u|² is the product of v - u with v + u.
    parts = views.by_feature("whitened", seen - others, from_centre + from_others)
    return parts / from_centre.square().sum(-1, keepdim=True).clamp(min=TINY)


def _normalised(parts: Tensor) -> Tensor:
    return parts / parts.sum(-1, keepdim=True).clamp(min=TINY)
