"""What the engine and its paths share: the settings of the two levels, and what rows have to be."""

from __future__ import annotations

from collections.abc import Mapping
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


def check_rows(
    given: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None, n_features: int | None
) -> None:
    """Of rows [E, n, d] by name.

    Args:
        given: rows of as many episodes each, as wide as each other, of one dtype.
        device: where they must be.
        dtype: what they must be; None: any.
        n_features: d; None: any, also more than one dim.

    Raises:
        ValueError: they are not, or there is no episode.
    """
    first = next(iter(given.values()))
    for name, rows in given.items():
        if rows.ndim < 3 or not len(rows):
            raise ValueError(f"{name} must be [episodes, rows, features], one episode at least, got {list(rows.shape)}")
        if (len(rows), rows.shape[2:]) != (len(first), first.shape[2:]):
            raise ValueError(f"{name} {list(rows.shape)} must be of the episodes and features of {list(first.shape)}")
        if n_features is not None and rows.shape[2:] != (n_features,):
            raise ValueError(f"{name} must have the {n_features} features of the encoder, got {list(rows.shape)}")
        if rows.device != device:
            raise ValueError(f"{name} is on {rows.device}, and the parameters on {device}: move one of them")
        if dtype is not None and rows.dtype != dtype:
            raise ValueError(f"{name} is {rows.dtype}, and the parameters are {dtype}: convert one of them")
        if rows.dtype != first.dtype:
            raise ValueError(f"{name} is {rows.dtype}, and the other rows are {first.dtype}: convert one of them")
