"""Mean distances to the nearest references by the compiled kernels: no matrix of distances is ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_kernels.native.calls import call, whole

# Candidates of a row that the kernel has room for.
MOST = 64
# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 22


def neighbour_distances(
    rows: Tensor, references: Tensor, k: int, spare: int, families: Tensor | None, reference_families: Tensor | None
) -> Tensor:
    """The mean Euclidean distance [N] of rows [N, d] to their k nearest references [n, d]; NaN where there is none.

    Float32 on a CPU. k + spare candidates, `MOST` at most, are found by a product in float32; their squared distances
    are summed in float64. A row is not compared with references of its own family (int [N] and [n]; None: with all).
    """
    own, others = (None if codes is None else whole(codes.to(torch.int64)) for codes in (families, reference_families))
    out = torch.empty(len(rows))
    call(
        *("mdml_neighbour_distances", len(rows), references.numel(), _LEAST_PRODUCTS, *references.shape, k, k + spare),
        *(whole(rows), whole(references), own, others, out),
    )
    return out
