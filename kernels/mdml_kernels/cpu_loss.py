"""The `hinge` and `pairwise` losses on a CPU, confidence `max`, as one operator: fewer and cheaper steps than by odds.

These losses see S alone, so log(1 - S) and with it a second maximum are not needed: S_i is the softmax p at the first
maximum m, times κ = 1 - p_b where there is a background, and ∂S/∂x = S (e_m - κ p), ∂S/∂b = -S p_b. The second
derivative goes by the log-odds o as everything else does: ∂L/∂o and ∂²L/∂o² are diagonal in the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdml_kernels import cpu, losses, pages, reference
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.chunks import first_max
from mdml_kernels.reference import Form, Scalar
from mdml_kernels.rows import needed

# Below this many logits the calls cost more than the arithmetic, and the textbook formula is the fastest there is.
_FEW_LOGITS = 1 << 17


def is_small(logits: Tensor) -> bool:
    """Whether `textbook_confidence` is the faster way."""
    return logits.numel() <= _FEW_LOGITS


def textbook_confidence(logits: Tensor, temperature: Scalar, background: Scalar | None) -> Tensor:
    """S [..., N] of few logits [..., N, K], arguments as in `functional`, by the derivatives that PyTorch has."""
    if isinstance(temperature, Tensor) or temperature != 1:
        scaled = _scaled(logits, temperature)
    else:
        scaled = logits.to(reference.accumulation_dtype(logits))
    if background is not None:
        column = reference.per_row(background, logits).unsqueeze(-1).expand(*scaled.shape[:-1], 1)
        return torch.softmax(torch.cat([scaled, column], dim=-1), -1)[..., :-1].max(-1).values
    return torch.softmax(scaled, -1).max(-1).values


def _scaled(logits: Tensor, temperature: Scalar) -> Tensor:
    """ℓ / T [..., N, K]. A class of -inf stays so at any T, and takes no part in the derivative by it."""
    barred = logits == -torch.inf
    finite = logits.to(reference.accumulation_dtype(logits)).masked_fill(barred, 0.0)
    return (finite / reference.per_row(temperature, logits).unsqueeze(-1)).masked_fill(barred, -torch.inf)


@dataclass(frozen=True)
class CpuMarginLoss:
    """Inputs logits [E, N, K], τ [E], background [E] or None, is_ood bool [E, N]; output losses [E].

    unscaled: the host knows that τ is 1, and a pass is saved.
    keeps: forward keeps the softmax, and the first backward turns it into the gradient in place; any other one makes it
        again. That is one buffer of the logits' size, as without, and half the exponentials. One operator, one call.
    """

    margin: float
    form: Form
    unscaled: bool = False
    keeps: bool = False
    n_inputs = 4
    _kept: cpu.Kept = field(default_factory=cpu.Kept, init=False, compare=False)

    def define(self, *inputs: Any) -> Tensor:
        """See `autograd.RowOp`."""
        logits, tau, background, is_ood = inputs
        return reference.softmax_margin_loss(logits, is_ood, self.margin, 1 / tau, background, "max", self.form)

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The losses; then to save: ∂L/∂S, S, 1 - S, p_b, m."""
        logits, tau, background, is_ood = inputs
        n_episodes, n_rows, _ = logits.shape
        top, s, rest = (tau.new_empty(n_episodes, n_rows, 1) for _ in range(3))
        first = torch.empty(n_episodes, n_rows, 1, dtype=torch.int64, device=logits.device)
        plan = cpu.Plan(logits, tau)
        softmax = pages.empty_like(logits) if self.keeps and logits.dtype == tau.dtype else None
        columns = (top, first, s, rest, top if softmax is None else softmax)
        for chunk, t, top_c, first_c, s_c, rest_c, p_c in plan.pieces(logits, tau[:, None, None], *columns):
            p = plan.scratch(0, chunk) if softmax is None else p_c
            x = chunk if self.unscaled and chunk.dtype == tau.dtype else torch.mul(chunk, t, out=p)
            first_max(x, top_c, first_c, plan.scratch(1, chunk), plan.descending)
            torch.gather(torch.softmax(x, -1, out=p), -1, first_c, out=s_c)
            torch.sum(p.scatter_(-1, first_c, 0.0), -1, keepdim=True, out=rest_c)  # 1 - S would lose what S rounds off
        if softmax is not None:
            self._kept.put(logits, softmax)
        top, s, rest, first = (column.squeeze(-1) for column in (top, s, rest, first))
        if background is None:
            dropped = s.new_zeros(n_episodes, 1)
        else:
            against = (background[:, None] - top) + s.log()
            dropped, kept = torch.sigmoid(against), torch.sigmoid(-against)
            s, rest = s * kept, rest * kept + dropped
        loss, slope = losses.value_and_slope(s, is_ood, self.margin, self.form)
        return loss, slope, s, rest, dropped, first

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, _ = inputs
        slope, s, rest, dropped, first = saved
        grad_s = grad[:, None] * slope * s
        scaled = grad_s * tau[:, None]
        at_rest, at_first = (scaled * (dropped - 1)).unsqueeze(-1), (scaled * rest).unsqueeze(-1)
        recipe = cpu.Recipe(at_rest, at_first, first.unsqueeze(-1), drops_first=False, unscaled=self.unscaled)
        grad_logits, grad_tau = cpu.pull_back(logits, tau, recipe, needs[1], self._kept.take(logits))
        grad_background = None if background is None else -(grad_s * dropped).sum(1)
        return needed((grad_logits, grad_tau, grad_background, None), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, _ = inputs
        odds, *kept = cpu.forward(logits, tau, background, "max")
        by_odds = saved[0] * odds.sigmoid() * odds.neg().sigmoid()
        return double_backward(inputs, (odds, *kept), by_odds, grad, tangents, needs)


def double_backward(
    inputs: Inputs, rows: tuple[Tensor, ...], by_odds: Tensor, grad: Tensor, tangents: Inputs, needs: Needs
) -> list[Tensor]:
    """`RowOp.double_backward` of these losses, from `cpu.forward` of the rows and the slopes ∂L/∂o [E, N]."""
    logits, tau, background, _ = inputs
    odds, *saved = rows
    weighted = grad[:, None] * by_odds
    *grads, moved = cpu.double_backward(logits, tau, background, tuple(saved), weighted, tangents[:3], "max")
    curved = weighted * (1 - 2 * odds.sigmoid()) * moved
    others = cpu.backward(logits, tau, background, tuple(saved), curved, "max", needs[1])
    sums = (b if b is None else a + b for a, b in zip(grads, others, strict=True))
    return [*needed(sums, needs[:3]), (by_odds * moved).sum(1)]
