"""What the default algorithm is made of: views, neighbours, tails, weights, trees."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mdml_kernels.native import loader
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.neighbors import NearestNeighbors
from support import normals_and_two_classes
from torch import Tensor
from torch.nn.functional import softplus

from mdml_fast.data.views import VIEWS, Views
from mdml_fast.meta import distance_trees
from mdml_fast.meta.distance_trees import DistanceTrees, asked_of
from mdml_fast.meta.encoders import Encoders
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
from mdml_fast.meta.neighbourhood import Neighbourhood, NeighbourhoodConfig
from mdml_fast.meta.neighbours import References
from mdml_fast.meta.scoring import LEAST_HEAD_INDEX, family_tails, judged_by_halves
from mdml_fast.meta.tails import FOLDS, LEAST_INDEX, Tails
from mdml_fast.meta.trees import TreeHead, Trees, _rounded_down, grow, odds

CPU = torch.device("cpu")


# --- views ---


def test_views_have_mean_variance_one_and_a_centre_near_zero() -> None:
    normals = np.random.default_rng(0).gamma(2, size=(2000, 5)).astype(np.float32)
    rows = Views.fit(normals).transform(torch.as_tensor(normals))
    assert rows.shape == (4, 2000, 5)
    torch.testing.assert_close(rows.var(dim=1).mean(1), torch.ones(4), rtol=1e-3, atol=0)
    assert rows.mean(1).abs().max() < 0.05
    whitened = rows[VIEWS.index("whitened")]
    torch.testing.assert_close(whitened.T.cov(), torch.eye(5), rtol=0, atol=0.05)


def test_the_cdf_view_is_the_mid_rank_and_grows_beyond_the_range() -> None:
    normals = np.array([[0.0], [0.0], [1.0], [2.0]], dtype=np.float32).repeat(10, axis=0)
    views = Views.fit(normals)
    cdf = views.transform(torch.tensor([[0.0], [1.0], [2.0], [1.5], [3.0], [-1.0]]))[VIEWS.index("cdf"), :, 0]
    level = cdf / views.tensors["scales"][1] / 12**0.5 + 0.5
    torch.testing.assert_close(level[:4], torch.tensor([0.25, 0.625, 0.875, 0.75]))
    assert cdf[4] > cdf[2]
    assert cdf[5] < cdf[0]


def test_views_of_a_feature_that_never_varies_are_finite() -> None:
    normals = np.c_[np.zeros(30), np.arange(30)].astype(np.float32)
    assert Views.fit(normals).transform(torch.tensor([[0.0, 3.0], [5.0, 3.0]])).isfinite().all()


@pytest.mark.parametrize(("n", "d"), [(500, 12), (20, 40), (500, 1)])
def test_rows_are_whitened_by_the_covariance_of_ledoit_and_wolf(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.tanh(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5).astype(np.float32)  # nothing to clip
    whitening = Views.fit(rows).tensors["whitening"].double().numpy()
    covariance = LedoitWolf().fit(rows.astype(float)).covariance_
    np.testing.assert_allclose(whitening @ covariance @ whitening, np.eye(d), atol=2e-5)


def test_compiled_views_are_those_of_torch_and_of_each_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    kinds = [np.zeros(900), rng.random(900) < 0.1, rng.integers(0, 9, 900), *rng.standard_t(2, (20, 900))]
    views = Views.fit(np.stack(kinds, axis=1).astype(np.float32)[:700])
    rows = torch.as_tensor(np.stack(kinds, axis=1), dtype=torch.float32)
    rows[800:820], rows[820:840], rows[840] = 40 * rows[800:820], views.tensors["knots"].T[:20], torch.nan
    compiled = views.transform(rows)
    alone = torch.cat([views.transform(row[None]) for row in rows[790:]], dim=1)
    assert torch.equal(compiled[:, 790:].nan_to_num(), alone.nan_to_num())
    monkeypatch.setattr(loader, "serves", lambda *_: False)
    torch.testing.assert_close(compiled, views.transform(rows), rtol=1.2e-7, atol=1e-12, equal_nan=True)
    assert compiled.isnan().any(0).any(1).nonzero().tolist() == [[840]]


# --- neighbours, tails, weights, trees ---


@pytest.mark.parametrize("n", [3, 40, 1003])
def test_neighbour_distances_are_those_of_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(0)
    rows, references = (rng.normal(size=(2, size, 4)).astype(np.float32) for size in (50, n))
    ours = References(torch.as_tensor(references)).distances(torch.as_tensor(rows), 3)
    for embedding in range(2):
        peer = NearestNeighbors(n_neighbors=3).fit(references[embedding]).kneighbors(rows[embedding])[0].mean(1)
        np.testing.assert_allclose(ours[embedding], peer, rtol=1e-4)


def test_a_row_is_not_compared_with_its_own_family() -> None:
    rows = torch.tensor([[[0.0], [0.1], [5.0], [6.0]]])
    families = torch.tensor([0, 0, 1, 2])
    distances = References(rows).distances(rows, 2, families=families, reference_families=families)
    torch.testing.assert_close(distances[0], torch.tensor([5.5, 5.4, 2.95, 3.45]))
    # Of three rows of one family and one of another, that one is all that the three can be compared with.
    families = torch.tensor([0, 0, 0, 1])
    distances = References(rows).distances(rows, 2, families=families, reference_families=families)
    torch.testing.assert_close(distances[0], torch.tensor([6.0, 5.9, 1.0, 3.45]))


def test_tail_scores_are_minus_log_shares_and_a_pareto_tail_is_found() -> None:
    rng = np.random.default_rng(0)
    tails = Tails.fit(torch.as_tensor(rng.pareto(3, size=(1, 20_000)) + 1))
    x = torch.tensor([[1.2, 2.0, 5.0, 50.0]], dtype=torch.float64)
    torch.testing.assert_close(tails.score(x)[0], 3 * x[0].log(), rtol=0.1, atol=0.02)


def test_tails_of_equal_distances_are_finite_and_rank_what_is_beyond() -> None:
    scores = Tails.fit(torch.ones(1, 30)).score(torch.tensor([[0.0, 1.0, 1.1, 2.0]]))[0]
    assert scores.isfinite().all()
    assert (scores[1:].diff() > 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 61])
def test_held_out_rows_are_scored_between_their_own_tails_and_those_of_the_others(n: int) -> None:
    distances, rows = torch.as_tensor(np.random.default_rng(0).pareto(3, size=(2, n)) + 1), torch.arange(n)
    for row in range(min(n, 3)):
        stranger = distances.clone()
        stranger[:, row] *= 100
        tails, place = Tails.fit(stranger), stranger[:, row : row + 1]
        others = distances[:, rows % FOLDS != row] if n > 1 else stranger
        expected = (tails.score(place) + Tails.fit(others).score(place)) / 2
        torch.testing.assert_close(tails.held_out_scores(stranger, rows)[:, row : row + 1], expected)
        assert n < 3 or (expected > tails.score(place)).all()


def test_rows_of_a_family_are_scored_by_the_tails_of_the_others_where_those_are_most() -> None:
    distances = torch.as_tensor(np.random.default_rng(0).pareto(3, size=(2, 100)) + 1)
    families = torch.tensor([0] * 60 + [1] * 20 + [2] * 20)
    tails = Tails.fit(distances)
    scores = tails.held_out_scores(distances, families)
    torch.testing.assert_close(scores[:, :60], tails.score(distances)[:, :60])
    for own in (families == 1, families == 2):
        torch.testing.assert_close(scores[:, own], Tails.fit(distances[:, ~own]).score(distances[:, own]))


def test_tails_that_begin_at_nothing_are_finite() -> None:
    """Nearly all normals are copies of each other: distances of 0, then far rows."""
    distances = torch.cat([torch.zeros(1, 90), torch.linspace(1, 3, 10).unsqueeze(0)], dim=1)
    scores = Tails.fit(distances).score(torch.tensor([[0.0, 1e-30, 2.0, 1e30]]))[0]
    assert scores.isfinite().all()
    assert (scores.diff() > 0).all()


def test_of_normals_that_are_mostly_copies_the_others_tell_how_the_tail_falls() -> None:
    """Not how far these are from zero, beside which nothing would be far out."""
    others = torch.linspace(1, 3, 10).unsqueeze(0)
    tails = Tails.fit(torch.cat([torch.zeros(1, 190), others], dim=1))
    assert tails.index < others.log().mean() + 1e-6
    zero, small, far, farther = tails.score(torch.tensor([[0.0, 1e-6, 3.0, 30.0]]))[0]
    assert zero < 0.1 < small < far < farther - 5
    copies = Tails.fit(torch.zeros(1, 50)).score(torch.tensor([[0.0, 1e-6, 1.0]]))[0]
    assert copies.isfinite().all()
    assert (copies.diff() > 0).all()


def test_the_tail_of_few_rows_takes_its_shape_from_that_of_many() -> None:
    """Distances of which the outermost 40 % spread wider than a Pareto law's would, for what they do farther out."""
    generator = torch.Generator().manual_seed(0)
    many, few = (torch.randn(n, rows, generator=generator).mul(0.2).exp() for n, rows in ((1, 20_000), (40, 50)))
    rare = many.quantile(0.999).expand(40, 1)
    shape = Tails.fit(many.expand(40, -1))
    alone, shaped = (Tails.fit(few, shape=given) for given in (None, shape))
    assert (alone.n_tail, shaped.n_tail) == (20, 10)
    assert alone.score(rare).mean() < 5.5 < shaped.score(rare).mean() < 8  # it is log 1000 = 6.9


