"""What the engine gives: gradients in sums over groups of episodes, and their mean over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from mdml_fast.meta.settings import Parameters

if TYPE_CHECKING:
    from mdml_fast.meta.engine import MetaEngine

# Episodes whose gradients are summed as one, whatever the batch.
GROUP = 8


class MetaGradients(NamedTuple):
    """Attributes:
    loss: the outer loss of each episode [E].
    grads: gradient of its mean over episodes, by name: `encoder.…`, `head.…`, `loss.…`, `decoder.…`; with
        directions [D, …], each the mean over the direction's own episodes, zero where it has none.
    """

    loss: Tensor
    grads: Parameters


class GradientSums(NamedTuple):
    """Attributes:
    loss: the outer loss of each episode [E].
    groups: gradients by the path's own names, each [G, …], summed over groups of consecutive episodes.
    direction: with directions, of each group (a single episode), int64 [G].
    """

    loss: Tensor
    groups: Parameters
    direction: Tensor | None


class MeanGradients:
    """The mean of gradient sums that arrive one after the other: added group by group, in the order of episodes.

    So the bits of the mean do not depend on how the episodes were cut into batches, if whole groups were kept.

    Args:
        engine: what gives them.
        n_episodes: of all of them.

    Attributes:
        values: the engine's parameters and buffers, for all the sums of this mean; they must not change before
            `result`.
    """

    def __init__(self, engine: MetaEngine, n_episodes: int) -> None:
        self._engine, self.values = engine, engine.values()
        self._totals: Parameters = {}
        self._counts = torch.zeros(engine.n_directions, device=engine.device) if engine.n_directions else None
        # One tensor from the start: a small one kept of each batch lies between the large ones, and splits memory up.
        self._losses, self._n_done = torch.empty(n_episodes, device=engine.device), 0

    def add(self, sums: GradientSums) -> Self:
        """Take the next episodes in."""
        if not self._totals:
            self._losses = self._losses.to(sums.loss.dtype)
            outer = () if self._counts is None else (len(self._counts),)
            self._totals = {name: value.new_zeros((*outer, *value.shape[1:])) for name, value in sums.groups.items()}
        self._losses[self._n_done : self._n_done + len(sums.loss)] = sums.loss
        self._n_done += len(sums.loss)
        if sums.direction is None:
            for name, groups in sums.groups.items():
                for group in groups:
                    self._totals[name] += group
            return self
        assert self._counts is not None
        self._counts += sums.direction.bincount(minlength=len(self._counts))
        # A GPU adds up what is for one place in any order.
        for episodes in _rounds(sums.direction) if sums.direction.is_cuda else [slice(None)]:
            places = sums.direction[episodes]
            for name, groups in sums.groups.items():
                self._totals[name].index_add_(0, places, groups[episodes])
        return self

    def result(self) -> MetaGradients:
        """The mean over all episodes, or over each direction's; this takes the totals."""
        for total in self._totals.values():
            if self._counts is None:
                total /= self._n_done
            else:
                total /= self._counts.clamp(min=1).to(total.dtype).view(-1, *[1] * (total.ndim - 1))
        grads = self._engine.finished(self.values, self._totals)
        if self._counts is not None and bool((idle := self._counts == 0).any()):
            for grad in grads.values():  # whatever parameters that are not finite made of a zero
                grad[idle] = 0
        return MetaGradients(self._losses[: self._n_done], grads)


def _rounds(direction: Tensor) -> Sequence[Tensor]:
    """Where each direction's first episode is, where its second, and so on: no direction is in a round twice."""
    ordered, places = direction.sort(stable=True)
    earlier = torch.arange(len(places), device=places.device) - torch.searchsorted(ordered, ordered)
    return torch.split(places[earlier.argsort(stable=True)], earlier.bincount().tolist())
