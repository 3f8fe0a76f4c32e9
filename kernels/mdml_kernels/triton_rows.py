"""The Triton backend of the row functions: the leaves that the autograd layer calls, on logits [E, N, K].

float32 accumulation (float64 for float64 logits), every output freshly allocated and contiguous. E episodes, N rows,
K logits. Runs on CUDA and ROCm tensors, and on CPU tensors where ``TRITON_INTERPRET=1`` was set before import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdml_kernels import triton_row_kernels as kernels
from mdml_kernels.launch import INTERPRETER, MAX_ROWS, LaunchConfig, arch_of, on_device_of, rows_config
from mdml_kernels.reference import Confidence

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Logits of a row that a thread holds: in the backward pass its registers hold where gradients go as well, in the second
# one tangents.
PER_THREAD = {"forward": 64, "backward": 32, "double_backward": 16}


def odds_forward(
    logits: Tensor, inv_temperature: Tensor, background: Tensor | None, confidence: Confidence
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-odds log S - log(1 - S) of each row, and what `odds_backward` wants back.

    Args:
        logits: float [E, N, K], any strides.
        inv_temperature: float [E], 1 / T.
        background: float [E] or None.
        confidence: ``max`` or ``mass``; ``mass`` needs the background.

    Returns:
        odds [E, N] and reference [E, N, 2] in float32 (float64 for float64 logits), and the first argmax int32 [E, N],
        empty [E, 0] for ``mass``. The reference is a log-sum-exp of the scaled logits, for ``max`` without the
        largest and with the background: the largest term, and the sum of exp relative to it.

    Raises:
        ValueError: a shape does not fit, or there are too many rows for 32-bit row numbers.
        TypeError: the logits' dtype has no kernel.
    """
    rows, config = _prepare(logits, inv_temperature, background, confidence, PER_THREAD["forward"])
    shape = logits.shape[:2]
    odds, reference = (logits.new_empty(size, dtype=accumulator(logits.dtype)) for size in (shape, (*shape, 2)))
    argmax = logits.new_empty((shape[0], 0) if confidence == "mass" else shape, dtype=torch.int32)
    if odds.numel():
        with on_device_of(logits):
            kernels.rows_forward_kernel[rows.grid](
                logits,
                inv_temperature,
                background,
                odds,
                reference,
                argmax,
                rows.n_rows,
                shape[1],
                logits.stride(0),
                **rows.constants,
                MASS=confidence == "mass",
                **config,
            )
    return odds, reference, argmax


