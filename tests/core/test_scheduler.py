"""The meta-scheduler: the same numbers however episodes are cut and shared out, in bounded memory."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.native import calls
from mdml_kernels.native import episodes as native_episodes
from mdml_kernels.native import loader as native
from torch import nn

from mdml_fast import MetaEngine, MetaGradients
from mdml_fast.episodes import EpisodeBatch
from mdml_fast.meta import chunks
from mdml_fast.meta.chunks import ChunkCache, Shape
from mdml_fast.meta.scheduler import MetaScheduler


class Source:
    """Episode e is a function of e; remembers what it was asked for."""

    def __init__(self, n_support: int = 16, n_query: int = 20) -> None:
        self.sizes = (n_support, n_query)
        self.asked: list[tuple[int, int]] = []

    def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
        self.asked.append((first, n_episodes))
        parts = []
        for episode in range(first, first + n_episodes):
            generator = torch.Generator().manual_seed(episode)
            parts.append([torch.randn(n, 12, generator=generator) for n in self.sizes])
        support, query = (torch.stack(side) for side in zip(*parts, strict=True))
        is_ood = (torch.arange(self.sizes[1]) >= 14).expand(n_episodes, -1)
        return EpisodeBatch(support, query, is_ood, torch.arange(first, first + n_episodes) % 3)


def engine(path: str = "auto", loss: dict[str, object] | None = None, **settings: object) -> MetaEngine:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 25), nn.Tanh(), nn.Linear(25, 7))
    margin = SoftmaxMarginLoss(margin=0.9, learn_temperature=True, **(loss or {}))
    return MetaEngine(encoder, nn.Linear(7, 5), 3, 0.2, margin, path=path, **settings)


def mean_of(scheduler: MetaScheduler, n: int, source: Source | None = None) -> MetaGradients:
    [out] = scheduler.stream(source or Source(), n_steps=1, episodes_per_step=n)
    return out


def equal(a: MetaGradients, b: MetaGradients) -> bool:
    return torch.equal(a.loss, b.loss) and all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """As the scheduler's workers compute: a product that threads share may have other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assert_close(a: MetaGradients, b: MetaGradients) -> None:
    """To 1e-6 of the largest gradient: in a mean whose terms cancel, float32 has no more."""
    assert (a.loss - b.loss).norm() <= 1e-6 * b.loss.norm()
    largest = max(float(value.norm()) for value in b.grads.values())
    for name, value in b.grads.items():
        assert (a.grads[name] - value).norm() <= 1e-6 * largest, name


@pytest.mark.parametrize("n_directions", [None, 3])
@pytest.mark.parametrize("path", ["fused", "generic"])
def test_bits_depend_neither_on_chunks_nor_on_threads(path: str, n_directions: int | None) -> None:
    """69 episodes of an odd number of rows: nothing falls on the bounds of groups or of vectors by itself."""
    one = engine(path, n_directions=n_directions, loss={"form": "bce"})
    batch = Source(15, 21).batch(0, 69)
    with on_one_thread():
        whole = one.meta_gradients(*batch[:3], direction=batch.direction if n_directions else None)
    for chunk, threads in [(32, 1), (32, 2), (64, 1), (64, 3), (None, 1), (None, 2)]:
        out = mean_of(MetaScheduler(one, chunk=chunk, threads=threads), 69, Source(15, 21))
        assert equal(out, whole), (chunk, threads)


@pytest.mark.parametrize("path", ["fused", "generic"])
@pytest.mark.parametrize("chunk", [1, 3, 5, 11])
def test_any_chunk_and_order_gives_the_same_gradient(path: str, chunk: int) -> None:
    one = engine(path)
    batch = Source().batch(0, 24)
    whole = one.meta_gradients(*batch[:3])
    assert_close(mean_of(MetaScheduler(one, chunk=chunk, threads=2), 24), whole)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(chunk))
    shuffled = MetaScheduler(one, chunk=chunk, threads=1).meta_gradients(*(tensor[order] for tensor in batch[:3]))
    assert_close(MetaGradients(shuffled.loss[order.argsort()], shuffled.grads), whole)


def test_steps_see_the_parameters_as_they_are_then() -> None:
    streamed, plain = engine(), engine()
    source = Source()
    for step, out in enumerate(
        MetaScheduler(streamed, threads=2).stream(source, n_steps=5, episodes_per_step=16, done=2)
    ):
        batch = Source().batch(16 * (2 + step), 16)
        with on_one_thread():
            assert equal(out, plain.meta_gradients(*batch[:3]))
        for one in (streamed, plain):
            for name, value in one.parameters().items():
                value.data -= 0.1 * out.grads[name]
    # Sampled in order; the next step's episodes before this one's gradient was asked for.
    assert source.asked[-6:] == [(first, 8) for first in range(32, 80, 8)]


