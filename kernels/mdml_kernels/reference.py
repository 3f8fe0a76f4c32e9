"""The definition that every backend is held against: plain PyTorch, any float dtype, any number of derivatives.

Letters: E episodes (any leading dims), N rows, K logits.

    Z_i  = Σ_k exp(ℓ_ik / T) + [exp(b)]
    S_i  = max_k exp(ℓ_ik / T) / Z_i      confidence "max"
    S_i  = 1 - exp(b) / Z_i               confidence "mass", needs the background logit b

Everything is computed from log S and log(1 - S), so nothing saturates. half and bfloat16 accumulate in float32.
A NaN in a row makes that row's confidence NaN, and with it the loss of its episode; comparisons are written so
that NaN is never taken for "margin met".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Confidence = Literal["max", "mass"]
Form = Literal["hinge", "pairwise", "bce"]
Reduction = Literal["mean", "sum", "none"]
Scalar = float | Tensor


def log_confidence(
    logits: Tensor, temperature: Scalar = 1.0, background: Scalar | None = None, confidence: Confidence = "max"
) -> tuple[Tensor, Tensor]:
    """log S and log(1 - S), each [..., N], of logits [..., N, K]; at ties of the maximum the first index counts."""
    scaled = logits.to(accumulation_dtype(logits)) / per_row(temperature, logits).unsqueeze(-1)
    log_mass = torch.logsumexp(scaled, dim=-1)
    if background is not None:
        log_background = per_row(background, logits).expand_as(log_mass)
        log_total = torch.logaddexp(log_mass, log_background)
        if confidence == "mass":
            return log_mass - log_total, log_background - log_total
    else:
        log_total = log_mass

    first_max = scaled.argmax(dim=-1, keepdim=True)
    log_max = scaled.gather(-1, first_max).squeeze(-1)
    if scaled.shape[-1] == 1:
        return log_max - log_total, log_background - log_total
    log_rest = torch.logsumexp(scaled.scatter(-1, first_max, -torch.inf), dim=-1)
    if background is not None:
        log_rest = torch.logaddexp(log_rest, log_background)
    return log_max - log_total, log_rest - log_total


def softmax_margin_loss(
    logits: Tensor,
    is_ood: Tensor,
    margin: float = 0.5,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    form: Form = "hinge",
) -> Tensor:
    """The margin loss of each episode [...], from logits [..., N, K] and is_ood bool [..., N]. See `functional`."""
    log_s, log_not_s = log_confidence(logits, temperature, background, confidence)
    if form == "bce":
        return _masked_mean(-log_s, ~is_ood) + _masked_mean(-log_not_s, is_ood)
    s = log_s.exp()
    if form == "hinge":
        both_sides = ~is_ood.all(dim=-1) & is_ood.any(dim=-1)
        gap = margin - (_masked_mean(s, ~is_ood) - _masked_mean(s, is_ood))
        return hinge(gap) * both_sides
    pairs = ~is_ood.unsqueeze(-1) & is_ood.unsqueeze(-2)
    gaps = margin - (s.unsqueeze(-1) - s.unsqueeze(-2))
    return _masked_mean(hinge(gaps).flatten(-2), pairs.flatten(-2))


def head_logits(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    centers: Tensor | None = None,
    scale: Scalar = 1.0,
) -> Tensor:
    """The logits [..., N, K] of embeddings z [..., N, H]: ``z Wᵀ + c``, or ``-|z - c_k|² / (2 scale²)`` of centers."""
    if weight is not None:
        return torch.nn.functional.linear(z, weight, bias)
    assert centers is not None
    # |z - c|² expanded, so that a prototype head is a linear head plus a row constant.
    squared = z.square().sum(-1, keepdim=True) - 2 * z @ centers.mT + centers.square().sum(-1)
    return -squared / (2 * torch.as_tensor(scale, dtype=accumulation_dtype(z), device=z.device) ** 2)


def reduce_episodes(losses: Tensor, reduction: Reduction) -> Tensor:
    """The mean or the sum over all episodes, or the losses [...] as they are."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def accumulation_dtype(values: Tensor) -> torch.dtype:
    """What sums over values are kept in: float32 for half and bfloat16, else their own dtype."""
    return torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype


def per_row(value: Scalar, logits: Tensor) -> Tensor:
    """A scalar, or one value per episode [...], made to broadcast against rows [..., N]."""
    return torch.as_tensor(value, dtype=accumulation_dtype(logits), device=logits.device).unsqueeze(-1)


def hinge(gap: Tensor) -> Tensor:
    """relu(gap) whose gradient at NaN is NaN: torch.relu passes the value on but zeroes the gradient."""
    return torch.where(gap <= 0, 0.0, gap)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the last dim of the values under the mask; 0 where the mask is empty, NaN if any value is NaN."""
    kept = torch.where(mask | values.isnan(), values, 0.0)
    return kept.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
