"""What sets families of normals apart: each class from the others, and one that is adapted to from the known ones."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mdml_fast import MDMLDetector
from mdml_fast.data import as_table
from mdml_fast.data.labelled import UNNAMED
from mdml_fast.data.views import VIEWS
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.discriminants import MOST_EXPONENT, DiscriminantConfig, Discriminants
from mdml_fast.meta.fusion import FusionConfig

CLIPPED = VIEWS.index("clipped")
CONFIG = DiscriminantConfig()


def views(n: int, d: int, seed: int, centre: float = 0.0) -> Tensor:
    """Rows in each view; those in the others must not count."""
    rows = np.random.default_rng(seed).normal(size=(len(VIEWS), n, d))
    rows[CLIPPED, :, 0] += centre
    return torch.as_tensor(rows, dtype=torch.float32)


def least_squares(family: Tensor, known: Tensor, left_out: int | None = None) -> Tensor:
    """Weights and offset [d + 1] by the normal equations; without one of the family's rows, of the same ridge."""
    rows = torch.cat([family, known], dim=1)[CLIPPED].double()
    n, m = family.shape[1], known.shape[1]
    of_rows = [0.5 / n] * n + [0.5 / m] * m, [-1] * n + [1] * m
    share, side = (torch.tensor(values, dtype=torch.float64) for values in of_rows)
    ridge = CONFIG.shrinkage * (share @ (rows - share @ rows).square()).mean()
    if left_out is not None:
        share[left_out] = 0
    with_one = torch.cat([rows, torch.ones(n + m, 1).double()], dim=1)
    ridges = ridge * torch.eye(rows.shape[1] + 1).double()
    ridges[-1, -1] = 0
    return torch.linalg.solve(with_one.T @ (share[:, None] * with_one) + ridges, with_one.T @ (share * side))


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 3), (25, 200, 1), (20, 40, 90)])
def test_it_is_the_least_squares_solution_and_left_out_rows_are_those_of_learning_again(n: int, m: int, d: int) -> None:
    family, known = views(n, d, seed=0, centre=1.5), views(m, d, seed=1)
    found, left_out = Discriminants.of_family(family, known, CONFIG)
    expected = least_squares(family, known)
    torch.testing.assert_close(torch.cat([found.weights[0], found.offsets]), expected, rtol=1e-8, atol=1e-10)
    for row in (0, 7, n - 1):
        *weights, offset = least_squares(family, known, row)
        sum_ = family[CLIPPED, row].double() @ torch.stack(weights) + offset
        assert float(left_out[0, row]) == pytest.approx(float(sum_.exp()), rel=1e-5)
    assert torch.equal(found.tails.distances, left_out.sort().values)


