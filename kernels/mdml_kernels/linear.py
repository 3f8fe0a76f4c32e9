"""The log-odds of a linear head, the [N, K] logits being made and used piece by piece, forward and backward.

Letters: G groups (a head each), N rows, H features, K logits. Per group ℓ = z Wᵀ + c; τ = 1/T and the background b
are one per row, so that a prototype head fits as well (`functional.linear_softmax_confidence`). Memory besides the
gradients is O(chunk x K); the price is that backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdml_kernels import chunks, reference
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.reference import Confidence
from mdml_kernels.rows import dense, needed

# Logits in a chunk: enough rows for the matrix product to run at full speed, few enough to stay in a shared cache.
_CHUNK_ELEMENTS = 1 << 20
_LEAST_ROWS = 64


@dataclass(frozen=True)
class CpuLinearLogOdds:
    """By chunks of rows.

    Inputs: z [G, N, H], weight [G, K, H], bias [G, K] or None, τ [G, N], background [G, N] or None.
    """

    confidence: Confidence
    n_inputs = 5

    def define(self, *inputs: Any) -> Tensor:
        """The odds in plain operations, the logits materialised; of third derivatives only."""
        z, weight, bias, tau, background = inputs
        logits = z @ weight.mT + (0 if bias is None else bias.unsqueeze(-2))
        log_s, log_not_s = reference.log_confidence(
            logits.flatten(0, 1).unsqueeze(1),  # every row an episode, because τ and b are its own
            1 / tau.flatten(),
            None if background is None else background.flatten(),
            self.confidence,
        )
        return (log_s - log_not_s).view(tau.shape)

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        head = _Head(inputs, self.confidence)
        top, second, largest = (head.tau.new_empty(head.tau.shape) for _ in range(3))
        first_shape = head.tau.shape if self.confidence == "max" else (len(top), 0, 1)
        first = torch.empty(first_shape, dtype=torch.int64, device=top.device)
        descending = torch.arange(head.n_classes, 0, -1, dtype=head.tau.dtype, device=head.tau.device)
        mark = torch.empty_like(head.scratch)
        for g, n in head.chunks():
            x = head.logits(g, n).mul_(head.tau[g, n])
            if self.confidence == "max":
                chunks.first_max(x, top[g, n], first[g, n], mark[: len(x)], descending)
                torch.amax(chunks.drop(x, first[g, n]), -1, keepdim=True, out=second[g, n])
            else:
                torch.amax(x, -1, keepdim=True, out=top[g, n])
            torch.softmax(x, -1, out=x)
            torch.amax(x, -1, keepdim=True, out=largest[g, n])
        peak = second if self.confidence == "max" else top
        odds, total = chunks.finish_odds(top, peak, largest, head.background, self.confidence)
        return odds.squeeze(-1), peak.squeeze(-1), total.squeeze(-1), first.squeeze(-1)

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        head = _Head(inputs, self.confidence, saved, grad)
        totals = head.totals()
        at_first = head.grad * head.tau
        at_rest = at_first * head.kept
        for g, n in head.chunks():
            x = head.logits(g, n)
            reached = chunks.finite(x) if needs[3] else x
            grad_x = x.mul_(head.tau[g, n])
            first = head.first_of(g, n)
            if first is not None:
                chunks.drop(grad_x, first)
            torch.softmax(grad_x, -1, out=grad_x)
            chunks.weigh(grad_x, first, at_rest[g, n], at_first[g, n])
            if needs[3]:
                totals.tau[g, n] = reached.mul_(grad_x).sum(-1, keepdim=True) / head.tau[g, n]
            if needs[0]:
                torch.mm(grad_x, head.weight[g], out=totals.z[g, n])
            if needs[1]:
                totals.weight[g].addmm_(grad_x.T, head.z[g, n])
            if needs[2]:
                totals.bias[g] += grad_x.sum(0)
        totals.background = -head.grad * head.dropped
        return totals.needed(inputs, needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`. A chunk's logits have the tangent v_z Wᵀ + z v_Wᵀ + v_c.

        Products are written by out= or in place, which autocast leaves in the accumulation dtype.
        """
        head = _Head(inputs, self.confidence, saved, grad)
        totals, along = head.totals(), torch.empty_like(head.tau)
        v_z, v_weight, v_bias, v_tau, v_background = (
            torch.zeros_like(like) if v is None else v.to(head.tau.dtype).view(like.shape)
            for v, like in zip(tangents, (head.z, head.weight, totals.bias, head.tau, head.tau), strict=True)
        )
        for g, n in head.chunks():
            logits = head.logits(g, n)
            v_logits = torch.addmm(v_bias[g], v_z[g, n], head.weight[g].T, out=torch.empty_like(logits))
            v_logits.addmm_(head.z[g, n], v_weight[g].T)
            rows = (head.tau, v_tau, v_background, head.grad, head.kept, head.dropped)
            columns = tuple(value[g, n] for value in rows)
            grad_x, grad_moved, totals.tau[g, n], totals.background[g, n], along[g, n] = chunks.second_order(
                logits, v_logits, head.first_of(g, n), columns
            )
            grad_logits = grad_x.mul_(head.tau[g, n]).addcmul_(grad_moved, v_tau[g, n])
            grad_v_logits = grad_moved.mul_(head.tau[g, n])
            torch.mm(grad_logits, head.weight[g], out=totals.z[g, n]).addmm_(grad_v_logits, v_weight[g])
            totals.weight[g].addmm_(grad_logits.T, head.z[g, n]).addmm_(grad_v_logits.T, v_z[g, n])
            totals.bias[g] += grad_logits.sum(0)
        return [*totals.needed(inputs, needs), along.squeeze(-1)]


