"""What the default algorithm is made of: views, neighbours, tails, encoders."""

import numpy as np
import pytest
import torch
from mdml_kernels.native import loader
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from mdml_fast.data.views import VIEWS, Views
from mdml_fast.known import KnownRows
from mdml_fast.meta.encoders import Encoders
from mdml_fast.meta.neighbours import References
from mdml_fast.meta.tails import FOLDS, Tails

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


# --- neighbours, tails, encoders ---


@pytest.mark.parametrize("n", [3, 40, 1003])
def test_neighbour_distances_are_those_of_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(0)
    rows, references = (rng.normal(size=(2, size, 4)).astype(np.float32) for size in (50, n))
    ours = References(torch.as_tensor(references)).distances(torch.as_tensor(rows), 3)
    for embedding in range(2):
        peer = NearestNeighbors(n_neighbors=3).fit(references[embedding]).kneighbors(rows[embedding])[0].mean(1)
        np.testing.assert_allclose(ours[embedding], peer, rtol=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_nearest_of_references_that_are_close_together_is_found(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their squared distances are a millionth of what float32 tells beside their squares."""
    if not compiled:
        monkeypatch.setattr(loader, "serves", lambda *_: False)
    rng = np.random.default_rng(0)
    rows, references = (
        (rng.integers(0, 3, size=(1, n, 1)) + 10 + rng.normal(scale=1e-5, size=(1, n, 4))).astype(np.float32)
        for n in (50, 700)
    )
    ours = References(torch.as_tensor(references)).distances(torch.as_tensor(rows), 2)
    apart = np.linalg.norm(rows[0, :, None].astype(np.float64) - references[0], axis=-1)
    np.testing.assert_allclose(ours[0], np.sort(apart, axis=1)[:, :2].mean(1), rtol=1e-4)
    known = KnownRows(references[0], np.full(700, "ok", dtype=object))
    np.testing.assert_allclose(known.nearest(rows[0])[1], apart.min(1), rtol=1e-4)


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
