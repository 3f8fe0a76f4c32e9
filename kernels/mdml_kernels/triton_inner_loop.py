"""The whole inner loop of an MLP d-h-z with a frozen linear head as one kernel: one program an episode, all SGD steps.

Tiled over the hidden units: the forward pass accumulates z over tiles of hidden units; the backward pass takes the
tiles again, recomputes a tile's activations, and updates both of the tile's weight blocks in place, since nothing
later in the step needs them. The weights live in the episode's own slice of the output, which stays in the L2 cache:
support rows and initial weights are read once from memory, adapted weights written back once.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

from mdml_kernels.triton_matmul import load_tile, matmul
from mdml_kernels.triton_mlp_kernels import weights_of
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
def one_class_slope(x, cols, live, n_rows, log_background, K: tl.constexpr, MASS: tl.constexpr, HAS_B: tl.constexpr):
    """d mean(-log S) / dx of scaled logits x [R, C] whose padding is -inf: -(1 - S) / n times dL/dx."""
    top, first, second, mass = scaled_statistics(x, cols, K)
    if HAS_B and not MASS:
        never = tl.full(top.shape, MINUS_INF, tl.float32)
        b = tl.zeros_like(top) + log_background
        top, first, second, mass = merge_statistics(never, first, b, exp_below(b, b), top, first, second, mass, LOG2_E)
    odds, reference = log_odds(top, second, mass, 1.0, log_background, MASS)
    slope = tl.where(live, -tl.sigmoid(-odds) / n_rows, 0.0)
    return scaled_slope(x, cols, first, reference, slope, MASS)


@triton.jit
def copy(source, target, SIZE: tl.constexpr):
    """SIZE numbers, as float32."""
    BLOCK: tl.constexpr = 1024
    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(source + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)
        tl.store(target + offsets, values, mask=offsets < SIZE)


@triton.jit
def inner_loop_kernel(
    support,
    w1,
    b1,
    w2,
    b2,
    head_weight,
    head_bias,
    direction,
    inv_temperature,
    background,
    out_w1,
    out_b1,
    out_w2,
    out_b2,
    lr,
    steps,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    Z: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STACKED: tl.constexpr,
    MASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adapted weights of one episode after `steps` of SGD on the one-class loss mean(-log S) of its support rows."""
    episode = tl.program_id(0).to(tl.int64)
    which = weights_of(direction, episode, STACKED)
    out_w1 += episode * (H * D)
    out_b1 += episode * H
    out_w2 += episode * (Z * H)
    out_b2 += episode * Z

    # From here on the episode's slice of the output holds its weights.
    copy(w1 + which * (H * D), out_w1, H * D)
    copy(b1 + which * H, out_b1, H)
    copy(w2 + which * (Z * H), out_w2, Z * H)
    copy(b2 + which * Z, out_b2, Z)
    tl.debug_barrier()

    rows = tl.arange(0, BLOCK_N)[:, None]
    live = tl.arange(0, BLOCK_N) < N
    d_rows = tl.arange(0, BLOCK_D)[:, None]
    z_rows = tl.arange(0, BLOCK_Z)[:, None]
    z_line = tl.arange(0, BLOCK_Z)
    k_cols = tl.arange(0, BLOCK_K)[None, :]

    x = load_tile(support + episode * (N * D), rows, tl.arange(0, BLOCK_D)[None, :], D, 1, N, D)
    scale = tl.load(inv_temperature + episode)
    log_background = scale
    if background is not None:
        log_background = tl.load(background + episode)
    logit_bias = tl.zeros([BLOCK_K], tl.float32)
    if head_bias is not None:
        k_line = tl.arange(0, BLOCK_K)
        logit_bias = tl.load(head_bias + which * K + k_line, mask=k_line < K, other=0.0)

    for _ in range(steps):
        bias2 = tl.load(out_b2 + z_line, mask=z_line < Z, other=0.0)
        z = tl.zeros([BLOCK_N, BLOCK_Z], tl.float32) + bias2[None, :]
        for start in range(0, H, BLOCK_H):
            h_line = start + tl.arange(0, BLOCK_H)
            bias1 = tl.load(out_b1 + h_line, mask=h_line < H, other=0.0)
            weight1 = load_tile(out_w1, d_rows, h_line[None, :], 1, D, D, H)
            weight2 = load_tile(out_w2, z_rows, h_line[None, :], H, 1, Z, H)
            pre = matmul(x, weight1, tl.zeros([BLOCK_N, BLOCK_H], tl.float32) + bias1[None, :], PRECISION)
            z = matmul(tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.trans(weight2), z, PRECISION)

        head = load_tile(head_weight + which * (K * Z), z_rows, k_cols, 1, Z, Z, K)
        logits = matmul(z, head, tl.zeros([BLOCK_N, BLOCK_K], tl.float32) + logit_bias[None, :], PRECISION)
        scaled = tl.where(k_cols < K, logits * scale, MINUS_INF)
        slope = one_class_slope(scaled, k_cols, live, N, log_background, K, MASS, background is not None)
        dz = matmul(slope * scale, tl.trans(head), tl.zeros([BLOCK_N, BLOCK_Z], tl.float32), PRECISION)
        tl.debug_barrier()  # every thread has read the old biases of z
        tl.store(out_b2 + z_line, bias2 - lr * tl.sum(dz, 0), mask=z_line < Z)

        for start in range(0, H, BLOCK_H):
            h_line = start + tl.arange(0, BLOCK_H)
            bias1 = tl.load(out_b1 + h_line, mask=h_line < H, other=0.0)
            weight1 = load_tile(out_w1, d_rows, h_line[None, :], 1, D, D, H)
            weight2 = load_tile(out_w2, z_rows, h_line[None, :], H, 1, Z, H)
            pre = matmul(x, weight1, tl.zeros([BLOCK_N, BLOCK_H], tl.float32) + bias1[None, :], PRECISION)
            hidden = tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL)
            dh = matmul(dz, weight2, tl.zeros([BLOCK_N, BLOCK_H], tl.float32), PRECISION)
            dh = tl.where(pre <= 0.0, 0.0, dh)
            dw2 = matmul(tl.trans(dz), hidden, tl.zeros([BLOCK_Z, BLOCK_H], tl.float32), PRECISION)
            dw1 = matmul(tl.trans(x), dh, tl.zeros([BLOCK_D, BLOCK_H], tl.float32), PRECISION)
            tl.debug_barrier()  # every thread has read the tile
            keep1 = (d_rows < D) & (h_line[None, :] < H)
            keep2 = (z_rows < Z) & (h_line[None, :] < H)
            tl.store(out_w1 + d_rows + h_line[None, :] * D, weight1 - lr * dw1, mask=keep1)
            tl.store(out_w2 + z_rows * H + h_line[None, :], weight2 - lr * dw2, mask=keep2)
            tl.store(out_b1 + h_line, bias1 - lr * tl.sum(dh, 0), mask=h_line < H)
        tl.debug_barrier()  # the next step reads what this one wrote
