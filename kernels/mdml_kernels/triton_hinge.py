"""The hinge loss as an operator for `autograd`: five launches, where PyTorch's operations on rows would be dozens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdml_kernels import reference, triton_rows
from mdml_kernels import triton_hinge_kernels as kernels
from mdml_kernels.autograd import Inputs, Needs
from mdml_kernels.launch import LaunchConfig, arch_of, hinge_config, on_device_of
from mdml_kernels.reference import Confidence
from mdml_kernels.rows import dense, needed, per_episode

CHUNK = 4096  # rows of one program that sums, so that one long episode still makes enough programs; unmeasured


@dataclass(frozen=True)
class TritonHingeLoss:
    """Inputs logits [E, N, K], τ [E], background [E] or None, is_ood bool [E, N]; output losses [E]."""

    margin: float
    confidence: Confidence
    n_inputs = 4

    def define(self, *inputs: Any) -> Tensor:
        """See `autograd.RowOp`."""
        logits, tau, background, is_ood = inputs
        return reference.softmax_margin_loss(logits, is_ood, self.margin, 1 / tau, background, self.confidence, "hinge")

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The losses; then to save: ∂loss/∂S by side [E, 2], the odds, and what the rows' backward wants back."""
        logits, tau, background, is_ood = inputs[0], *dense(inputs[1:])
        odds, *saved = triton_rows.odds_forward(logits, tau, background, self.confidence)
        loss, weights = hinge(odds, is_ood, self.margin)
        return loss, weights, odds, *saved

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """See `autograd.RowOp`."""
        logits, tau, background, is_ood = inputs[0], *dense(inputs[1:])
        weights, odds, row_sum, first, grad = dense((*saved, grad))
        slope = hinge_slope(odds, is_ood, weights, grad)
        grad_logits, *rest = triton_rows.odds_backward(logits, tau, background, self.confidence, row_sum, first, slope)
        return needed((grad_logits, *per_episode(rest, needs[1:3]), None), needs)

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """See `autograd.RowOp`. By the odds: ∂L/∂o and ∂²L/∂o² are diagonal in the rows."""
        logits, tau, background, is_ood = inputs[0], *dense(inputs[1:])
        weights, odds, row_sum, first, grad = dense((*saved, grad))
        arguments = (logits, tau, background, self.confidence, row_sum, first)
        moves = (tangents[0], *dense(tangents[1:3]))
        by_odds = hinge_slope(odds, is_ood, weights, torch.ones_like(grad))
        weighted = grad[:, None] * by_odds
        grad_logits, *rest, along = triton_rows.odds_double_backward(*arguments, weighted, *moves)
        curved = weighted * (1 - 2 * odds.sigmoid()) * along
        more_logits, *more = triton_rows.odds_backward(*arguments, curved)
        first_part = (grad_logits, *per_episode(rest, needs[1:3]))
        second_part = (more_logits, *per_episode(more, needs[1:3]))
        sums = [None if a is None or b is None else a + b for a, b in zip(first_part, second_part, strict=True)]
        return [*needed(sums, needs[:3]), (by_odds * along).sum(1)]


def hinge(odds: Tensor, is_ood: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The loss of each episode [E], and ∂loss/∂S of an ID and of an OOD row [E, 2]; two runs give the same bits.

    Args:
        odds: float32 or float64 [E, N], contiguous.
        is_ood: bool [E, N], contiguous.
        margin: m.
    """
    triton_rows.check_device("odds", odds)
    episodes, n = odds.shape
    loss, weights = odds.new_empty(episodes), odds.new_empty((episodes, 2))
    if not episodes:
        return loss, weights
    config = hinge_config(n, arch_of(odds.device))
    chunk = CHUNK if n > config.block_rows else config.block_rows
    n_chunks = -(-n // chunk)
    sums = odds.new_empty((episodes, n_chunks, 4))
    with on_device_of(odds):
        if n_chunks:
            kernels.episode_sums_kernel[(episodes * n_chunks,)](
                odds, is_ood, sums, n, n_chunks, CHUNK=chunk, **_tile(n, config)
            )
        kernels.hinge_kernel[(episodes,)](sums, loss, weights, margin, n_chunks, num_warps=1, enable_fp_fusion=True)
    return loss, weights


def hinge_slope(odds: Tensor, is_ood: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """∂loss/∂o [E, N] times grad [E], of what `hinge` took and gave; all contiguous."""
    slope = torch.empty_like(odds)
    if odds.numel():
        episodes, n = odds.shape
        config = hinge_config(n, arch_of(odds.device))
        n_tiles = -(-n // config.block_rows)
        with on_device_of(odds):
            kernels.hinge_slope_kernel[(episodes * n_tiles,)](
                odds, is_ood, weights, grad, slope, n, n_tiles, **_tile(n, config)
            )
    return slope


def _tile(n_rows: int, config: LaunchConfig) -> dict[str, Any]:
    """Constants and options that the kernels over rows share."""
    return {"BLOCK": config.block_rows, "ALIGN": math.gcd(n_rows, 16), **config.options}
