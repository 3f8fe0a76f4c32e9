"""The head: trees of features and of distances, and what they say of rows that they did not learn from."""

from typing import Any

import numpy as np
import pytest
import torch
from mdml_kernels.native import loader
from sklearn.ensemble import ExtraTreesClassifier
from support import normals_and_two_classes

from mdml_fast.data.views import Views
from mdml_fast.meta import distance_trees
from mdml_fast.meta.distance_trees import DistanceTrees, asked_of
from mdml_fast.meta.encoders import Encoders
from mdml_fast.meta.fusion import missed_shares
from mdml_fast.meta.neighbourhood import Neighbourhood, NeighbourhoodConfig
from mdml_fast.meta.scoring import LEAST_HEAD_INDEX, family_tails, judged_by_halves
from mdml_fast.meta.tails import LEAST_INDEX, Tails
from mdml_fast.meta.trees import TreeHead, Trees, _rounded_down, grow, odds

CPU = torch.device("cpu")


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


def test_thresholds_in_float32_compare_as_in_float64() -> None:
    thresholds = np.array([0.1, np.nextafter(1.0, 2), -0.3])
    rounded = _rounded_down(thresholds)
    assert rounded.dtype == np.float32
    near = np.concatenate([rounded, np.nextafter(rounded, np.float32(9)), np.nextafter(rounded, np.float32(-9))])
    np.testing.assert_array_equal(near[:, None] <= rounded, near[:, None].astype(np.float64) <= thresholds)