@dataclass(frozen=True)
class TritonLinearLogOdds(CpuLinearLogOdds):
    """By the kernels of `triton_linear`; the second derivative, which has none, by chunks as on a CPU."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_linear  # only here: Triton may not be installed

        z, weight, bias, tau, background = inputs
        return triton_linear.linear_odds_forward(z, weight, bias, tau, background, self.confidence)

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        from mdml_kernels import triton_linear

        z, weight, bias, tau, background = inputs
        log_sum, first, grad = dense((*saved, grad))
        arguments = (z, weight, bias, tau, background, self.confidence, log_sum, first, grad)
        return needed(triton_linear.linear_odds_backward(*arguments, head=needs[1] or needs[2]), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`."""
        del saved  # what the kernels saved is not what the chunks save
        chunked = CpuLinearLogOdds(self.confidence)
        return chunked.double_backward(inputs, chunked.forward(inputs)[1:], grad, tangents, needs)


class _Head:
    """The inputs in the accumulation dtype, rows as columns [G, N, 1], and the logits of a chunk when asked."""

    def __init__(self, inputs: Inputs, confidence: Confidence, saved: Inputs = (), grad: Tensor | None = None) -> None:
        z, weight, bias, tau, background = inputs
        self.confidence = confidence
        self.z, self.weight = z.to(tau.dtype), weight.to(tau.dtype)
        self.bias = None if bias is None else bias.to(tau.dtype)
        self.tau = tau.unsqueeze(-1)
        self.background = None if background is None else background.unsqueeze(-1)
        self.n_classes = weight.shape[1]
        n_rows = max(_LEAST_ROWS, _CHUNK_ELEMENTS // self.n_classes)
        self.rows_per_chunk = max(1, min(n_rows, z.shape[1]))
        self.scratch = tau.new_empty(self.rows_per_chunk, self.n_classes)
        if grad is not None:
            peak, total, self.first = (column.unsqueeze(-1) for column in saved)
            self.kept, self.dropped, poison = chunks.split_background(peak, total, self.background, confidence)
            self.grad = grad.unsqueeze(-1) + poison

    def chunks(self) -> Iterator[tuple[int, slice]]:
        for g in range(self.z.shape[0]):
            for n in range(0, self.z.shape[1], self.rows_per_chunk):
                yield g, slice(n, n + self.rows_per_chunk)

    def logits(self, g: int, n: slice) -> Tensor:
        """ℓ of the chunk's rows, in the scratch that the next chunk overwrites."""
        z = self.z[g, n]
        out = self.scratch[: len(z)]
        if self.bias is None:
            return torch.mm(z, self.weight[g].T, out=out)
        return torch.addmm(self.bias[g], z, self.weight[g].T, out=out)

    def first_of(self, g: int, n: slice) -> Tensor | None:
        return self.first[g, n] if self.confidence == "max" else None

    def totals(self) -> _Totals:
        return _Totals(
            torch.empty_like(self.z, memory_format=torch.contiguous_format),
            torch.zeros_like(self.weight, memory_format=torch.contiguous_format),
            self.weight.new_zeros(self.weight.shape[:2]),
            torch.empty_like(self.tau, memory_format=torch.contiguous_format),
            torch.empty_like(self.tau, memory_format=torch.contiguous_format),
        )


@dataclass
class _Totals:
    """Gradients of the five inputs, in the accumulation dtype; those of rows are columns."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    tau: Tensor
    background: Tensor

    def needed(self, inputs: Inputs, needs: Needs) -> list[Tensor]:
        """Those that are needed, in the inputs' order, dtype and shape."""
        grads = (self.z, self.weight, self.bias, self.tau, self.background)
        triples = zip(grads, inputs, needs, strict=True)
        return [grad.view(like.shape).to(like.dtype) for grad, like, need in triples if need and like is not None]
