"""Why rows are flagged: what contributions add up to, what they name, and whether taking them away helps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from mdml_kernels.native import loader
from sklearn.metrics import roc_auc_score
from support import OPEN_SETS, open_table

from mdml_fast import MDMLDetector
from mdml_fast.data.encoding import FeatureEncoder
from mdml_fast.data.views import VIEWS
from mdml_fast.known import KnownRows
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.distance_trees import asked_of
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.paper import PaperConfig
from mdml_fast.meta.scoring import head_odds
from mdml_fast.meta.shares import centre_shares, distance_shares

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10),
    n_trees=20,
)
FAST_PAPER = PaperConfig(hidden=16, embedding=8, outer_steps=20)


def table(n_normals: int = 300, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Numbers with gaps, a heavy tail and text; 'long' is far out in bytes, 'odd' in size and colour."""
    rng = np.random.default_rng(seed)
    labels = np.array(["ok"] * n_normals + ["long"] * 20 + ["odd"] * 20, dtype=object)
    size, bytes_ = rng.normal(size=len(labels)), np.exp(rng.normal(5, 2, size=len(labels)))
    size[labels == "odd"] += 6
    bytes_[labels == "long"] *= 1e6
    colour = rng.choice(["red", "green"], len(labels)).astype(object)
    colour[labels == "odd"] = "purple"
    columns = {
        "colour": pa.array(colour),
        "size": pa.array(size, mask=rng.random(len(labels)) < 0.1),
        "same": pa.array(np.ones(len(labels))),
        "bytes": pa.array(bytes_),
        "noise": pa.array(rng.normal(size=len(labels))),
    }
    return pa.table(columns), labels


@pytest.fixture(scope="module", params=[FAST, FAST_PAPER], ids=["default", "paper"])
def fitted(request: pytest.FixtureRequest) -> MDMLDetector:
    return MDMLDetector(request.param, random_state=0).fit(*table(), normal=["ok"])


