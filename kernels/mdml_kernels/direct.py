"""Losses with their analytic gradients, for loops that build no graph: what autograd would give, in fewer steps.

Letters: E episodes, N rows, K logits; x = τ ℓ the scaled logits, τ = 1/T, b the background. The operators and their
mathematics are those of `rows` and `cpu_loss`. Nothing here is checked, and no gradient flows through the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdml_kernels import chunks, losses, rows
from mdml_kernels.reference import Confidence, Form, accumulation_dtype


class LossGradients(NamedTuple):
    """Attributes:
    loss: of each episode [E].
    logits: its gradient to the episode's logits [E, N, K], in their dtype.
    tau: to 1/T [E], or None where it was not asked for.
    background: to b [E], or None where there is no background.
    """

    loss: Tensor
    logits: Tensor
    tau: Tensor | None
    background: Tensor | None


def one_class_gradient_(
    logits: Tensor, tau: Tensor | None, background: Tensor | None, confidence: Confidence
) -> Tensor:
    """Replace logits by the gradient of `one_class_loss` of each episode; the loss itself is not computed. On a CPU.

    Args:
        logits: float32 or float64 [E, N, K], contiguous; overwritten.
        tau: 1/T [E] in their dtype, None for 1.
        background: b [E] in their dtype, or None.
        confidence: ``max`` or ``mass`` (which needs a background).

    Returns:
        logits, which now hold ∂ mean(-log S) / ∂ℓ.
    """
    scale = 1 / logits.shape[1] if tau is None else tau[:, None, None] / logits.shape[1]
    if confidence == "mass":
        if background is None:
            raise ValueError("confidence 'mass' is one minus the background's probability: give background")
        if tau is not None:
            logits.mul_(tau[:, None, None])
        top = logits.amax(-1, keepdim=True)
        largest = torch.softmax(logits, -1, out=logits).amax(-1, keepdim=True)
        against = (background[:, None, None] - top) + largest.log()
        return logits.mul_(-torch.sigmoid(against) * scale)
    p, top, first = _softmax_and_largest_(logits, tau)
    # ∂(-log S)/∂x is the softmax with the background among the logits, less 1 at the first maximum. That entry is
    # minus the sum of all others, which is exact where S rounds to 1.
    p_largest = p.gather(-1, first) if background is not None else None
    rest = p.scatter_(-1, first, 0.0).sum(-1, keepdim=True)
    if background is not None and p_largest is not None:
        against = (background[:, None, None] - top) + p_largest.log()
        kept = torch.sigmoid(-against)
        p.mul_(kept)
        rest = rest * kept + torch.sigmoid(against)
    return p.scatter_(-1, first, rest.neg_()).mul_(scale)


def margin_gradients(
    logits: Tensor,
    is_ood: Tensor,
    tau: Tensor | None,
    background: Tensor | None,
    *,
    margin: float,
    confidence: Confidence,
    form: Form,
    backend: str,
    needs_tau: bool = False,
) -> LossGradients:
    """`softmax_margin_loss` with reduction ``none``, and its gradients.

    Args:
        logits: float [E, N, K]; may be overwritten.
        is_ood: bool [E, N].
        tau: 1/T [E] in the dtype that the logits accumulate in, None for 1.
        background: b [E], likewise, or None.
        margin: as in `softmax_margin_loss`.
        confidence: likewise.
        form: likewise.
        backend: ``cpu`` or ``triton``.
        needs_tau: whether the gradient to τ is wanted.
    """
    if backend == "cpu" and confidence == "max" and form != "bce" and not needs_tau:
        return _of_largest_(logits, is_ood, tau, background, margin, form)
    if tau is None:
        tau = logits.new_ones(len(logits), dtype=accumulation_dtype(logits))
    op = rows.operator(backend, confidence)
    odds, *saved = op.forward((logits, tau, background))
    loss, slope = losses.value_and_slope_of_odds(odds, is_ood, margin, form)
    grads = op.backward((logits, tau, background), tuple(saved), slope, (True, needs_tau, background is not None))
    by_tau = grads[1] if needs_tau else None
    return LossGradients(loss, grads[0], by_tau, grads[-1] if background is not None else None)


def _of_largest_(
    logits: Tensor, is_ood: Tensor, tau: Tensor | None, background: Tensor | None, margin: float, form: Form
) -> LossGradients:
    """`margin_gradients` of losses that see S = max alone, in place: one softmax serves the value and the gradient."""
    p, top, first = _softmax_and_largest_(logits, tau)
    s = p.gather(-1, first)
    p.scatter_(-1, first, 0.0)
    rest = p.sum(-1, keepdim=True)  # 1 - S would lose what S rounds off
    kept, dropped = None, None
    if background is not None:
        against = (background[:, None, None] - top) + s.log()
        dropped, kept = torch.sigmoid(against), torch.sigmoid(-against)
        s, rest = s * kept, rest * kept + dropped
    loss, slope = losses.value_and_slope(s.squeeze(-1), is_ood, margin, form)
    by_s = slope.unsqueeze(-1) * s
    by_background = None if dropped is None else -(by_s * dropped).sum((1, 2))
    if tau is not None:
        by_s = by_s * tau[:, None, None]
    p.mul_(-by_s if kept is None else -by_s * kept).scatter_(-1, first, by_s * rest)
    return LossGradients(loss, p, None, by_background)


def _softmax_and_largest_(logits: Tensor, tau: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of scaled logits [E, N, K], in their place; the largest of these and its first index [E, N, 1]."""
    columns = (*logits.shape[:-1], 1)
    if tau is not None:
        logits.mul_(tau[:, None, None])
    top, first = logits.new_empty(columns), torch.empty(columns, dtype=torch.int64, device=logits.device)
    if logits.shape[-1] < chunks.SHORT_ROW:
        torch.max(logits, -1, keepdim=True, out=(top, first))
    else:
        descending = torch.arange(logits.shape[-1], 0, -1, dtype=logits.dtype, device=logits.device)
        chunks.first_max(logits, top, first, torch.empty_like(logits), descending)
    return torch.softmax(logits, -1, out=logits), top, first
