"""A linear head and the log-odds of its logits in one kernel: tiles of logits live in registers, never in memory.

Groups G have a head each; logits [N, K] of a group are z Wᵀ + c, tau = 1/T and the background are one a row. Backward
makes the tiles again: once by rows, for the gradients of z, tau and the background, and once by logits, for the head's.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

from mdml_kernels.triton_matmul import load_tile, matmul
from mdml_kernels.triton_row_math import (
    LOG2_E,
    MINUS_INF,
    exp_below,
    log_odds,
    merge_statistics,
    scaled_slope,
    scaled_statistics,
)


@triton.jit
def tile_logits(
    z,
    weight,
    bias,
    rows,
    cols,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits [BLOCK_N, BLOCK_K] of one group at rows [BLOCK_N] x cols [BLOCK_K]."""
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, H, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        z_tile = load_tile(z, rows[:, None].to(tl.int64), inner[None, :], H, 1, N, H)
        w_tile = load_tile(weight, cols[:, None].to(tl.int64), inner[None, :], H, 1, K, H)
        acc = matmul(z_tile, tl.trans(w_tile), acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_forward_kernel(
    z,
    weight,
    bias,
    tau,
    background,
    odds,
    reference,
    argmax,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log-odds, reference and first argmax of BLOCK_N rows."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // tiles_n).to(tl.int64)
    rows = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    scale = tl.load(tau + group * N + rows, mask=live, other=1.0)
    top = tl.full([BLOCK_N], MINUS_INF, tl.float32)
    second = tl.full([BLOCK_N], MINUS_INF, tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_N], tl.int32)
    log_background = top
    if background is not None:
        log_background = tl.load(background + group * N + rows, mask=live, other=0.0)
        if not MASS:
            second = log_background
            mass = exp_below(log_background, log_background)

    bias_of = bias
    if bias is not None:
        bias_of = bias + group * K
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        logits = tile_logits(
            z + group * (N * H), weight + group * (K * H), bias_of, rows, cols,
            N, H, K, BLOCK_N, BLOCK_K, BLOCK_H, PRECISION,
        )  # fmt: skip
        x = tl.where(cols[None, :] < K, logits * scale[:, None], MINUS_INF)
        tile_top, tile_first, tile_second, tile_mass = scaled_statistics(x, cols[None, :], K)
        top, first, second, mass = merge_statistics(
            top, first, second, mass, tile_top, tile_first, tile_second, tile_mass, LOG2_E
        )

    row_odds, row_reference = log_odds(top, second, mass, 1.0, log_background, MASS)
    tl.store(odds + group * N + rows, row_odds, mask=live)
    tl.store(reference + group * N + rows, row_reference, mask=live)
    if not MASS:
        tl.store(argmax + group * N + rows, first, mask=live)


@triton.jit
def tile_slope(logits, cols, scale, first, log_sum, g, K: tl.constexpr, MASS: tl.constexpr):
    """The odds' gradient g [R] pulled back to scaled logits [R, C]; 0 beyond K."""
    x = tl.where(cols[None, :] < K, logits * scale[:, None], MINUS_INF)
    return scaled_slope(x, cols[None, :], first, log_sum, g, MASS)


@triton.jit
def linear_backward_rows_kernel(
    z,
    weight,
    bias,
    tau,
    background,
    reference,
    argmax,
    grad,
    grad_z,
    grad_tau,
    grad_background,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of z (BLOCK_OUT of its features), and with the first of those of tau and the background."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_out: tl.constexpr = (H + BLOCK_OUT - 1) // BLOCK_OUT
    group = (tl.program_id(0) // (tiles_n * tiles_out)).to(tl.int64)
    rows = tl.program_id(0) // tiles_out % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_out = tl.program_id(0) % tiles_out
    out = (tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :]
    live = rows < N
    scale = tl.load(tau + group * N + rows, mask=live, other=1.0)
    log_sum = tl.load(reference + group * N + rows, mask=live, other=float("inf"))
    first = rows
    if not MASS:
        first = tl.load(argmax + group * N + rows, mask=live, other=0)
    g = tl.load(grad + group * N + rows, mask=live, other=0.0)
    g = tl.where(log_sum == log_sum, g, log_sum)  # the one constant slope, that of the maximum, must turn NaN as well

    bias_of = bias
    if bias is not None:
        bias_of = bias + group * K
    acc = tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32)
    tau_terms = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        logits = tile_logits(
            z + group * (N * H), weight + group * (K * H), bias_of, rows, cols,
            N, H, K, BLOCK_N, BLOCK_K, BLOCK_H, PRECISION,
        )  # fmt: skip
        slope = tile_slope(logits, cols, scale, first, log_sum, g, K, MASS)
        tau_terms += tl.sum(logits * slope, 1)
        w_tile = load_tile(weight + group * (K * H), cols[:, None].to(tl.int64), out, H, 1, K, H)
        acc = matmul(slope * scale[:, None], w_tile, acc, PRECISION)

    keep = live[:, None] & (out < H)
    to = grad_z + group * (N * H) + rows[:, None].to(tl.int64) * H + out
    tl.store(to, acc.to(grad_z.dtype.element_ty), mask=keep)
    if tile_out == 0:
        tl.store(grad_tau + group * N + rows, tau_terms, mask=live)
        if background is not None:
            slope_background = -g
            if not MASS:
                log_background = tl.load(background + group * N + rows, mask=live, other=0.0)
                slope_background = -g * exp_below(log_background, log_sum)
            tl.store(grad_background + group * N + rows, slope_background, mask=live)


@triton.jit
def linear_backward_head_kernel(
    z,
    weight,
    bias,
    tau,
    reference,
    argmax,
    grad,
    grad_weight,
    grad_bias,
    n_groups,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What ROWS rows give to the gradients of BLOCK_K logits' weights (BLOCK_OUT features) and bias.

    grad_weight is [splits, G, K, H] and grad_bias [splits, G, K]: the caller adds up the splits, in a fixed order.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_out: tl.constexpr = (H + BLOCK_OUT - 1) // BLOCK_OUT
    tile_out = tl.program_id(0) % tiles_out
    cols = tl.program_id(0) // tiles_out % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    split_group = (tl.program_id(0) // (tiles_out * tiles_k)).to(tl.int64)
    group = split_group % n_groups
    first_row = (split_group // n_groups).to(tl.int32) * ROWS
    out = (tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :]

    bias_of = bias
    if bias is not None:
        bias_of = bias + group * K
    acc = tl.zeros([BLOCK_K, BLOCK_OUT], tl.float32)
    acc_bias = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        rows = first_row + start + tl.arange(0, BLOCK_N)
        live = rows < N
        scale = tl.load(tau + group * N + rows, mask=live, other=1.0)
        log_sum = tl.load(reference + group * N + rows, mask=live, other=float("inf"))
        first = rows
        if not MASS:
            first = tl.load(argmax + group * N + rows, mask=live, other=0)
        g = tl.load(grad + group * N + rows, mask=live, other=0.0)
        g = tl.where(log_sum == log_sum, g, log_sum)
        logits = tile_logits(
            z + group * (N * H), weight + group * (K * H), bias_of, rows, cols,
            N, H, K, BLOCK_N, BLOCK_K, BLOCK_H, PRECISION,
        )  # fmt: skip
        slope = tile_slope(logits, cols, scale, first, log_sum, g, K, MASS) * scale[:, None]
        z_tile = load_tile(z + group * (N * H), rows[:, None].to(tl.int64), out, H, 1, N, H)
        acc = matmul(tl.trans(slope), z_tile, acc, PRECISION)
        acc_bias += tl.sum(slope, 0)

    keep = (cols[:, None] < K) & (out < H)
    tl.store(grad_weight + split_group * (K * H) + cols[:, None].to(tl.int64) * H + out, acc, mask=keep)
    if grad_bias is not None:  # noqa: SIM102 - decided at compile time, the inner one at run time
        if tile_out == 0:
            tl.store(grad_bias + split_group * K + cols, acc_bias, mask=cols < K)
