"""The meta-scheduler: a stream of episodes through the engine, as many at once as pays, on all threads there are.

Memory is that of the chunks in flight, whatever the number of episodes. The bits of the result depend neither on the
threads nor on the chunk size, as long as that is of whole granules (see `chunks`). Only one that is forced, or that
little memory dictates, is not; then they differ in the last digits. So they do where the generic path is compiled,
which chunks of the measured size are, and what is left over is not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch
from mdml_kernels.native.threads import shared_by
from torch import Tensor

from mdml_fast.episodes import EpisodeBatch
from mdml_fast.meta import chunks
from mdml_fast.meta.compiling import first_compiled_step, in_background
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.gradients import GROUP, GradientSums, MeanGradients, MetaGradients
from mdml_fast.meta.settings import Parameters
from mdml_fast.threads import in_order, single_thread, workers

log = logging.getLogger("mdml_fast")


class EpisodeSource(Protocol):
    """Where episodes come from; `EpisodeSampler` is one."""

    def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
        """Episodes first, …, first + n_episodes - 1: a pure function of these numbers."""


class MetaScheduler:
    """Meta-gradients of any number of episodes.

    Args:
        engine: what computes a chunk.
        chunk: episodes at once on each thread, at least 1; None measures it at the first use, or remembers.
        threads: CPU threads that share the episodes; None for as many as torch uses.
        memory: bytes that the chunks in flight may take; None for a quarter of what is free.
        cache: where measured chunk sizes are kept; None for the user's cache folder.

    Attributes:
        chosen: how episodes are computed, in one line; empty before the first use.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        engine: MetaEngine,
        *,
        chunk: int | None = None,
        threads: int | None = None,
        memory: int | None = None,
        cache: chunks.ChunkCache | None = None,
    ) -> None:
        for name, value in (("chunk", chunk), ("threads", threads), ("memory", memory)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.engine, self.chosen = engine, ""
        self._forced, self._memory, self._cache = chunk, memory, cache or chunks.ChunkCache()
        self._chunks: dict[tuple[chunks.Shape, int], int] = {}
        self.threads = (threads or torch.get_num_threads()) if engine.device.type == "cpu" else 1
        # Chunks side by side, or each shared by all threads: then the work around it is done once, with no other thread
        # waiting for the interpreter.
        self._side_by_side = 1 if engine.shares_threads else self.threads
        self._others = workers(self._side_by_side - 1) if self._side_by_side > 1 else None

    def meta_gradients(
        self, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None
    ) -> MetaGradients:
        """As `MetaEngine.meta_gradients`, for any number of episodes."""
        direction = self.engine.check(self.engine.values(), support, query, is_ood, direction)
        n = len(support)
        numbers = torch.arange(n, device=support.device) if direction is None else direction
        given = _Given(EpisodeBatch(support, query, is_ood, numbers))
        return self._mean(n, (given.batch(*cut) for cut in self._cuts(given, 0, n)))

    def stream(
        self, source: EpisodeSource, *, n_steps: int, episodes_per_step: int, done: int = 0
    ) -> Iterator[MetaGradients]:
        """The meta-gradient of each step's episodes, one step after the other; parameters may be changed in between.

        Step i takes episodes i · episodes_per_step and following. Those of the next chunks, and of the next step, are
        sampled while these are computed.

        Args:
            source: of the episodes.
            n_steps: steps of the whole run.
            episodes_per_step: episodes of each.
            done: steps that are left out, because they were done before.

        Raises:
            ValueError: a step has no episode, or the source gives others than it was asked for, or such as the engine
                does not take.
        """
        if done >= n_steps:
            return
        first = done * episodes_per_step
        cuts = self._cuts(source, first, episodes_per_step)
        ranges = ((step * episodes_per_step + start, count) for step in range(done, n_steps) for start, count in cuts)
        one = first, cuts[0][1]
        with workers(1) as sampling, self._compiling(source, one, n_steps, episodes_per_step) as due:
            batches = in_order(sampling, (partial(_batch, source, *cut) for cut in ranges), self._side_by_side)
            for step in range(done, n_steps):
                due(step)
                yield self._mean(episodes_per_step, (next(batches) for _ in cuts))

    def _mean(self, n_episodes: int, batches: Iterable[EpisodeBatch]) -> MetaGradients:
        mean = MeanGradients(self.engine, n_episodes)
        with single_thread():  # torch's own threads, once awake, spin on for a while and take the cores from ours
            for sums in self._in_order(mean.values, batches):
                mean.add(sums)
            return mean.result()

    def _in_order(self, values: Parameters, batches: Iterable[EpisodeBatch]) -> Iterator[GradientSums]:
        """Computed side by side, given back in the order of the batches; one more in flight than there are threads."""
        compute = partial(self._compute, values)
        if self._others is None:
            return map(compute, batches)
        jobs = (partial(compute, batch) for batch in batches)
        return in_order(self._others, jobs, self._side_by_side, helping=True)

    def _compute(self, values: Parameters, batch: EpisodeBatch) -> GradientSums:
        # Whatever torch may use: bits are those of products on a single thread.
        with single_thread(), shared_by(self.threads // self._side_by_side):
            return self.engine.gradient_sums(values, *self._arguments(batch))

    def _arguments(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As the engine takes them."""
        return batch.support, batch.query, batch.is_ood, batch.direction if self.engine.n_directions else None

    @contextlib.contextmanager
    def _compiling(
        self, source: EpisodeSource, cut: tuple[int, int], n_steps: int, episodes_per_step: int
    ) -> Iterator[Callable[[int], None]]:
        """Compile for chunks like this cut in the background of a long run; gives what to call before each step.

        Between steps no chunk is computed, so that none finds torch at compiling.
        """
        first_step = None
        if self.engine.compile == "auto" and self.engine.device.type == "cpu":
            sample = _batch(source, cut[0], 1)
            flops = self.engine.flops(sample.support.shape[1], sample.query.shape[1])
            first_step = first_compiled_step(episodes_per_step * flops, n_steps, self.threads)
        if first_step is None:
            yield lambda step: None  # noqa: ARG005
            return
        batch = _batch(source, *cut)
        with in_background(self.engine.compiling_for(*self._arguments(batch))) as background:
            is_due = True

            def due(step: int) -> None:
                nonlocal is_due
                if is_due and step >= first_step:
                    is_due = False
                    if background.succeeded():
                        self._compile(batch)

            try:
                yield due
            finally:
                self.engine.leave_compiled()

    def _compile(self, batch: EpisodeBatch) -> None:
        """Have chunks like this one compiled."""
        with single_thread():
            if self.engine.compile_for(*self._arguments(batch)):
                log.info("engine: compiled for %d episodes at once", len(batch.support))

    def _cuts(self, source: EpisodeSource, first: int, n_episodes: int) -> list[tuple[int, int]]:
        """How the episodes of a step are cut into chunks, as `chunks.cuts`."""
        if n_episodes < 1:
            raise ValueError(f"there must be 1 episode or more in a step, got {n_episodes}")
        sample = _batch(source, first, 1)
        self.engine.check(self.engine.values(), *self._arguments(sample))
        shape = chunks.Shape(sample.support.shape[1], sample.query.shape[1], math.prod(sample.query.shape[2:]))
        if (shape, n_episodes) not in self._chunks:
            self._chunks[shape, n_episodes] = self._chunk(source, first, n_episodes, shape)
        each = self._chunks[shape, n_episodes]
        cuts = chunks.cuts(n_episodes, each * self.threads // self._side_by_side)
        if self.engine.is_to_be_compiled:
            self._compile(_batch(source, first, cuts[0][1]))
        return cuts

    def _chunk(self, source: EpisodeSource, first: int, n_episodes: int, shape: chunks.Shape) -> int:
        """Episodes at once: the best size, less where the threads would not get equal shares."""
        size, how = self._forced, "asked for"
        if size is None:
            granule = chunks.granule(shape, 2 if self.engine.n_directions else GROUP)
            size, how = self._best(source, first, n_episodes, shape, granule)
            rounds = -(-n_episodes // (size * self.threads))
            share = -(-n_episodes // (rounds * self.threads))
            size = min(size, -(-share // granule) * granule)
        path = self.engine.choice
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        self.chosen = f"{path.path} path ({path.reason}), {size} episodes at once ({how}) on {threads}"
        log.info("engine: %s", self.chosen)
        return size

    def _best(
        self, source: EpisodeSource, first: int, n_episodes: int, shape: chunks.Shape, granule: int
    ) -> tuple[int, str]:
        """The chunk size to aim at, and how it came about."""
        memory = self._memory or chunks.available_memory(self.engine.device)
        in_flight = self.threads + 1
        share = -(-n_episodes // self.threads)
        sizes = chunks.candidates(share, chunks.episode_bytes(self.engine, shape), memory // in_flight, granule)
        if len(sizes) == 1:
            return sizes[0], "no other fits"
        key = chunks.cache_key(self.engine, shape, sizes, self.threads)
        size = self._cache.get(key)
        if size in sizes:
            return size, "measured earlier"
        size = chunks.measure(lambda n: self._seconds(source.batch(first, n)), sizes)
        self._cache.put(key, size)
        return size, "measured"

    def _seconds(self, batch: EpisodeBatch) -> float:
        """How long one thread computes a batch; on a CPU in time of its own, which other processes do not add to."""
        on_gpu = self.engine.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.thread_time

        start = clock()
        with single_thread():
            sums = self.engine.gradient_sums(self.engine.values(), *self._arguments(batch))
        sums.loss.cpu()  # waits for a GPU
        return clock() - start


def _batch(source: EpisodeSource, first: int, n_episodes: int) -> EpisodeBatch:
    """What the source gives, if that is so many episodes."""
    batch = source.batch(first, n_episodes)
    if len(batch.support) != n_episodes:
        raise ValueError(
            f"the source gave {len(batch.support)} episodes as batch({first}, {n_episodes}): it must give {n_episodes}"
        )
    return batch


class _Given:
    """Episodes that are there already."""

    def __init__(self, episodes: EpisodeBatch) -> None:
        self._episodes = episodes

    def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
        """See `EpisodeSource`."""
        return EpisodeBatch(*(tensor[first : first + n_episodes] for tensor in self._episodes))
