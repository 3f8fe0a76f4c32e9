"""The mathematics of log-odds on one chunk of rows, shared by `cpu` and `linear`: tensor operations and no loop.

x = τ ℓ are the scaled logits, τ = 1/T; b the background logit or None; w the softmax of what the logarithm sums:

    max    o = x_m - log(Σ_{k≠m} e^x_k + [e^b])    m the first largest      ∂o/∂x = e_m - w    ∂o/∂b = -w_b
    mass   o = log(Σ_k e^x_k) - b                                           ∂o/∂x = w          ∂o/∂b = -1

log S = -softplus(-o) and log(1 - S) = -softplus(o) follow from o, so it is all that has to be differentiated. The sum
over x is kept as two numbers, its largest x, ``peak``, and ``total`` = Σ e^(x - peak): a logarithm would be rounded at
its own size, which is that of what all logits of a row share.

Chunks are [..., K], columns [..., 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_kernels.reference import Confidence

SHORT_ROW = 32


def first_max(x: Tensor, top: Tensor, first: Tensor, mark: Tensor, descending: Tensor) -> None:
    """Write the largest x [..., K] and the first index of it into the columns top and first.

    Long rows are compared with their maximum and the marks reduced: both are vectorised, and take a third of the time
    of the reduction that carries an index, which short rows use. descending is K, ..., 1; mark a scratch like x.
    """
    if x.shape[-1] < SHORT_ROW:
        torch.max(x, -1, keepdim=True, out=(top, first))
        return
    torch.amax(x, -1, keepdim=True, out=top)
    torch.eq(x, top, out=mark)
    ahead = torch.amax(mark.mul_(descending), -1, keepdim=True)
    # A row of NaN has no mark: any index will do, because top is NaN.
    first.copy_((x.shape[-1] - ahead).clamp_(max=x.shape[-1] - 1))


def drop(x: Tensor, first: Tensor) -> Tensor:
    """Take the entry first out of x [..., K], in place. Not by -inf: a row that has nothing else would make NaN."""
    return x.scatter_(-1, first, torch.finfo(x.dtype).min)


def finite(logits: Tensor) -> Tensor:
    """The logits, with 0 for -inf: such a class takes no share of anything, but 0 times -inf would be NaN."""
    return logits.masked_fill(logits == -torch.inf, 0.0)


def finish_odds(
    top: Tensor, peak: Tensor, largest: Tensor, background: Tensor | None, confidence: Confidence
) -> tuple[Tensor, Tensor]:
    """The odds and total (without the background), from columns or rows.

    top is the largest x; peak the largest of those summed; largest that of their softmax.
    """
    # (top - top) is zero, or NaN where a row holds a NaN or an infinity: those must not come out finite.
    total = 1 / largest + (top - top)
    return odds_of(top, peak, total, background, confidence), total


def odds_of(top: Tensor, peak: Tensor, total: Tensor, background: Tensor | None, confidence: Confidence) -> Tensor:
    """The odds from the largest x and the sum of e^x."""
    if confidence == "mass":
        assert background is not None
        return (peak - background) + total.log()
    below = (peak - top) + total.log()
    return -(below if background is None else torch.logaddexp(below, background - top))


def split_background(
    peak: Tensor, total: Tensor, background: Tensor | None, confidence: Confidence
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (or rows) such that ∂o/∂x = kept * softmax [+ e_m] and ∂o/∂b = -dropped; and NaN where total is."""
    poison = total - total
    if confidence == "mass":
        return 1 + poison, torch.ones_like(total), poison
    if background is None:
        return poison - 1, torch.zeros_like(total), poison
    ahead = (peak - background) + total.log()
    return -torch.sigmoid(ahead), torch.sigmoid(-ahead), poison


def weigh(softmax: Tensor, first: Tensor | None, at_rest: Tensor, at_first: Tensor) -> None:
    """Make at_rest * softmax of it, in place, with at_first at the entry first (None: no such)."""
    softmax.mul_(at_rest)
    if first is not None:
        softmax.scatter_(-1, first, at_first)


def second_order(
    logits: Tensor,
    v_logits: Tensor | None,
    first: Tensor | None,
    columns: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of D = g · J v: ∂D/∂x [..., K], ∂D/∂ẋ [..., K], ∂D/∂τ, ∂D/∂b and J v (columns), with ẋ = τ v_ℓ + v_τ ℓ.

    columns are τ, v_τ, v_b, g and the two of `split_background`. With ν = Σ w ẋ + [w_b v_b]:

        J v = ẋ_m - ν  (max)   ν - v_b  (mass)     ∂(J v)/∂x_k = ∓ w_k (ẋ_k - ν)     ∂(J v)/∂b = -w_b (v_b - ν)  (max)
    """
    tau, v_tau, v_background, grad, kept, dropped = columns
    x, reached = logits * tau, finite(logits)
    moved = reached * v_tau
    if v_logits is not None:
        moved.addcmul_(v_logits, tau)
    if first is not None:
        drop(x, first)
    signed = torch.softmax(x, -1).mul_(kept)
    if first is not None:
        signed.scatter_(-1, first, 0.0)
    total = (signed * moved).sum(-1, keepdim=True) - dropped * v_background
    if first is None:
        along, centre = total, total + v_background
        grad_background = torch.zeros_like(grad)
    else:
        along, centre = total + moved.gather(-1, first), -total
        grad_background = -grad * dropped * (v_background - centre)
    grad_x = (signed * grad) * (moved - centre)
    if first is not None:
        signed.scatter_(-1, first, 1.0)
    grad_moved = signed.mul_(grad)
    by_tau = reached.mul_(grad_x)
    if v_logits is not None:
        by_tau.addcmul_(grad_moved, v_logits)
    return grad_x, grad_moved, by_tau.sum(-1, keepdim=True), grad_background, along
