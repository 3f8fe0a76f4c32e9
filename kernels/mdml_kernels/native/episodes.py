"""Whole episodes of an MLP with a linear head by the compiled kernels: one after the other, all of it in the cache.

Letters: C episodes, n support and q query rows of d features; O and I features out of and into a layer; K logits.
Everything is float32 on a CPU, and parameters are contiguous; shapes that don't fit are refused by a ValueError.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdml_kernels.native.calls import address, call, check, stride, whole
from mdml_kernels.reference import Confidence

# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


class MlpLayer(NamedTuple):
    """Attributes:
    weight: [O, I], shared by the episodes, or [C, O, I].
    bias: [1, O] or [C, 1, O], or None.
    rectify: whether a ReLU follows.
    own: weight [C, O, I] and bias [C, 1, O] for `adapt` to write; None for a head that is not adapted, and for
        `meta_gradients`.
    metric: of a head that stands for two layers, F = V W: V Vᵀ [K, K] or [C, K, K]. The inner loop then trains it, and
        multiplies its steps by this. Its own is what it descended by before that.
    fixed_bias: of such a head, whether its bias does not move.
    """

    weight: Tensor
    bias: Tensor | None
    rectify: bool
    own: tuple[Tensor, Tensor | None] | None = None
    metric: Tensor | None = None
    fixed_bias: bool = False


class InnerLoop(NamedTuple):
    """Attributes:
    n_steps: of SGD on the one-class loss of the support rows.
    lr: its learning rate.
    confidence: of that loss.
    bfloat16: whether products take their operands in bfloat16; they are summed, and weights kept, in float32.
    """

    n_steps: int
    lr: float
    confidence: Confidence
    bfloat16: bool = False


def takes_bfloat16(layers: Sequence[MlpLayer]) -> bool:
    """Whether the layers' widths are even, as products of bfloat16 want them."""
    return all(width % 2 == 0 for layer in layers for width in layer.weight.shape[-2:])


class MetaGradients(NamedTuple):
    """Hinge losses [C]; gradients [C / group, …] with the `gradient_shapes` one behind the other; by background [C]."""

    loss: Tensor
    by_layer: Tensor
    by_background: Tensor | None


def gradient_shapes(layers: Sequence[MlpLayer], inner: InnerLoop) -> list[tuple[int, ...]]:
    """Of the gradients to each layer's weight and then to its bias, where it has one, the head last.

    After them, for a head with a metric that took a step, [K, K]: G Dᵀ + g dᵀ of its gradients G and g and what it
    descended by.
    """
    shapes: list[tuple[int, ...]] = []
    for layer in layers:
        n_out, n_in = layer.weight.shape[-2:]
        shapes.append((n_out, n_in))
        if layer.bias is not None:
            shapes.append((n_out,))
    if layers[-1].metric is not None and inner.n_steps:
        shapes.append((layers[-1].weight.shape[-2],) * 2)
    return shapes


def adapt(
    layers: Sequence[MlpLayer], inner: InnerLoop, support: Tensor, tau: Tensor | None, background: Tensor | None
) -> None:
    """Run the inner loop on support rows [C, n, d], into the layers' own parameters.

    Args:
        layers: the encoder's, then the head.
        inner: what to do.
        support: see above.
        tau: 1/T [C], None for 1.
        background: b [C], None for none.
    """
    support, tau, background = support.contiguous(), whole(tau), whole(background)
    program = _program(layers, inner, support, tau, background)
    n_products = _products(layers, support.shape[1]) * inner.n_steps
    held = (layers, support, tau, background)
    call("mdml_adapt", len(support), n_products, _LEAST_PRODUCTS, ctypes.byref(program), held=held)


