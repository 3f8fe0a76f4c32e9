"""The inner loop of an MLP with a frozen linear head on the GPU: whole in one kernel where it fits, else by layers.

Letters: E episodes, N support rows, I and O features into and out of a layer, K logits, D directions. Weights are
shared (D = 1), one an episode (D = E), or stacked by direction, each episode naming its own by an int tensor [E].
No graph is built: first-order meta-gradients take the adapted weights as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdml_kernels import triton_mlp_kernels as kernels
from mdml_kernels.launch import (
    LaunchConfig,
    Precision,
    arch_of,
    dot_precision,
    inner_loop_config,
    inner_loop_precision,
    layer_config,
    next_power_of_2,
    on_device_of,
)
from mdml_kernels.reference import Confidence
from mdml_kernels.triton_inner_loop import inner_loop_kernel
from mdml_kernels.triton_rows import check_device, odds_backward, odds_forward


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
    stacked = _check_layer(x, weight, bias, direction)
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
    stacked = _check_layer(grad, weight.mT, None, direction)
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
    stacked = _check_layer(x, weight, bias, direction)
    return _update(grad, x, weight, bias, lr, direction, stacked, precision)


def adapt_mlp(
    support: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    steps: int,
    lr: float,
    direction: Tensor | None = None,
    inv_temperature: Tensor | None = None,
    background: Tensor | None = None,
    confidence: Confidence = "max",
    precision: Precision = "float32",
    whole: bool | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [E, O, I] and biases [E, O] of an MLP after SGD on the one-class loss mean(-log S) of each episode.

    The inner level of arXiv 2601.19833. ReLU follows every layer but the last; the head, linear, stays as it is.

    Args:
        support: float [E, N, d], normal rows.
        weights: float [D, O, I], one for each layer.
        biases: float [D, O], likewise.
        head_weight: float [D, K, z].
        head_bias: float [D, K] or None.
        steps: SGD steps, at least 1.
        lr: their size.
        direction: int [E], the weights and head of each episode; None where D is 1 or E.
        inv_temperature: float [E], 1 / T; None for 1.
        background: float [E] or None.
        confidence: ``max`` or ``mass``.
        precision: as in `layer_forward`; weights, sums and statistics are float32 whatever it is.
        whole: all steps in one kernel (two layers that fit on the chip); None where that can be.

    Raises:
        ValueError: a shape does not fit, steps is not positive, or whole is forced where it cannot be.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"weights and biases must be one per layer, got {len(weights)} and {len(biases)}")
    stacked = _check_layer(support, weights[0], biases[0], direction)
    if len({w.shape[0] for w in (*weights, head_weight)}) > 1:
        raise ValueError("weights and head_weight must be stacked alike, over the same D directions")
    for below, above in itertools.pairwise(weights):
        if below.shape[1] != above.shape[2]:
            raise ValueError(
                f"weights must chain: {below.shape[1]} features out of a layer, {above.shape[2]} into the next"
            )
    if head_weight.shape[2] != weights[-1].shape[1]:
        raise ValueError(f"head_weight must be [D, K, {weights[-1].shape[1]}], got {list(head_weight.shape)}")
    if confidence == "mass" and background is None:
        raise ValueError("confidence 'mass' needs a background")
    if inv_temperature is None:
        inv_temperature = torch.ones(len(support), device=support.device)
    config = whole_config(support, weights, head_weight, precision)
    if whole and config is None:
        raise ValueError("whole=True: the inner loop in one kernel takes two layers that fit on the chip; use None")
    options = (inv_temperature, background, confidence, precision)
    if config is not None and whole is not False:
        return _adapt_whole(
            support, weights, biases, head_weight, head_bias, steps, lr, direction, stacked, *options, config
        )
    return _adapt_by_layers(support, weights, biases, head_weight, head_bias, steps, lr, direction, *options)


def whole_config(
    support: Tensor, weights: Sequence[Tensor], head_weight: Tensor, precision: Precision
) -> LaunchConfig | None:
    """How the whole inner loop runs as one kernel, or None where it does not."""
    if len(weights) != 2:
        return None
    _, n, d = support.shape
    return inner_loop_config(n, d, weights[1].shape[1], head_weight.shape[1], precision, arch_of(support.device))


def _adapt_whole(
    support: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    steps: int,
    lr: float,
    direction: Tensor | None,
    stacked: bool,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    precision: Precision,
    config: LaunchConfig,
) -> tuple[list[Tensor], list[Tensor]]:
    (episodes, n, d), (_, h, _), (_, z, _), k = support.shape, weights[0].shape, weights[1].shape, head_weight.shape[1]
    new: Any = {"dtype": torch.float32, "device": support.device}
    out_weights = [torch.empty((episodes, h, d), **new), torch.empty((episodes, z, h), **new)]
    out_biases = [torch.empty((episodes, h), **new), torch.empty((episodes, z), **new)]
    with on_device_of(support):
        inner_loop_kernel[(episodes,)](
            support.contiguous(),
            weights[0].contiguous(),
            biases[0].contiguous(),
            weights[1].contiguous(),
            biases[1].contiguous(),
            head_weight.contiguous(),
            None if head_bias is None else head_bias.contiguous(),
            direction,
            inv_temperature,
            background,
            out_weights[0],
            out_biases[0],
            out_weights[1],
            out_biases[1],
            lr,
            steps,
            N=n,
            D=d,
            H=h,
            Z=z,
            K=k,
            BLOCK_N=config.block_rows,
            BLOCK_D=max(16, next_power_of_2(d)),
            BLOCK_H=config.block_inner,
            BLOCK_Z=max(16, next_power_of_2(z)),
            BLOCK_K=config.block_cols,
            STACKED=stacked,
            MASS=confidence == "mass",
            PRECISION=inner_loop_precision(precision, arch_of(support.device)),
            **config.options,
        )
    return out_weights, out_biases


def _adapt_by_layers(
    support: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    steps: int,
    lr: float,
    direction: Tensor | None,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    precision: Precision,
) -> tuple[list[Tensor], list[Tensor]]:
    named, last = direction, len(weights) - 1
    weights, biases = list(weights), list(biases)
    for _ in range(steps):
        inputs = [support]
        for layer in range(last + 1):
            x = layer_forward(inputs[-1], weights[layer], biases[layer], named, relu=layer < last, precision=precision)
            inputs.append(x)
        logits = layer_forward(inputs[last + 1], head_weight, head_bias, direction, precision=precision)
        odds, reference, argmax = odds_forward(logits, inv_temperature, background, confidence)
        slope = -torch.sigmoid(-odds) / odds.shape[1]  # of mean(-log S)
        grad, _, _ = odds_backward(logits, inv_temperature, background, confidence, reference, argmax, slope)
        grad = layer_backward(grad, head_weight, None, direction, precision=precision)
        for layer in range(last, -1, -1):
            below = (
                None if layer == 0 else layer_backward(grad, weights[layer], inputs[layer], named, precision=precision)
            )
            weights[layer], bias = layer_update(
                grad, inputs[layer], weights[layer], biases[layer], lr, named, precision=precision
            )
            assert bias is not None
            biases[layer] = bias
            grad = grad if below is None else below
        named = None  # from here on every episode has weights of its own
    return weights, biases


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


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, direction: Tensor | None) -> bool:
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
