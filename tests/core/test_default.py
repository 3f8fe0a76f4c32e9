"""The default algorithm and its parts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import softplus

from mdml_fast import MDMLDetector
from mdml_fast.baselines import mdml
from mdml_fast.data.open_sets import open_sets
from mdml_fast.data.views import VIEWS, Views
from mdml_fast.evaluation import EvaluationProtocol, evaluate
from mdml_fast.meta.default import DefaultConfig, DefaultModel
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.ensemble import Ensemble, EnsembleConfig
from mdml_fast.meta.fusion import FusionConfig, cross_fused, fuse, learn_weights, prior_weights
from mdml_fast.meta.left_out import BOTH, FIRST, NEITHER, SECOND, left_out_by_both, left_out_in_turn
from mdml_fast.meta.model import TrainingRows
from mdml_fast.meta.neighbours import neighbour_distances
from mdml_fast.meta.tails import FOLDS, Tails
from mdml_fast.meta.trees import TreeHead, _rounded_down, excess

CPU = torch.device("cpu")
FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10),
    n_trees=20,
)


def data(seed: int = 0, n: int = 300, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Normals around 0; 'up' and 'side' are anomaly classes."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n + 40, d))
    rows[n : n + 20, 0] += 6
    rows[n + 20 :, -1] -= 6
    return rows, np.array(["ok"] * n + ["up"] * 20 + ["side"] * 20)


@pytest.fixture(scope="module")
def fitted() -> MDMLDetector:
    return MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])


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


# --- neighbours, tails, weights, trees ---


@pytest.mark.parametrize("n", [3, 40, 1003])
def test_neighbour_distances_are_those_of_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(0)
    rows, references = (rng.normal(size=(2, size, 4)).astype(np.float32) for size in (50, n))
    ours = neighbour_distances(torch.as_tensor(rows), torch.as_tensor(references), 3)
    for embedding in range(2):
        peer = NearestNeighbors(n_neighbors=3).fit(references[embedding]).kneighbors(rows[embedding])[0].mean(1)
        np.testing.assert_allclose(ours[embedding], peer, rtol=1e-4)


def test_a_row_is_not_compared_with_its_own_family() -> None:
    rows = torch.tensor([[[0.0], [0.1], [5.0], [6.0]]])
    families = torch.tensor([0, 0, 1, 2])
    distances = neighbour_distances(rows, rows, 2, families=families, reference_families=families)
    torch.testing.assert_close(distances[0], torch.tensor([5.5, 5.4, 2.95, 3.45]))
    # Of three rows of one family and one of another, that one is all that the three can be compared with.
    families = torch.tensor([0, 0, 0, 1])
    distances = neighbour_distances(rows, rows, 2, families=families, reference_families=families)
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
    labels = np.array([f"family {i % 3}" for i in range(30)], dtype=object)
    config = FusionConfig(steps=40)
    prior = prior_weights(6, 500, config).double()
    quantiles = torch.tensor(config.quantiles, dtype=torch.float64)
    logits = prior.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=config.rate)
    for _ in range(config.steps):
        weights = logits.softmax(0)
        gaps = fuse(weights, normals, config).quantile(quantiles)[:, None] - fuse(weights, anomalies, config)
        optimizer.zero_grad()
        (softplus(gaps).mean() + config.pull / 3 * (weights @ (weights / prior).log())).backward()
        optimizer.step()
    found = learn_weights(normals, anomalies, labels, prior, config)
    torch.testing.assert_close(found, logits.detach().softmax(0), rtol=1e-9, atol=1e-12)
    assert (found - prior).abs().max() > 0.05


@pytest.mark.parametrize("n", [1, 2, 41])
def test_a_normal_is_fused_by_weights_that_were_learned_without_it(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    normals, anomalies = (torch.rand(6, k, generator=generator) + 0.01 for k in (n, 20))
    labels, config = np.array(["a"] * 10 + ["b"] * 10, dtype=object), FusionConfig()
    prior = prior_weights(6, 500, config)
    others = torch.arange(n) % 2 == 1 if n > 1 else torch.ones(1, dtype=torch.bool)
    weights = learn_weights(normals[:, others], anomalies, labels, prior, config)
    expected = fuse(weights, normals[:, ::2], config)
    fused = cross_fused(normals, torch.arange(n), anomalies, labels, prior, config)
    torch.testing.assert_close(fused[::2], expected)


def test_the_anchor_rules_where_normals_are_few() -> None:
    config = FusionConfig()
    assert prior_weights(6, 10**6, config)[0] == pytest.approx(0.6, abs=1e-3)
    assert prior_weights(6, 10, config)[0] > 0.9
    assert prior_weights(6, 10, config).sum() == pytest.approx(1)


def test_trees_walk_as_scikit_learn_does() -> None:
    rows, labels = data()
    rows = rows.astype(np.float32)
    is_anomaly = labels != "ok"
    head = TreeHead.fit(rows[~is_anomaly], rows[is_anomaly], 30, 5, CPU)
    new = np.random.default_rng(1).normal(scale=3, size=(400, 6)).astype(np.float32)
    forest = ExtraTreesClassifier(30, class_weight="balanced", random_state=5).fit(rows, is_anomaly)
    expected = forest.predict_proba(new)[:, 1]
    np.testing.assert_allclose(head.probability(torch.as_tensor(new)), expected, atol=1e-6)
    fresh = torch.as_tensor(data(1)[0][:300], dtype=torch.float32)
    beyond = excess(head.probability(torch.as_tensor(rows)), head.probability(fresh).quantile(0.98))
    assert (beyond[~is_anomaly] > 0).float().mean() < 0.05
    assert (beyond[is_anomaly] > 0.3).all()


def test_thresholds_in_float32_compare_as_in_float64() -> None:
    thresholds = np.array([0.1, np.nextafter(1.0, 2), -0.3])
    rounded = _rounded_down(thresholds)
    assert rounded.dtype == np.float32
    near = np.concatenate([rounded, np.nextafter(rounded, np.float32(9)), np.nextafter(rounded, np.float32(-9))])
    np.testing.assert_array_equal(near[:, None] <= rounded, near[:, None].astype(np.float64) <= thresholds)


# --- the model ---


def test_both_seen_and_unseen_classes_are_found(fitted: MDMLDetector) -> None:
    rows, labels = data(seed=1)
    unseen = np.random.default_rng(2).normal(loc=[0, 0, 5, 0, 0, 0], size=(50, 6))
    scores, unseen_scores = fitted.score_samples(rows), fitted.score_samples(unseen)
    assert roc_auc_score(labels == "ok", scores) > 0.99
    normal_scores = scores[labels == "ok"]
    is_normal = np.r_[np.ones(len(normal_scores)), np.zeros(50)]
    assert roc_auc_score(is_normal, np.r_[normal_scores, unseen_scores]) > 0.95


def test_training_lowers_the_loss_of_every_direction_together(fitted: MDMLDetector) -> None:
    losses = fitted.losses_
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    encoders = {name: value for name, value in fitted.model_.to_tensors().items() if name.startswith("encoders.")}
    for direction in range(8):
        assert encoders["encoders.outer.weight"][direction].abs().max() > 0


def test_distances_are_averaged_over_the_directions_that_learned_nothing_from_a_row(fitted: MDMLDetector) -> None:
    neighbourhood = fitted.model_._families[0].neighbourhood
    rows = torch.as_tensor(data(1)[0][:4], dtype=torch.float32)
    anchors, directions = neighbourhood.by_direction(rows)
    counted = torch.zeros(2, len(VIEWS), 4, dtype=torch.bool)
    counted[0, :, 0] = True
    counted[1, :, 1] = True
    counted[0, 0, 2] = counted[1, 1:, 2] = True
    means = neighbourhood.distances(rows, counted=counted.flatten(0, 1))
    torch.testing.assert_close(means[:2], anchors)
    torch.testing.assert_close(means[2:, 0], directions[0, :, 0])
    torch.testing.assert_close(means[2:, 1], directions[1, :, 1])
    torch.testing.assert_close(means[2, 2], directions[0, 0, 2])
    torch.testing.assert_close(means[3:, 2], directions[1, 1:, 2])
    # Where none does, both do.
    torch.testing.assert_close(means[2:, 3], directions[:, :, 3].mean(0))
    torch.testing.assert_close(neighbourhood.distances(rows)[2:], directions.mean(0))


def test_nothing_is_learned_from_a_normal_to_calibrate_on() -> None:
    rows, labels = data()
    normals, anomalies = rows[:300].astype(np.float32), rows[300:].astype(np.float32)
    held_out = np.arange(300) % 3 == 0

    def fit(normals: np.ndarray) -> DefaultModel:
        training = TrainingRows(normals, labels[:300], held_out, anomalies, labels[300:])
        return DefaultModel.fit(training, FAST, seed=0, device=CPU)

    model = fit(normals)
    assert model.held_out is not None
    assert sorted(model.held_out.positions.tolist()) == np.flatnonzero(held_out).tolist()
    place = int(model.held_out.positions[0])
    altered = normals.copy()
    altered[place] = 30
    changed = fit(altered)
    before, after = model.to_tensors(), changed.to_tensors()
    learned = [name for name in before if name.startswith(("views.", "encoders.", "trees."))]
    assert len(learned) > 10
    assert all(torch.equal(before[name], after[name]) for name in learned)
    assert not torch.equal(before["normals0.distances"], after["normals0.distances"])
    # Nor is it held against itself: among the others' tails it is stranger than by those it is part of.
    assert changed.held_out is not None
    assert -changed.held_out.scores[0] > -changed.score(altered[place : place + 1])[0]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda codes: len(set(codes)) > 1))
def test_groups_are_left_out_whole_and_each_model_leaves_some_out(codes: list[int]) -> None:
    largest = max(map(codes.count, codes))
    left_out = left_out_in_turn(np.array(codes, dtype=object), 0)
    assert len(set(zip(codes, left_out.tolist(), strict=True))) == len(set(codes))
    assert set(left_out.tolist()) == {FIRST, SECOND}
    assert abs((left_out == FIRST).sum() - len(codes) / 2) <= largest / 2


def test_without_groups_both_models_leave_a_quarter_out() -> None:
    left_out = left_out_by_both(300, 19, 0)
    assert dict(zip(*np.unique(left_out, return_counts=True), strict=True)) == {NEITHER: 225, BOTH: 75}


@pytest.mark.parametrize(
    ("n", "d", "classes"),
    [(20, 6, ["up", "side"]), (100, 1, ["up"]), (100, 2000, ["up"]), (100, 6, ["one row"]), (100, 6, [])],
    ids=["20 normals", "1 feature", "2000 features", "1 anomaly", "no anomalies"],
)
def test_extreme_sizes_train_and_score(n: int, d: int, classes: list[str]) -> None:
    rows, labels = data(n=n, d=d)
    kept = np.arange(n + 1) if classes == ["one row"] else np.flatnonzero(np.isin(labels, ["ok", *classes]))
    detector = MDMLDetector(FAST, random_state=0).fit(rows[kept], labels[kept], normal=["ok"])
    new, new_labels = data(seed=1, d=d)
    scores = detector.score_samples(new)
    assert np.isfinite(scores).all()
    if d < 2000:
        assert roc_auc_score(new_labels != "side", scores) > (0.6 if n == 20 else 0.8)


def test_the_same_seed_gives_the_same_bytes_on_one_thread_and_on_two() -> None:
    threads, weights = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            detector = MDMLDetector(FAST, random_state=3).fit(*data(), normal=["ok"])
            tensors = detector.model_.to_tensors() | {"scores": torch.as_tensor(detector.score_samples(data(1)[0]))}
            weights.append({name: value.numpy().tobytes() for name, value in tensors.items()})
    finally:
        torch.set_num_threads(threads)
    assert weights[0] == weights[1]
    other = MDMLDetector(FAST, random_state=4).fit(*data(), normal=["ok"]).model_.to_tensors()
    assert other["encoders.outer.weight"].numpy().tobytes() != weights[0]["encoders.outer.weight"]


def test_a_saved_model_scores_the_same(fitted: MDMLDetector, tmp_path: Path) -> None:
    rows, _ = data(seed=1)
    fitted.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    assert loaded.model_.config == FAST
    np.testing.assert_array_equal(loaded.score_samples(rows), fitted.score_samples(rows))
    np.testing.assert_array_equal(loaded.p_value(rows), fitted.p_value(rows))


def test_scores_do_not_depend_on_what_else_is_scored(fitted: MDMLDetector) -> None:
    rows, _ = data(seed=1)
    np.testing.assert_allclose(fitted.score_samples(rows[:7]), fitted.score_samples(rows)[:7], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    class CutOffError(Exception):
        pass

    def cut_off(step: int, n_steps: int, loss: float) -> None:
        if step == 4:
            raise CutOffError

    path = tmp_path / "run.checkpoint"
    whole = MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])
    with pytest.raises(CutOffError):
        MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"], progress=cut_off, checkpoint=path)
    resumed = MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"], checkpoint=path, resume=True)
    for name, value in whole.model_.to_tensors().items():
        assert torch.equal(value, resumed.model_.to_tensors()[name]), name


def test_of_many_normals_a_sample_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    learned_from: list[np.ndarray] = []
    fit = Views.fit

    def counted(normals: np.ndarray) -> Views:
        learned_from.append(normals)
        return fit(normals)

    monkeypatch.setattr(Views, "fit", counted)
    detector = MDMLDetector(replace(FAST, training_normals=200, judged_normals=150), random_state=0)
    rows, labels = data(n=1000)
    detector.fit(rows, labels, normal=["ok"])
    assert [len(rows) for rows in learned_from] == [200]
    assert len(detector.calibration_.scores) == 150
    held_out = detector.kept_.training().normals[detector.model_.held_out.positions]
    assert not {row.tobytes() for row in learned_from[0]} & {row.tobytes() for row in held_out}


def test_a_large_family_is_learned_from_in_part() -> None:
    from mdml_fast.meta.default import _at_most_of_each

    labels = np.array(["a"] * 50 + ["b"] * 3, dtype=object)
    kept = _at_most_of_each(labels, 10, seed=0)
    assert (labels[kept] == "a").sum() == 10
    assert (labels[kept] == "b").sum() == 3
    assert len(_at_most_of_each(labels[:0], 10, seed=0)) == 0


def test_embeddings_are_the_encoders_own_in_whatever_thread() -> None:
    generator = torch.Generator().manual_seed(0)
    encoders = [ResidualEncoder(5, 7) for _ in range(2 * len(VIEWS))]
    for parameter in (value for encoder in encoders for value in encoder.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    weights = {
        name: torch.stack([encoder.state_dict()[name] for encoder in encoders]) for name in encoders[0].state_dict()
    }
    ensemble = Ensemble(weights, [[]] * len(encoders))
    rows = torch.randn(len(VIEWS), 400, 5, generator=generator)
    expected = torch.stack([encoder(own) for encoder, own in zip(encoders, rows.repeat(2, 1, 1), strict=True)])
    with ThreadPoolExecutor(4) as pool:
        for embedded in pool.map(ensemble.embed, [rows] * 40):
            torch.testing.assert_close(embedded, expected.detach(), rtol=1e-5, atol=1e-6)


def test_bfloat16_finds_what_float32_finds() -> None:
    """The digits: unseen and seen classes, the default constants."""
    methods = {dtype: mdml("default", "cpu", dtype) for dtype in ("float32", "bfloat16")}
    results = evaluate(open_sets()["digits"](), methods, EvaluationProtocol(splits=1, seeds=1))["results"]
    exact, rough = (results[dtype]["splits"][0] for dtype in ("float32", "bfloat16"))
    assert exact != rough
    for kind in ("auroc_unseen", "auroc_seen"):
        assert rough[kind] == pytest.approx(exact[kind], abs=0.005)
