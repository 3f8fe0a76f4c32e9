"""What tells a family that is adapted to from the known normals."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mdml_fast import MDMLDetector
from mdml_fast.data.views import VIEWS
from mdml_fast.meta.discriminant import MOST_EXPONENT, Discriminant

CLIPPED = VIEWS.index("clipped")
SHRINKAGE = 0.1


def views(n: int, d: int, seed: int, centre: float = 0.0) -> Tensor:
    """Rows in each view; those in the others must not count."""
    rows = np.random.default_rng(seed).normal(size=(len(VIEWS), n, d))
    rows[CLIPPED, :, 0] += centre
    return torch.as_tensor(rows, dtype=torch.float32)


def least_squares(family: Tensor, known: Tensor, left_out: int | None = None) -> Tensor:
    """Weights and offset [d + 1] by the normal equations; without one of the family's rows, of the same ridge."""
    rows = torch.cat([family, known], dim=1)[CLIPPED].double()
    n, m = family.shape[1], known.shape[1]
    share, side = (
        torch.tensor(parts, dtype=torch.float64) for parts in ([0.5 / n] * n + [0.5 / m] * m, [-1] * n + [1] * m)
    )
    ridge = SHRINKAGE * (share @ (rows - share @ rows).square()).mean()
    if left_out is not None:
        share[left_out] = 0
    with_one = torch.cat([rows, torch.ones(n + m, 1).double()], dim=1)
    ridges = ridge * torch.eye(rows.shape[1] + 1).double()
    ridges[-1, -1] = 0
    return torch.linalg.solve(with_one.T @ (share[:, None] * with_one) + ridges, with_one.T @ (share * side))


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 3), (25, 200, 1), (20, 40, 90)])
def test_it_is_the_least_squares_solution_and_left_out_rows_are_those_of_learning_again(n: int, m: int, d: int) -> None:
    family, known = views(n, d, seed=0, centre=1.5), views(m, d, seed=1)
    discriminant, left_out = Discriminant.fit(family, known, SHRINKAGE)
    expected = least_squares(family, known)
    found = torch.cat([discriminant.weights, discriminant.offset[None]])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    for row in (0, 7, n - 1):
        *weights, offset = least_squares(family, known, row)
        sum_ = family[CLIPPED, row].double() @ torch.stack(weights) + offset
        assert float(left_out[0, row]) == pytest.approx(float(sum_.exp()), rel=1e-5)
    assert torch.equal(discriminant.tails.distances, left_out.sort().values)


def test_the_score_rises_across_to_the_known_side_and_the_shares_are_of_what_raises_it() -> None:
    discriminant, _ = Discriminant.fit(views(40, 5, 0, centre=3.0), views(300, 5, 1), SHRINKAGE)
    own, known = views(200, 5, 2, centre=3.0), views(200, 5, 3)
    assert float(discriminant.score(own).median()) < 1.5
    assert float(discriminant.score(known).median()) > 4
    distances, of_own = discriminant.distances(known)[0], discriminant.distances(own)[0]
    shares, farther = discriminant.shares(known, own), distances > of_own
    assert farther.sum() > 150
    assert (~farther).any()
    torch.testing.assert_close(shares.sum(1), (1 - of_own / distances).clamp(min=0), rtol=1e-5, atol=1e-6)
    assert (shares >= 0).all()
    assert (shares[(known[CLIPPED] - own[CLIPPED]) * discriminant.weights <= 0] == 0).all()
    assert shares.mean(0).argmax() == 0


@pytest.mark.parametrize("centre", [0.0, 1e30])
def test_rows_that_are_all_alike_or_very_far_give_finite_scores(centre: float) -> None:
    alike = torch.full((len(VIEWS), 30, 4), centre)
    discriminant, left_out = Discriminant.fit(alike, views(100, 4, 0) if centre else alike, SHRINKAGE)
    assert left_out.isfinite().all()
    for rows in (alike, views(20, 4, 1), -alike, views(20, 4, 1) * 1e20):
        assert discriminant.score(rows).isfinite().all()
    assert float(discriminant.distances(-alike).max()) <= float(torch.tensor(MOST_EXPONENT).exp())


def test_digits_that_are_near_to_few_ones_are_still_found() -> None:
    """Ones are adapted to; few of them are far apart, and eights are as near."""
    rows, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    train, test = np.split(rng.permutation(len(rows)), [len(rows) // 2])
    known, labelled = np.isin(digits, [0, 2, 3, 4]), np.isin(digits, [5, 6])
    shown = np.concatenate([train[known[train]], train[labelled[train]][:20]])
    detector = MDMLDetector(random_state=0, false_alarm_rate=0.05).fit(
        rows[shown], digits[shown], normal=["0", "2", "3", "4"]
    )
    of_test = [test[known[test]], test[np.isin(digits[test], [7, 8, 9])]]
    at_first = ranked(detector, *(rows[own] for own in of_test))
    ones = rng.permutation(np.flatnonzero(digits == 1))
    detector.adapt(rows[ones[:50]])
    assert (detector.predict(rows[ones[50:]]) == -1).mean() < 0.12
    lost = at_first - ranked(detector, *(rows[own] for own in of_test))
    detector.model_._families[1] = detector.model_._families[1]._replace(discriminant=None)
    lost_without = at_first - ranked(detector, *(rows[own] for own in of_test))
    assert 0 < lost < 0.8 * lost_without


def ranked(detector: MDMLDetector, normals: np.ndarray, anomalies: np.ndarray) -> float:
    scores = [detector.score_samples(rows) for rows in (normals, anomalies)]
    return float(roc_auc_score([1] * len(normals) + [0] * len(anomalies), np.concatenate(scores)))
