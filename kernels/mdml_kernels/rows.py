"""The log-odds of rows as an operator for `autograd`.

Inputs: logits [E, N, K], τ = 1/T [E], background [E] or None.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mdml_kernels import cpu, reference
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.reference import Confidence


def operator(backend: str, confidence: Confidence) -> CpuLogOdds | TritonLogOdds:
    """The operator of a backend, ``cpu`` or ``triton``."""
    return CpuLogOdds(confidence) if backend == "cpu" else TritonLogOdds(confidence)


@dataclass(frozen=True)
class CpuLogOdds:
    """By the vectorised operations of PyTorch on chunks."""

    confidence: Confidence
    n_inputs = 3

    def define(self, *inputs: Any) -> Tensor:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        log_s, log_not_s = reference.log_confidence(logits, 1 / tau, background, self.confidence)
        return log_s - log_not_s

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        return cpu.forward(logits, tau, background, self.confidence)

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        return needed(cpu.backward(logits, tau, background, saved, grad, self.confidence, needs[1]), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        *grads, along = cpu.double_backward(logits, tau, background, saved, grad, tangents, self.confidence)
        return [*needed(grads, needs), along]


@dataclass(frozen=True)
class TritonLogOdds(CpuLogOdds):
    """By the kernels of `triton_rows`, imported when they run: Triton may not be installed."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows

        logits, tau, background = inputs[0], *dense(inputs[1:])
        return triton_rows.odds_forward(logits, tau, background, self.confidence)

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows

        logits, tau, background = inputs[0], *dense(inputs[1:])
        first, *rest = triton_rows.odds_backward(logits, tau, background, self.confidence, *dense((*saved, grad)))
        return needed([first, *per_episode(rest, needs[1:])], needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows

        logits, tau, background = inputs[0], *dense(inputs[1:])
        moves = (tangents[0], *dense(tangents[1:]))
        first, *rest, along = triton_rows.odds_double_backward(
            logits, tau, background, self.confidence, *dense((*saved, grad)), *moves
        )
        return [*needed([first, *per_episode(rest, needs[1:])], needs), along]


def needed(grads: Iterable[Tensor | None], needs: Needs) -> list[Tensor]:
    """The gradients of those inputs that need one."""
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


def dense(tensors: Inputs) -> Inputs:
    """The tensors contiguous: a vmap may have expanded what it did not batch, and kernels take no strides but K's."""
    return tuple(None if value is None else value.contiguous() for value in tensors)


def per_episode(rows: Iterable[Tensor | None], needs: Needs) -> list[Tensor | None]:
    """Gradients row by row [E, N] as those of the episodes [E], where they are needed."""
    return [value.sum(1) if need and value is not None else None for value, need in zip(rows, needs, strict=True)]
