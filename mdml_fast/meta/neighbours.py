"""Mean distances to the nearest references, exact, in blocks: memory does not grow with the number of rows."""

from __future__ import annotations

import math
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from mdml_kernels.native import loader
from mdml_kernels.native.neighbours import MOST, NeighbourSearch
from torch import Tensor

from mdml_fast.data.encoding import Rows
from mdml_fast.threads import side_by_side

# Squared distances held at once, in float64: 16 MiB are still in the cache when their minima are sought.
BLOCK_VALUES = 2**21
# The k smallest of n values are sought in groups of so many: one pass of minima instead of a selection over all.
GROUP = 8
# So many candidates more than needed are taken from the matrix product, which is inexact, and measured exactly.
SPARE = 3
# Outliers among the normals are told by their distance to at most so many of them.
OUTLIER_REFERENCES = 10_000


class References:
    """What rows are compared with in each of D embeddings.

    Args:
        embedded: float [D, n, d].
    """

    def __init__(self, embedded: Tensor) -> None:
        self.embedded = embedded

    def distances(
        self, rows: Tensor, k: int, *, families: Tensor | None = None, reference_families: Tensor | None = None
    ) -> Tensor:
        """The mean Euclidean distance of each row to its k nearest references [D, N].

        Their distances are summed in float64 and rounded once. Distances that are equal come out equal to the bit,
        whatever the machine, the threads or the other rows.

        Args:
            rows: [D, N, d], in each embedding.
            k: how many; all of them where there are fewer.
            families: int [N]; a row is not compared with references of its own family. None compares with all.
            reference_families: int [n], needed with `families`.
        """
        references = self.embedded
        if torch.compiler.is_exporting() and families is None:
            # A program for any number of rows has no loop over them.
            return _block_distances(rows, references, _product_columns(references), k)
        if k <= MOST and loader.serves(rows, references):
            each = zip(self._searches, rows, strict=True)
            return torch.stack([search.distances(own, k, families, reference_families) for search, own in each])
        columns = _product_columns(references)
        step = max(1, BLOCK_VALUES // references.shape[1])
        distances = rows.new_empty(rows.shape[:2])
        for start in range(0, rows.shape[1], step):
            own, block = None, slice(start, start + step)
            if families is not None and reference_families is not None:
                own = families[block, None] == reference_families
            # One embedding after the other: blocks of many rows are faster to multiply.
            for place in range(len(rows)):
                one = slice(place, place + 1)
                distances[one, block] = _block_distances(rows[one, block], references[one], columns[one], k, own)
        return distances

    def order(self, rows: Tensor) -> Tensor:
        """Positions of rows [N, d], in the first embedding, in an order in which they are found faster [N]."""
        if loader.serves(rows, self.embedded):
            return self._searches[0].order(rows)
        return torch.arange(len(rows), device=rows.device)

    @cached_property
    def _searches(self) -> list[NeighbourSearch]:
        return side_by_side([partial(NeighbourSearch, one) for one in self.embedded])


def _product_columns(references: Tensor) -> Tensor:
    """(-2r, |r|²) of each reference [D, d + 1, n]: (x, 1) times it is |x - r|² - |x|², in one pass.

    In float64: which of references that are close together is nearest tells what float32 loses beside their size.
    """
    wide = references.double()
    return torch.cat([-2.0 * wide, wide.square().sum(-1, keepdim=True)], dim=-1).mT


def _block_distances(rows: Tensor, references: Tensor, columns: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """`References.distances` of few rows, given the references' `_product_columns`.

    `own` tells which references a row is not compared with, bool [N, n].
    """
    squared = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1).double() @ columns
    if own is not None:
        squared.masked_fill_(own, torch.inf)
    k = min(k, references.shape[1])
    candidates = _smallest(squared, min(k + SPARE, references.shape[1]))
    allowed = squared.gather(-1, candidates) < torch.inf
    exact = _squared_distances(rows, references, candidates).where(allowed, torch.inf)
    nearest = exact.topk(k, largest=False).values
    # Fewer than k references may be of other families: the mean is over those that are.
    return nearest.sqrt().where(nearest.isfinite(), torch.nan).nanmean(-1).to(rows.dtype)


def innermost(rows: Rows, outside: float, seed: int) -> npt.NDArray[np.intp]:
    """Positions, increasing, of rows [N, d] without the share `outside` that lies farthest from the others.

    By the mean distance to the nearest others, of at most 10 000 sampled ones: to 5 more than would be left out, so
    that those can't vouch for each other.
    """
    n_dropped = math.floor(outside * len(rows))
    if not n_dropped:
        return np.arange(len(rows))
    sample = np.random.default_rng(seed).permutation(len(rows))[:OUTLIER_REFERENCES]
    matrix, own = torch.as_tensor(rows), torch.arange(len(rows))
    k = math.ceil(outside * len(sample)) + 5
    references = References(matrix[None, sample])
    distances = references.distances(matrix[None], k, families=own, reference_families=torch.as_tensor(sample))
    return np.sort(np.argsort(distances[0].numpy(), kind="stable")[: len(rows) - n_dropped])


def _squared_distances(rows: Tensor, references: Tensor, chosen: Tensor) -> Tensor:
    """Squared distances, float64 [D, N, c], of rows [D, N, d] from those of references [D, n, d] at [D, N, c]."""
    embedding = torch.arange(len(references), device=rows.device)[:, None, None]
    steps = rows.unsqueeze(2) - references[embedding, chosen]
    return steps.square_().sum(-1, dtype=torch.float64)


def _smallest(values: Tensor, k: int) -> Tensor:
    """Positions of the k smallest in the last dimension: they lie in the k groups with the smallest minima."""
    width = values.shape[-1] // GROUP
    if width < GROUP * k:
        return values.topk(k, largest=False).indices
    rest = torch.arange(GROUP * width, values.shape[-1], device=values.device)
    grouped = values[..., : GROUP * width].view(*values.shape[:-1], GROUP, width)
    groups = grouped.amin(-2).topk(k, largest=False).indices
    places = groups.unsqueeze(-2) + width * torch.arange(GROUP, device=values.device).unsqueeze(-1)
    candidates = torch.cat([places.flatten(-2), rest.expand(*values.shape[:-1], -1)], dim=-1)
    return candidates.gather(-1, values.gather(-1, candidates).topk(k, largest=False).indices)
