"""Statistics of rows of logits and gradients to them, by the compiled kernels; the rows are shared by the threads.

Letters: E episodes, N rows, K logits; x = τ ℓ. Everything is float32 on a CPU, and `loader.serves` it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mdml_kernels.native.calls import call, whole
from mdml_kernels.native.loader import serves
from mdml_kernels.reference import Confidence

# Rows in a block of the kernels.
_BLOCK = 16
# Rows up to this many logits are turned (see rows.h), and nothing is left of them for a gradient.
SHORT = 64
# Fewer logits than this are not worth a thread of their own.
_LEAST_LOGITS = 1 << 17


def serves_rows(logits: Tensor, tau: Tensor) -> bool:
    """Whether the kernels can take logits [E, N, K]: rows may lie anywhere, their entries side by side."""
    return (logits.stride(-1) == 1 or logits.shape[-1] == 1) and serves(logits, tau)


def statistics(logits: Tensor, tau: Tensor, confidence: Confidence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows [E, N]: the largest x; peak and total; the first index of the largest (`mass`: empty).

    Of all others than that one (`mass`: of all), peak is the largest, and total Σ e^(x - peak). τ is [E].
    """
    n_episodes, n_rows, _ = logits.shape
    top, peak, total = (tau.new_empty(n_episodes, n_rows) for _ in range(3))
    first = torch.empty(n_episodes, n_rows if confidence == "max" else 0, dtype=torch.int64)
    outputs = (top, peak, total, first if confidence == "max" else None)
    call("mdml_row_statistics", *_by_block(logits), *_walk(logits, tau), *outputs)
    return top, peak, total, first


def hinge(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    is_ood: Tensor,
    margin: float,
    ahead: float = 1.0,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The hinge loss [E] at confidence `max`; its slopes by the odds [E, N]; peak, total and first of `statistics`.

    is_ood is bool [E, N].

    grad [E, N, K] is filled with the gradient to rows longer than SHORT of ahead times each loss, while they are in the
    cache; see `reweigh`.
    """
    n_episodes, n_rows, n_classes = logits.shape
    loss = tau.new_empty(n_episodes)
    slope, peak, total = (tau.new_empty(n_episodes, n_rows) for _ in range(3))
    first = torch.empty(n_episodes, n_rows, dtype=torch.int64)
    others = (whole(background), whole(is_ood), ctypes.c_float(margin), loss, slope, peak, total, first)
    work = (n_episodes, n_rows * n_classes, _LEAST_LOGITS)
    call("mdml_hinge", *work, *_walk(logits, tau), *others, ctypes.c_float(ahead), grad)
    return loss, slope, peak, total, first


def reweigh(grad: Tensor, by_loss: Tensor, ahead: float) -> Tensor:
    """What `hinge` made of the logits becomes the gradient of by_loss [E] times each loss; it is there already if that
    is what was foreseen.
    """
    size = grad.shape[1:].numel()
    call("mdml_reweigh", len(grad), size, _LEAST_LOGITS, by_loss.contiguous(), ctypes.c_float(ahead), size, grad)
    return grad


def gradients(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    slopes: tuple[Tensor | None, Tensor],
    saved: tuple[Tensor, Tensor, Tensor | None],
    needs_tau: bool,
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill out [E, N, K] with slopes by the odds [E, N], times those by the losses [E] (None: 1), pulled back.

    Args:
        logits: [E, N, K].
        tau: [E].
        background: [E] or None.
        slopes: by the losses, and by the odds.
        saved: peak, total and first of `statistics`, contiguous; first is None for `mass`.
        needs_tau: whether the gradient to τ is wanted.
        out: float32 [E, N, K], contiguous; may be the logits.

    Returns:
        The gradients to τ and to the background [E], where there are such.
    """
    tau_rows = torch.empty_like(saved[0]) if needs_tau else None
    background_rows = None if background is None else torch.empty_like(saved[0])
    others = (whole(background), *slopes, *saved, out, tau_rows, background_rows)
    call("mdml_row_gradients", *_by_block(logits), *_walk(logits, tau), *others)
    return (
        None if tau_rows is None else tau_rows.sum(1) / tau,
        None if background_rows is None else background_rows.sum(1),
    )


def _by_block(logits: Tensor) -> tuple[int, int, int]:
    """How many blocks of rows there are, of how many logits, and how many are worth a thread."""
    return len(logits) * -(-logits.shape[1] // _BLOCK), _BLOCK * logits.shape[-1], _LEAST_LOGITS


def _walk(logits: Tensor, tau: Tensor) -> tuple[Tensor | int, ...]:
    """What every kernel is told of logits [E, N, K] and τ [E]."""
    return logits, *logits.stride()[:2], *logits.shape[1:], tau.contiguous()
