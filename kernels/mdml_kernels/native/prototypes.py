"""Whole episodes of a residual encoder with a prototype head by the compiled kernels, all of it in the cache.

Letters: C episodes, n support and q query rows of d features, h hidden units. Everything is float32 on a CPU;
shapes that don't fit are refused by a ValueError.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from mdml_kernels.native.calls import address, call, check, whole

# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20


class ResidualEncoder(NamedTuple):
    """``z = x · exp(s) + B relu(A x + b)`` of each episode; or the gradients to these.

    Attributes:
        log_scale: s [C, d].
        inner: A [C, h, d].
        bias: b [C, h].
        outer: B [C, d, h].
    """

    log_scale: Tensor
    inner: Tensor
    bias: Tensor
    outer: Tensor


def takes_bfloat16(encoder: ResidualEncoder, support: Tensor | None = None) -> bool:
    """Whether widths are even, as products of bfloat16 want them."""
    widths = (*encoder.inner.shape[1:], *(() if support is None else support.shape[1:2]))
    return all(width % 2 == 0 for width in widths)


def gradients(
    encoder: ResidualEncoder,
    variance: Tensor,
    support: Tensor,
    query: Tensor,
    is_ood: Tensor,
    tau: Tensor | None,
    background: Tensor | None,
    bfloat16: bool = False,
) -> tuple[Tensor, ResidualEncoder, Tensor | None]:
    """The `bce` loss of confidence `mass` of query rows, and its gradients.

    The logits are ``-|z - c_k|² / 2τ²`` for the embeddings c of the support rows, through which the gradient flows too.

    Args:
        encoder: see there.
        variance: τ² [C].
        support: [C, n, d].
        query: [C, q, d].
        is_ood: bool [C, q].
        tau: 1/T of the softmax [C], None for 1.
        background: b [C], None for none.
        bfloat16: whether products take their operands in bfloat16; see `takes_bfloat16`.

    Returns:
        The losses [C], the gradients to the encoder, and to the background [C] where there is one.
    """
    encoder = ResidualEncoder(*(value.contiguous() for value in encoder))
    given = [value.contiguous() for value in (support, query, is_ood, variance)]
    support, query, is_ood, variance = given
    tau, background = whole(tau), whole(background)
    grads = ResidualEncoder(*(torch.empty_like(value) for value in encoder))
    loss = support.new_empty(len(support))
    by_background = None if background is None else torch.empty_like(loss)
    (n_episodes, n_support, d), n_query, h = support.shape, query.shape[1], encoder.bias.shape[-1]
    check("support", support, n_episodes, n_support, d)
    check("query", query, n_episodes, n_query, d)
    check("is_ood", is_ood, n_episodes, n_query, dtype=torch.bool)
    for name, value, shape in zip(encoder._fields, encoder, ((d,), (h, d), (h,), (d, h)), strict=True):
        check(name, value, n_episodes, *shape)
    for name, setting in (("variance", variance), ("tau", tau), ("background", background)):
        check(name, setting, n_episodes)
    inputs = (support, query, is_ood, *encoder, variance, tau, background)
    outputs = (loss, *grads, by_background)
    program = _Program(n_support, n_query, d, h, bfloat16, *map(address, (*inputs, *outputs)))
    n_products = (n_support + n_query) * d * h * 2 + n_support * n_query * d
    held = (inputs, outputs)
    call("mdml_prototype_gradients", n_episodes, n_products, _LEAST_PRODUCTS, ctypes.byref(program), held=held)
    return loss, grads, by_background


class _Program(ctypes.Structure):
    """`PrototypeProgram` of prototypes.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_support", "n_query", "d", "h", "bfloat16")),
        *((name, ctypes.c_void_p) for name in ("support", "query", "is_ood")),
        *((name, ctypes.c_void_p) for name in ("log_scale", "inner", "bias", "outer", "variance", "tau", "background")),
        *((name, ctypes.c_void_p) for name in ("loss", "by_log_scale", "by_inner", "by_bias", "by_outer")),
        ("by_background", ctypes.c_void_p),
    ]