def odds_backward(
    logits: Tensor,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    reference: Tensor,
    argmax: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The odds' gradient grad [E, N] pulled back; the rest is what `odds_forward` took and gave.

    Returns:
        grad_logits [E, N, K] in the logits' dtype, and row by row, for the caller to sum over N,
        grad_inv_temperature [E, N] and grad_background [E, N] (None without a background).

    Raises:
        ValueError, TypeError: as `odds_forward`.
    """
    rows, config = _prepare(logits, inv_temperature, background, confidence, PER_THREAD["backward"])
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_inv_temperature = reference.new_empty(logits.shape[:2])
    grad_background = None if background is None else reference.new_empty(logits.shape[:2])
    if reference.numel():
        with on_device_of(logits):
            kernels.rows_backward_kernel[rows.grid](
                logits,
                inv_temperature,
                background,
                reference,
                argmax,
                grad.contiguous(),
                grad_logits,
                grad_inv_temperature,
                grad_background,
                rows.n_rows,
                logits.shape[1],
                logits.stride(0),
                **rows.constants,
                MASS=confidence == "mass",
                **config,
            )
    return grad_logits, grad_inv_temperature, grad_background


def odds_double_backward(
    logits: Tensor,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    reference: Tensor,
    argmax: Tensor,
    grad: Tensor,
    v_logits: Tensor | None,
    v_inv_temperature: Tensor | None,
    v_background: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of ``<v, odds_backward(...)>`` = grad · J v, given cotangents v of the three that it gives.

    Args:
        v_logits: [E, N, K], any strides, or None for zero.
        v_inv_temperature: [E], one for all rows of an episode (their gradients are summed), or None for zero.
        v_background: likewise; ignored without a background.

    Returns:
        Gradients of logits [E, N, K] (their dtype), inv_temperature rows [E, N] and background rows [E, N] (None
        without one), and J v [E, N], the gradient of grad.

    Raises:
        ValueError, TypeError: as `odds_forward`.
    """
    rows, config = _prepare(logits, inv_temperature, background, confidence, PER_THREAD["double_backward"])
    shape, zero = logits.shape, torch.zeros((), dtype=reference.dtype, device=logits.device)
    # A missing tangent is one zero seen through strides of 0: no memory, and the reads stay in cache.
    v_logits = zero.expand(shape) if v_logits is None else v_logits
    v_inv_temperature = zero.expand(shape[0]) if v_inv_temperature is None else v_inv_temperature
    if background is None:
        v_background = None
    else:
        v_background = (zero.expand(shape[0]) if v_background is None else v_background).contiguous()
    out_logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    out_inv_temperature, along = (reference.new_empty(shape[:2]) for _ in range(2))
    out_background = None if background is None else reference.new_empty(shape[:2])
    if reference.numel():
        with on_device_of(logits):
            kernels.rows_double_backward_kernel[rows.grid](
                logits,
                inv_temperature,
                background,
                reference,
                argmax,
                grad.contiguous(),
                v_logits,
                v_inv_temperature.contiguous(),
                v_background,
                out_logits,
                out_inv_temperature,
                out_background,
                along,
                rows.n_rows,
                shape[1],
                logits.stride(0),
                v_logits.stride(0),
                **rows.constants,
                V_STRIDE_N=v_logits.stride(1),
                V_STRIDE_K=v_logits.stride(2),
                V_FLAT=_is_flat(v_logits),
                MASS=confidence == "mass",
                **config,
            )
    return out_logits, out_inv_temperature, out_background, along


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a logits dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_device(name: str, tensor: Tensor) -> None:
    """Raise unless a kernel can read the tensor: on a GPU, or anywhere in Triton's interpreter."""
    if arch_of(tensor.device) == INTERPRETER and not isinstance(kernels.rows_forward_kernel, _interpreted()):
        raise ValueError(
            f"{name} is on {tensor.device}: the triton backend needs a CUDA or ROCm tensor, "
            "or TRITON_INTERPRET=1 set before mdml_kernels is imported"
        )


class _Rows:
    """How the rows of logits [E, N, K] are walked: their number, the grid, the strides."""

    def __init__(self, logits: Tensor, config: LaunchConfig) -> None:
        self.n_rows = logits.shape[0] * logits.shape[1]
        self.grid = (-(-self.n_rows // config.block_rows),)
        self.constants = {
            "K": logits.shape[2],
            "STRIDE_N": logits.stride(1),
            "STRIDE_K": logits.stride(2),
            "FLAT": _is_flat(logits),
        }


def _prepare(
    logits: Tensor,
    inv_temperature: Tensor,
    background: Tensor | None,
    confidence: Confidence,
    per_thread: int,
) -> tuple[_Rows, dict[str, Any]]:
    if logits.ndim != 3:
        raise ValueError(f"logits must be [E, N, K], got {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be one of {', '.join(map(str, DTYPES))}, got {logits.dtype}")
    if logits.shape[0] * logits.shape[1] > MAX_ROWS:
        raise ValueError(f"logits have {logits.shape[0] * logits.shape[1]} rows; the kernels take at most {MAX_ROWS}")
    if background is None and confidence == "mass":
        raise ValueError("confidence 'mass' needs a background")
    for name, value in (("inv_temperature", inv_temperature), ("background", background)):
        if value is not None and (value.shape != logits.shape[:1] or not value.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [E] = {[logits.shape[0]]}, got {list(value.shape)}")
    check_device("logits", logits)
    config = rows_config(logits.shape[2], logits.dtype, arch_of(logits.device), per_thread)
    tile = {"BLOCK_N": config.block_rows, "BLOCK_K": config.block_cols, "TILES": config.tiles, **config.options}
    return _Rows(logits, config), tile


def _is_flat(tensor: Tensor) -> bool:
    """Whether one stride leads through the rows of all episodes."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _interpreted() -> type[Any]:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction  # type: ignore[no-any-return]
