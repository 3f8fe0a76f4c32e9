"""The benchmark of the engine refuses a wrong contender, and counts the products that are needed."""

from dataclasses import replace

import pytest
import torch
from support import benchmark_script

from mdml_fast.bench import engine, peers

CPU = torch.device("cpu")
SMALL = replace(engine.CASES[0], n_episodes=3)
DETECTOR = replace(engine.CASES[-1], n_episodes=2, n_support=16, n_query=20, widths=(6, 4, 6, 16))


@pytest.mark.parametrize("case", [SMALL, DETECTOR], ids=["mlp", "detector"])
def test_a_case_is_checked_and_timed(case: engine.Case) -> None:
    row = engine.run(case, CPU, rounds=2)
    assert row.ratios["ours"] == 1
    assert row.ratios["plain loop"] == pytest.approx(row.per_second["ours"] / row.per_second["plain loop"])
    assert row.errors["ours"] < 1e-5
    assert row.share["ours"] == pytest.approx(row.per_second["ours"] * case.flops / row.sgemm_flops)
    assert row.share_taken["ours"] == pytest.approx(row.share["ours"] * case.taken / case.flops)
    table = engine.table([row])
    assert f"{row.ratios['plain loop']:.2f}" in table
    assert "path" in row.chosen


def test_the_gpu_acceptance_runs_the_engine_and_keeps_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CASES", (SMALL,))
    benchmark_script("gpu_runs")
    script = benchmark_script("gpu_acceptance")
    run, kept = script.engine, script.kept
    assert run("cpu", rounds=1)["small"]["errors"]["ours"] < 1e-5
    monkeypatch.setattr(peers, "hinge", lambda *arguments: 1.01 * peers.one_class(arguments[0]))
    [wrong] = kept(lambda: run("cpu", rounds=1))["wrong"]
    assert "plain loop: relative error" in wrong


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "hinge", lambda *arguments: 1.01 * peers.one_class(arguments[0]))
    with pytest.raises(AssertionError, match="plain loop: relative error"):
        engine.run(SMALL, CPU, rounds=1)


def test_the_products_that_are_needed() -> None:
    """Counted by hand for one row of the reference: forward 3, backward 2 of the first two layers and 1 of the head."""
    case = replace(engine.CASES[1], n_support=1, n_query=0, inner_steps=1)
    assert case.flops == 2 * (2 * 64 * 128 + 3 * 128 * 64 + 2 * 64 * 16)
    outer = replace(engine.CASES[1], n_support=0, n_query=1, inner_steps=1)
    assert outer.flops == 2 * (2 * 64 * 128 + 3 * 128 * 64 + 3 * 64 * 16)


def test_the_products_that_folding_leaves() -> None:
    """A forward and a descending product of both layers, one pull, and the metric on what the head moved by."""
    case = replace(engine.CASES[1], n_support=100, n_query=0, inner_steps=1)
    both_ends = 128 * 16 * 16  # at the outer loss it is G Dᵀ
    assert case.taken == 2 * (100 * (2 * 64 * 128 + 3 * 128 * 16) + 2 * both_ends)
    wide = replace(case, widths=(64, 128, 64, 65))
    assert wide.taken == wide.flops