def test_chunks_are_computed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two chunks waits until the other is being computed too."""
    one, both = engine(), threading.Barrier(2, timeout=20)
    compute = one.gradient_sums

    def together(*args: object) -> object:
        both.wait()
        return compute(*args)

    monkeypatch.setattr(one, "gradient_sums", together)
    mean_of(MetaScheduler(one, chunk=8, threads=2), 16)
    both = threading.Barrier(2, timeout=0.2)
    with pytest.raises(threading.BrokenBarrierError):
        mean_of(MetaScheduler(one, chunk=8, threads=1), 16)


@pytest.mark.skipif(not native.native().kernels, reason="no compiled kernels here")
def test_threads_share_a_chunk_of_whole_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its two parts waits until the other is being computed too."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 25), nn.ReLU(), nn.Linear(25, 7))
    one, both, parts = MetaEngine(encoder, nn.Linear(7, 5), 3, 0.2), threading.Barrier(2, timeout=20), []
    expected = mean_of(MetaScheduler(one, chunk=16, threads=1), 32)

    def watched(run: Callable[[int, int], None], n: int, least: int) -> None:
        def part(begin: int, end: int) -> None:
            parts.append((begin, end))
            both.wait()
            run(begin, end)

        shared(part, n, least)

    shared = calls.shared
    monkeypatch.setattr(calls, "shared", watched)
    monkeypatch.setattr(native_episodes, "_LEAST_PRODUCTS", 1)
    with on_one_thread():  # the scheduler's threads count, not torch's
        assert equal(mean_of(MetaScheduler(one, chunk=16, threads=2), 32), expected)
    assert sorted(parts) == [(0, 2), (2, 4)]  # groups of eight episodes


def test_an_error_in_a_source_is_raised_and_threads_end() -> None:
    class Broken(Source):
        def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
            if first >= 16:
                raise RuntimeError("no more rows")
            return super().batch(first, n_episodes)

    with pytest.raises(RuntimeError, match="no more rows"):
        mean_of(MetaScheduler(engine(), chunk=8, threads=2), 64, Broken())


@pytest.mark.parametrize("off_by", [-1, 1])
@pytest.mark.parametrize("chunk", [8, None])
def test_a_source_gives_as_many_episodes_as_it_is_asked_for(off_by: int, chunk: int | None) -> None:
    class Other(Source):
        def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
            return super().batch(first, n_episodes + off_by * (n_episodes > 1))

    with pytest.raises(ValueError, match=r"the source gave \d+ episodes as batch\(0, \d+\): it must"):
        mean_of(MetaScheduler(engine(), chunk=chunk, threads=2), 32, Other())


def test_rows_may_have_more_dims_than_one() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))
    one = MetaEngine(encoder, nn.Linear(8, 4))
    images = torch.randn(32, 5, 1, 8, 8), torch.randn(32, 6, 1, 8, 8), (torch.arange(6) >= 3).expand(32, 6)
    with on_one_thread():
        assert equal(MetaScheduler(one, threads=2).meta_gradients(*images), one.meta_gradients(*images))


def test_what_the_engine_refuses_the_scheduler_does() -> None:
    class Flat(Source):
        def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
            batch = super().batch(first, n_episodes)
            return batch._replace(support=batch.support[:, 0], query=batch.query[:, 0])

    support, query, is_ood, direction = Source().batch(0, 16)
    for wrong, match in (
        (lambda one: mean_of(one, 16, Flat()), r"support must be \[episodes, rows, features\]"),
        (lambda one: one.meta_gradients(support, query, is_ood[:, :-1]), "is_ood must be bool"),
        (lambda one: one.meta_gradients(support[:-1], query, is_ood), "must be of the episodes and features of"),
        (lambda one: one.meta_gradients(support, query, is_ood, direction), "leave direction out"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong(MetaScheduler(engine(), threads=1))


def test_a_chunk_size_is_measured_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mdml_fast")
    cache = ChunkCache(tmp_path / "deep" / "chunks.json")
    for expected in ("measured", "measured earlier"):
        scheduler = MetaScheduler(engine(), threads=2, cache=cache)
        mean_of(scheduler, 64)
        assert f"episodes at once ({expected}) on 2 threads" in scheduler.chosen
        assert scheduler.chosen.startswith("fused path (an MLP in float32 on cpu, first order), ")
    assert scheduler.chosen in caplog.text
    assert len(json.loads(cache.path.read_text())) == 1
    assert [path.name for path in cache.path.parent.iterdir()] == ["chunks.json"]


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\x00"])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, content: str) -> None:
    cache = ChunkCache(tmp_path / "chunks.json")
    cache.path.write_text(content)
    scheduler = MetaScheduler(engine(), threads=1, cache=cache)
    mean_of(scheduler, 32)
    assert "(measured)" in scheduler.chosen
    assert json.loads(cache.path.read_text())


def test_a_cached_size_that_cannot_be_one_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ChunkCache(tmp_path / "chunks.json")
    monkeypatch.setattr(chunks, "cache_key", lambda *_: "key")
    cache.put("key", 7)
    scheduler = MetaScheduler(engine(), threads=1, cache=cache)
    mean_of(scheduler, 32)
    assert "(measured)" in scheduler.chosen


def test_without_a_folder_to_write_to_it_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    scheduler = MetaScheduler(engine(), threads=1)
    mean_of(scheduler, 32)
    assert "(measured)" in scheduler.chosen


def test_without_a_home_it_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    for _ in range(2):
        scheduler = MetaScheduler(engine(), threads=1)
        mean_of(scheduler, 32)
        assert "(measured)" in scheduler.chosen


def test_bits_do_not_depend_on_how_much_memory_caches_files(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mean_of(MetaScheduler(engine(), threads=1), 32)
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 10 if name == "SC_AVPHYS_PAGES" else sysconf(name))
    assert equal(mean_of(MetaScheduler(engine(), threads=1), 32), expected)


def test_numbers_out_of_range_are_refused() -> None:
    for name in ("chunk", "threads", "memory"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            MetaScheduler(engine(), **{name: 0})
    scheduler = MetaScheduler(engine())
    with pytest.raises(ValueError, match="1 episode or more in a step, got 0"):
        mean_of(scheduler, 0)
    with pytest.raises(ValueError, match="one episode at least"):
        scheduler.meta_gradients(*(part[:0] for part in Source().batch(0, 1)[:3]))


def test_an_episodes_memory_grows_with_what_it_holds() -> None:
    one = engine()
    small = chunks.episode_bytes(one, Shape(16, 20, 12))
    own_weights = sum(value.numel() for name, value in one.parameters().items() if name.startswith("encoder."))
    assert small > 4 * own_weights
    assert chunks.episode_bytes(one, Shape(160, 200, 12)) > 5 * small
    assert chunks.episode_bytes(engine(first_order=False), Shape(16, 20, 12)) > 2 * small


PEAKS = """
    import sys, torch
    from torch import nn
    from mdml_fast.episodes import EpisodeBatch
    from mdml_fast.meta.engine import MetaEngine
    from mdml_fast.meta.scheduler import MetaScheduler
    from mdml_fast.resources import PeakMemory

    class Source:
        is_ood = torch.arange(16) >= 12

        def batch(self, first, n):
            rows = torch.randn(n, 16, 64)
            return EpisodeBatch(rows, rows, self.is_ood.expand(n, -1), torch.arange(n))

    def peak(path, inner_steps, n_episodes):
        encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        engine = MetaEngine(encoder, nn.Linear(32, 4), inner_steps, path=path)
        scheduler = MetaScheduler(engine, chunk=16, threads=2)
        next(scheduler.stream(Source(), n_steps=1, episodes_per_step=n_episodes))
        return memory.bytes() / 2**20

    torch.set_num_threads(2)
    memory = PeakMemory()
    print(*[peak(*case) for case in eval(sys.argv[1])])
"""


def peaks(*cases: tuple[str, int, int]) -> list[float]:
    """The peak memory of a process [MiB] after each run, one after the other."""
    command = [sys.executable, "-c", textwrap.dedent(PEAKS), repr(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@on_linux
def test_ten_thousand_episodes_leave_the_peak_of_a_thousand() -> None:
    """An episode's own weights are 50 KiB here: 9 000 more of them would take 440 MiB."""
    thousand, ten_thousand = peaks(("fused", 1, 1_000), ("fused", 1, 10_000))
    assert ten_thousand - thousand < 8


@on_linux
def test_first_order_keeps_no_graph_through_the_inner_loop() -> None:
    """A step's weights of a chunk are 0.8 MiB, its activations as much again: 100 more steps would take 150 MiB."""
    few, many = peaks(("generic", 2, 64), ("generic", 102, 64))
    assert many - few < 20
