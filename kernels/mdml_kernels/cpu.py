"""The log-odds of rows on a CPU: passes over chunks that stay in the cache, with the analytic gradient and no graph.

Letters: E episodes, N rows, K logits; τ = 1/T one per episode, b the background logits or None. See `chunks` for the
mathematics. Nothing the size of the logits is allocated but the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mdml_kernels import chunks
from mdml_kernels.reference import Confidence

# Two scratch buffers of this many float32 fit a 1 MiB second-level cache; every thread has a cache of its own.
_CHUNK_ELEMENTS = 1 << 17


def forward(
    logits: Tensor, tau: Tensor, background: Tensor | None, confidence: Confidence
) -> tuple[Tensor, Tensor, Tensor]:
    """The odds [E, N], log Σ e^x without the background [E, N], the first largest index [E, N] (mass: empty)."""
    n_episodes, n_rows, n_classes = logits.shape
    top, second, peak = tau.new_empty(3, n_episodes, n_rows, 1)
    first = torch.empty(n_episodes, n_rows if confidence == "max" else 0, 1, dtype=torch.int64, device=logits.device)
    descending = torch.arange(n_classes, 0, -1, dtype=tau.dtype, device=logits.device)
    scaled, mark = tau.new_empty(2, _largest_chunk(logits))
    for e, n in _chunks(logits):
        chunk = logits[e, n]
        x = torch.mul(chunk, tau[e, None, None], out=_shaped(scaled, chunk))
        torch.amax(x, -1, keepdim=True, out=top[e, n])
        if confidence == "max":
            chunks.drop_first_max(x, top[e, n], first[e, n], _shaped(mark, chunk), descending)
            torch.amax(x, -1, keepdim=True, out=second[e, n])
        torch.softmax(x, -1, out=x)
        torch.amax(x, -1, keepdim=True, out=peak[e, n])
    summed = second if confidence == "max" else top
    column = None if background is None else background[:, None, None]
    odds, log_sum = chunks.finish_odds(top, summed, peak, column, confidence)
    return odds.squeeze(-1), log_sum.squeeze(-1), first.squeeze(-1)


def backward(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    saved: tuple[Tensor, Tensor],
    grad: Tensor,
    confidence: Confidence,
    needs_tau: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad [E, N] pulled back to the logits [E, N, K] in their dtype, to τ [E] where asked, and to b [E]."""
    log_sum, first, per_episode = saved[0].unsqueeze(-1), saved[1].unsqueeze(-1), tau[:, None, None]
    column = None if background is None else background[:, None, None]
    kept, dropped, poison = chunks.split_background(log_sum, column, confidence)
    grad = grad.unsqueeze(-1) + poison
    at_first = grad * per_episode
    at_rest = at_first * kept
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tau_rows = torch.empty_like(log_sum) if needs_tau else None
    direct = logits.dtype == tau.dtype
    scaled, product = tau.new_empty(2, _largest_chunk(logits) if needs_tau or not direct else 0)
    for e, n in _chunks(logits):
        chunk = logits[e, n]
        out = torch.mul(chunk, per_episode[e], out=grad_logits[e, n] if direct else _shaped(scaled, chunk))
        chunks.pull_back(out, first[e, n] if confidence == "max" else None, at_rest[e, n], at_first[e, n])
        if not direct:
            grad_logits[e, n] = out
        if tau_rows is not None:
            torch.sum(torch.mul(out, chunk, out=_shaped(product, chunk)), -1, keepdim=True, out=tau_rows[e, n])
    grad_tau = None if tau_rows is None else tau_rows.sum((1, 2)) / tau
    return grad_logits, grad_tau, None if background is None else -(grad * dropped).sum((1, 2))


def double_backward(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    saved: tuple[Tensor, Tensor],
    grad: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    confidence: Confidence,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂(grad · J v)/∂(logits, τ, b) as in `backward`, then J v [E, N]; v are the tangents, None for zero."""
    log_sum, first = saved[0].unsqueeze(-1), saved[1].unsqueeze(-1)
    column = None if background is None else background[:, None, None]
    kept, dropped, poison = chunks.split_background(log_sum, column, confidence)
    grad = grad.unsqueeze(-1) + poison
    v_logits = tangents[0]
    t, v_tau, v_background = (torch.zeros_like(tau) if v is None else v for v in (tau, *tangents[1:]))
    t, v_tau, v_background = t[:, None, None], v_tau[:, None, None], v_background[:, None, None]
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tau_rows, background_rows, along = (torch.empty_like(log_sum) for _ in range(3))
    for e, n in _chunks(logits):
        chunk = logits[e, n].to(tau.dtype)
        v = None if v_logits is None else v_logits[e, n].to(tau.dtype)
        columns = (t[e], v_tau[e], v_background[e], grad[e, n], kept[e, n], dropped[e, n])
        grad_x, grad_moved, background_rows[e, n], along[e, n] = chunks.second_order(
            chunk, v, first[e, n] if confidence == "max" else None, columns
        )
        products = grad_x * chunk
        tau_rows[e, n] = (products if v is None else products.addcmul_(grad_moved, v)).sum(-1, keepdim=True)
        grad_logits[e, n] = grad_x.mul_(t[e]).addcmul_(grad_moved, v_tau[e])
    return grad_logits, tau_rows.sum((1, 2)), background_rows.sum((1, 2)), along.squeeze(-1)


def _chunks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of episodes and rows that cover logits [E, N, K]: several whole episodes, or a part of one."""
    n_episodes, n_rows, n_classes = logits.shape
    episodes, rows = _chunk_shape(logits)
    if not n_rows * n_classes:
        return
    for e in range(0, n_episodes, episodes):
        for n in range(0, n_rows, rows):
            yield slice(e, e + episodes), slice(n, n + rows)


def _chunk_shape(logits: Tensor) -> tuple[int, int]:
    n_episodes, n_rows, n_classes = logits.shape
    elements = _CHUNK_ELEMENTS * torch.get_num_threads()
    if n_rows * n_classes <= elements:
        return min(n_episodes, max(1, elements // max(1, n_rows * n_classes))), n_rows
    return 1, max(1, elements // n_classes)


def _largest_chunk(logits: Tensor) -> int:
    episodes, rows = _chunk_shape(logits)
    return episodes * rows * logits.shape[-1]


def _shaped(scratch: Tensor, chunk: Tensor) -> Tensor:
    return scratch[: chunk.numel()].view(chunk.shape)
