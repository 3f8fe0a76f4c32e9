"""The row kernels: log-odds of rows of logits, their gradient and second derivative. No atomics, offsets in int64.

Rows are numbered through all episodes; a program takes BLOCK_N of them, TILES tiles of BLOCK_K logits at a time, which
its threads hold in registers: a few threads a row, side by side, and most of the row in each. K and the row stride are
compile-time constants, so that the compiler can prove the alignment of every load.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

from mdml_kernels.triton_row_math import (
    LOG2_E,
    MINUS_INF,
    log_odds,
    merge_statistics,
    pulled_back,
    rebased,
    tile_statistics,
    zero_at_minus_inf,
)


@triton.jit
def row_offsets(rows, episodes, rows_per_episode, stride_e, STRIDE_N: tl.constexpr, FLAT: tl.constexpr):
    """int64 offset of each row; FLAT when one stride spans all rows, which keeps the alignment provable."""
    if FLAT:
        return rows.to(tl.int64) * STRIDE_N
    return episodes.to(tl.int64) * stride_e + (rows - episodes * rows_per_episode).to(tl.int64) * STRIDE_N


@triton.jit
def load_tiles(
    row_start, live, cols, other, K: tl.constexpr, STRIDE_K: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tuple of TILES tiles [R, BLOCK_K]: logits of rows [R] from columns [1, BLOCK_K] on, `other` beyond K."""
    tiles = ()
    for tile in tl.static_range(TILES):
        at = cols + tile * BLOCK_K
        place = row_start[:, None] + at.to(tl.int64) * STRIDE_K
        tiles = tiles + (tl.load(place, mask=live[:, None] & (at < K), other=other),)  # noqa: RUF005 - Triton's tuples
    return tiles


@triton.jit
def load_reference(reference, rows, live):
    """The unscaled logit [R] that a row's summed ones are relative to, 0 for -inf, and one over their sum.

    Where nothing is summed that is 0, and so is each share of it. NaN where the row is.
    """
    at = reference + 2 * rows.to(tl.int64)
    total = tl.load(at + 1, mask=live, other=1.0)
    return zero_at_minus_inf(tl.load(at, mask=live, other=0.0)), tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def softmax_times(factor, x, largest, scale):
    """The factor [R] times exp((x - largest) / T) [R, C], as it was summed: times one over the sum, a softmax."""
    return tl.exp2((x - largest[:, None]) * (scale * LOG2_E)[:, None]) * factor[:, None]


@triton.jit
def background_term(log_background, largest, scale):
    """What the background adds to the sum that is relative to the unscaled logit `largest` [R]."""
    return tl.exp(log_background - zero_at_minus_inf(largest) * scale)


