"""torch.compile: where it pays, in the background, and what happens where it fails."""

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mdml_fast import MetaEngine
from mdml_fast.episodes import EpisodeBatch
from mdml_fast.meta import compiling, scheduler
from mdml_fast.meta.compiling import Background, Compiled, first_compiled_step
from mdml_fast.meta.gradients import MetaGradients
from mdml_fast.meta.scheduler import MetaScheduler

FAILED = "engine: goes on without torch.compile, which failed: "


def engine(**settings: object) -> MetaEngine:
    torch.manual_seed(0)
    return MetaEngine(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3), 1, path="generic", **settings)


class Episodes:
    """A source of episodes."""

    def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
        support, query = (
            torch.stack(
                [torch.randn(rows, 4, generator=torch.Generator().manual_seed(first + i)) for i in range(n_episodes)]
            )
            for rows in (8, 10)
        )
        is_ood = (torch.arange(10) >= 7).expand(n_episodes, -1)
        return EpisodeBatch(support, query, is_ood, torch.arange(first, first + n_episodes))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return Episodes().batch(0, 3)[:3]


def steps(one: MetaEngine) -> Iterator[MetaGradients]:
    return MetaScheduler(one, chunk=8, threads=2).stream(Episodes(), n_steps=4, episodes_per_step=18)


def assert_close(got: MetaGradients, expected: MetaGradients) -> None:
    torch.testing.assert_close(got.loss, expected.loss)
    for name, value in expected.grads.items():
        torch.testing.assert_close(got.grads[name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_long_run_is_compiled_in_the_background_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # of what other runs compiled nothing is found
    monkeypatch.setattr(scheduler, "first_compiled_step", lambda flops, n_steps, n_threads: 2)
    calls: list[int] = []
    plain = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, *args: calls.append(len(args[1])) or plain(self, *args))
    caplog.set_level(logging.INFO, "mdml_fast")
    counters.clear()
    one = engine()
    once = []
    for step, (got, expected) in enumerate(zip(steps(one), steps(engine(compile=False)), strict=True)):
        assert_close(got, expected)
        assert bool(calls) == (step >= 2)
        once.append(got.loss)
    assert calls == [8, 8] * 2  # two whole chunks of each step; the rest is computed as before
    assert "engine: compiled for 8 episodes at once" in caplog.messages
    found = sum(
        counters[kind][f"{cache}_cache_hit"] for kind, cache in (("inductor", "fxgraph"), ("aot_autograd", "autograd"))
    )
    assert found, "the other process compiled it, and not this one"
    assert one._path.compiled is None
    there = contextlib.nullcontext(SimpleNamespace(succeeded=lambda: True))
    monkeypatch.setattr(scheduler, "in_background", lambda job: there)  # it is in the cache by now
    for got, loss in zip(steps(one), once, strict=True):
        assert torch.equal(got.loss, loss)


@pytest.mark.parametrize("way", ["engine", "scheduler"])
def test_it_is_compiled_at_once_where_that_is_asked_for(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: functions.append(function) or function)
    one, expected = engine(compile=True), engine(compile=False).meta_gradients(*batch())
    for _ in range(2):
        computes = one if way == "engine" else MetaScheduler(one, threads=2)
        assert_close(computes.meta_gradients(*batch()), expected)
    assert len(functions) == 1


@pytest.mark.parametrize("way", ["engine", "scheduler"])
def test_a_compiler_that_fails_costs_one_warning(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **options: object) -> object:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    caplog.set_level(logging.WARNING, "mdml_fast")
    expected = engine().meta_gradients(*batch())
    one = engine(compile=True)
    for _ in range(2):
        computes = one if way == "engine" else MetaScheduler(one, threads=2)
        assert torch.equal(computes.meta_gradients(*batch()).loss, expected.loss)
    assert caplog.messages == [f"{FAILED}RuntimeError: no C++ compiler"]


def test_it_takes_the_shapes_that_it_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    function = Compiled(lambda rows: rows["x"] + 1, ({"x": torch.zeros(4)},))
    assert function.takes(({"x": torch.ones(4)},))
    assert not function.takes(({"x": torch.ones(3)},))
    assert not function.takes(({"x": torch.ones(4, dtype=torch.float64)},))
    with torch.no_grad():
        assert not function.takes(({"x": torch.ones(4)},))
    assert torch.equal(function({"x": torch.zeros(4)}), torch.ones(4))


def test_a_short_run_is_not_compiled_and_a_long_one_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_compiled_step(1e9, 2_000, 1) is None
    assert first_compiled_step(0, 10**9, 1) is None  # modules without weights
    assert first_compiled_step(1e9, 3_000, 1) == 600
    assert first_compiled_step(1e9, 3_000, 2) is None
    assert first_compiled_step(1e9, 6_000, 2) == 1200
    assert first_compiled_step(1e13, 1, 1) is None  # no step would be left
    monkeypatch.setattr(scheduler, "in_background", None)
    assert len(list(steps(engine()))) == 4


def test_modules_that_cannot_be_sent_to_another_process_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "first_compiled_step", lambda flops, n_steps, n_threads: 1)
    one = engine()
    one.modules["encoder"].note = lambda: "of this process alone"
    for got, expected in zip(steps(one), steps(engine(compile=False)), strict=True):
        assert torch.equal(got.loss, expected.loss)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(FAILED)
    assert "pickle" in caplog.messages[0]


def test_only_the_episodes_of_a_batch_are_sent_to_the_other_process(tmp_path: Path) -> None:
    many = Episodes().batch(0, 1000)
    torch.save(engine().compiling_for(*(tensor[:3] for tensor in many[:3])), tmp_path / "job")
    assert (tmp_path / "job").stat().st_size < 20_000


def test_a_process_that_fails_says_why_and_one_that_is_not_waited_for_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mdml_fast")
    assert not Background(partial(int, "three"), tmp_path).succeeded()
    assert caplog.messages == [f"{FAILED}ValueError: invalid literal for int() with base 10: 'three'"]
    start = time.monotonic()
    with compiling.in_background(partial(time.sleep, 600)) as background:
        assert background._process is not None
    assert background._process.returncode
    assert time.monotonic() - start < 60
