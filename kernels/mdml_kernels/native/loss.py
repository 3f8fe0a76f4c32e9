"""The `hinge` and `pairwise` losses at confidence `max` by the compiled kernels: one operator, by the log-odds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mdml_kernels import cpu, cpu_loss, losses, pages, reference
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.native import rows
from mdml_kernels.reference import Form
from mdml_kernels.rows import needed

# Logits of an episode that threads share, where others have one episode after the other to themselves.
_LONG_EPISODE = 1 << 22


@dataclass(frozen=True)
class NativeMarginLoss:
    """Inputs logits [E, N, K], τ [E], background [E] or None, is_ood bool [E, N]; output losses [E].

    Where a tracer hides the memory from the kernels, a step goes by tensor operations, from the same saved columns.

    ahead: what the reduction will multiply each loss by. The hinge's gradient to long rows is made in the forward pass
        for that factor, and the first backward that asks for it alone multiplies by what it finds in its place. None:
        no gradient will be asked for. One operator, one call.
    """

    margin: float
    form: Form
    ahead: float | None = None
    n_inputs = 4
    _kept: cpu.Kept = field(default_factory=cpu.Kept, init=False, compare=False)

    def define(self, *inputs: Any) -> Tensor:
        """See `autograd.RowOp`."""
        logits, tau, background, is_ood = inputs
        return reference.softmax_margin_loss(logits, is_ood, self.margin, 1 / tau, background, "max", self.form)

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The losses; then to save: ∂L/∂o, and what `cpu.forward` saves."""
        logits, tau, background, is_ood = inputs
        small = logits.shape[1:].numel() <= _LONG_EPISODE
        if self.form == "hinge" and small and rows.serves_rows(logits, tau):
            if self.ahead is None or logits.shape[-1] <= rows.SHORT:
                return rows.hinge(logits, tau, background, is_ood, self.margin)
            grad = pages.empty_like(logits)
            self._kept.put(logits, grad)
            return rows.hinge(logits, tau, background, is_ood, self.margin, self.ahead, grad)
        odds, *saved = cpu.forward(logits, tau, background, "max")
        return *losses.value_and_slope_of_odds(odds, is_ood, self.margin, self.form), *saved

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, _ = inputs
        kept = self._kept.take(logits)
        if kept is not None and self.ahead and not any(needs[1:]) and rows.serves_rows(logits, grad):
            return [rows.reweigh(kept, grad, self.ahead)]
        slope, columns = saved[0], saved[1:]
        return needed((*cpu.backward(logits, tau, background, columns, slope, "max", needs[1], grad), None), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, _ = inputs
        found = cpu.forward(logits, tau, background, "max")
        return cpu_loss.double_backward(inputs, found, saved[0], grad, tangents, needs)