def test_a_tails_shape_is_taken_only_from_enough_rows_and_changes_no_pareto_law() -> None:
    generator = torch.Generator().manual_seed(0)
    pareto = torch.rand(200, 200, generator=generator).pow(-0.3)
    assert Tails.fit(pareto).part_of_index(0.2, 0.4).mean() > 0.93  # at most 1 of each
    assert Tails.fit(torch.rand(1, 2000, generator=generator)).part_of_index(0.1, 0.4) == 0.5
    assert Tails.fit(torch.ones(1, 200)).part_of_index(0.1, 0.4) == 1
    few, enough = (torch.rand(1, n, generator=generator) for n in (50, 400))
    for distances, shape in ((few, few[:, :40]), (enough, pareto[:1])):
        alone, shaped = Tails.fit(distances), Tails.fit(distances, shape=Tails.fit(shape))
        assert torch.equal(alone.index, shaped.index)
        assert torch.equal(alone.threshold, shaped.threshold)


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


def test_each_half_of_a_class_is_judged_by_trees_that_learned_from_the_other() -> None:
    rng = np.random.default_rng(0)
    normals, judged, rows = (rng.normal(size=(n, 4)).astype(np.float32) for n in (200, 100, 13))
    labels = np.array(["a"] * 12 + ["b"], dtype=object)
    halves = judged_by_halves(normals, rows, labels, torch.as_tensor(judged), 20, 3)
    assert (np.stack([half.rows for half in halves]).sum(0) == 1).all()
    assert [int(half.rows[:12].sum()) for half in halves] == [6, 6]
    for half in halves:
        head = TreeHead.of(grow(normals, rows[~half.rows], 20, 3), CPU)
        by_head = [odds(head.probability(torch.as_tensor(some)))[None] for some in (judged, rows[half.rows])]
        tails = Tails.fit(by_head[0], LEAST_HEAD_INDEX)
        torch.testing.assert_close(half.normals, tails.score(by_head[0])[0])
        torch.testing.assert_close(half.anomalies, tails.score(by_head[1])[0])
    # They look like normals, so that only trees which learned from them would tell them.
    assert 0.2 < np.concatenate([missed_shares(half.normals, half.anomalies) for half in halves]).mean() < 0.8


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