def meta_gradients(
    layers: Sequence[MlpLayer],
    inner: InnerLoop,
    support: Tensor,
    query: Tensor,
    is_ood: Tensor,
    tau: Tensor | None,
    background: Tensor | None,
    margin: float,
    group: int,
) -> MetaGradients:
    """As `adapt`, then the hinge loss of query rows [C, q, d] at confidence `max`, and its gradients.

    Args:
        layers: as in `adapt`; adapted weights stay in the processor's cache.
        inner: likewise.
        support: likewise.
        query: see above.
        is_ood: bool [C, q].
        tau: as in `adapt`.
        background: likewise.
        margin: as in `softmax_margin_loss`.
        group: over so many episodes, which divide C, the gradients are summed.
    """
    support, query, is_ood = support.contiguous(), query.contiguous(), is_ood.contiguous()
    tau, background = whole(tau), whole(background)
    n_episodes, n_groups = len(support), len(support) // group
    check("query", query, n_episodes, query.shape[1], support.shape[2])
    check("is_ood", is_ood, n_episodes, query.shape[1], dtype=torch.bool)
    loss = support.new_empty(n_episodes)
    by_background = None if background is None else torch.empty_like(loss)
    sizes = [math.prod(shape) for shape in gradient_shapes(layers, inner)]
    by_layer = support.new_empty(n_groups, sum(sizes))
    starts = (by_layer.data_ptr() + 4 * start for start in itertools.accumulate(sizes, initial=0))
    addresses = [(next(starts), next(starts) if layer.bias is not None else None) for layer in layers]
    program = _program(layers, inner, support, tau, background, addresses)
    if layers[-1].metric is not None and inner.n_steps:
        program.cross = next(starts)
    program.group_stride = by_layer.shape[1]
    program.query, program.is_ood, program.n_query = address(query), address(is_ood), query.shape[1]
    program.loss, program.by_background = loss.data_ptr(), address(by_background)
    program.margin, program.group = margin, group
    n_products = _products(layers, support.shape[1]) * inner.n_steps + _products(layers, query.shape[1])
    held = (layers, support, query, is_ood, tau, background, loss, by_layer, by_background)
    call("mdml_meta_gradients", n_groups, n_products * group, _LEAST_PRODUCTS, ctypes.byref(program), held=held)
    return MetaGradients(loss, by_layer, by_background)


class _Layer(ctypes.Structure):
    """`EpisodeLayer` of episodes.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_in", "n_out", "rectify")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "bias_stride")),
        *((name, ctypes.c_void_p) for name in ("own_weight", "own_bias", "by_weight", "by_bias")),
    ]


class _Program(ctypes.Structure):
    """`EpisodeProgram` of episodes.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layers", "n_support", "n_query", "n_steps")),
        *((name, ctypes.c_int64) for name in ("group", "group_stride", "mass", "bfloat16", "fixed_bias")),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("support", "query", "is_ood", "tau", "background")),
        *((name, ctypes.c_void_p) for name in ("loss", "by_background", "cross", "metric")),
        ("metric_stride", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("lr", "margin")),
    ]


def _program(
    layers: Sequence[MlpLayer],
    inner: InnerLoop,
    support: Tensor,
    tau: Tensor | None,
    background: Tensor | None,
    by_layer: Sequence[tuple[int | None, int | None]] | None = None,
) -> _Program:
    """The tensors that go in must outlive it; by_layer are the addresses of each layer's gradients."""
    by_layer = by_layer or [(None, None)] * len(layers)
    n_episodes, n_support, width = support.shape
    check("support", support, n_episodes, n_support, width)
    check("tau", tau, n_episodes)
    check("background", background, n_episodes)
    filled = []
    for layer, by in zip(layers, by_layer, strict=True):
        filled.append(_layer(layer, n_episodes, width, *by))
        width = layer.weight.shape[-2]
    metric = layers[-1].metric
    return _Program(
        n_layers=len(layers),
        n_support=n_support,
        n_steps=inner.n_steps,
        mass=inner.confidence == "mass",
        bfloat16=inner.bfloat16,
        fixed_bias=layers[-1].fixed_bias,
        layers=(_Layer * len(layers))(*filled),
        support=address(support),
        tau=address(tau),
        background=address(background),
        metric=address(metric),
        metric_stride=stride("metric", metric, n_episodes, width, width),
        lr=inner.lr,
    )


def _layer(layer: MlpLayer, n_episodes: int, n_in: int, by_weight: int | None, by_bias: int | None) -> _Layer:
    """The layer, of rows of n_in features."""
    own_weight, own_bias = layer.own or (None, None)
    n_out = layer.weight.shape[-2]
    strides = (
        stride("weight", layer.weight, n_episodes, n_out, n_in),
        stride("bias", layer.bias, n_episodes, 1, n_out),
    )
    pointers = [address(value) for value in (layer.weight, layer.bias)]
    own = address(own_weight), address(own_bias)
    return _Layer(n_in, n_out, layer.rectify, *pointers, *strides, *own, by_weight, by_bias)


def _products(layers: Sequence[MlpLayer], n_rows: int) -> int:
    return n_rows * sum(layer.weight.shape[-1] * layer.weight.shape[-2] for layer in layers)
