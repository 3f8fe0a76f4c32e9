"""The outer loop: batches of episodes, meta-gradients, optimiser steps; can be interrupted and resumed."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from mdml_fast.episodes import EpisodeSampler
from mdml_fast.meta.adam import Adam
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.history import History
from mdml_fast.meta.scheduler import MetaScheduler
from mdml_fast.threads import single_thread

log = logging.getLogger("mdml_fast")


class Progress(Protocol):
    """Told after every outer step."""

    def __call__(self, step: int, n_steps: int, loss: float) -> None:
        """`step` of `n_steps` is done; `loss` is the mean outer loss of its episodes."""


def train(
    engine: MetaEngine,
    sampler: EpisodeSampler,
    optimizer: Adam,
    *,
    n_steps: int,
    episodes_per_step: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train the engine's meta-parameters in place.

    An interrupted run that is resumed from its checkpoint ends with the same bits as one that was not interrupted,
    since an episode depends on its number alone.

    Args:
        engine: what is trained.
        sampler: where its episodes come from.
        optimizer: of all meta-parameters.
        n_steps: outer steps.
        episodes_per_step: how many episodes a step's gradient is of.
        progress: told after each step.
        checkpoint: where the state of the run is kept.

    Returns:
        The losses of the steps.
    """
    history = History(sampler.direction_names, [], [])
    if checkpoint:
        checkpoint.restore(optimizer, history)
    already = len(history.losses)
    steps = MetaScheduler(engine).stream(sampler, n_steps=n_steps, episodes_per_step=episodes_per_step, done=already)
    start = time.perf_counter()
    with single_thread():  # between chunks
        for step, out in enumerate(steps, start=already):
            optimizer.step(out.grads)
            history.add(out.loss, sampler.directions(step * episodes_per_step, episodes_per_step))
            if checkpoint:
                checkpoint.save_sometimes(optimizer, history)
            if progress:
                progress(step + 1, n_steps, history.losses[-1])
    seconds, n_episodes = time.perf_counter() - start, (n_steps - already) * episodes_per_step
    if n_episodes:
        log.info("engine: %d episodes in %.1f s, %.0f a second", n_episodes, seconds, n_episodes / seconds)
    return history