def test_each_class_has_its_side_small_ones_are_one_and_rows_belong_to_the_nearest() -> None:
    parts = [
        views(n, 4, seed, centre) for seed, (n, centre) in enumerate([(100, 4.0), (90, -4.0), (15, 9.0), (12, 9.0)])
    ]
    rows, labels = torch.cat(parts, dim=1), np.repeat(["p", "q", "r", "s"], [100, 90, 15, 12])
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = views(50, 4, 9)
    found, distances = Discriminants.of_classes(rows[:, order], labels[order], held_out, CONFIG)
    assert found.weights.shape == (3, 4)
    each = [least_squares(own, torch.cat(parts[:i] + parts[i + 1 :], 1)) for i, own in enumerate(parts[:2])]
    each.append(least_squares(torch.cat(parts[2:], 1), torch.cat(parts[:2], 1)))
    expected = torch.stack(each)
    torch.testing.assert_close(torch.cat([found.weights, found.offsets[:, None]], 1), expected, rtol=1e-8, atol=1e-10)
    sums = held_out[CLIPPED].double() @ expected[:, :-1].T + expected[:, -1]
    torch.testing.assert_close(distances[0].double(), sums.amin(1).exp(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.tails.distances, distances.sort().values)
    left_out = [
        least_squares(own, torch.cat(others, 1), row) @ torch.cat([own[CLIPPED, row].double(), torch.ones(1)])
        for own, others in (
            (parts[0], parts[1:]),
            (parts[1], [parts[0], *parts[2:]]),
            (torch.cat(parts[2:], 1), parts[:2]),
        )
        for row in range(own.shape[1])
    ]
    means = [part.mean() for part in torch.stack(left_out).split([100, 90, 27])]
    assert float(found.told) == pytest.approx(-float(sum(means)) / 3, rel=1e-5)


def test_classes_that_differ_in_nothing_tell_nothing() -> None:
    labels = np.array(["a", "b", "c"] * 100)
    alike, _ = Discriminants.of_classes(views(300, 5, 0), labels, views(90, 5, 1), CONFIG)
    assert float(alike.told) < 0.05
    # What fits a small class by chance has the many others on their side.
    labels_of_unequal = np.repeat(["many", "few"], [970, 30])
    unequal, _ = Discriminants.of_classes(views(1000, 90, 4), labels_of_unequal, views(90, 90, 5), CONFIG)
    assert float(unequal.told) < 0.05
    apart = views(300, 5, 2)
    apart[CLIPPED, :, 1:4] += 6 * torch.eye(3).repeat(100, 1)
    found, _ = Discriminants.of_classes(apart, labels, views(90, 5, 3), CONFIG)
    assert float(found.told) > 0.8


def test_normals_that_nobody_named_are_of_no_class() -> None:
    rows, held_out = views(300, 4, 0), views(50, 4, 1)
    labels = np.array(["p", "q", UNNAMED] * 100, dtype=object)
    rows[CLIPPED, ::3, 0] += 5
    named = torch.arange(300) % 3 < 2
    found, _ = Discriminants.of_classes(rows, labels, held_out, CONFIG)
    expected, _ = Discriminants.of_classes(rows[:, named], labels[named.numpy()], held_out, CONFIG)
    assert found.weights.shape == (2, 4)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.told, expected.told)


@pytest.mark.parametrize("sizes", [{"ok": 200}, {"ok": 190, "rare": 10}, dict.fromkeys("abcdefgh", 10)])
def test_of_one_class_there_are_none(sizes: dict[str, int]) -> None:
    labels = np.repeat(list(sizes), list(sizes.values()))
    assert Discriminants.of_classes(views(len(labels), 3, 0), labels, views(20, 3, 1), CONFIG) is None


def test_the_score_rises_across_to_the_known_side_and_the_shares_are_of_what_raises_it() -> None:
    found, _ = Discriminants.of_family(views(40, 5, 0, centre=3.0), views(300, 5, 1), CONFIG)
    own, known = views(200, 5, 2, centre=3.0), views(200, 5, 3)
    assert float(found.score(own).median()) < 1.5
    assert float(found.score(known).median()) > 4
    distances, of_own = found.distances(known)[0], found.distances(own)[0]
    shares, farther = found.shares(known, own), distances > of_own
    assert farther.sum() > 150
    assert (~farther).any()
    torch.testing.assert_close(shares.sum(1), (1 - of_own / distances).clamp(min=0), rtol=1e-5, atol=1e-6)
    assert (shares >= 0).all()
    assert (shares[(known[CLIPPED] - own[CLIPPED]) * found.weights <= 0] == 0).all()
    assert shares.mean(0).argmax() == 0


@pytest.mark.parametrize("centre", [0.0, 1e30])
def test_rows_that_are_all_alike_or_very_far_give_finite_scores(centre: float) -> None:
    alike = torch.full((len(VIEWS), 30, 4), centre)
    found, left_out = Discriminants.of_family(alike, views(100, 4, 0) if centre else alike, CONFIG)
    assert left_out.isfinite().all()
    for rows in (alike, views(20, 4, 1), -alike, views(20, 4, 1) * 1e20):
        assert found.score(rows).isfinite().all()
    beyond = Discriminants(torch.ones(1, 4).double(), torch.zeros(1).double(), found.tails, found.told)
    assert float(beyond.distances(torch.full((len(VIEWS), 1, 4), 1e3))) == pytest.approx(
        np.exp(MOST_EXPONENT), rel=1e-5
    )


