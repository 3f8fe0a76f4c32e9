"""torch.compile: where it pays, and what happens where it fails."""

import logging

import pytest
import torch
from torch import Tensor, nn

from mdml_fast import MetaEngine
from mdml_fast.meta.compiling import Compiled, pays


def engine(path: str = "generic", **settings: object) -> MetaEngine:
    torch.manual_seed(0)
    return MetaEngine(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3), 1, path=path, **settings)


def episodes() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(3, rows, 4, generator=generator) for rows in (8, 10))
    return support, query, (torch.arange(10) >= 7).expand(3, -1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("path", ["generic", "fused"])
def test_compiled_gradients_are_the_same(path: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, compiled = (engine(path, compile=compiled).meta_gradients(*episodes()) for compiled in (False, True))
    assert not [record for record in caplog.records if record.name == "mdml_fast"]
    torch.testing.assert_close(compiled.loss, plain.loss)
    for name, value in plain.grads.items():
        torch.testing.assert_close(compiled.grads[name], value)


def test_a_compiler_that_fails_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: object, **options: object) -> object:
        def call(*args: object) -> object:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(Compiled, "_warned", False)
    caplog.set_level(logging.WARNING, "mdml_fast")
    expected = engine().meta_gradients(*episodes())
    for _ in range(2):
        out = engine(compile=True).meta_gradients(*episodes())
        assert torch.equal(out.loss, expected.loss)
    assert [record.getMessage() for record in caplog.records] == [
        "engine: goes on without torch.compile, which failed: no C++ compiler"
    ]


def test_other_shapes_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda rows: calls.append(len(rows)) or function(rows))
    function = Compiled(lambda rows: rows + 1)
    for n in (4, 3, 4):
        assert torch.equal(function(torch.zeros(n)), torch.ones(n))
    assert calls == [4, 4]


def test_a_short_run_is_not_compiled_and_a_long_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    assert not pays("generic", 1e12)
    assert pays("generic", 1e13)
    assert not pays("fused", 1e13)
    assert pays("fused", 1e14)
    one = engine()
    one.expect(1_000, 64, 80)
    one.meta_gradients(*episodes())
    assert not compiled
    one.expect(10**10, 64, 80)
    one.meta_gradients(*episodes())
    assert compiled