def test_one_trees_doubt_is_no_alarm_where_the_trees_find_all_normals_normal() -> None:
    distances = torch.rand(6, 200, generator=torch.Generator().manual_seed(0)) + 1
    no_doubt = odds(torch.zeros(1, 200))
    tails = family_tails(torch.cat([distances, no_doubt]))
    some, certain = (tails.score(torch.cat([distances[:, :1], odds(p)]))[-1] for p in torch.tensor([[[0.01]], [[1.0]]]))
    assert 3 < some < 6 < 15 < certain < 25
    torch.testing.assert_close(tails.index[:6], Tails.fit(distances).index)
    held_out = tails.held_out_scores(torch.cat([distances, no_doubt]), torch.arange(200))
    assert held_out[-1].max() < 1
    one_doubt = no_doubt.clone()
    one_doubt[0, 7] = odds(torch.tensor(0.01))
    held_out = tails.held_out_scores(torch.cat([distances, one_doubt]), torch.arange(200))
    assert 3 < held_out[-1, 7] < 6
    equal = family_tails(torch.ones(6, 200))
    assert (equal.index == LEAST_INDEX).all()


def test_how_far_out_a_distance_is_has_no_unit_and_is_a_half_where_the_tail_begins() -> None:
    distances = torch.rand(6, 200, generator=torch.Generator().manual_seed(0)) + 1
    tails = Tails.fit(distances)
    assert torch.equal(tails.outlyingness(tails.threshold), torch.full((6, 1), 0.5))
    far = tails.outlyingness(torch.tensor([[0.0, 1.0, 2.0, 1e30]]).expand(6, -1))
    assert (far[:, 0] == 0).all()
    assert (far.diff(dim=1) > 0).all()
    assert (far[:, -1] == 1).all()
    torch.testing.assert_close(Tails.fit(8 * distances).outlyingness(8 * distances), tails.outlyingness(distances))
    copies = Tails.fit(torch.zeros(6, 200))
    assert copies.outlyingness(torch.tensor([[0.0, 1e-3]]).expand(6, -1)).tolist() == [[0.0, 1.0]] * 6


