"""What the engine refuses of its callers' tensors, each in one line: what was given, what it must be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdml_fast.meta.settings import ADAPTED, Parameters


def loss(given: nn.Module) -> None:
    """Of the loss, which is `SoftmaxMarginLoss` or has its methods.

    Raises:
        ValueError: it has not.
    """
    if not callable(getattr(given, "one_class", None)):
        raise ValueError(
            f"loss must be a SoftmaxMarginLoss, or have its forward(logits, is_ood) and one_class(logits), "
            f"got a {type(given).__name__}"
        )


def rows(
    given: Mapping[str, Tensor], device: torch.device | None, dtype: torch.dtype | None, n_features: int | None
) -> None:
    """Of rows [E, n, d] by name.

    Args:
        given: rows of as many episodes each, as wide as each other, of one dtype.
        device: where they must be; None: anywhere, together.
        dtype: what they must be; None: any.
        n_features: d; None: any, also more than one dim.

    Raises:
        ValueError: they are not, or there is no episode.
    """
    first = next(iter(given.values()))
    for name, own in given.items():
        if not isinstance(own, Tensor):
            raise ValueError(f"{name} must be a tensor [episodes, rows, features], got a {type(own).__name__}")
        if own.ndim < 3 or not len(own):
            raise ValueError(f"{name} must be [episodes, rows, features], one episode at least, got {list(own.shape)}")
        if (len(own), own.shape[2:]) != (len(first), first.shape[2:]):
            raise ValueError(f"{name} {list(own.shape)} must be of the episodes and features of {list(first.shape)}")
        if n_features is not None and own.shape[2:] != (n_features,):
            raise ValueError(f"{name} must have the {n_features} features of the encoder, got {list(own.shape)}")
        if own.device != (device or first.device):
            other = f"the parameters on {device}" if device else f"the other rows on {first.device}"
            raise ValueError(f"{name} is on {own.device}, and {other}: move one of them")
        if dtype is not None and own.dtype != dtype:
            raise ValueError(f"{name} is {own.dtype}, and the parameters are {dtype}: convert one of them")
        if own.dtype != first.dtype:
            raise ValueError(f"{name} is {own.dtype}, and the other rows are {first.dtype}: convert one of them")


def flags(is_ood: Tensor, query: Tensor) -> None:
    """Of is_ood, which must be bool [E, q] for query rows [E, q, d].

    Raises:
        ValueError: it is not.
    """
    shape = list(query.shape[:2])
    if not isinstance(is_ood, Tensor):
        raise ValueError(f"is_ood must be a tensor, bool {shape}, got a {type(is_ood).__name__}")
    if is_ood.dtype != torch.bool or is_ood.shape != query.shape[:2]:
        raise ValueError(f"is_ood must be bool {shape}, got {is_ood.dtype} {list(is_ood.shape)}")
    if is_ood.device != query.device:
        raise ValueError(f"is_ood is on {is_ood.device}, and the query on {query.device}: move one of them")


def adapted(given: Parameters, params: Mapping[str, Tensor], n_episodes: int, stacked: bool) -> None:
    """Of adapted parameters [E, …] by name, for an engine's, which are [D, …] if stacked.

    Raises:
        ValueError: one is missing, or of another shape.
    """
    for name, param in params.items():
        if not name.startswith(ADAPTED):
            continue
        if name not in given:
            raise ValueError(f"adapted lacks {name}: give what adapt() returned, whole")
        shape = (n_episodes, *param.shape[stacked:])
        if given[name].shape != shape:
            raise ValueError(
                f"adapted {name} must be {list(shape)}, got {list(given[name].shape)}: give rows of the episodes "
                "that adapt() had, or expand what it gave"
            )


def direction(given: Tensor, n_episodes: int, n_directions: int) -> None:
    """Of the direction of each episode, which must be int64 [E], from 0 to D - 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(given, Tensor):
        raise ValueError(f"direction must be a tensor, int64 [{n_episodes}], got a {type(given).__name__}")
    if given.shape != (n_episodes,) or given.dtype != torch.int64:
        raise ValueError(f"direction must be int64 [{n_episodes}], got {given.dtype} {list(given.shape)}")
    # On a GPU only indexing looks at it: this would wait for the device.
    if given.device.type == "cpu" and bool(((given < 0) | (given >= n_directions)).any()):
        found = f"{int(given.min())} to {int(given.max())}"
        raise ValueError(f"direction must be in 0 to {n_directions - 1}, got {found}")
