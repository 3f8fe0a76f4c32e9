"""A linear layer for many episodes, by the compiled kernels: forward, backward, and the descent of its parameters.

Letters: C episodes, n rows, I and O features into and out of the layer. Everything is contiguous float32 on a CPU. A
weight [O, I] or bias [1, O] is shared by the episodes, else they are [C, O, I] and [C, 1, O]. Shapes that don't fit
are refused by a ValueError.
"""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from mdml_kernels.native.calls import call, check, stride

# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, rectify: bool, out: Tensor) -> None:
    """out [C, n, O] = rows [C, n, I] Wᵀ + bias, through a ReLU if asked."""
    (n_episodes, n, n_in), n_out = rows.shape, out.shape[-1]
    check("rows", rows, n_episodes, n, n_in)
    check("out", out, n_episodes, n, n_out)
    by_episode = (stride("weight", weight, n_episodes, n_out, n_in), stride("bias", bias, n_episodes, 1, n_out))
    others = (rows, weight, by_episode[0], bias, by_episode[1], rectify, out)
    _over_episodes("mdml_layer_forward", n_episodes, (n, n_in, n_out), *others)


def pull(grad: Tensor, weight: Tensor, below: Tensor | None, out: Tensor) -> None:
    """out [C, n, I] = grad [C, n, O] W; zero where below [C, n, I], what a ReLU gave, is (None: there is no ReLU)."""
    (n_episodes, n, n_out), n_in = grad.shape, out.shape[-1]
    check("out", out, n_episodes, n, n_in)
    check("below", below, n_episodes, n, n_in)
    others = (grad, weight, stride("weight", weight, n_episodes, n_out, n_in), below, out)
    _over_episodes("mdml_layer_pull", n_episodes, (n, n_in, n_out), *others)


def step(
    grad: Tensor,
    rows: Tensor,
    factor: float,
    old: tuple[Tensor | None, Tensor | None],
    new: tuple[Tensor, Tensor | None],
) -> None:
    """new weight [C, O, I] and bias [C, 1, O] = old ones (None: 0) + factor · (gradᵀ rows, Σ grad); may be in place.

    grad is [C, n, O], rows [C, n, I].
    """
    (n_episodes, n, n_out), n_in = grad.shape, rows.shape[-1]
    (weight, bias), (new_weight, new_bias) = old, new
    check("rows", rows, n_episodes, n, n_in)
    check("new weight", new_weight, n_episodes, n_out, n_in)
    check("new bias", new_bias, n_episodes, 1, n_out)
    weights = (weight, stride("weight", weight, n_episodes, n_out, n_in), new_weight)
    biases = (bias, stride("bias", bias, n_episodes, 1, n_out), new_bias)
    by = ctypes.c_float(factor)
    _over_episodes("mdml_layer_step", n_episodes, (n, n_in, n_out), grad, rows, by, *weights, *biases)


def _over_episodes(
    name: str, n_episodes: int, sizes: tuple[int, int, int], *others: Tensor | ctypes.c_float | int | None
) -> None:
    """sizes are n, I and O."""
    call(name, n_episodes, math.prod(sizes), _LEAST_PRODUCTS, *sizes, *others)
