"""The parts of the GPU acceptance script that the interpreter can run, at small sizes: they run, and can fail."""

import time

import pytest
import torch
from support import benchmark_script


@pytest.fixture(scope="module")
def acceptance():
    runs = benchmark_script("gpu_runs")
    runs.SUPPORT, runs.SIZES, runs.CLASSES, runs.STEPS = 16, (8, 16, 8), 4, 2
    return benchmark_script("gpu_acceptance")


@pytest.fixture(scope="module")
def tiles(acceptance):
    module = benchmark_script("gpu_tiles")
    assert module.gpu_runs is acceptance.gpu_runs
    module.DEVICE, module.SHAPES, module.EPISODES = "cpu", ((2, 5, 80),), (2,)
    return module


@pytest.fixture
def timer():
    def once(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return once


def test_correctness(acceptance, monkeypatch):
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    monkeypatch.setitem(acceptance.parity.TOLERANCE, torch.bfloat16, 2**-6)
    found = acceptance.correctness(problems=4, largest=70)
    assert found["kinds"]
    assert found["wrong"] == []


def test_determinism(acceptance, monkeypatch):
    assert acceptance.determinism("cpu", (2, 20, 10), episodes=2) == {"wrong": []}
    from mdml_kernels import triton_rows

    monkeypatch.setattr(triton_rows, "odds_backward", lambda logits, *_: (torch.rand_like(logits), None, None))
    assert acceptance.determinism("cpu", (2, 20, 10), episodes=2)["wrong"]


def test_bandwidth_and_speed(acceptance, timer):
    for found in (
        *acceptance.bandwidth("cpu", timer, (2, 6, 20)).values(),
        *acceptance.speed("cpu", timer, (2, 6, 20), compiled=False).values(),
    ):
        assert all(value > 0 for value in found.values() if not isinstance(value, bool))


def test_inner_loop(acceptance, timer, monkeypatch):
    found = acceptance.inner_loop("cpu", timer, (2,))
    assert found["wrong"] == []
    assert found["2 episodes"]["float32 whole"]["error"] < 1e-5 + found["2 episodes"]["vmap_error"]
    from mdml_kernels import triton_mlp

    adapt = triton_mlp.adapt_mlp
    monkeypatch.setattr(triton_mlp, "adapt_mlp", lambda *a, **k: adapt(*a, **{**k, "steps": k["steps"] - 1}))
    assert len(acceptance.inner_loop("cpu", timer, (2,))["wrong"]) >= 4


def test_other_tiles_give_the_same(tiles):
    """Every launch of a case, but for products that the interpreter does not know."""
    results = {}
    for variant in tiles.variants():
        if variant.kernel != "inner loop" or variant.launched[2] == variant.choice[2]:
            with tiles.prepared(variant) as run:
                results.setdefault(variant.case, []).append(run())
    assert {case.split(" [")[0] for case in results} == {"forward", "backward", "inner loop"}
    assert all(len(group) > 3 for group in results.values())
    for first, *others in results.values():
        for other in others:
            torch.testing.assert_close(other, first)


def test_a_launch_that_fails_says_why(tiles):
    variant = next(iter(tiles.variants()))
    assert "zero" in tiles.compiled(variant._replace(launched=(0, 4)))
