"""Softmax-margin OOD losses for PyTorch: a drop-in that needs torch and nothing else."""

from mdml_kernels.functional import (
    explain,
    linear_softmax_confidence,
    one_class_loss,
    softmax_confidence,
    softmax_log_odds,
    softmax_margin_loss,
)
from mdml_kernels.module import SoftmaxMarginLoss

__all__ = [
    "SoftmaxMarginLoss",
    "explain",
    "linear_softmax_confidence",
    "one_class_loss",
    "softmax_confidence",
    "softmax_log_odds",
    "softmax_margin_loss",
]
