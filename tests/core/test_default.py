"""The default algorithm and its parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from mdml_fast import MDMLDetector
from mdml_fast.calibration import left_out_by
from mdml_fast.data.views import VIEWS, Views
from mdml_fast.meta.default import DefaultConfig, DefaultModel
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.fusion import FusionConfig, fuse, learn_weights, prior_weights
from mdml_fast.meta.model import TrainingRows
from mdml_fast.meta.neighbourhood import _mean_where
from mdml_fast.meta.neighbours import neighbour_distances
from mdml_fast.meta.tails import Tails
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


def test_the_anchor_rules_where_normals_are_few() -> None:
    config = FusionConfig()
    assert prior_weights(6, 10**6, config)[0] == pytest.approx(0.6, abs=1e-3)
    assert prior_weights(6, 10, config)[0] > 0.9
    assert prior_weights(6, 10, config).sum() == pytest.approx(1)


def test_trees_walk_as_scikit_learn_does() -> None:
    rows, labels = data()
    rows = rows.astype(np.float32)
    is_anomaly = labels != "ok"
    left_out = np.arange(300) % 3
    head, held_out = TreeHead.fit(rows[~is_anomaly], left_out, rows[is_anomaly], 30, 5, CPU)
    new = np.random.default_rng(1).normal(scale=3, size=(400, 6)).astype(np.float32)
    expected = []
    for learner in (0, 1):
        kept = np.r_[left_out != learner, np.ones(40, dtype=bool)]
        forest = ExtraTreesClassifier(15, class_weight="balanced", random_state=5 + learner).fit(
            rows[kept], is_anomaly[kept]
        )
        expected.append(forest.predict_proba(new)[:, 1])
        others = forest.predict_proba(rows[:300][left_out == learner])[:, 1]
        np.testing.assert_allclose(held_out[torch.as_tensor(left_out == learner)], others, atol=1e-6)
    np.testing.assert_allclose(head.probability(torch.as_tensor(new)), np.mean(expected, axis=0), atol=1e-6)
    beyond = excess(head.probability(torch.as_tensor(rows)), held_out.quantile(0.98))
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
    losses = fitted.model_.losses
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    encoders = {name: value for name, value in fitted.model_.to_tensors().items() if name.startswith("encoders.")}
    for direction in range(8):
        assert encoders["encoders.outer.weight"][direction].abs().max() > 0


def test_distances_are_averaged_over_the_folds_that_learned_nothing_from_a_row() -> None:
    # Two folds of two views; the first value of each fold belongs to the fold as a whole.
    values = torch.tensor([[[1.0] * 4, [2.0] * 4, [3.0] * 4], [[5.0] * 4, [6.0] * 4, [7.0] * 4]])
    first, second, both = [True, True], [False, False], [True, False]
    counted = torch.tensor([[first, second, both, second], [second, second, first, first]]).transpose(1, 2)
    means = _mean_where(values, counted)
    assert means[:, 0].tolist() == [1, 2, 3]
    # Where no fold counts, both do.
    assert means[:, 1].tolist() == [3, 4, 5]
    # In the first fold one view alone counts.
    assert means[:, 2].tolist() == [3, 4, 7]
    assert means[:, 3].tolist() == [5, 6, 7]


def test_a_normal_is_scored_by_the_learner_that_left_it_out() -> None:
    rows, labels = data()
    normals, anomalies = rows[:300].astype(np.float32), rows[300:].astype(np.float32)

    def fit(normals: np.ndarray) -> DefaultModel:
        training = TrainingRows(normals, labels[:300], anomalies, labels[300:])
        return DefaultModel.fit(training, FAST, seed=0, device=CPU)

    model = fit(normals)
    assert model.held_out is not None
    assert len(set(model.held_out.positions.tolist())) == 150
    place = int(model.held_out.positions[0])
    altered = normals.copy()
    altered[place] = 30
    changed = fit(altered)
    before, after = model.to_tensors(), changed.to_tensors()
    same = [torch.equal(before[f"views.{fold}.knots"], after[f"views.{fold}.knots"]) for fold in (0, 1)]
    assert sum(same) == 1  # one learner left the altered row out: its views and encoders are as they were
    other = slice(0, 4) if same[0] else slice(4, 8)
    assert torch.equal(before["encoders.outer.weight"][other], after["encoders.outer.weight"][other])
    assert not torch.equal(before["encoders.outer.weight"], after["encoders.outer.weight"])

    known = changed._families[0]
    assert changed.held_out is not None
    counted = torch.zeros(8, 1, dtype=torch.bool)
    counted[other] = True
    row = torch.as_tensor(altered[place : place + 1])
    itself = (known.neighbourhood.normals == row).all(1)
    distances = known.neighbourhood.distances(row, known.neighbourhood.families[itself], counted)
    fused = fuse(changed._weights, known.tails.score(distances), FAST.fusion)
    assert float(fused) <= -changed.held_out.scores[0] <= float(fused + changed._head_gain)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda codes: len(set(codes)) > 1))
def test_groups_are_left_out_whole_and_each_learner_leaves_some_out(codes: list[int]) -> None:
    largest = max(map(codes.count, codes))
    for share in (0.5, 0.25):
        left_out = left_out_by(np.array(codes), share, 0)
        pairs = set(zip(codes, left_out.tolist(), strict=True))
        assert len(pairs) == len(set(codes))
        for learner in (0, 1):
            assert abs((left_out == learner).sum() - share * len(codes)) <= largest / 2
            assert share < 0.5 or learner in left_out
        assert share < 0.5 or 2 not in left_out


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


def test_a_large_family_is_learned_from_in_part() -> None:
    from mdml_fast.meta.default import _at_most_of_each

    labels = np.array(["a"] * 50 + ["b"] * 3, dtype=object)
    kept = _at_most_of_each(labels, 10, seed=0)
    assert (labels[kept] == "a").sum() == 10
    assert (labels[kept] == "b").sum() == 3
    assert len(_at_most_of_each(labels[:0], 10, seed=0)) == 0
