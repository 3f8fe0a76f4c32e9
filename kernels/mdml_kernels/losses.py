"""Episode losses from the log-odds of rows: odds [..., N] and is_ood bool [..., N] -> [...], in plain operations.

Every form is a weighted sum over rows, of S or of log S, with weights that are constant almost everywhere:

    hinge      gap = m + Σ w S            w = -1/n_ID on ID rows, 1/n_OOD on OOD rows; the loss is relu(gap)
    pairwise   Σ c (m - S)  +  Σ c S      c = how many rows of the other side miss the margin to this one, / pairs
               over ID         over OOD
    bce        -Σ w log(S or 1 - S)       w = 1/n of the row's own side

so PyTorch differentiates them at the cost of one number a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdml_kernels.reference import Form, hinge


def of_odds(odds: Tensor, is_ood: Tensor, margin: float, form: Form) -> Tensor:
    """The loss of each episode; what it means is said in `functional.softmax_margin_loss`."""
    if form != "bce":
        return of_confidence(log_sigmoid(odds).exp(), is_ood, margin, form)
    n_id, n_ood = _sizes(is_ood, odds)
    mean = torch.where(is_ood, 1 / n_ood, 1 / n_id)
    return -(mean * log_sigmoid(torch.where(is_ood, -odds, odds))).sum(-1)


def of_confidence(s: Tensor, is_ood: Tensor, margin: float, form: Form) -> Tensor:
    """The `hinge` or `pairwise` loss of each episode from confidences [..., N]."""
    n_id, n_ood = _sizes(is_ood, s)
    if form == "hinge":
        gap = (torch.where(is_ood, 1 / n_ood, -1 / n_id) * s).sum(-1) + margin
        return hinge(gap * (n_ood * n_id > 0).squeeze(-1))
    terms = _missing_partners(s.detach(), is_ood, margin) * torch.where(is_ood, s, margin - s)
    return terms.sum(-1) / (n_ood * n_id).squeeze(-1).clamp(min=1)


def log_sigmoid(odds: Tensor) -> Tensor:
    """log S; PyTorch's own has s (1 - s) in its second derivative, and nothing is left of that where s rounds to 1."""
    positive = odds > 0
    return torch.where(positive, 0.0, odds) - torch.where(positive, -odds, odds).exp().log1p()


def value_and_slope(s: Tensor, is_ood: Tensor, margin: float, form: Form) -> tuple[Tensor, Tensor]:
    """The `hinge` or `pairwise` loss [E] of confidences s [E, N], and ∂loss/∂s [E, N]; no graph."""
    n_id, n_ood = _sizes(is_ood, s)
    if form == "hinge":
        mean = torch.where(is_ood, 1 / n_ood, -1 / n_id)
        gap = (mean * s).sum(-1, keepdim=True).add_(margin).mul_(n_ood * n_id > 0)
        met = gap <= 0  # which a NaN is not
        return gap.masked_fill_(met, 0.0).squeeze(-1), mean.masked_fill_(met, 0.0)
    slope = _missing_partners(s, is_ood, margin) / (n_ood * n_id).clamp_(min=1)
    return (slope * torch.where(is_ood, s, margin - s)).sum(-1), torch.where(is_ood, slope, -slope)


def value_and_slope_of_odds(odds: Tensor, is_ood: Tensor, margin: float, form: Form) -> tuple[Tensor, Tensor]:
    """The loss [E] of log-odds [E, N], and ∂loss/∂odds [E, N]; no graph."""
    if form != "bce":
        s = odds.sigmoid()
        loss, slope = value_and_slope(s, is_ood, margin, form)
        return loss, slope * s * odds.neg().sigmoid()
    n_id, n_ood = _sizes(is_ood, odds)
    mean = torch.where(is_ood, 1 / n_ood, 1 / n_id)
    right = torch.where(is_ood, -odds, odds)  # the larger, the better
    slope = mean * right.neg().sigmoid()
    return -(mean * log_sigmoid(right)).sum(-1), torch.where(is_ood, slope, -slope)


def _sizes(is_ood: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many ID and OOD rows there are, [..., 1], in the values' dtype."""
    n_ood = is_ood.sum(-1, keepdim=True, dtype=values.dtype)
    return is_ood.shape[-1] - n_ood, n_ood


def _missing_partners(s: Tensor, is_ood: Tensor, margin: float) -> Tensor:
    """For an ID row how many OOD rows have S_j > S_i - m, for an OOD row how many ID rows have S_i < S_j + m.

    One sort of the N shifted values instead of N² pairs. OOD rows are put first among equals, because a pair that
    just meets the margin does not count: then an ID row's partners lie behind it, an OOD row's before it.
    """
    ood_first = is_ood.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    value = torch.where(is_ood, s, s - margin).gather(-1, ood_first)
    order = ood_first.gather(-1, value.argsort(dim=-1, stable=True))
    ood = is_ood.gather(-1, order)
    seen_ood = ood.cumsum(-1)
    seen_id = (~ood).cumsum(-1)
    counts = torch.where(ood, seen_id, is_ood.sum(-1, keepdim=True) - seen_ood)
    return torch.empty_like(counts).scatter(-1, order, counts).to(s.dtype)