def test_trees_that_may_ask_distances_find_a_class_that_no_tree_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    normals, others, seen, unseen = (torch.randn(n, 8, generator=generator) for n in (300, 100, 30, 30))
    seen[:, 0] += 6
    unseen[:, 1] += 6
    # They start as the identity.
    sizes = {"inner.weight": (4, 1, 8), "inner.bias": (4, 1), "outer.weight": (4, 8, 1), "log_scale": (4, 8)}
    encoders = Encoders({name: torch.zeros(size) for name, size in sizes.items()})
    views, families = Views.fit(normals.numpy()), torch.arange(300)
    near = Neighbourhood(NeighbourhoodConfig(), views, encoders, normals, families, torch.zeros(8))
    tails = Tails.fit(near.distances(near.place(normals), families))

    def missed_by(trees: Trees) -> float:
        head = TreeHead.of(trees, CPU)
        asked = [asked_of(rows, tails, near.distances(near.place(rows))) for rows in (others, unseen)]
        return float(missed_shares(*map(head.probability, asked)).mean())

    assert missed_by(DistanceTrees().grow(near, normals, seen, 0)) < 0.02
    assert missed_by(grow(normals.numpy(), seen.numpy(), 100, 0)) > 0.2
    # Of a group a normal is like the anomalies: what is near to it is of its group too.
    grouped = Neighbourhood(NeighbourhoodConfig(), views, encoders, normals, families // 150, torch.zeros(8))
    alike = (DistanceTrees(3).grow(of, normals, seen, 0)[0].tree_.threshold.tolist() for of in (near, grouped))
    assert next(alike) == next(alike)

    learned_from: list[int] = []

    def counted(normals: np.ndarray, *rest: Any) -> Trees:
        learned_from.append(len(normals))
        return grow(normals, *rest)

    monkeypatch.setattr(distance_trees, "grow", counted)
    assert DistanceTrees(n=0).grow(near, normals, seen, 0) == []
    assert len(DistanceTrees(n=2, normals=50).grow(near, normals, seen, 0)) == 2
    assert learned_from == [50]


def test_trees_walk_as_scikit_learn_does() -> None:
    rows, labels = normals_and_two_classes()
    rows = rows.astype(np.float32)
    is_anomaly = labels != "ok"
    head = TreeHead.of(grow(rows[~is_anomaly], rows[is_anomaly], 30, 5), CPU)
    new = np.random.default_rng(1).normal(scale=3, size=(400, 6)).astype(np.float32)
    forest = ExtraTreesClassifier(30, class_weight="balanced", random_state=5).fit(rows, is_anomaly)
    expected = forest.predict_proba(new)[:, 1]
    np.testing.assert_allclose(head.probability(torch.as_tensor(new)), expected, atol=1e-6)
    by_head = odds(head.probability(torch.as_tensor(rows)))
    torch.testing.assert_close(by_head.aminmax().min, torch.tensor(0.01 / 1.01))
    torch.testing.assert_close(by_head.aminmax().max, torch.tensor(1.01 / 0.01), rtol=1e-4, atol=0)
    assert by_head[is_anomaly].min() > 10 > by_head[~is_anomaly].max()


def test_compiled_trees_are_those_of_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = normals_and_two_classes(n=600, d=20)
    rows = rows.astype(np.float32)
    head = TreeHead.of(grow(rows[labels == "ok"], rows[labels != "ok"], 50, 5), CPU)
    t, generator = head.tensors, torch.Generator().manual_seed(1)
    t["anomaly"] = torch.rand(t["anomaly"].shape, generator=generator)  # a sum that float32 would round
    new = 2 * torch.randn(700, 20, generator=generator)
    new[torch.arange(50), t["feature"][t["roots"]]] = t["threshold"][t["roots"]]  # as large as the first to be met
    new[::20, 0] = torch.nan
    assert head._forest(new) is not None, loader.native().reason
    probability, changes = head.probability(new), head._changes(new)
    monkeypatch.setattr(loader, "native", lambda: loader.Native(None, "the test wants none"))
    assert head._forest(new) is None
    torch.testing.assert_close(head.probability(new), probability, rtol=2**-23, atol=0)
    torch.testing.assert_close(head._changes(new), changes, rtol=0, atol=1e-6)


def test_compiled_encoders_are_pulled_back_through_as_by_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where hidden units change by next to nothing, and where a step is none."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"inner.weight": (8, 20, 30), "inner.bias": (8, 20), "outer.weight": (8, 30, 20), "log_scale": (8, 30)}
    weights = {name: 0.3 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    encoders = Encoders(weights)
    rows, steps = (torch.randn(4, 80, 30, generator=generator) for _ in range(2))
    steps[:, ::3] *= 1e-7
    steps[:, 1] = 0.0
    found = encoders.pull_back(rows, steps)
    monkeypatch.setattr(loader, "native", lambda: loader.Native(None, "the test wants none"))
    torch.testing.assert_close(encoders.pull_back(rows, steps), found, rtol=1e-3, atol=1e-4)
    # The smallest steps' own, which are lost beside the others.
    small = (slice(None), slice(None, None, 3))
    torch.testing.assert_close(1e7 * encoders.pull_back(rows, steps)[small], 1e7 * found[small], rtol=1e-2, atol=1e-2)
    assert not torch.equal(encoders.pull_back(rows, steps), found)


def test_thresholds_in_float32_compare_as_in_float64() -> None:
    thresholds = np.array([0.1, np.nextafter(1.0, 2), -0.3])
    rounded = _rounded_down(thresholds)
    assert rounded.dtype == np.float32
    near = np.concatenate([rounded, np.nextafter(rounded, np.float32(9)), np.nextafter(rounded, np.float32(-9))])
    np.testing.assert_array_equal(near[:, None] <= rounded, near[:, None].astype(np.float64) <= thresholds)
