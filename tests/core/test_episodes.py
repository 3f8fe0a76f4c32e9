import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdml_fast.episodes import (
    Direction,
    EpisodeSampler,
    Families,
    make_directions,
    normal_families,
    synthetic_rows,
)
from mdml_fast.episodes.random import uniform

ID = Families(("a", "b"), (np.arange(0, 30), np.arange(30, 70)))
OOD = Families(("x", "y"), (np.arange(70, 80), np.arange(80, 100)))
DIRECTIONS = [Direction((0,), (1,)), Direction((0, 1), (0, 1)), Direction((1,), (0,))]


def sampler(seed: int = 0) -> EpisodeSampler:
    rows = torch.arange(100.0).unsqueeze(-1)
    return EpisodeSampler(rows, ID, OOD, DIRECTIONS, n_support=8, n_query_id=7, n_query_ood=5, seed=seed)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 10**9), n=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_an_episode_depends_on_seed_and_number_alone(first: int, n: int, seed: int) -> None:
    batch = sampler(seed).batch(first, n)
    for place in reversed(range(n)):
        alone = sampler(seed).batch(first + place, 1)
        for together, single in zip(batch, alone, strict=True):
            assert torch.equal(together[place], single[0])


def test_rows_come_from_the_directions_families_and_support_never_meets_query() -> None:
    batch = sampler().batch(0, 300)
    assert batch.support.shape == (300, 8, 1)
    assert batch.query.shape == (300, 12, 1)
    assert batch.is_ood.tolist() == [[False] * 7 + [True] * 5] * 300
    for e in range(300):
        direction = DIRECTIONS[e % 3]
        inside = set(np.concatenate([ID.rows[f] for f in direction.id_families]))
        outside = set(np.concatenate([OOD.rows[f] for f in direction.ood_families]))
        support, query = batch.support[e, :, 0].tolist(), batch.query[e, :, 0].tolist()
        assert set(support) | set(query[:7]) <= inside
        assert set(query[7:]) <= outside
        assert not set(support) & set(query[:7])


def test_all_rows_are_drawn_in_time_and_seeds_differ() -> None:
    batch = sampler().batch(0, 600)
    drawn = set(batch.support.flatten().tolist()) | set(batch.query.flatten().tolist())
    assert drawn == set(map(float, range(100)))
    assert not torch.equal(sampler(0).batch(0, 3).support, sampler(1).batch(0, 3).support)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    draws = uniform(5, torch.arange(500).unsqueeze(-1), torch.arange(400)).numpy()
    assert 0 <= draws.min() < draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    # 10,000 expected in each bin, with a deviation of 97.
    assert np.abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.2
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.2


@pytest.mark.parametrize(("n_id", "n_ood"), [(1, 1), (2, 3), (8, 5)])
def test_directions_come_in_complementary_pairs(n_id: int, n_ood: int) -> None:
    directions = make_directions(n_id, n_ood, 6, np.random.default_rng(0))
    assert len(directions) == 6
    for first, second in zip(directions[::2], directions[1::2], strict=True):
        assert set(first.id_families) | set(second.id_families) == set(range(n_id))
        assert set(first.ood_families) | set(second.ood_families) == set(range(n_ood))
        if n_id > 1:
            assert not set(first.id_families) & set(second.id_families)


def test_one_normal_class_is_clustered_and_several_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(mean, 0.1, (100, 3)) for mean in (0, 5, 9)]).astype(np.float32)
    clusters = normal_families(rows, np.full(300, "ok", dtype=object), rng)
    assert 2 <= len(clusters.names) <= 6
    assert sorted(np.concatenate(clusters.rows)) == list(range(300))
    for cluster in clusters.rows:
        assert len({int(row) // 100 for row in cluster}) == 1
    classes = normal_families(rows, np.array(["p", "q", "p"] * 100, dtype=object), rng)
    assert classes.names == ("p", "q")


def test_synthetic_rows_mix_the_features_of_normals() -> None:
    normals = np.arange(40, dtype=np.float32).reshape(10, 4)
    made = synthetic_rows(normals, 200, np.random.default_rng(0))
    assert all(set(made[:, j]) <= set(normals[:, j]) for j in range(4))
    assert len({tuple(row) for row in made} - {tuple(row) for row in normals}) > 50
