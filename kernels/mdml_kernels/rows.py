"""The log-odds of rows as an operator for `autograd`.

Inputs: logits [E, N, K], τ = 1/T [E], background [E] or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mdml_kernels import cpu, reference
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.reference import Confidence


class _LogOdds:
    """What all backends share: the definition that the third derivative is taken from."""

    confidence: Confidence
    n_inputs = 3

    def define(self, *inputs: Tensor | None) -> Tensor:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        assert logits is not None
        assert tau is not None
        log_s, log_not_s = reference.log_confidence(logits, 1 / tau, background, self.confidence)
        return log_s - log_not_s


@dataclass(frozen=True)
class CpuLogOdds(_LogOdds):
    """By the vectorised operations of PyTorch on chunks."""

    confidence: Confidence

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        logits, tau, background = inputs
        assert logits is not None
        assert tau is not None
        return cpu.forward(logits, tau, background, self.confidence)

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, *rest = _present(inputs, saved)
        return _needed(cpu.backward(logits, tau, background, rest, grad, self.confidence, needs[1]), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, *rest = _present(inputs, saved)
        *grads, along = cpu.double_backward(logits, tau, background, rest, grad, tangents, self.confidence)
        return [*_needed(grads, needs), along]


@dataclass(frozen=True)
class TritonLogOdds(_LogOdds):
    """By the kernels of `triton_rows`, whose outputs are log S and log(1 - S); their difference is the odds."""

    confidence: Confidence

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows  # only here: triton may not be installed

        logits, tau, background = inputs
        log_s, log_not_s, log_z, first = triton_rows.rows_forward(logits, tau, background, self.confidence)
        if self.confidence == "mass":
            first = first.new_empty(len(log_s), 0)  # a leading dim to fold episodes into
        return log_s - log_not_s, log_s, log_not_s, log_z, first

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows

        grads = triton_rows.rows_backward(*inputs, self.confidence, *saved, grad, -grad)
        return _needed([grads[0], *_per_episode(grads[1:])], needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_rows

        results = triton_rows.rows_double_backward(*inputs, self.confidence, *saved, grad, -grad, *tangents)
        return [*_needed([results[0], *_per_episode(results[1:3])], needs), results[3] - results[4]]


def operator(backend: str, confidence: Confidence) -> CpuLogOdds | TritonLogOdds:
    """The operator of a backend, ``cpu`` or ``triton``."""
    return CpuLogOdds(confidence) if backend == "cpu" else TritonLogOdds(confidence)


def _present(inputs: Inputs, saved: Inputs) -> Any:
    return *inputs, *saved


def _per_episode(rows: Any) -> list[Tensor | None]:
    return [None if value is None else value.sum(1) for value in rows]


def _needed(grads: Any, needs: Needs) -> list[Tensor]:
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
