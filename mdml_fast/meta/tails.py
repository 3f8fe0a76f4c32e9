"""Tail scores: -log of the share of normals that lie at least as far out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The outermost 5 % of the normals (at least 20, at most half) give the tail its slope.
TAIL_SHARE, TAIL_ROWS = 0.05, 20
# Parts that normals are divided into where each is scored by the tails of the others.
FOLDS = 20


class Tails:
    """The distribution of C kinds of distances over the normals, by which distances become comparable scores.

    Within the normals' range it is the empirical one; above, a Pareto law fitted to the outermost distances (Hill, "A
    simple general approach to inference about the tail of a distribution", 1975).

    Args:
        distances: of normals, each left out of its own references, sorted, float [C, n].
    """

    def __init__(self, distances: Tensor) -> None:
        self.distances = distances
        n = distances.shape[1]
        n_tail = max(1, min(max(TAIL_ROWS, round(TAIL_SHARE * n)), n // 2))
        self._start = n - n_tail
        tiny = torch.finfo(distances.dtype).tiny
        self._threshold = distances[:, self._start : self._start + 1].clamp(min=tiny)
        excess = (distances[:, self._start :].clamp(min=tiny) / self._threshold).log()
        # Equal distances have no slope. Normal rows in 2 000 independent dimensions would have 0.006.
        self._index = excess.mean(dim=1, keepdim=True).clamp(min=0.01)

    @classmethod
    def fit(cls, distances: Tensor) -> Tails:
        """From unsorted distances [C, n]."""
        return cls(distances.sort(dim=1).values)

    @classmethod
    def scores_of_others(cls, distances: Tensor, families: Tensor) -> Tensor:
        """The tail scores [C, n] of distances [C, n], each by the tails of rows of other families [n] alone.

        A row is less strange among rows that it is one of: scores by its own tails would promise too few alarms.
        """
        codes = torch.unique(families, return_inverse=True)[1]
        n_families = int(codes.max()) + 1
        order = np.random.default_rng(0).permutation(n_families)
        folds = torch.as_tensor(order % FOLDS, device=codes.device)[codes]
        scores = torch.empty_like(distances)
        for fold in range(min(n_families, FOLDS)):
            own = folds == fold
            scores[:, own] = cls.fit(distances[:, ~own]).score(distances[:, own])
        return scores

    def pareto(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tail: where it starts [C, 1], its index [C, 1], and the score there, a scalar."""
        n = self.distances.shape[1]
        return self._threshold, self._index, -torch.tensor((n - self._start + 0.5) / (n + 1)).log()

    def score(self, distances: Tensor) -> Tensor:
        """-log P(a normal's distance ≥ x) for distances x [C, N] -> [C, N]."""
        n = self.distances.shape[1]
        below = torch.searchsorted(self.distances, distances.contiguous())
        body = -((n - below + 0.5) / (n + 1)).log()
        threshold, index, at_threshold = self.pareto()
        tail = at_threshold + (distances / threshold).clamp(min=1).log() / index
        return torch.where(distances > threshold, tail, body)