def ranked(detector: MDMLDetector, normals: np.ndarray, anomalies: np.ndarray) -> float:
    scores = [detector.score_samples(rows) for rows in (normals, anomalies)]
    return float(roc_auc_score([1] * len(normals) + [0] * len(anomalies), np.concatenate(scores)))


def digits(seed: int, normal: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    """All rows and digits; positions to learn from, of which the fives and sixes are few; other positions."""
    rows, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    train, test = np.split(rng.permutation(len(rows)), [len(rows) // 2])
    shown = np.concatenate([train[np.isin(labels[train], normal)], train[np.isin(labels[train], [5, 6])][:20]])
    return rows, labels, shown, test, rng


def test_normals_of_several_classes_tell_more_than_a_mass_of_them() -> None:
    rows, labels, shown, test, _ = digits(0, [0, 1, 2, 3, 4])
    normals, unseen = rows[test[labels[test] < 5]], rows[test[labels[test] > 6]]
    found = []
    for names in (labels, np.where(labels < 5, 0, labels)):
        detector = MDMLDetector(random_state=0, normal=sorted({str(name) for name in names if name < 5}))
        detector.fit(rows[shown], names[shown])
        found.append(ranked(detector, normals, unseen))
        assert (detector.predict(normals) == -1).mean() < 0.03
    family = detector.model_.scorer.families[0]
    assert family.discriminants is None
    assert found[0] > found[1] + 0.002


def test_they_come_beside_the_weights_in_the_scores_of_new_rows_and_of_those_to_calibrate_on() -> None:
    rows, labels, shown, test, _ = digits(0, [0, 1, 2, 3, 4])
    without = dataclasses.replace(DefaultConfig(), fusion=FusionConfig(discriminants=0.0))
    plain, detector = (
        MDMLDetector(config, random_state=0, normal=list("01234")).fit(rows[shown], labels[shown])
        for config in (without, DefaultConfig())
    )
    scorer = detector.model_.scorer
    assert torch.equal(scorer.weights, plain.model_.scorer.weights)
    new = torch.as_tensor(detector.encoder_.transform(as_table(rows[test])))
    by_side = scorer.families[0].discriminants.score(scorer.families[0].neighbourhood.place(new).views)[0].numpy()
    weight = FusionConfig().discriminants * float(scorer.families[0].discriminants.told)
    assert 0.15 < weight < 0.25
    expected = np.sqrt(plain.score_samples(rows[test]) ** 2 + weight * by_side**2)
    np.testing.assert_allclose(-detector.score_samples(rows[test]), expected, rtol=1e-5)
    gained = np.square(detector.model_.held_out.scores) - np.square(plain.model_.held_out.scores)
    assert (gained >= -1e-6).all()
    of_new = np.square(expected) - np.square(plain.score_samples(rows[test]))
    normal = labels[test] < 5
    assert np.quantile(gained, 0.9) == pytest.approx(np.quantile(of_new[normal], 0.9), rel=0.5)


def test_digits_that_are_near_to_few_ones_are_still_found() -> None:
    """Ones are adapted to; few of them are far apart, and eights are as near."""
    rows, labels, shown, test, rng = digits(0, [0, 2, 3, 4])
    detector = MDMLDetector(random_state=0, false_alarm_rate=0.05, normal=list("0234")).fit(rows[shown], labels[shown])
    of_test = rows[test[np.isin(labels[test], [0, 2, 3, 4])]], rows[test[np.isin(labels[test], [7, 8, 9])]]
    at_first = ranked(detector, *of_test)
    ones = rng.permutation(np.flatnonzero(labels == 1))
    detector.adapt(rows[ones[:50]])
    assert (detector.predict(rows[ones[50:]]) == -1).mean() < 0.12
    lost = at_first - ranked(detector, *of_test)
    detector.model_._families[1] = detector.model_._families[1]._replace(discriminants=None)
    assert 0 < lost < 0.8 * (at_first - ranked(detector, *of_test))
