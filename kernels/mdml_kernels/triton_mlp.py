"""The inner loop of an MLP with a frozen linear head on the GPU: whole in one kernel where it fits, else by layers.

Letters: E episodes, N support rows, I and O features into and out of a layer, K logits, D directions (`triton_layers`).
No graph is built: first-order meta-gradients take the adapted weights as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdml_kernels.launch import (
    LaunchConfig,
    Precision,
    arch_of,
    inner_loop_config,
    inner_loop_precision,
    next_power_of_2,
    on_device_of,
)
from mdml_kernels.reference import Confidence
from mdml_kernels.triton_inner_loop import inner_loop_kernel
from mdml_kernels.triton_layers import check_layer, layer_backward, layer_forward, layer_update
from mdml_kernels.triton_rows import odds_backward, odds_forward


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
        precision: as in `triton_layers.layer_forward`; weights, sums and statistics are float32 whatever it is.
        whole: all steps in one kernel (two layers that fit on the chip); None where that can be.

    Raises:
        ValueError: a shape does not fit, steps is not positive, or whole is forced where it cannot be.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"weights and biases must be one per layer, got {len(weights)} and {len(biases)}")
    stacked = check_layer(support, weights[0], biases[0], direction)
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
