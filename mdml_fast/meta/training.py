"""The outer loop: batches of episodes, meta-gradients, optimiser steps; can be interrupted and resumed."""

from __future__ import annotations

from typing import Protocol

import torch

from mdml_fast.episodes import EpisodeSampler
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.engine import MetaEngine


class Progress(Protocol):
    """Told after every outer step."""

    def __call__(self, step: int, n_steps: int, loss: float) -> None:
        """`step` of `n_steps` is done; `loss` is the mean outer loss of its episodes."""


def train(
    engine: MetaEngine,
    sampler: EpisodeSampler,
    optimizer: torch.optim.Adam,
    *,
    n_steps: int,
    episodes_per_step: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the engine's meta-parameters in place.

    An interrupted run that is resumed from its checkpoint ends with the same bits as one that was not interrupted,
    since an episode depends on its number alone.

    Args:
        engine: what is trained.
        sampler: where its episodes come from.
        optimizer: Adam over all meta-parameters, in their order.
        n_steps: outer steps.
        episodes_per_step: how many episodes a step's gradient is of.
        progress: told after each step.
        checkpoint: where the state of the run is kept.

    Returns:
        The mean outer loss of each step [n_steps].
    """
    params = engine.parameters()
    losses = checkpoint.restore(params, optimizer) if checkpoint else []
    for step in range(len(losses), n_steps):
        episodes = sampler.batch(step * episodes_per_step, episodes_per_step)
        direction = None if engine.n_directions is None else episodes.direction
        out = engine.meta_gradients(episodes.support, episodes.query, episodes.is_ood, direction)
        for name, param in params.items():
            param.grad = out.grads[name]
        optimizer.step()
        losses.append(float(out.loss.mean()))
        if checkpoint:
            checkpoint.save_sometimes(params, optimizer, losses)
        if progress:
            progress(step + 1, n_steps, losses[-1])
    return losses
