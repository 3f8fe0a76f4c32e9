"""A linear layer for many episodes, by the compiled kernels: forward, backward, and the descent of its parameters.

Letters: C episodes, n rows, I and O features into and out of the layer. Everything is contiguous float32 on a CPU. A
weight [O, I] or bias [1, O] is shared by the episodes, else they are [C, O, I] and [C, 1, O].
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from mdml_kernels.native.calls import call

# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, rectify: bool, out: Tensor) -> None:
    """out [C, n, O] = rows [C, n, I] Wᵀ + bias, through a ReLU if asked."""
    _over_episodes("mdml_layer_forward", rows, weight, rows, *_strided(weight), *_strided(bias), rectify, out)


def pull(grad: Tensor, weight: Tensor, below: Tensor | None, out: Tensor) -> None:
    """out [C, n, I] = grad [C, n, O] W; zero where below [C, n, I], what a ReLU gave, is (None: there is no ReLU)."""
    _over_episodes("mdml_layer_pull", grad, weight, grad, *_strided(weight), below, out)


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
    (weight, bias), (new_weight, new_bias) = old, new
    by = ctypes.c_float(factor)
    others = (grad, rows, by, *_strided(weight), new_weight, *_strided(bias), new_bias)
    _over_episodes("mdml_layer_step", grad, new_weight, *others)


def _strided(parameter: Tensor | None) -> tuple[Tensor | None, int]:
    """A parameter and the distance between two episodes' values of it."""
    return parameter, parameter.stride(0) if parameter is not None and parameter.ndim == 3 else 0


def _over_episodes(name: str, rows: Tensor, weight: Tensor, *others: Tensor | ctypes.c_float | int | None) -> None:
    n_episodes, n_rows, _ = rows.shape
    n_out, n_in = weight.shape[-2:]
    call(name, n_episodes, n_rows * n_in * n_out, _LEAST_PRODUCTS, n_rows, n_in, n_out, *others)
