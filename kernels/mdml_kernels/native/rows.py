"""Statistics of rows of logits and gradients to them, by the compiled kernels; the rows are shared by the threads.

Letters: E episodes, N rows, K logits; x = τ ℓ. Everything is float32 on a CPU, and `library.serves` it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mdml_kernels.native.library import native, serves
from mdml_kernels.native.threads import shared
from mdml_kernels.reference import Confidence

# Rows that the kernels take at once, one to a lane.
_BLOCK = 16
# Fewer logits than this are not worth a thread of their own.
_LEAST_LOGITS = 1 << 17


def serves_rows(logits: Tensor, tau: Tensor) -> bool:
    """Whether the kernels can take logits [E, N, K]: rows may lie anywhere, their entries side by side."""
    return (logits.stride(-1) == 1 or logits.shape[-1] == 1) and serves(logits, tau)


def statistics(logits: Tensor, tau: Tensor, confidence: Confidence) -> tuple[Tensor, Tensor, Tensor]:
    """The largest x; log Σ e^x of all others (`mass`: of all); the first index of the largest (`mass`: empty): [E, N].

    τ is [E].
    """
    n_episodes, n_rows, n_classes = logits.shape
    top, log_sum = tau.new_empty(2, n_episodes, n_rows).unbind()
    first = torch.empty(n_episodes, n_rows if confidence == "max" else 0, dtype=torch.int64)
    call = _Call("mdml_row_statistics", logits, tau)
    call(_blocks(logits), _BLOCK * n_classes, top, log_sum, first if confidence == "max" else None)
    return top, log_sum, first


def hinge(
    logits: Tensor, tau: Tensor, background: Tensor | None, is_ood: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The hinge loss [E] at confidence `max`; its slopes by the odds [E, N]; log Σ e^x without the first largest; which
    that is. is_ood is bool [E, N].
    """
    n_episodes, n_rows, n_classes = logits.shape
    loss, columns = tau.new_empty(n_episodes), tau.new_empty(2, n_episodes, n_rows)
    first = torch.empty(n_episodes, n_rows, dtype=torch.int64)
    slope, log_sum = columns.unbind()
    is_ood, background = is_ood.contiguous(), _whole(background)
    call = _Call("mdml_hinge", logits, tau)
    call(n_episodes, n_rows * n_classes, background, is_ood, ctypes.c_float(margin), loss, slope, log_sum, first)
    return loss, slope, log_sum, first


def gradients(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    slopes: tuple[Tensor | None, Tensor],
    saved: tuple[Tensor, Tensor | None],
    needs_tau: bool,
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill out [E, N, K] with slopes by the odds [E, N], times those by the losses [E] (None: 1), pulled back.

    Args:
        logits: [E, N, K].
        tau: [E].
        background: [E] or None.
        slopes: by the losses, and by the odds.
        saved: log Σ e^x of the entries but the first largest, and which that is; or of all, and None: `mass`.
        needs_tau: whether the gradient to τ is wanted.
        out: float32 [E, N, K], contiguous; may be the logits.

    Returns:
        The gradients to τ and to the background [E], where there are such.
    """
    log_sum, first = saved
    tau_rows = torch.empty_like(log_sum) if needs_tau else None
    background_rows = None if background is None else torch.empty_like(log_sum)
    call = _Call("mdml_row_gradients", logits, tau)
    background = _whole(background)
    others = (background, *slopes, log_sum, first, out, tau_rows, background_rows)
    call(_blocks(logits), _BLOCK * logits.shape[-1], *others)
    return (
        None if tau_rows is None else tau_rows.sum(1) / tau,
        None if background_rows is None else background_rows.sum(1),
    )


def _whole(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _blocks(logits: Tensor) -> int:
    return len(logits) * -(-logits.shape[1] // _BLOCK)


class _Call:
    """A kernel that walks through logits; called with how many things to do, of how many logits each, and the rest."""

    def __init__(self, name: str, logits: Tensor, tau: Tensor) -> None:
        library = native().library
        assert library is not None
        self._function = getattr(library, name)
        self._tensors = logits, tau.contiguous()

    def __call__(self, n: int, size: int, *others: Tensor | ctypes.c_float | None) -> None:
        logits, tau = self._tensors
        given = [other if isinstance(other, ctypes.c_float) else _pointer(other) for other in others]
        walk = [_pointer(logits), *map(ctypes.c_int64, (*logits.stride()[:2], *logits.shape[1:])), _pointer(tau)]

        def run(begin: int, end: int) -> None:
            self._function(ctypes.c_int64(begin), ctypes.c_int64(end), *walk, *given)

        shared(run, n, least=max(1, _LEAST_LOGITS // max(1, size)))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of contiguous memory (that of the logits apart, which come with their strides)."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
