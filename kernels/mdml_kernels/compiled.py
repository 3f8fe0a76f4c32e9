"""The operators as custom ops, for `torch.compile`, which cannot trace autograd Functions that have a jvp.

To the compiler they are opaque, so the kernels stay what they are; first derivatives only, which is all that compiled
code supports. Imported when the first call is compiled, because registering costs milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdml_kernels import linear, rows
from mdml_kernels.autograd import RowOp, spread


def apply(op: rows.CpuLogOdds | linear.CpuLinearLogOdds, *inputs: Tensor | None) -> Tensor:
    """`autograd.apply` of an operator of log-odds, as one node of the compiler's graph."""
    odds: Tensor = _forward(list(inputs), type(op).__name__, op.confidence)[0]
    return odds


_OPERATORS: dict[str, Any] = {
    operator.__name__: operator
    for operator in (rows.CpuLogOdds, rows.TritonLogOdds, linear.CpuLinearLogOdds, linear.TritonLinearLogOdds)
}


def _operator(kind: str, confidence: str) -> RowOp:
    made: RowOp = _OPERATORS[kind](confidence)
    return made


@torch.library.custom_op("mdml_kernels::log_odds", mutates_args=())
def _forward(inputs: list[Tensor | None], kind: str, confidence: str) -> list[Tensor]:
    return list(_operator(kind, confidence).forward(tuple(inputs)))


@_forward.register_fake
def _(inputs: list[Tensor | None], kind: str, confidence: str) -> list[Tensor]:
    first, like = inputs[0], inputs[3 if "Linear" in kind else 1]  # τ has the dtype of the odds
    assert first is not None
    assert like is not None
    shape = first.shape[:2]
    index = torch.int32 if kind.startswith("Triton") else torch.int64
    indices = like.new_empty(shape if confidence == "max" else (shape[0], 0), dtype=index)
    return [like.new_empty(shape), like.new_empty(shape), indices]


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
