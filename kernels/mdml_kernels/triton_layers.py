"""Layers of an MLP on the GPU, batched over episodes with weights of their own: forward, backward, gradient, SGD step.

Letters: E episodes, N rows, I and O features into and out of a layer, D directions. Weights are shared (D = 1), one an
episode (D = E), or stacked by direction, each episode naming its own by an int tensor [E]. Results are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdml_kernels import triton_mlp_kernels as kernels
from mdml_kernels.launch import Precision, arch_of, dot_precision, layer_config, on_device_of
from mdml_kernels.triton_rows import check_device


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    direction: Tensor | None = None,
    *,
    relu: bool = False,
    precision: Precision = "float32",
) -> Tensor:
    """act(x Wᵀ + b) [E, N, O] in float32.

    Args:
        x: float [E, N, I].
        weight: float [D, O, I].
        bias: float [D, O] or None.
        direction: int [E], the weights of each episode; None where D is 1 or E.
        relu: the activation, or none.
        precision: of the products' operands: ``float32``, ``tf32`` or ``bfloat16``. Sums are float32.

    Raises:
        ValueError: a shape does not fit.
    """
    stacked = check_layer(x, weight, bias, direction)
    (episodes, n, i), o = x.shape, weight.shape[1]
    out = torch.empty((episodes, n, o), dtype=torch.float32, device=x.device)
    config = layer_config(arch_of(x.device))
    with on_device_of(x):
        kernels.layer_forward_kernel[(episodes * _tiles(n, config.block_rows) * _tiles(o, config.block_cols),)](
            x.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            direction,
            out,
            N=n,
            I=i,
            O=o,
            STACKED=stacked,
            RELU=relu,
            BLOCK_N=config.block_rows,
            BLOCK_O=config.block_cols,
            BLOCK_I=config.block_inner,
            PRECISION=dot_precision(precision, arch_of(x.device)),
            **config.options,
        )
    return out


def layer_backward(
    grad: Tensor,
    weight: Tensor,
    hidden: Tensor | None = None,
    direction: Tensor | None = None,
    *,
    precision: Precision = "float32",
) -> Tensor:
    """The gradient [E, N, I] of a layer's input, from that of its product [E, N, O].

    Args:
        grad: float [E, N, O].
        weight: float [D, O, I].
        hidden: float [E, N, I], the layer's input where that is the output of a ReLU: its mask is applied.
        direction: as in `layer_forward`.
        precision: as in `layer_forward`.

    Raises:
        ValueError: a shape does not fit.
    """
    stacked = check_layer(grad, weight.mT, None, direction)
    (episodes, n, o), i = grad.shape, weight.shape[2]
    if hidden is not None and hidden.shape != (episodes, n, i):
        raise ValueError(f"hidden must be [E, N, I] = {[episodes, n, i]}, got {list(hidden.shape)}")
    out = torch.empty((episodes, n, i), dtype=torch.float32, device=grad.device)
    config = layer_config(arch_of(grad.device))
    with on_device_of(grad):
        kernels.layer_backward_kernel[(episodes * _tiles(n, config.block_rows) * _tiles(i, config.block_cols),)](
            grad.contiguous(),
            weight.contiguous(),
            direction,
            None if hidden is None else hidden.contiguous(),
            out,
            N=n,
            I=i,
            O=o,
            STACKED=stacked,
            BLOCK_N=config.block_rows,
            BLOCK_O=config.block_inner,
            BLOCK_I=config.block_cols,
            PRECISION=dot_precision(precision, arch_of(grad.device)),
            **config.options,
        )
    return out


def layer_gradient(grad: Tensor, x: Tensor, *, precision: Precision = "float32") -> tuple[Tensor, Tensor]:
    """The gradients of a layer's weight [E, O, I] and bias [E, O], from that of its product.

    Args:
        grad: float [E, N, O].
        x: float [E, N, I], the layer's input.
        precision: as in `layer_forward`.

    Raises:
        ValueError: a shape does not fit.
    """
    weight, bias = _update(grad, x, None, None, 0.0, None, False, precision)
    assert bias is not None
    return weight, bias


def layer_update(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: float,
    direction: Tensor | None = None,
    *,
    precision: Precision = "float32",
) -> tuple[Tensor, Tensor | None]:
    """One SGD step: W - lr gradᵀ x [E, O, I] and b - lr Σ grad [E, O], float32; no gradient goes through memory.

    Args:
        grad: float [E, N, O], of the layer's product.
        x: float [E, N, I], the layer's input.
        weight: float [D, O, I].
        bias: float [D, O] or None.
        lr: the step size.
        direction: as in `layer_forward`.
        precision: as in `layer_forward`.

    Raises:
        ValueError: a shape does not fit.
    """
    stacked = check_layer(x, weight, bias, direction)
    return _update(grad, x, weight, bias, lr, direction, stacked, precision)


def _update(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lr: float,
    direction: Tensor | None,
    stacked: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor | None]:
    if grad.ndim != 3 or x.ndim != 3 or grad.shape[:2] != x.shape[:2]:
        raise ValueError(f"grad [E, N, O] and x [E, N, I] must agree, got {list(grad.shape)} and {list(x.shape)}")
    if weight is not None and weight.shape[1] != grad.shape[2]:
        raise ValueError(f"weight must be [D, {grad.shape[2]}, I], got {list(weight.shape)}")
    check_device("grad", grad)
    (episodes, n, o), i = grad.shape, x.shape[2]
    new: Any = {"dtype": torch.float32, "device": grad.device}
    out_weight = torch.empty((episodes, o, i), **new)
    out_bias = torch.empty((episodes, o), **new) if weight is None or bias is not None else None
    config = layer_config(arch_of(grad.device))
    with on_device_of(grad):
        kernels.layer_update_kernel[(episodes * _tiles(o, config.block_rows) * _tiles(i, config.block_cols),)](
            grad.contiguous(),
            x.contiguous(),
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            direction,
            out_weight,
            out_bias,
            lr,
            N=n,
            I=i,
            O=o,
            STACKED=stacked,
            BLOCK_N=config.block_inner,
            BLOCK_O=config.block_rows,
            BLOCK_I=config.block_cols,
            PRECISION=dot_precision(precision, arch_of(grad.device)),
            **config.options,
        )
    return out_weight, out_bias


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, direction: Tensor | None) -> bool:
    """Raise where shapes do not fit; whether each episode has weights of its own."""
    check_device("x", x)
    if x.ndim != 3 or weight.ndim != 3 or x.shape[2] != weight.shape[2]:
        raise ValueError(f"x [E, N, I] and weight [D, O, I] must agree, got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must be [D, O] = {list(weight.shape[:2])}, got {list(bias.shape)}")
    if direction is None:
        if weight.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"weight is stacked over {weight.shape[0]} directions: direction must name each episode's")
    elif direction.shape != x.shape[:1] or direction.is_floating_point() or not direction.is_contiguous():
        raise ValueError(
            f"direction must be contiguous int [E] = {[x.shape[0]]}, got {direction.dtype} {list(direction.shape)}"
        )
    return direction is None and weight.shape[0] > 1


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