def test_contributions_and_remainder_sum_to_the_score(fitted: MDMLDetector) -> None:
    rows, labels = table(seed=1)
    why = fitted.explain(rows)
    assert why.contributions.shape == (340, 5)
    assert why.columns == rows.column_names
    np.testing.assert_allclose(why.scores, fitted.score_samples(rows), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(why.contributions.sum(1) + why.remainder, why.scores, rtol=1e-12)
    assert (why.contributions[:, why.columns.index("same")] == 0).all()
    if isinstance(fitted.model_.config, DefaultConfig):
        alarms = labels != "ok"
        assert np.median(np.abs(why.remainder[alarms]) / np.abs(why.scores[alarms])) < 0.1


def test_arrays_are_explained_as_they_are_scored() -> None:
    rows, labels = table()
    names = ["size", "bytes", "noise"]
    detector = MDMLDetector(FAST, random_state=0).fit(rows.select(names), labels, normal=["ok"])
    array = np.stack([rows[name].fill_null(np.nan).to_numpy() for name in names], axis=1)
    np.testing.assert_array_equal(detector.explain(array).contributions, detector.explain(rows).contributions)


def test_what_equals_the_nearest_normal_adds_nothing(fitted: MDMLDetector) -> None:
    rows, _ = table()
    why = fitted.explain(rows.slice(0, 50))
    nearest = why.nearest_normals()
    equal = np.array(rows["colour"][:50].to_pylist()) == np.array(nearest["colour"].to_pylist())
    assert equal.any()
    assert (why.contributions[equal, why.columns.index("colour")] == 0).all()


def test_what_equals_the_nearest_normal_adds_nothing_in_any_row_and_nothing_adds_much_more_than_the_score() -> None:
    """Trees go other ways for other reasons: their changes at a feature differ where the feature does not."""
    detector = MDMLDetector(random_state=0).fit(*table(), normal=["ok"])
    rows, _ = table(seed=1)
    why, encoder = detector.explain(rows), detector.encoder_
    agree = (encoder.transform(rows) == encoder.transform(why.nearest_normals())).astype(float)
    both = encoder.by_column(1 - agree, why.columns) == 0
    assert both.sum() > 100
    assert np.abs(why.contributions[both]).max() < 1e-6
    assert (np.abs(why.contributions).max(1) < 1.2 * np.abs(why.scores)).mean() > 0.99


def test_reasons_name_column_and_value_and_what_is_usual() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(*table(), normal=["ok"])
    rows, labels = table(seed=1)
    why = detector.explain(rows)
    first, second = (np.array(words, dtype=object) for words in why.reasons(2))
    long, odd = labels == "long", labels == "odd"
    assert all(text.startswith("bytes = ") and ", usual " in text for text in first[long])
    both = [f"{a} {b}" for a, b in zip(first[odd], second[odd], strict=True)]
    assert sum("colour = 'purple', nearest " in text for text in both) > 15
    assert set(why.nearest_family) == {"ok"}
    assert np.mean(why.kind[odd] == "odd") > 0.8
    unseen = pa.table(rows.slice(0, 30).to_pydict() | {"noise": np.full(30, 40.0)})
    assert (detector.explain(unseen).kind == "new").all()
    missing = unseen.set_column(1, "size", pa.nulls(30, pa.float64()))
    texts = [text for words in detector.explain(missing).reasons(5) for text in words if text]
    assert any(text.startswith("size = missing, nearest ") for text in texts)
    # More reasons than columns are asked for: the rest stays empty.
    assert [set(words) for words in why.reasons(7)[5:]] == [{None}, {None}]


def test_rows_that_equal_a_known_normal_have_no_reasons(fitted: MDMLDetector) -> None:
    rows, labels = table()
    why = fitted.explain(rows.filter(pa.array(labels == "ok")).slice(0, 4))
    assert why.reasons(2) == [[None] * 4] * 2
    assert [words.null_count for words in why.why(2).values()] == [4, 4, 0, 0]
    assert why.reasons(0) == []
    assert why.why(0) == {}


def test_a_saved_model_explains_the_same_and_an_adapted_family_is_named(fitted: MDMLDetector, tmp_path: Path) -> None:
    rows, _ = table(seed=1)
    fitted.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    before, after = fitted.explain(rows), loaded.explain(rows)
    np.testing.assert_array_equal(before.contributions, after.contributions)
    assert before.reasons(3) == after.reasons(3)
    assert (before.kind == after.kind).all()
    family = pa.table(rows.slice(0, 60).to_pydict() | {"noise": np.random.default_rng(0).normal(30, size=60)})
    assert set(loaded.adapt(family.slice(0, 40)).explain(family.slice(40)).nearest_family) == {"adapted 1"}


def test_the_squared_distance_of_an_embedding_is_exactly_a_sum_over_features() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(*table(), normal=["ok"])
    neighbourhood = detector.model_._families[0].neighbourhood
    # Weights far from the identity: the relu must matter.
    generator = torch.Generator().manual_seed(0)
    outer = neighbourhood.encoders.weights["outer.weight"]
    outer.copy_(torch.randn(outer.shape, generator=generator))
    rows = torch.as_tensor(detector.encoder_.transform(table(seed=1)[0]))
    normals = rows[torch.randperm(len(rows), generator=generator)]
    seen, others = neighbourhood.views.transform(rows), neighbourhood.views.transform(normals)
    squared = (neighbourhood.encoders.embed(seen) - neighbourhood.encoders.embed(others)).square().sum(-1)
    weights = neighbourhood.encoders.pull_back(seen, seen - others)
    torch.testing.assert_close((weights * (seen - others)).sum(-1), squared, rtol=1e-3, atol=1e-3)
    centres = neighbourhood.centre.expand_as(rows)
    shares = distance_shares(
        neighbourhood, neighbourhood.place(rows), neighbourhood.place(normals), torch.arange(len(rows)), centres
    )
    differs = (rows != normals).any(1)
    sums = shares.sum(-1)[:, differs]
    # All but the Mahalanobis distances.
    exact = [0, *range(2, 6)]
    torch.testing.assert_close(sums[exact], torch.ones(5, int(differs.sum())), rtol=1e-3, atol=1e-3)
    assert (shares[:, rows == normals] == 0).all()
    # Those fall short by what the normal's own distance from the centre is of the row's.
    centre, whitened = torch.full_like(neighbourhood.centre, 0.3), VIEWS.index("whitened")
    placed, others = neighbourhood.place(rows), neighbourhood.place(normals)
    from_there = centre_shares(neighbourhood.views, placed.views, others.views, centre)
    far, near = ((own.views[whitened] - centre).square().sum(-1) for own in (placed, others))
    torch.testing.assert_close(from_there.sum(-1), 1 - near / far, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shares[1], centre_shares(neighbourhood.views, placed.views, others.views, centres))


def test_the_heads_shares_are_of_what_its_probability_is_above_the_normals() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(*table(), normal=["ok"])
    scorer, head = detector.model_.scorer, detector.model_._head
    encoded = torch.as_tensor(detector.encoder_.transform(table(seed=1)[0]))
    distances = scorer.families[0].neighbourhood.distances(scorer._place(encoded))
    rows = asked_of(encoded, scorer.families[0].tails, distances)
    assert rows.shape[1] == encoded.shape[1] + 6
    normals = rows[torch.arange(len(rows)) // 2]
    probability, below = head.probability(rows), head.probability(normals)
    shares, more = head.shares(rows, normals, torch.arange(len(rows))), probability > below
    assert min(more.sum(), (~more).sum()) > 20
    torch.testing.assert_close(shares.sum(1)[more], (1 - below / probability)[more], rtol=1e-3, atol=1e-4)
    assert (shares[~more] == 0).all()


def test_what_distances_head_and_discriminants_add_is_the_score_of_each_family() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(*table(), normal=["ok"])
    rows, _ = table(seed=1)
    family = pa.table(rows.slice(0, 60).to_pydict() | {"noise": np.random.default_rng(0).normal(30, size=60)})
    scorer = detector.adapt(family).model_.scorer
    encoded = torch.as_tensor(detector.encoder_.transform(pa.concat_tables([rows, family])))
    placed = scorer._place(encoded)
    distances = [own.neighbourhood.distances(placed) for own in scorer.families]
    by_head = head_odds(scorer.head, encoded, scorer.families[0].tails, distances[0])
    for own, far in zip(scorer.families, distances, strict=True):
        scores = own.scores(placed, far, by_head)
        anomaly, amounts = scorer._amounts(own, scores)
        torch.testing.assert_close(amounts.sum(0), anomaly, rtol=1e-5, atol=1e-5)
        sides = own.discriminants
        weights = [*scorer.weights.tolist(), *([scorer.fusion.discriminants * float(sides.told)] if sides else [])]
        for place in range(2 + 4 + 1 + (own is scorer.families[1])):
            of_one = weights[place] * (scorer.scale(own) * scores[place]).square() / anomaly
            torch.testing.assert_close(amounts[place], of_one, rtol=1e-4, atol=1e-5)
        assert len(amounts) == place + 1


def test_values_are_decoded_to_what_they_were() -> None:
    rows, labels = table()
    encoder = FeatureEncoder.fit(rows, labels == "ok")
    decoded = encoder.decode(encoder.transform(rows))
    for name in ("size", "bytes", "noise"):
        expected = rows[name].fill_null(np.nan).to_numpy()
        np.testing.assert_allclose(decoded[name].fill_null(np.nan).to_numpy(), expected, rtol=1e-4, atol=1e-5)
    assert decoded["colour"].to_pylist() == rows["colour"].to_pylist()


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_are_like_a_family_as_near_as_its_own_rows_are(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(loader, "native", lambda: loader.Native(None, "the test wants none"))
    known = KnownRows(np.array([[0.0], [1.0], [2.0], [50.0]], dtype=np.float32), np.array(["a", "a", "a", "b"]))
    rows = np.array([[2.5], [3.5], [50.0], [49.0], [2.5]], dtype=np.float32)
    kinds = known.resembled(rows, np.array([9.0, 9.0, 1.0, 1.5, 0.1]))
    assert kinds.tolist() == ["a", "new", "b", "new", "new"]
    assert (known._search is not None) == compiled
    positions, distances = known.nearest(rows)
    assert positions.tolist() == [2, 2, 3, 3, 2]
    np.testing.assert_allclose(distances, [0.5, 1.5, 0.0, 1.0, 0.5])
    positions, distances = known.nearest(np.array([[1e30]], dtype=np.float32))
    assert positions[0] in range(4)
    assert np.isinf(distances[0])
    empty = KnownRows(np.empty((0, 1), dtype=np.float32), np.array([], dtype=object))
    assert empty.resembled(rows, np.ones(5)).tolist() == ["new"] * 5


# --- deletion, on real tables ---


def replaced(rows: pa.Table, normals: pa.Table, columns: np.ndarray) -> pa.Table:
    """Rows in which each one's columns [N, k] have the nearest normal's values."""
    changed = {}
    for place, name in enumerate(rows.column_names):
        values = rows[name].combine_chunks()
        if name in normals.column_names:
            values = values.cast(normals[name].type)
            values = pc.if_else(pa.array((columns == place).any(1)), normals[name].combine_chunks(), values)
        changed[name] = values
    return pa.table(changed)


@pytest.mark.parametrize("name", OPEN_SETS)
def test_replacing_the_named_columns_lowers_the_score_most(name: str) -> None:
    data = open_table(name)
    rng = np.random.default_rng(0)
    classes = sorted(name for name, rows in data.anomaly_classes().items() if rows >= 20)
    normals = rng.permutation(np.flatnonzero(data.is_normal))
    seen = np.concatenate([np.flatnonzero(data.labels == name)[:10] for name in classes[::2]])
    unseen = rng.permutation(np.flatnonzero(np.isin(data.labels.astype(str), classes[1::2])))[:150]
    train, test = data.take(np.concatenate([normals[:1000], seen])), data.take(np.concatenate([normals[-150:], unseen]))
    detector = MDMLDetector(FAST, random_state=0).fit(train.features, train.labels, normal=train.normal)

    rows, is_normal = test.features, test.is_normal
    why = detector.explain(rows)
    used = [why.columns.index(column.name) for column in detector.encoder_.columns]

    def auroc_without(column: int) -> float:
        shuffled = rows.column(column).take(pa.array(rng.permutation(len(test))))
        return float(
            roc_auc_score(is_normal, detector.score_samples(rows.set_column(column, why.columns[column], shuffled)))
        )

    important = sorted(used, key=auroc_without)
    flagged = np.flatnonzero(~is_normal)
    alarms, normal_values = rows.take(pa.array(flagged)), why.nearest_normals().take(pa.array(flagged))

    def gain(columns: np.ndarray) -> float:
        return float(np.mean(detector.score_samples(replaced(alarms, normal_values, columns)) - why.scores[flagged]))

    named = np.argsort(why.contributions[flagged], axis=1)
    at_random = np.stack([rng.permutation(used) for _ in flagged])
    for k in (1, 3):
        ours = gain(named[:, :k])
        assert ours > gain(at_random[:, :k])
        assert ours > gain(np.tile(important[:k], (len(flagged), 1)))
