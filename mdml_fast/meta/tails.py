"""Tail scores: -log of the share of normals that lie at least as far out."""

from __future__ import annotations

import torch
from torch import Tensor

# The outermost 5 % of the normals (at least 20, at most half) give the tail its slope.
TAIL_SHARE, TAIL_ROWS = 0.05, 20
# Where the shape of the tail is known from many other normals, at least so many of either.
SHAPED_TAIL_ROWS = 10
# Equal distances have no slope. Normal rows in 2 000 independent dimensions would have 0.006.
LEAST_INDEX = 0.01
# The shape makes a tail twice as steep as its own rows say, at most.
LEAST_PART = 0.5
# Parts of the normals, where each is scored by the tails of the others.
FOLDS = 20


class Tails:
    """The distribution of C kinds of distances over the normals, by which distances become comparable scores.

    Within the normals' range it is the empirical one; above, a Pareto law fitted to the outermost distances (Hill, "A
    simple general approach to inference about the tail of a distribution", 1975).

    Args:
        distances: of normals, each left out of its own references, sorted, float [C, n]; or what else is larger for
            stranger rows.
        least_index: what each tail's index is at least: the same for all, or of each [C, 1].
        shape: the tails of many other normals. The 20 outermost of few rows reach into the middle, where distances
            spread wider than in the tail. So the tail begins at the 10 outermost, and what the 20 say of its index is
            multiplied by what the same shares of those other normals say that it falls by from there to here.

    Attributes:
        n_tail: how many of them are the outermost.
        threshold: the least of those [C, 1].
        least: the least distance above zero [C, 1]: where most rows are copies, that between others tells how a tail
            falls, and not how far it is from zero.
        index: the tail's index [C, 1]: the mean logarithm of what they are times that, or as `shape` says.
    """

    def __init__(
        self, distances: Tensor, least_index: Tensor | float = LEAST_INDEX, shape: Tails | None = None
    ) -> None:
        self.distances, self._least_index, self._shape = distances, torch.as_tensor(least_index).to(distances), shape
        n = distances.shape[1]
        n_sloping = self.n_tail = _n_outermost(TAIL_ROWS, n)
        if shape and shape.reaches(n_shaped := _n_outermost(SHAPED_TAIL_ROWS, n), n):
            self.n_tail = n_shaped
        self.threshold = distances[:, n - self.n_tail : n - self.n_tail + 1].clone()
        self.least = distances.where(distances > 0, torch.inf).amin(1, keepdim=True)
        self.least = self.least.where(self.least < torch.inf, torch.finfo(distances.dtype).tiny)
        self.index = self._spread(n_sloping)
        if shape and self.n_tail < n_sloping:
            self.index *= shape.part_of_index(self.n_tail / n, n_sloping / n)
        self.index = self.index.clamp(min=self._least_index)

    @classmethod
    def fit(cls, distances: Tensor, least_index: Tensor | float = LEAST_INDEX, shape: Tails | None = None) -> Tails:
        """From unsorted distances [C, n]."""
        return cls(distances.sort(dim=1).values, least_index, shape)

    def held_out_scores(self, distances: Tensor, families: Tensor) -> Tensor:
        """What new rows at the places of these tails' own rows would score, float [C, n] of [C, n].

        A row is less strange by tails that it is part of, as a new one is not. By the tails of the others alone it is
        stranger than a new one, which would be part of those that the others are held against. So: the mean of both.
        But rows of one family are as good as part of each other: where there are such, the tails are those of other
        families, as long as these are most of the rows.

        Args:
            distances: [C, n].
            families: a number from 0 on for each row [n]; in random order, where all are different.
        """
        n, own_scores = distances.shape[1], self.score(distances)
        scores, folds = own_scores.clone(), families % FOLDS
        for fold in torch.unique(folds):
            own = folds == fold
            if 2 * int(own.sum()) <= n:
                others = Tails.fit(distances[:, ~own], self._least_index, self._shape)
                scores[:, own] = others.score(distances[:, own])
        return scores if len(torch.unique(families)) < n else (own_scores + scores) / 2

    def score(self, distances: Tensor) -> Tensor:
        """-log P(a normal's distance ≥ x) for distances x [C, N] -> [C, N]."""
        n = self.distances.shape[1]
        below = torch.searchsorted(self.distances, distances.contiguous())
        body = -((n - below + 0.5) / (n + 1)).log()
        tail = self._beyond(distances) / self.index - torch.tensor((self.n_tail + 0.5) / (n + 1)).log()
        # Logarithms differ in the last bit from machine to machine; which rows are the outermost must not.
        return torch.where(distances > self.threshold, tail, body)

    def outlyingness(self, distances: Tensor) -> Tensor:
        """x / (x + the threshold) of the first c ≤ C distances x [c, N]: from 0 to 1, and a half where the tail begins.

        Where that is at zero, all above it is 1. Without a logarithm it is equal to the bit on every machine, so
        that trees send a row the same way everywhere.
        """
        threshold = self.threshold[: len(distances)].clamp(min=torch.finfo(distances.dtype).tiny)
        return distances / (distances + threshold)

    def reaches(self, n_rows: int, of: int) -> bool:
        """Whether as large a share of these rows is enough of them to tell how the tail falls."""
        return n_rows * self.distances.shape[1] >= SHAPED_TAIL_ROWS * of

    def part_of_index(self, share: float, of: float) -> Tensor:
        """The index that the outermost share gives, as a part of what a larger share gives: ½ to 1 [C, 1].

        It is 1 for a Pareto law, less for lighter tails. Without the least row, whose logarithm is 0 for any law.
        """
        inner, outer = (round(part * self.distances.shape[1]) for part in (of, share))
        part = self._spread(outer) / self._spread(inner) * (outer / (outer - 1)) * ((inner - 1) / inner)
        return part.nan_to_num(1.0).clamp(LEAST_PART, 1.0)

    def _spread(self, n_rows: int) -> Tensor:
        """The mean logarithm of what so many of the outermost distances are times the least of them [C, 1]."""
        outermost = self._logarithm(self.distances[:, self.distances.shape[1] - n_rows :])
        return (outermost - outermost[:, :1]).mean(dim=1, keepdim=True)

    def _beyond(self, distances: Tensor) -> Tensor:
        """The logarithm of what distances [C, N] are times the threshold."""
        return self._logarithm(distances) - self._logarithm(self.threshold)

    def _logarithm(self, distances: Tensor) -> Tensor:
        return torch.maximum(distances, self.least).log()


def _n_outermost(at_least: int, n: int) -> int:
    return max(1, min(max(at_least, round(TAIL_SHARE * n)), n // 2))
