"""What the engine and its paths share: the settings of the two levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
