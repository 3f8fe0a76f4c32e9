"""The default algorithm as a whole."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from support import normals_and_two_classes as data

from mdml_fast import MDMLDetector
from mdml_fast.baselines import mdml
from mdml_fast.data import FeatureEncoder, as_table
from mdml_fast.data.labelled import at_most_of_each
from mdml_fast.data.open_sets import open_sets
from mdml_fast.data.views import VIEWS, Views
from mdml_fast.evaluation import EvaluationProtocol, evaluate
from mdml_fast.meta import default
from mdml_fast.meta.default import DefaultConfig, DefaultModel
from mdml_fast.meta.distance_trees import DistanceTrees
from mdml_fast.meta.encoders import Encoders, ResidualEncoder
from mdml_fast.meta.ensemble import Ensemble, EnsembleConfig
from mdml_fast.meta.left_out import BOTH, FIRST, NEITHER, SECOND, left_out_by_both, left_out_in_turn
from mdml_fast.meta.model import TrainingRows
from mdml_fast.meta.scoring import head_odds, scores_by_others
from mdml_fast.meta.tails import Tails

CPU = torch.device("cpu")
FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10),
    n_trees=20,
    distance_trees=DistanceTrees(n=9),
)


@pytest.fixture(scope="module")
def fitted() -> MDMLDetector:
    return MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])


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


def test_a_labelled_row_is_scored_by_the_directions_that_learned_nothing_from_its_family(
    fitted: MDMLDetector,
) -> None:
    neighbourhood, encoders = fitted.model_._families[0].neighbourhood, fitted.model_._ensemble.encoders
    normals, rows = (torch.as_tensor(data(seed)[0][:n], dtype=torch.float32) for seed, n in ((1, 90), (2, 4)))
    families = -1 - torch.arange(len(normals))
    trained_on = [["a", "c"], *[["a", "c", "d"]] * 3, ["b", "c", "d"], *[["b", "c"]] * 3]
    labels = np.array(["a", "b", "c", "d"], dtype=object)
    placed = neighbourhood.place(normals)
    judges = (neighbourhood, Ensemble(encoders, trained_on), placed, neighbourhood.distances(placed, families))
    scores = scores_by_others(*judges, families, rows, labels)

    apart = neighbourhood.embedded_by(encoders)
    tails = Tails.fit(apart.distances(apart.place(normals), families))
    expected = tails.score(apart.distances(apart.place(rows)))
    first, second = expected[2:].view(2, len(VIEWS), 4)
    assert not torch.equal(first, second)
    torch.testing.assert_close(scores[:2], expected[:2])
    torch.testing.assert_close(scores[2:, 0], second[:, 0])
    torch.testing.assert_close(scores[2:, 1], first[:, 1])
    # Where none did, both do.
    torch.testing.assert_close(scores[2:, 2], (first + second)[:, 2] / 2)
    torch.testing.assert_close(scores[2, 3], first[0, 3])
    torch.testing.assert_close(scores[3:, 3], second[1:, 3])


def test_the_head_counts_for_more_where_it_finds_what_distances_miss() -> None:
    """Anomalies lie in a gap of one feature of sixteen, near normals of both sides; then no trees can tell them."""
    rng = np.random.default_rng(0)
    normals, anomalies, alike = (rng.normal(size=(n, 16)) for n in (500, 60, 60))
    for rows in (normals, alike):
        rows[:, 0] += np.copysign(1.5, rows[:, 0])
    anomalies[:, 0] *= 0.5
    labels = ["ok"] * 500 + ["a", "b", "c"] * 20

    def of_head(labelled: np.ndarray) -> float:
        detector = MDMLDetector(FAST, random_state=0).fit(np.concatenate([normals, labelled]), labels, normal=["ok"])
        weights = detector.model_.scorer.weights
        assert weights.sum() == pytest.approx(1)
        return float(weights[-1] / weights[:-1].sum())

    assert of_head(anomalies) >= 2 * FAST.fusion.head
    assert of_head(alike) == pytest.approx(FAST.fusion.head)


def test_tails_are_of_what_new_rows_are_held_against_them_by() -> None:
    """Held-out normals, and those that it was adapted to: their odds are the scorer's, their distances without them."""
    detector = MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])
    adapted = np.random.default_rng(3).normal(loc=[0, 0, 0, 4, 0, 0], size=(40, 6))
    scorer = detector.adapt(adapted).model_.scorer
    first, own = scorer.families
    held_out = detector.kept_.training().normals[detector.model_.held_out.positions]
    for family, rows in ((first, torch.as_tensor(held_out)), (own, own.neighbourhood.normals)):
        placed = family.neighbourhood.place(rows)
        itself = (rows[:, None] == family.neighbourhood.normals).all(-1).int().argmax(1)
        distances = family.neighbourhood.distances(placed, family.neighbourhood.families[itself])
        from_first = distances if family is first else first.neighbourhood.distances(placed)
        by_head = head_odds(scorer.head, rows, first.tails, from_first)
        expected = torch.cat([distances, by_head]).sort(dim=1).values
        torch.testing.assert_close(family.tails.distances, expected, rtol=1e-5, atol=1e-6)


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
    scores = fitted.score_samples(rows)
    np.testing.assert_allclose(fitted.score_samples(rows[:7]), scores[:7], rtol=1e-4, atol=1e-4)
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_allclose(fitted.score_samples(rows[order]), scores[order], rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_their_rows_where_these_are_scored_in_parts(
    fitted: MDMLDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = data(seed=1)
    expected, why = fitted.score_samples(rows), fitted.explain(rows)
    monkeypatch.setattr(default, "SCORING_ROWS", 30)
    monkeypatch.setattr(default, "ORDERED_ROWS", 100)
    np.testing.assert_allclose(fitted.score_samples(rows), expected, rtol=1e-4, atol=1e-4)
    in_parts = fitted.explain(rows)
    np.testing.assert_allclose(in_parts.scores, why.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(in_parts.contributions, why.contributions, rtol=1e-3, atol=1e-3)


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
    labels = np.array(["a"] * 50 + ["b"] * 3, dtype=object)
    kept = at_most_of_each(labels, 10, seed=0)
    assert (labels[kept] == "a").sum() == 10
    assert (labels[kept] == "b").sum() == 3
    assert len(at_most_of_each(labels[:0], 10, seed=0)) == 0


def random_encoders(n: int, d: int, hidden: int) -> tuple[list[ResidualEncoder], Encoders]:
    """Encoders far from the identity, one by one and together."""
    generator = torch.Generator().manual_seed(0)
    encoders = [ResidualEncoder(d, hidden) for _ in range(n)]
    for parameter in (value for encoder in encoders for value in encoder.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    names = encoders[0].state_dict()
    return encoders, Encoders({name: torch.stack([each.state_dict()[name] for each in encoders]) for name in names})


def test_embeddings_are_the_encoders_own_in_whatever_thread() -> None:
    encoders, together = random_encoders(2 * len(VIEWS), 5, 7)
    rows = torch.randn(len(VIEWS), 400, 5, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([encoder(own) for encoder, own in zip(encoders, rows.repeat(2, 1, 1), strict=True)])
    with ThreadPoolExecutor(4) as pool:
        for embedded in pool.map(together.embed, [rows] * 40):
            torch.testing.assert_close(embedded, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [4, 8, 12])
def test_averaged_encoders_embed_as_the_mean_of_the_views_own(n: int) -> None:
    encoders, together = random_encoders(n, 5, 7)
    rows = torch.randn(len(VIEWS), 400, 5, generator=torch.Generator().manual_seed(1))
    each = torch.stack([encoder(rows[place % 4]).detach() for place, encoder in enumerate(encoders)])
    means = torch.stack([each[view::4].mean(0) for view in range(4)])
    torch.testing.assert_close(together.averaged(4).embed(rows), means, rtol=1e-5, atol=1e-6)


def test_bfloat16_finds_what_float32_finds() -> None:
    """The digits: unseen and seen classes, the default constants."""
    methods = {dtype: mdml("default", "cpu", dtype) for dtype in ("float32", "bfloat16")}
    results = evaluate(open_sets()["digits"](), methods, EvaluationProtocol(splits=1, seeds=1))["results"]
    exact, rough = (results[dtype]["splits"][0] for dtype in ("float32", "bfloat16"))
    assert exact != rough
    for kind in ("auroc_unseen", "auroc_seen"):
        assert rough[kind] == pytest.approx(exact[kind], abs=0.005)


@pytest.mark.parametrize(("n", "all_of_them"), [(60, True), (240, False)])
def test_few_normals_all_scale_the_columns(n: int, all_of_them: bool) -> None:
    """So the anchor of few is plain nearest neighbours; of more, the held-out ones are left out."""
    rows = np.random.default_rng(0).normal(size=(n, 4))
    detector = MDMLDetector(FAST, random_state=0).fit(rows)
    encoder = FeatureEncoder.fit(as_table(rows), np.ones(n, dtype=bool))
    assert (detector.encoder_ == encoder) == all_of_them


def test_held_out_normals_are_judged_by_the_head_too() -> None:
    rows, labels = data()
    with_head, without = (
        MDMLDetector(replace(FAST, fusion=replace(FAST.fusion, head=weight)), normal=["ok"], random_state=0)
        .fit(rows, labels)
        .model_.held_out.scores
        for weight in (0.25, 0.0)
    )
    # All weights have sum 1.
    assert (1.25**0.5 * with_head <= without + 1e-6).all()
    assert (with_head < without - 0.05).mean() > 0.02
