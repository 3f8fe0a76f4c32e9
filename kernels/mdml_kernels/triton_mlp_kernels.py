"""Layer kernels of the inner loop: batched linear + bias + ReLU, its backward, the SGD step as an epilogue.

A program takes one tile of one episode. Weights are stacked by direction [D, O, I], an episode naming its own; without
names there is one for all (STACKED false) or one an episode (STACKED true).
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

from mdml_kernels.triton_matmul import load_tile, matmul


@triton.jit
def weights_of(direction, episode, STACKED: tl.constexpr):
    """int64 number of the weights that an episode takes."""
    if direction is not None:
        which = tl.load(direction + episode).to(tl.int64)
    elif STACKED:
        which = episode
    else:
        which = episode * 0
    return which


@triton.jit
def layer_forward_kernel(
    x,
    weight,
    bias,
    direction,
    out,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    STACKED: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [E, N, O] = act(x Wᵀ + b)."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    episode = (tl.program_id(0) // (tiles_n * tiles_o)).to(tl.int64)
    rows = (tl.program_id(0) // tiles_o % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    which = weights_of(direction, episode, STACKED)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    if bias is not None:
        acc += tl.load(bias + which * O + cols, mask=cols < O, other=0.0).to(tl.float32)[None, :]
    for start in range(0, I, BLOCK_I):
        inner = start + tl.arange(0, BLOCK_I)
        x_tile = load_tile(x + episode * (N * I), rows, inner[None, :], I, 1, N, I)
        w_tile = load_tile(weight + which * (O * I), inner[:, None], cols[None, :], 1, I, I, O)
        acc = matmul(x_tile, w_tile, acc, PRECISION)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    keep = (rows < N) & (cols[None, :] < O)
    tl.store(out + episode * (N * O) + rows * O + cols[None, :], acc, mask=keep)


@triton.jit
def layer_backward_kernel(
    grad,
    weight,
    direction,
    hidden,
    out,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    STACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [E, N, I] = grad W, masked where the layer's input `hidden` came out of a ReLU as 0."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_i: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    episode = (tl.program_id(0) // (tiles_n * tiles_i)).to(tl.int64)
    rows = (tl.program_id(0) // tiles_i % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = (tl.program_id(0) % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    which = weights_of(direction, episode, STACKED)
    acc = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for start in range(0, O, BLOCK_O):
        inner = start + tl.arange(0, BLOCK_O)
        g_tile = load_tile(grad + episode * (N * O), rows, inner[None, :], O, 1, N, O)
        w_tile = load_tile(weight + which * (O * I), inner[:, None], cols, I, 1, O, I)
        acc = matmul(g_tile, w_tile, acc, PRECISION)
    keep = (rows < N) & (cols < I)
    offsets = episode * (N * I) + rows * I + cols
    if hidden is not None:
        acc = tl.where(tl.load(hidden + offsets, mask=keep, other=0.0) <= 0.0, 0.0, acc)
    tl.store(out + offsets, acc, mask=keep)


@triton.jit
def layer_update_kernel(
    grad,
    x,
    weight,
    bias,
    direction,
    out_weight,
    out_bias,
    lr,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    STACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W - lr gradᵀ x and b - lr Σ grad, in float32; without a weight, gradᵀ x and Σ grad themselves.

    A program reads no more of the weights than it writes, so out_weight may be weight where each episode has its own.
    """
    tiles_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    tiles_i: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    episode = (tl.program_id(0) // (tiles_o * tiles_i)).to(tl.int64)
    tile_i = tl.program_id(0) % tiles_i
    rows = tl.program_id(0) // tiles_i % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = (tile_i * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    which = weights_of(direction, episode, STACKED)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    acc_bias = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, N, BLOCK_N):
        inner = start + tl.arange(0, BLOCK_N)
        g_tile = load_tile(grad + episode * (N * O), inner[:, None], rows[None, :], O, 1, N, O)
        x_tile = load_tile(x + episode * (N * I), inner[:, None], cols, I, 1, N, I)
        acc = matmul(tl.trans(g_tile), x_tile, acc, PRECISION)
        acc_bias += tl.sum(g_tile, 0)
    keep = (rows[:, None] < O) & (cols < I)
    if weight is not None:
        acc = load_tile(weight + which * (O * I), rows[:, None], cols, I, 1, O, I) - lr * acc
    tl.store(out_weight + episode * (O * I) + rows[:, None] * I + cols, acc, mask=keep)
    if out_bias is not None:  # noqa: SIM102 - decided at compile time, the inner one at run time
        if tile_i == 0:
            if bias is not None:
                acc_bias = tl.load(bias + which * O + rows, mask=rows < O, other=0.0).to(tl.float32) - lr * acc_bias
            tl.store(out_bias + episode * O + rows, acc_bias, mask=rows < O)
