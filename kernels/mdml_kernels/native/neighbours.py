"""Mean distances to the nearest references by the compiled kernels: no matrix of distances is ever in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mdml_kernels.native.library import native
from mdml_kernels.native.threads import shared

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
    library = native().library
    assert library is not None
    rows, references = rows.contiguous(), references.contiguous()
    own, others = (
        None if codes is None else codes.to(torch.int64).contiguous() for codes in (families, reference_families)
    )
    out = torch.empty(len(rows))
    sizes = [ctypes.c_int64(size) for size in (*references.shape, k, k + spare)]
    pointers = [
        ctypes.c_void_p(None if value is None else value.data_ptr()) for value in (rows, references, own, others, out)
    ]

    def run(begin: int, end: int) -> None:
        library.mdml_neighbour_distances(ctypes.c_int64(begin), ctypes.c_int64(end), *sizes, *pointers)

    shared(run, len(rows), least=max(1, _LEAST_PRODUCTS // max(1, references.numel())))
    return out