@triton.jit
def rows_forward_kernel(
    logits,
    inv_temperature,
    background,
    odds,
    reference,
    argmax,
    n_rows,
    rows_per_episode,
    stride_e,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    FLAT: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Log-odds, reference and first argmax of each row; the logits read once."""
    acc = odds.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_rows
    episodes = rows // rows_per_episode
    scale = tl.load(inv_temperature + episodes, mask=live, other=1.0).to(acc)
    scale = tl.where(scale >= 0.0, scale, float("nan"))  # a negative T would turn the order of the logits round
    row_start = logits + row_offsets(rows, episodes, rows_per_episode, stride_e, STRIDE_N, FLAT)

    top = tl.full([BLOCK_N], MINUS_INF, acc)
    second = tl.full([BLOCK_N], MINUS_INF, acc)
    mass = tl.zeros([BLOCK_N], acc)
    first = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, K, TILES * BLOCK_K):
        cols = (start + tl.arange(0, BLOCK_K))[None, :]
        tiles = load_tiles(row_start, live, cols, MINUS_INF, K, STRIDE_K, TILES, BLOCK_K)
        tile_top, tile_first, tile_second, tile_mass = tile_statistics(tiles, cols, scale * LOG2_E, K, TILES, BLOCK_K)
        top, first, second, mass = merge_statistics(
            top, first, second, mass, tile_top, tile_first, tile_second, tile_mass, scale * LOG2_E
        )

    log_background = top
    if background is not None:
        log_background = tl.load(background + episodes, mask=live, other=0.0).to(acc)
        if not MASS:  # summed with the others, relative to whichever is larger
            larger = tl.maximum(second, log_background / scale)
            larger = tl.where(scale > 0.0, larger, zero_at_minus_inf(second))
            mass = rebased(mass, second, larger, scale * LOG2_E) + background_term(log_background, larger, scale)
            second = larger
    row_odds, _ = log_odds(top, second, mass, scale, log_background, MASS)
    tl.store(odds + rows, row_odds, mask=live)
    if MASS:  # the largest is summed too
        mass = rebased(mass, second, top, scale * LOG2_E) + tl.where(top == MINUS_INF, 0.0, 1.0)
        second = top
    second = tl.where(row_odds == row_odds, second, row_odds)  # NaN
    tl.store(reference + 2 * rows.to(tl.int64), second, mask=live)
    tl.store(reference + 2 * rows.to(tl.int64) + 1, mass, mask=live)
    if not MASS:
        tl.store(argmax + rows, first, mask=live)


@triton.jit
def rows_backward_kernel(
    logits,
    inv_temperature,
    background,
    reference,
    argmax,
    grad,
    grad_logits,
    grad_inv_temperature,
    grad_background,
    n_rows,
    rows_per_episode,
    stride_e,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    FLAT: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gradients of the logits and, row by row, of 1/T and b; the logits read once, their gradient written once."""
    acc = reference.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_rows
    episodes = rows // rows_per_episode
    scale = tl.load(inv_temperature + episodes, mask=live, other=1.0).to(acc)
    row_start = logits + row_offsets(rows, episodes, rows_per_episode, stride_e, STRIDE_N, FLAT)
    grad_start = grad_logits + rows.to(tl.int64) * K
    largest, inverse_sum = load_reference(reference, rows, live)
    first = rows
    if not MASS:
        first = tl.load(argmax + rows, mask=live, other=0)
    g = tl.load(grad + rows, mask=live, other=0.0).to(acc)
    g = tl.where(largest == largest, g, largest)  # the one constant slope, that of the maximum, must turn NaN as well

    summed = tl.zeros([BLOCK_N, BLOCK_K], acc)
    for start in range(0, K, TILES * BLOCK_K):
        cols = (start + tl.arange(0, BLOCK_K))[None, :]
        tiles = load_tiles(row_start, live, cols, MINUS_INF, K, STRIDE_K, TILES, BLOCK_K)
        for tile in tl.static_range(TILES):
            at, x = cols + tile * BLOCK_K, tiles[tile].to(acc)
            slope = softmax_times(g * inverse_sum, x, largest, scale)
            if not MASS:
                slope = tl.where(at == first[:, None], 0.0, -slope)
            summed += tl.where(x == MINUS_INF, 0.0, x * slope)
            if not MASS:
                slope = tl.where(at == first[:, None], g[:, None], slope)
            out = (slope * scale[:, None]).to(grad_logits.dtype.element_ty)
            tl.store(grad_start[:, None] + at, out, mask=live[:, None] & (at < K))

    moved = tl.sum(summed, 1)
    if not MASS:
        # The maximum's term is as large as all others and of the other sign: among them it would round them off.
        top = tl.load(row_start + first.to(tl.int64) * STRIDE_K, mask=live, other=0.0).to(acc)
        moved += g * zero_at_minus_inf(top)
    tl.store(grad_inv_temperature + rows, moved, mask=live)
    if background is not None:
        slope_background = -g
        if not MASS:
            log_background = tl.load(background + episodes, mask=live, other=0.0).to(acc)
            slope_background = -g * background_term(log_background, largest, scale) * inverse_sum
        tl.store(grad_background + rows, slope_background, mask=live)


@triton.jit
def tangent(x, vx, scale, v_scale):
    """Of the scaled logits, given those of the logits and the scale; 0 at logits of -inf where only the scale moves."""
    return vx * scale[:, None] + tl.where(x == MINUS_INF, 0.0, x * v_scale[:, None])


@triton.jit
def rows_double_backward_kernel(
    logits,
    inv_temperature,
    background,
    reference,
    argmax,
    grad,
    v_logits,
    v_inv_temperature,
    v_background,
    out_logits,
    out_inv_temperature,
    out_background,
    along,
    n_rows,
    rows_per_episode,
    stride_e,
    v_stride_e,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    FLAT: tl.constexpr,
    V_STRIDE_N: tl.constexpr,
    V_STRIDE_K: tl.constexpr,
    V_FLAT: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """J v, and the gradients of g J v, in closed form.

    With t_k = v_k / T + v_a l_k the tangent of the scaled logit and m the mean of the tangents under the softmax q,
    J v = Σ_k t_k dL/dx_k, and d(J v)/dx_j = dL/dx_j (t_j - m), but 0 for the maximum, whose slope is constant.
    """
    acc = reference.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_rows
    episodes = rows // rows_per_episode
    scale = tl.load(inv_temperature + episodes, mask=live, other=1.0).to(acc)
    v_scale = tl.load(v_inv_temperature + episodes, mask=live, other=0.0).to(acc)
    row_start = logits + row_offsets(rows, episodes, rows_per_episode, stride_e, STRIDE_N, FLAT)
    v_start = v_logits + row_offsets(rows, episodes, rows_per_episode, v_stride_e, V_STRIDE_N, V_FLAT)
    out_start = out_logits + rows.to(tl.int64) * K
    largest, inverse_sum = load_reference(reference, rows, live)
    first = rows
    if not MASS:
        first = tl.load(argmax + rows, mask=live, other=0)
    g = tl.load(grad + rows, mask=live, other=0.0).to(acc)
    g = tl.where(largest == largest, g, largest)

    share_terms = tl.zeros([BLOCK_N, BLOCK_K], acc)
    first_terms = tl.zeros([BLOCK_N, BLOCK_K], acc)
    for start in range(0, K, TILES * BLOCK_K):
        cols = (start + tl.arange(0, BLOCK_K))[None, :]
        tiles = load_tiles(row_start, live, cols, MINUS_INF, K, STRIDE_K, TILES, BLOCK_K)
        v_tiles = load_tiles(v_start, live, cols, 0.0, K, V_STRIDE_K, TILES, BLOCK_K)
        for tile in tl.static_range(TILES):
            x, vx = tiles[tile].to(acc), v_tiles[tile].to(acc)
            t = tangent(x, vx, scale, v_scale)
            share = softmax_times(inverse_sum, x, largest, scale)
            if MASS:
                share_terms += share * t
            else:
                is_first = cols + tile * BLOCK_K == first[:, None]
                share_terms += tl.where(is_first, 0.0, share * t)
                first_terms += tl.where(is_first, t, 0.0)

    mean_tangent = tl.sum(share_terms, 1)
    if background is not None:
        v_log_background = tl.load(v_background + episodes, mask=live, other=0.0).to(acc)
    if MASS:
        moved = mean_tangent - v_log_background
        tl.store(out_background + rows, g * 0.0, mask=live)
    else:
        if background is not None:
            log_background = tl.load(background + episodes, mask=live, other=0.0).to(acc)
            share_background = background_term(log_background, largest, scale) * inverse_sum
            mean_tangent += share_background * v_log_background
            slope_background = -g * share_background * (v_log_background - mean_tangent)
            tl.store(out_background + rows, slope_background, mask=live)
        moved = tl.sum(first_terms, 1) - mean_tangent
    tl.store(along + rows, moved, mask=live)

    scale_terms = tl.zeros([BLOCK_N, BLOCK_K], acc)
    for start in range(0, K, TILES * BLOCK_K):
        cols = (start + tl.arange(0, BLOCK_K))[None, :]
        tiles = load_tiles(row_start, live, cols, MINUS_INF, K, STRIDE_K, TILES, BLOCK_K)
        v_tiles = load_tiles(v_start, live, cols, 0.0, K, V_STRIDE_K, TILES, BLOCK_K)
        for tile in tl.static_range(TILES):
            at, x, vx = cols + tile * BLOCK_K, tiles[tile].to(acc), v_tiles[tile].to(acc)
            slope = pulled_back(softmax_times(g * inverse_sum, x, largest, scale), at, first[:, None], g[:, None], MASS)
            bend = slope * (tangent(x, vx, scale, v_scale) - mean_tangent[:, None])
            if not MASS:
                bend = tl.where((at == first[:, None]) & (slope == slope), 0.0, bend)
            out = (bend * scale[:, None] + v_scale[:, None] * slope).to(out_logits.dtype.element_ty)
            tl.store(out_start[:, None] + at, out, mask=live[:, None] & (at < K))
            scale_terms += tl.where(x == MINUS_INF, 0.0, x * bend + vx * slope)
    tl.store(out_inv_temperature + rows, tl.sum(scale_terms, 1), mask=live)
