"""Four views of rows by the compiled kernels, in one pass."""

from __future__ import annotations

import ctypes

from torch import Tensor

from mdml_kernels.native.calls import call, check, whole

# Fewer features, or products, than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


def views(
    rows: Tensor, knots: Tensor, levels: Tensor, mean: Tensor, whitening: Tensor, scales: Tensor, clip: float
) -> Tensor:
    """The clipped rows less their mean, the empirical cdf, its normal quantiles, the clipped rows whitened [4, N, d].

    Float32 on a CPU, computed in float64 and rounded once: rows [N, d]; knots and levels of the cdf [d, K], K > 1; mean
    [d]; whitening [d, d]; a factor of each view, scales [4]; beyond ±clip, and the knots, rows are on a log scale. A
    row's bits depend neither on the other rows nor on the threads. No graph.

    Raises:
        ValueError: a tensor is of another shape.
    """
    if rows.shape[1:] != mean.shape:
        raise ValueError(f"rows must have the {len(mean)} features of the views, got {rows.shape[1]}")
    d, n_knots = len(mean), knots.shape[-1]
    check("knots", knots, d, n_knots)
    check("levels", levels, d, n_knots)
    check("whitening", whitening, d, d)
    check("scales", scales, 4)
    out = rows.new_empty(4, *rows.shape)
    fitted = map(whole, (knots, levels, mean, whitening, scales))
    call(
        *("mdml_views", len(rows), whitening.numel(), _LEAST_PRODUCTS, *rows.shape, n_knots),
        *(ctypes.c_float(clip), whole(rows), *fitted, out),
    )
    return out
