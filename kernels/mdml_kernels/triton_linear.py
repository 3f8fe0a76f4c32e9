"""The Triton backend of the log-odds under a linear head: the logits are never in memory, forward nor backward.

Letters: G groups (a head each), N rows, H features, K logits. A prototype head is a linear head whose background has
the row constant taken off. float32, bfloat16 and float16 in, float32 accumulation; tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdml_kernels import triton_linear_kernels as kernels
from mdml_kernels.launch import (
    MAX_ROWS,
    Precision,
    arch_of,
    dot_precision,
    linear_backward_config,
    linear_forward_config,
    on_device_of,
)
from mdml_kernels.reference import Confidence
from mdml_kernels.triton_rows import check_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 264  # enough for two a multiprocessor on the largest chips; unmeasured


def linear_odds_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-odds log S - log(1 - S) of rows under a linear head, and what `linear_odds_backward` wants back.

    Args:
        z: float [G, N, H].
        weight: float [G, K, H].
        bias: float [G, K] or None.
        inv_temperature: float32 [G, N], 1 / T of each row.
        background: float32 [G, N] or None.
        confidence: ``max`` or ``mass``; ``mass`` needs the background.
        precision: of the products' operands; None for `precision_of`.

    Returns:
        odds [G, N] and reference [G, N] in float32, and the first argmax int32 [G, N], empty [G, 0] for ``mass``.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype has no kernel.
    """
    precision = precision or precision_of(z, weight)
    _check(z, weight, bias, inv_temperature, background, confidence)
    (groups, n, h), k = z.shape, weight.shape[1]
    odds, reference = (torch.empty((groups, n), dtype=torch.float32, device=z.device) for _ in range(2))
    argmax = torch.empty((groups, 0 if confidence == "mass" else n), dtype=torch.int32, device=z.device)
    config = linear_forward_config(precision, arch_of(z.device))
    if odds.numel():
        with on_device_of(z):
            kernels.linear_forward_kernel[(groups * -(-n // config.block_rows),)](
                z.contiguous(),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                inv_temperature.contiguous(),
                None if background is None else background.contiguous(),
                odds,
                reference,
                argmax,
                N=n,
                H=h,
                K=k,
                MASS=confidence == "mass",
                BLOCK_N=config.block_rows,
                BLOCK_K=config.block_cols,
                BLOCK_H=config.block_inner,
                PRECISION=dot_precision(precision, arch_of(z.device)),
                **config.options,
            )
    return odds, reference, argmax


def linear_odds_backward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    reference: Tensor,
    argmax: Tensor,
    grad: Tensor,
    precision: Precision | None = None,
    head: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The odds' gradient grad [G, N] pulled back to z, weight, bias, inv_temperature and background.

    The logits are made again, tile by tile. The head's gradients are summed without atomics, in a fixed order.

    Args:
        reference: from `linear_odds_forward`, as is argmax; the others as there.
        head: whether the head's gradients are wanted.

    Returns:
        Gradients of z [G, N, H], weight [G, K, H], bias [G, K] in their dtypes (None for the head's where not wanted,
        and without a bias), inv_temperature [G, N], background [G, N] (None without one).

    Raises:
        ValueError, TypeError: as `linear_odds_forward`.
    """
    precision = precision or precision_of(z, weight)
    _check(z, weight, bias, inv_temperature, background, confidence)
    (groups, n, h), k = z.shape, weight.shape[1]
    z, weight, inv_temperature, grad = (t.contiguous() for t in (z, weight, inv_temperature, grad.float()))
    bias = None if bias is None else bias.contiguous()
    config = linear_backward_config(h, precision, arch_of(z.device))
    common: dict[str, Any] = {
        "N": n,
        "H": h,
        "K": k,
        "MASS": confidence == "mass",
        "BLOCK_N": config.block_rows,
        "BLOCK_K": config.block_cols,
        "BLOCK_H": config.block_inner,
        "BLOCK_OUT": config.block_out,
        "PRECISION": dot_precision(precision, arch_of(z.device)),
        **config.options,
    }
    tiles_n, tiles_out = -(-n // config.block_rows), -(-h // config.block_out)
    grad_z = torch.empty((groups, n, h), dtype=z.dtype, device=z.device)
    grad_tau = torch.empty_like(reference)
    grad_background = None if background is None else torch.empty_like(reference)
    if reference.numel():
        with on_device_of(z):
            kernels.linear_backward_rows_kernel[(groups * tiles_n * tiles_out,)](
                z,
                weight,
                bias,
                inv_temperature,
                None if background is None else background.contiguous(),
                reference,
                argmax,
                grad,
                grad_z,
                grad_tau,
                grad_background,
                **common,
            )
    if not head:
        return grad_z, None, None, grad_tau, grad_background

    tiles = groups * -(-k // config.block_cols) * tiles_out
    splits = max(1, min(_PROGRAMS // tiles, tiles_n // 4))  # where few tiles would leave the chip idle
    rows = -(-tiles_n // splits) * config.block_rows
    splits = max(1, -(-n // rows)) if rows else 1
    part_weight = torch.empty((splits, groups, k, h), dtype=torch.float32, device=z.device)
    part_bias = None if bias is None else torch.empty((splits, groups, k), dtype=torch.float32, device=z.device)
    with on_device_of(z):
        kernels.linear_backward_head_kernel[(splits * tiles,)](
            z,
            weight,
            bias,
            inv_temperature,
            reference,
            argmax,
            grad,
            part_weight,
            part_bias,
            groups,
            ROWS=rows,
            **common,
        )
    grad_weight = part_weight.sum(0) if splits > 1 else part_weight[0]
    grad_bias = None if part_bias is None or bias is None else part_bias.sum(0).to(bias.dtype)
    return grad_z, grad_weight.to(weight.dtype), grad_bias, grad_tau, grad_background


def precision_of(z: Tensor, weight: Tensor) -> Precision:
    """bfloat16 operands are taken as they are, float16 as tf32, which holds them; float32 as PyTorch's products would.

    `torch.set_float32_matmul_precision` decides between ``float32`` and ``tf32``.
    """
    if z.dtype == weight.dtype == torch.bfloat16:
        return "bfloat16"
    if z.dtype == weight.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "float32"


def _check(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
) -> None:
    check_device("z", z)
    if z.dtype not in DTYPES or weight.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise TypeError(f"z and weight must be one of {names}, got {z.dtype} and {weight.dtype}")
    if z.ndim != 3 or weight.ndim != 3 or (z.shape[0], z.shape[2]) != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"z [G, N, H] and weight [G, K, H] must agree, got {list(z.shape)} and {list(weight.shape)}")
    if z.shape[1] > MAX_ROWS:
        raise ValueError(f"z has {z.shape[1]} rows a group; the kernels take at most {MAX_ROWS}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must be [G, K] = {list(weight.shape[:2])}, got {list(bias.shape)}")
    for name, value in (("inv_temperature", inv_temperature), ("background", background)):
        if value is not None and (value.shape != z.shape[:2] or value.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 [G, N] = {list(z.shape[:2])}, got {value.dtype} {list(value.shape)}"
            )
    if background is None and confidence == "mass":
        raise ValueError("confidence 'mass' needs a background")
