"""Mean distances to the nearest references, exact, in blocks: memory does not grow with the number of rows."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.data.encoding import Rows

# Squared distances held at once: 64 MiB in float32.
BLOCK_VALUES = 2**24
# The k smallest of n values are sought in groups of so many: one pass of minima instead of a selection over all.
GROUP = 8
# Outliers among the normals are told by their distance to at most so many of them.
OUTLIER_REFERENCES = 10_000


def neighbour_distances(
    rows: Tensor,
    references: Tensor,
    k: int,
    *,
    families: Tensor | None = None,
    reference_families: Tensor | None = None,
) -> Tensor:
    """The mean Euclidean distance of each row to its k nearest references [D, N].

    Args:
        rows: [D, N, d], in each of D embeddings.
        references: [D, n, d].
        k: how many; all of them where there are fewer.
        families: int [N]; a row is not compared with references of its own family. None compares with all.
        reference_families: int [n], needed with `families`.
    """
    n_embeddings, n_references = references.shape[:2]
    squares = references.square().sum(-1).unsqueeze(1)
    step = max(1, BLOCK_VALUES // (n_embeddings * n_references))
    distances = []
    for start in range(0, rows.shape[1], step):
        block = rows[:, start : start + step]
        squared = torch.baddbmm(squares, block, references.mT, alpha=-2.0)
        if families is not None and reference_families is not None:
            own = families[start : start + step, None] == reference_families
            squared.masked_fill_(own, torch.inf)
        nearest = _smallest(squared, min(k, n_references)) + block.square().sum(-1, keepdim=True)
        # Fewer than k references may be of other families: the mean is over those that are.
        distances.append(nearest.clamp(min=0).sqrt().where(nearest.isfinite(), torch.nan).nanmean(-1))
    return torch.cat(distances, dim=1) if distances else rows.new_empty(rows.shape[:2])


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
    distances = neighbour_distances(
        matrix[None], matrix[None, sample], k, families=own, reference_families=torch.as_tensor(sample)
    )
    return np.sort(np.argsort(distances[0].numpy(), kind="stable")[: len(rows) - n_dropped])


def _smallest(values: Tensor, k: int) -> Tensor:
    """The k smallest of the last dimension: they lie in the k groups with the smallest minima."""
    width = values.shape[-1] // GROUP
    if width < GROUP * k:
        return values.topk(k, largest=False).values
    rest = values[..., GROUP * width :]
    grouped = values[..., : GROUP * width].view(*values.shape[:-1], GROUP, width)
    groups = grouped.amin(-2).topk(k, largest=False).indices
    candidates = grouped.gather(-1, groups.unsqueeze(-2).expand(*groups.shape[:-1], GROUP, k))
    return torch.cat([candidates.flatten(-2), rest], dim=-1).topk(k, largest=False).values
