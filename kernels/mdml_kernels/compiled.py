"""The operators as custom ops, for `torch.compile`, which cannot trace autograd Functions that have a jvp.

To the compiler they are opaque, so the kernels stay what they are; first derivatives only, which is all that compiled
code supports. Imported when the first call is compiled, because registering costs milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdml_kernels import rows
from mdml_kernels.autograd import RowOp, spread
from mdml_kernels.linear import CpuLinearLogOdds


def apply(op: RowOp, *inputs: Tensor | None) -> Tensor:
    """`autograd.apply` of an operator of log-odds, as one node of the compiler's graph."""
    kind, confidence = _name(op)
    odds: Tensor = _forward(list(inputs), kind, confidence)[0]
    return odds


def _name(op: RowOp) -> tuple[str, str]:
    if isinstance(op, CpuLinearLogOdds):
        return "linear", op.confidence
    assert isinstance(op, rows.CpuLogOdds | rows.TritonLogOdds)
    return "cpu" if isinstance(op, rows.CpuLogOdds) else "triton", op.confidence


def _operator(kind: str, confidence: Any) -> RowOp:
    return CpuLinearLogOdds(confidence) if kind == "linear" else rows.operator(kind, confidence)


@torch.library.custom_op("mdml_kernels::log_odds", mutates_args=())
def _forward(inputs: list[Tensor | None], kind: str, confidence: str) -> list[Tensor]:
    return list(_operator(kind, confidence).forward(tuple(inputs)))


@_forward.register_fake
def _(inputs: list[Tensor | None], kind: str, confidence: str) -> list[Tensor]:
    like = inputs[3 if kind == "linear" else 1]
    first = inputs[0]
    assert like is not None
    assert first is not None
    n_float, index = (4, torch.int32) if kind == "triton" else (2, torch.int64)
    shape = first.shape[:2]
    has_index = confidence == "max" or kind == "linear"
    indices = like.new_empty(shape if has_index else (shape[0], 0), dtype=index)
    return [*(like.new_empty(shape) for _ in range(n_float)), indices]


@torch.library.custom_op("mdml_kernels::log_odds_backward", mutates_args=())
def _backward(
    inputs: list[Tensor | None], saved: list[Tensor], grad: Tensor, needs: list[bool], kind: str, confidence: str
) -> list[Tensor]:
    return list(_operator(kind, confidence).backward(tuple(inputs), tuple(saved), grad.contiguous(), tuple(needs)))


@_backward.register_fake
def _(
    inputs: list[Tensor | None], saved: list[Tensor], grad: Tensor, needs: list[bool], kind: str, confidence: str
) -> list[Tensor]:
    del saved, grad, kind, confidence
    contiguous = torch.contiguous_format
    pairs = zip(inputs, needs, strict=True)
    return [torch.empty_like(value, memory_format=contiguous) for value, need in pairs if need and value is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.kind, ctx.confidence = inputs
    ctx.n_inputs = len(tensors)
    ctx.save_for_backward(*tensors, *output[1:])


def _pull(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    inputs, saved = list(ctx.saved_tensors[: ctx.n_inputs]), list(ctx.saved_tensors[ctx.n_inputs :])
    needs = [value is not None for value in inputs]
    return spread(_backward(inputs, saved, grads[0], needs, ctx.kind, ctx.confidence), tuple(needs)), None, None


torch.library.register_autograd("mdml_kernels::log_odds", _pull, setup_context=_setup)
