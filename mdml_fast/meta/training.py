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
    *,
    n_steps: int,
    episodes_per_step: int,
    outer_lr: float,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the engine's meta-parameters in place with Adam.

    An interrupted run that is resumed from its checkpoint ends with the same bits as one that was not interrupted,
    since an episode depends on its number alone.

    Returns:
        The mean outer loss of each step [n_steps].
    """
    params = engine.parameters()
    optimizer = torch.optim.Adam(params.values(), lr=outer_lr)
    losses = checkpoint.restore(params, optimizer) if checkpoint else []
    for step in range(len(losses), n_steps):
        episodes = sampler.batch(step * episodes_per_step, episodes_per_step)
        out = engine.meta_gradients(episodes.support, episodes.query, episodes.is_ood)
        for name, param in params.items():
            param.grad = out.grads[name]
        optimizer.step()
        losses.append(float(out.loss.mean()))
        if checkpoint:
            checkpoint.save_sometimes(params, optimizer, losses)
        if progress:
            progress(step + 1, n_steps, losses[-1])
    return losses
