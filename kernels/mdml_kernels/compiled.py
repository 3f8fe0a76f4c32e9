"""The operators as custom ops, for `torch.compile`, which cannot trace autograd Functions that have a jvp.

To the compiler they are opaque, so the kernels stay what they are; first derivatives only, which is all that compiled
code supports. Imported when the first call is compiled, because registering costs milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from mdml_kernels import linear, rows
from mdml_kernels.autograd import RowOp, spread


def apply(op: rows.CpuLogOdds | linear.CpuLinearLogOdds, *inputs: Tensor | None) -> Tensor:
    """`autograd.apply` of an operator of log-odds, as one node of the compiler's graph."""
    # A list with a None in it would carry no gradient, so the list is of those present, with a mask of which they are.
    given = [value for value in inputs if value is not None]
    odds: Tensor = _forward(given, [value is not None for value in inputs], type(op).__name__, op.confidence)[0]
    return odds


_OPERATORS: dict[str, Any] = {
    operator.__name__: operator
    for operator in (rows.CpuLogOdds, rows.TritonLogOdds, linear.CpuLinearLogOdds, linear.TritonLinearLogOdds)
}


def _operator(kind: str, confidence: str) -> RowOp:
    made: RowOp = _OPERATORS[kind](confidence)
    return made


# A cache of compiled graphs on disk knows an operator by its name alone: one that saves other tensors needs another.
@library.custom_op("mdml_kernels::row_odds", mutates_args=())
def _forward(given: list[Tensor], mask: list[bool], kind: str, confidence: str) -> list[Tensor]:
    if forward_ad._current_level >= 0:  # tangents are out of sight here, and would be dropped without a word
        raise RuntimeError("a compiled loss has no forward-mode derivative: take torch.func.jvp in what is compiled")
    return list(_operator(kind, confidence).forward(tuple(spread(given, tuple(mask)))))


@_forward.register_fake
def _(given: list[Tensor], mask: list[bool], kind: str, confidence: str) -> list[Tensor]:
    like = spread(given, tuple(mask))[3 if "Linear" in kind else 1]  # τ, which has the dtype of the odds
    shape = given[0].shape[:2]
    index = torch.int32 if kind.startswith("Triton") else torch.int64
    indices = like.new_empty(shape if confidence == "max" else (shape[0], 0), dtype=index)
    columns = {"TritonLogOdds": [like.new_empty(*shape, 2)], "TritonLinearLogOdds": [like.new_empty(shape)]}
    peak_and_total = [like.new_empty(shape), like.new_empty(shape)]
    return [like.new_empty(shape), *columns.get(kind, peak_and_total), indices]


@library.custom_op("mdml_kernels::row_odds_backward", mutates_args=())
def _backward(
    given: list[Tensor], mask: list[bool], saved: list[Tensor], grad: Tensor, kind: str, confidence: str
) -> list[Tensor]:
    inputs, needs = tuple(spread(given, tuple(mask))), tuple(mask)
    return list(_operator(kind, confidence).backward(inputs, tuple(saved), grad.contiguous(), needs))


@_backward.register_fake
def _(
    given: list[Tensor], mask: list[bool], saved: list[Tensor], grad: Tensor, kind: str, confidence: str
) -> list[Tensor]:
    del mask, saved, grad, kind, confidence
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given, ctx.mask, ctx.kind, ctx.confidence = inputs
    ctx.n_given = len(given)
    ctx.save_for_backward(*given, *output[1:])


def _pull(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    given, saved = list(ctx.saved_tensors[: ctx.n_given]), list(ctx.saved_tensors[ctx.n_given :])
    return _backward(given, ctx.mask, saved, grads[0], ctx.kind, ctx.confidence), None, None, None


library.register_autograd("mdml_kernels::row_odds", _pull, setup_context=_setup)
