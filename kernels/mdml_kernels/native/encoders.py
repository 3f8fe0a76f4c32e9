"""Residual encoders by the compiled kernels: no matrix of float64, nor of hidden units, is ever in memory."""

from __future__ import annotations

from ctypes import c_float

from torch import Tensor

from mdml_kernels.native.calls import call, check, whole

# A hidden unit that changes by no more has no slope of its own.
NO_CHANGE = 1e-6
# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


def residual_encoders(rows: Tensor, inner: Tensor, bias: Tensor, outer: Tensor, log_scale: Tensor) -> Tensor:
    """x · exp(s) + B relu(A x + b) [D, N, d] of D encoders, computed in float64 and rounded once.

    Float32 on a CPU: rows x [V, N, d], of which encoder e takes those at e % V; A, `inner` [D, h, d]; b, `bias` [D, h];
    B, `outer` [D, d, h]; s, `log_scale` [D, d]. A row's bits depend neither on the other rows nor on the threads. No
    graph.

    Raises:
        ValueError: a tensor is of another shape.
    """
    if rows.shape[2] != inner.shape[2]:
        raise ValueError(f"rows must have the {inner.shape[2]} features of the encoders, got {rows.shape[2]}")
    _check(inner, bias, outer, log_scale)
    out = rows.new_empty(len(inner), *rows.shape[1:])
    call(
        *("mdml_residual_encoders", rows.shape[1], 2 * inner.numel(), _LEAST_PRODUCTS, *rows.shape, *inner.shape[:2]),
        *(whole(rows), whole(inner), whole(bias), whole(outer), whole(log_scale), out),
    )
    return out


def pull_back(rows: Tensor, steps: Tensor, inner: Tensor, bias: Tensor, outer: Tensor, log_scale: Tensor) -> Tensor:
    """What the coordinates of steps s [V, N, d], to rows x [V, N, d], add to |z(x) - z(x - s)|² [D, N, d].

    Their product with s; see `mdml_fast.meta.encoders.Encoders.pull_back`. Encoders are as in `residual_encoders`. All
    in float32 on a CPU; no graph.

    Raises:
        ValueError: a tensor is of another shape.
    """
    if rows.shape != steps.shape or rows.shape[2] != inner.shape[2]:
        raise ValueError(
            f"rows and steps must have the {inner.shape[2]} features, got {list(rows.shape)} and {list(steps.shape)}"
        )
    _check(inner, bias, outer, log_scale)
    out = rows.new_empty(len(inner), *rows.shape[1:])
    call(
        *("mdml_pull_back", rows.shape[1], 5 * inner.numel(), _LEAST_PRODUCTS, *rows.shape, *inner.shape[:2]),
        *(*map(whole, (rows, steps, inner, bias, outer, log_scale)), c_float(NO_CHANGE), out),
    )
    return out


def _check(inner: Tensor, bias: Tensor, outer: Tensor, log_scale: Tensor) -> None:
    n_encoders, h, d = inner.shape
    check("bias", bias, n_encoders, h)
    check("outer", outer, n_encoders, d, h)
    check("log_scale", log_scale, n_encoders, d)
