"""What the engine and its paths share: the settings of the two levels, and which modules they can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]

# What the inner loop adapts, by the beginning of its name; all else is shared by the episodes.
ADAPTED = ("encoder.", "decoder.")


@dataclass(frozen=True)
class EngineSettings:
    """See `MetaEngine`.

    Raises:
        ValueError: a number is out of range.
    """

    inner_steps: int
    inner_lr: float
    first_order: bool
    reconstruction_weight: float
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.inner_steps < 0:
            raise ValueError(f"inner_steps must be 0 or more, got {self.inner_steps}")
        if not self.inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, got {self.inner_lr}")


def check_batchable(modules: nn.Module) -> None:
    """Refuse now what would fail, or mix episodes, deep inside a batched computation.

    Raises:
        ValueError: one line with the module's name and the remedy.
    """
    for name, module in modules.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ValueError(f"{name} keeps running statistics, which episodes can't share: use LayerNorm")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name} is dropout, which has no place in an episode's inner loop: set p=0")
        within = getattr(module, "dropout", 0)  # of an attention or a recurrent layer
        if isinstance(within, float | int) and within > 0:
            raise ValueError(f"{name} has dropout, which has no place in an episode's inner loop: set dropout=0")
        if isinstance(module, nn.RReLU):
            raise ValueError(f"{name} draws its slopes at random, which episodes can't share: use LeakyReLU")
        if getattr(module, "inplace", False):
            raise ValueError(f"{name} works in place, on rows that other episodes read: set inplace=False")
