"""How scores become one: the weights of distances and of the head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from mdml_fast.meta.fusion import (
    FusionConfig,
    JudgedHalf,
    choose_and_hold_out,
    choose_weights,
    fuse,
    head_weight,
    learn_weights,
    missed,
    missed_shares,
    prior_weights,
)


def test_weights_go_to_the_score_that_finds_the_families_and_stay_near_the_anchor_otherwise() -> None:
    rng = np.random.default_rng(0)
    normals = torch.as_tensor(rng.exponential(size=(6, 500)), dtype=torch.float32)
    anomalies = torch.as_tensor(rng.exponential(size=(6, 40)), dtype=torch.float32)
    anomalies[3] += 6
    labels = np.array([f"family {i % 8}" for i in range(40)], dtype=object)
    config = FusionConfig()
    prior = prior_weights(6, 500, config)
    weights = learn_weights(normals, anomalies, labels, prior, config)
    assert weights[3] > 0.5
    assert weights.sum() == pytest.approx(1)
    one = learn_weights(normals, anomalies[:, :1], labels[:1], prior, config)
    assert prior[3] < one[3] < weights[3]
    assert torch.equal(learn_weights(normals, anomalies[:, :0], labels[:0], prior, config), prior)


def test_weights_are_those_of_automatic_differentiation() -> None:
    generator = torch.Generator().manual_seed(0)
    normals, anomalies = (torch.rand(6, n, dtype=torch.float64, generator=generator) + 0.01 for n in (203, 30))
    labels = np.array(["a"] * 20 + ["b"] * 7 + ["c"] * 3, dtype=object)
    config = FusionConfig(steps=40)
    prior = prior_weights(6, 500, config).double()
    quantiles = torch.tensor(config.quantiles, dtype=torch.float64)
    logits = prior.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=config.rate)
    for _ in range(config.steps):
        weights = logits.softmax(0)
        gaps = fuse(weights, normals, config).quantile(quantiles)[:, None] - fuse(weights, anomalies, config)
        optimizer.zero_grad()
        loss = torch.stack([softplus(gaps[:, labels == name]).mean() for name in "abc"]).mean()
        (loss + config.pull / 3 * (weights @ (weights / prior).log())).backward()
        optimizer.step()
    found = learn_weights(normals, anomalies, labels, prior, config)
    torch.testing.assert_close(found, logits.detach().softmax(0), rtol=1e-9, atol=1e-12)
    assert (found - prior).abs().max() > 0.05


def test_weights_that_rank_the_families_no_higher_than_the_anchor_give_way_to_it() -> None:
    rng = np.random.default_rng(0)
    normals = torch.as_tensor(rng.exponential(size=(6, 500)), dtype=torch.float32)
    labels = np.array([f"family {i % 4}" for i in range(40)], dtype=object)
    config, alone = FusionConfig(), torch.eye(6)[0]
    prior = prior_weights(6, 500, config)

    def chosen(*found_by: int) -> torch.Tensor:
        anomalies = torch.as_tensor(rng.exponential(0.1, size=(6, 40)), dtype=torch.float32)
        anomalies[list(found_by)] += 3
        learned = learn_weights(normals, anomalies, labels, prior, config)
        weights = choose_weights(normals, anomalies, labels, prior, config)
        assert any(torch.equal(weights, candidate) for candidate in (alone, prior, learned))
        return weights

    assert torch.equal(chosen(0), alone)  # what only the anchor sees
    assert chosen(3)[3] > prior[3]
    anomalies = normals.amax(1, keepdim=True).expand(6, 40) + 1  # all see them: nothing to tell the weights apart by
    assert torch.equal(choose_weights(normals, anomalies, labels, prior, config), alone)
    learned = learn_weights(normals, anomalies, labels, prior, config)
    assert torch.equal(choose_weights(normals, anomalies, labels, prior, replace(config, fallback=False)), learned)
    assert torch.equal(choose_weights(normals, anomalies[:, :0], labels[:0], prior, config), prior)


def test_weights_that_rank_the_families_hardly_higher_than_the_anchor_give_way_to_it() -> None:
    n, labels, prior = 10_000, np.array(["a", "b"], dtype=object), torch.full((2,), 0.5)
    normals = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    for n_above, leaves in ((2, False), (20, True)):  # of normals above the rows by the anchor; by the other score none
        anomalies = torch.tensor([float(normals[0].sort(descending=True).values[n_above]), 2.0]).repeat(2, 1).T
        weights = choose_weights(normals, anomalies, labels, prior, FusionConfig())
        assert (weights[0] < 1) == leaves


def test_the_heads_weight_is_doubled_where_rows_that_its_trees_did_not_learn_from_are_lifted() -> None:
    config, ranks = FusionConfig(), torch.arange(1.0, 1001) / 100
    labels = np.array(["a", "b", "c"] * 4, dtype=object)
    hidden = torch.full((12,), 3.0)  # of the distances, among the normals

    def of_head(by_head: list[float], labels: np.ndarray = labels, by_distances: Tensor = hidden) -> float:
        sides = np.arange(12) < 6, np.arange(12) >= 6
        halves = [JudgedHalf(own, torch.tensor(by_head), ranks.flip(0)) for own in sides]
        return head_weight(ranks, by_distances, labels, lambda: halves, config)

    assert of_head([8.0] * 6) == 4 * config.head
    assert of_head([8.0] * 6, by_distances=hidden + 30) == config.head  # all are found
    assert of_head([6.0] * 6) == 4 * config.head
    assert of_head([9.0, 9.0, 9.0, 1.0, 1.0, 1.0]) == config.head  # that may be chance
    two_families, one = (np.array(names * 6, dtype=object) for names in (["a", "b"], ["a", "a"]))
    assert of_head([8.0] * 6, two_families) == 2 * config.head

    def refuse() -> list[JudgedHalf]:
        raise AssertionError

    assert head_weight(ranks, hidden, one, refuse, config) == config.head


def test_what_is_missed_is_the_share_of_normals_above_equal_ones_by_half() -> None:
    shares = missed_shares(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0, 2.5, 4.0]))
    assert shares.tolist() == [1.0, 0.5, 0.25, 0.0]
    weights, labels = torch.eye(2)[0], np.array(["a", "b", "b"], dtype=object)
    normals, anomalies = torch.tensor([[1.0, 2.0], [9.0, 9.0]]), torch.tensor([[0.0, 3.0, 1.5], [9.0, 9.0, 9.0]])
    assert missed(weights, normals, anomalies, labels, FusionConfig()) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize("n", [1, 2, 41])
def test_half_of_a_normals_fused_score_is_by_weights_that_were_chosen_without_it(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    normals, anomalies = (torch.rand(6, k, generator=generator) + 0.01 for k in (n, 20))
    labels, config = np.array(["a"] * 10 + ["b"] * 10, dtype=object), FusionConfig()
    prior = prior_weights(6, 500, config)
    others = torch.arange(n) % 2 == 1 if n > 1 else torch.ones(1, dtype=torch.bool)
    weights, by_others = (
        choose_weights(normals[:, rows], anomalies, labels, prior, config) for rows in (slice(None), others)
    )
    expected = (fuse(weights, normals[:, ::2], config) + fuse(by_others, normals[:, ::2], config)) / 2
    chosen, fused = choose_and_hold_out(normals, torch.arange(n), anomalies, labels, prior, config)
    assert torch.equal(chosen, weights)
    torch.testing.assert_close(fused[::2], expected)


def test_the_anchor_rules_where_normals_are_few() -> None:
    config = FusionConfig()
    assert prior_weights(6, 10**6, config)[0] == pytest.approx(0.6, abs=1e-3)
    assert prior_weights(6, 10, config)[0] > 0.9
    assert prior_weights(6, 10, config).sum() == pytest.approx(1)
