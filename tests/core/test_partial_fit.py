"""partial_fit: further rows, without starting over and without the earlier table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mdml_fast import InputError, MDMLDetector
from mdml_fast import kept as kept_module
from mdml_fast.kept import ANOMALY, KeptRows
from mdml_fast.meta import left_out
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.left_out import FIRST, NEITHER, SECOND
from mdml_fast.meta.paper import PaperConfig

FAST = DefaultConfig(
    ensemble=EnsembleConfig(
        hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10, further_steps=3
    ),
    n_trees=40,
)
FAST_PAPER = PaperConfig(hidden=32, embedding=16, outer_steps=80, further_steps=40, episodes_per_step=8, outer_lr=3e-3)
BOTH = pytest.mark.parametrize("config", [FAST, FAST_PAPER], ids=["default", "paper"])
D = 6
PLACES = {"ok": (0.0, 1.0), "other": (12.0, 1.0), "up": (4.0, 1.0), "down": (-4.0, 1.0), "core": (0.0, 0.1)}


def rows_of(*classes: tuple[str, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """So many rows of each class; "core" lies within the normals, where no distance finds it."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, n in classes:
        centre, spread = PLACES[name]
        part = rng.normal(scale=spread, size=(n, D))
        part[:, :2] += centre
        parts.append(part)
    return np.concatenate(parts), np.repeat([name for name, _ in classes], [n for _, n in classes])


def auroc(detector: MDMLDetector, name: str) -> float:
    rows, labels = rows_of(("ok", 1000), (name, 300), seed=99)
    return float(roc_auc_score(labels == "ok", detector.score_samples(rows)))


def fitted(config: DefaultConfig | PaperConfig, **settings: object) -> MDMLDetector:
    first = rows_of(("ok", 400), ("up", 30))
    return MDMLDetector(config, random_state=0, **settings).fit(*first, normal=["ok"])


@BOTH
def test_the_first_call_is_fit(config: DefaultConfig | PaperConfig) -> None:
    first = rows_of(("ok", 400), ("up", 30))
    detector = MDMLDetector(config, normal=["ok"], random_state=0).partial_fit(*first)
    assert (detector.score_samples(first[0]) == fitted(config).score_samples(first[0])).all()


def test_a_class_given_later_is_then_a_seen_one_and_unseen_ones_are_found_as_before() -> None:
    detector = fitted(FAST)
    before = auroc(detector, "down")
    assert auroc(detector, "core") < 0.5
    detector.partial_fit(*rows_of(("core", 40), seed=1))
    assert detector.anomaly_classes_ == ["core", "up"]
    assert auroc(detector, "core") > 0.95
    assert auroc(detector, "up") > 0.95
    assert auroc(detector, "down") > before - 0.01
    rows, _ = rows_of(("core", 50), seed=2)
    assert (detector.explain(rows).kind == "core").mean() > 0.8


def test_the_papers_algorithm_learns_a_class_given_later() -> None:
    # With its own constants: fewer steps leave more to chance.
    detector = fitted(PaperConfig())
    before = {name: auroc(detector, name) for name in ("down", "up")}
    detector.partial_fit(*rows_of(("down", 40), seed=1))
    assert auroc(detector, "down") > max(before["down"], 0.95)
    assert auroc(detector, "up") > before["up"] - 0.02


@BOTH
def test_training_goes_on_from_where_it_was_and_is_short(config: DefaultConfig | PaperConfig) -> None:
    detector = fitted(config)
    steps = []
    earlier = list(detector.losses_)
    detector.partial_fit(
        *rows_of(("ok", 50), ("down", 20), seed=1), progress=lambda step, n_steps, _: steps.append((step, n_steps))
    )
    further = FAST.ensemble.further_steps if config is FAST else FAST_PAPER.further_steps
    assert steps == [(step + 1, further) for step in range(further)]
    assert detector.losses_[: len(earlier)] == earlier
    assert len(detector.losses_) == len(earlier) + further


def test_a_loaded_detector_goes_on_as_the_saved_one_would(tmp_path: Path) -> None:
    rows, _ = rows_of(("ok", 200))
    detector = MDMLDetector(FAST, normal="all", random_state=3).fit(rows, ["one", "two"] * 100)
    detector.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    for each in (detector, loaded):
        each.partial_fit(rows_of(("ok", 60), seed=1)[0], ["three"] * 60)
    assert loaded.normal_classes_ == detector.normal_classes_ == ["one", "two", "three"]
    np.testing.assert_array_equal(loaded.score_samples(rows), detector.score_samples(rows))


def test_without_further_steps_the_encoders_stay_as_they_are() -> None:
    detector = fitted(replace(FAST, ensemble=replace(FAST.ensemble, further_steps=0)))
    before = detector.model_.to_tensors()
    detector.partial_fit(*rows_of(("ok", 50), ("down", 20), seed=1))
    after = detector.model_.to_tensors()
    learned = [name for name in before if name.startswith(("encoders.", "views."))]
    assert len(learned) > 5
    assert all((after[name] == before[name]).all() for name in learned)
    assert len(after["normals0.rows"]) == len(before["normals0.rows"]) + 50


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_alarm_rate_holds_on_earlier_and_on_new_normals(seed: int) -> None:
    rate = 0.05
    detector = MDMLDetector(FAST, false_alarm_rate=rate, random_state=seed)
    detector.fit(*rows_of(("ok", 1000), ("up", 30), seed=seed), normal=["ok"])
    fresh, labels = rows_of(("ok", 2000), ("other", 2000), seed=seed + 100)
    assert (detector.predict(fresh[labels == "other"]) == -1).all()
    detector.partial_fit(*rows_of(("other", 1000), seed=seed + 200), normal=["other"])
    n_calibration = len(detector.calibration_.scores)
    assert 450 < n_calibration < 600
    alarms = detector.predict(fresh) == -1
    # Both families are half of the calibration normals: the rate is that of the mixture.
    bound = rate + 4 * np.sqrt(rate * (1 - rate) * (1 / n_calibration + 1 / len(fresh)))
    assert 0 < alarms.mean() < bound
    assert detector.normal_classes_ == ["ok", "other"]


@BOTH
def test_it_goes_on_from_a_saved_model_as_from_the_one_in_memory(
    config: DefaultConfig | PaperConfig, tmp_path: Path
) -> None:
    detector = fitted(config)
    detector.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model").set_params(random_state=0)
    more, test = rows_of(("ok", 60), ("down", 20), seed=1), rows_of(("ok", 50), ("down", 50), seed=2)[0]
    for one in (detector, loaded):
        one.partial_fit(*more)
    assert (detector.score_samples(test) == loaded.score_samples(test)).all()
    assert (detector.p_value(test) == loaded.p_value(test)).all()
    assert detector.model_.history == loaded.model_.history
    # And twice, saved in between.
    loaded.save(tmp_path / "model")
    again = MDMLDetector.load(tmp_path / "model").set_params(random_state=0)
    for one in (detector, again):
        one.partial_fit(*rows_of(("core", 20), seed=3))
    assert (detector.score_samples(test) == again.score_samples(test)).all()


def test_what_is_kept_and_learned_from_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "TRAINING_ROWS", 100)
    monkeypatch.setattr(kept_module, "CALIBRATION_ROWS", 50)
    monkeypatch.setattr(kept_module, "FAMILY_ROWS", 10)
    detector = fitted(FAST)
    for seed in range(3):
        detector.partial_fit(*rows_of(("ok", 300), ("up", 30), ("down", 30), seed=seed + 1))
        kept = detector.kept_
        assert [int((kept.parts == part).sum()) for part in (NEITHER, left_out.BOTH, ANOMALY)] == [100, 50, 20]
        assert len(detector.calibration_.scores) == 50
        assert len(detector.model_.to_tensors()["normals0.rows"]) == 150
    assert sum(detector.kept_.n_seen) == 400 + 3 * 300


def test_kept_rows_are_a_uniform_sample_of_all_that_came() -> None:
    kept: KeptRows | None = None
    for batch in range(10):
        rows = np.full((5_000, 1), batch, dtype=np.float32)
        parts = np.full(len(rows), NEITHER, dtype=np.int8)
        part = KeptRows.draw(rows, np.full(len(rows), "ok", dtype=object), parts, None, 0.0, batch)
        kept = part if kept is None else kept.with_rows(part).bounded()
    assert kept is not None
    _, counts = np.unique(kept.rows, return_counts=True)
    # Of 20 000 kept, a tenth of each batch but for chance.
    assert len(counts) == 10
    assert counts.sum() == 20_000
    assert np.abs(counts - 2_000).max() < 4 * np.sqrt(2_000 * 0.6)


def test_what_a_row_is_for_does_not_decide_whether_it_stays() -> None:
    first = KeptRows.draw(
        np.zeros((1000, 1), dtype=np.float32),
        np.full(1000, "ok", dtype=object),
        np.repeat(np.array([NEITHER, left_out.BOTH], dtype=np.int8), [800, 200]),
        None,
        0.0,
        1,
    )
    rows = np.ones((4000, 1), dtype=np.float32)
    both = first.with_further(rows, np.full(4000, "ok", dtype=object), np.ones(4000, dtype=np.bool_), None, 0.0, 1)
    for part, share in ((NEITHER, 0.8), (left_out.BOTH, 0.2)):
        new = (both.parts == part) & (both.rows[:, 0] == 1)
        assert abs(new.sum() - share * 4000) < 4 * np.sqrt(4000 * 0.16)
        assert abs(both.keys[new].mean() - 0.5) < 4 * np.sqrt(1 / 12 / new.sum())


@BOTH
def test_families_that_were_adapted_to_stay_normal(config: DefaultConfig | PaperConfig) -> None:
    detector = fitted(config, false_alarm_rate=0.05)
    detector.adapt(rows_of(("other", 60), seed=3)[0])
    new = rows_of(("other", 200), seed=4)[0]
    before = (detector.predict(new) == -1).mean()
    detector.partial_fit(*rows_of(("ok", 100), ("down", 20), seed=1))
    assert (detector.predict(new) == -1).mean() < before + 0.1
    assert set(detector.explain(new).nearest_family) == {"adapted 1"}
    if config is FAST:
        assert (detector.predict(rows_of(("down", 100), seed=5)[0]) == -1).mean() > 0.9


def test_normals_of_a_group_stay_on_their_side() -> None:
    rows, labels = rows_of(("ok", 400), ("up", 20))
    groups = np.arange(len(rows)) % 8
    detector = MDMLDetector(FAST, random_state=0).fit(rows, labels, normal=["ok"], groups=groups)
    sides = {part: set(detector.kept_.groups[detector.kept_.parts == part]) for part in (FIRST, SECOND)}
    more, names = rows_of(("ok", 200), seed=1)
    detector.partial_fit(more, names, groups=np.arange(200) % 20)
    after = {part: set(detector.kept_.groups[detector.kept_.parts == part]) for part in (FIRST, SECOND)}
    assert not after[FIRST] & after[SECOND]
    assert all(sides[part] <= after[part] for part in sides)
    assert set(detector.calibration_.groups) == after[FIRST] | after[SECOND]
    with pytest.raises(InputError, match="groups must be given"):
        detector.partial_fit(more, names)


def test_it_recalibrates_on_the_normals_of_a_recalibration() -> None:
    detector = fitted(FAST, false_alarm_rate=0.05)
    detector.recalibrate(rows_of(("ok", 300), seed=7)[0])
    detector.partial_fit(*rows_of(("down", 20), seed=1))
    assert len(detector.calibration_.scores) == 300
    fresh = rows_of(("ok", 2000), seed=8)[0]
    assert (detector.predict(fresh) == -1).mean() < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 300)


def test_outliers_among_further_normals_are_left_out() -> None:
    detector = fitted(FAST, contamination=0.1)
    rows, labels = rows_of(("ok", 90), ("other", 10), seed=1)
    detector.partial_fit(rows, np.full(len(labels), "ok"))
    assert detector.kept_.rows[detector.kept_.parts != ANOMALY].max() < fitted(FAST).kept_.rows.max()


def test_without_labels_all_further_rows_are_normal() -> None:
    detector = fitted(FAST)
    before = detector.kept_.n_seen
    detector.partial_fit(rows_of(("ok", 50), seed=1)[0])
    assert sum(detector.kept_.n_seen) == sum(before) + 50
    assert detector.normal_classes_ == ["ok"]


@pytest.mark.parametrize(
    ("X", "y", "options", "match"),
    [
        (np.zeros((3, D)), ["up", "up"], {}, "2 labels for 3 rows"),
        (np.zeros((0, D)), None, {}, "no rows"),
        (np.zeros((3, D - 1)), None, {}, "5 features"),
        (np.zeros((3, D)), ["up"] * 3, {"normal": ["up"]}, "'up' was learned as an anomaly"),
        (np.zeros((3, D)), ["ok"] * 3, {"groups": [1, 2, 3]}, "groups must be given"),
    ],
    ids=["labels", "no rows", "columns", "an anomaly made normal", "groups"],
)
def test_what_cannot_be_learned_is_refused_and_changes_nothing(
    X: np.ndarray, y: list[str] | None, options: dict[str, object], match: str
) -> None:
    detector = fitted(FAST)
    test = rows_of(("ok", 20), seed=9)[0]
    before = detector.score_samples(test)
    with pytest.raises(InputError, match=match):
        detector.partial_fit(X, y, **options)
    assert (detector.score_samples(test) == before).all()
    assert detector.normal_classes_ == ["ok"]


def test_rows_that_are_given_twice_are_told_but_not_those_that_are_equal_by_chance() -> None:
    first, further = rows_of(("ok", 400), ("up", 30)), rows_of(("ok", 200), seed=1)
    detector = MDMLDetector(FAST, random_state=0).fit(*first, normal=["ok"])
    assert not detector.partial_fit(*further).remarks_
    detector.recalibrate(further[0][:100])
    (line,) = detector.remarks_
    assert line.startswith("100 of 100 rows equal rows that were given before")
    assert line in detector.notes_
    detector.partial_fit(first[0][:300], first[1][:300])
    assert len(detector.remarks_) == 2
    assert not MDMLDetector(FAST, random_state=0).fit(*first, normal=["ok"]).remarks_
    adapted = rows_of(("other", 60), seed=2)[0]
    (line,) = MDMLDetector(FAST, random_state=0).fit(*first, normal=["ok"]).adapt(adapted).recalibrate(adapted).remarks_
    assert line.startswith("60 of 60 rows equal")
    # Of few values most rows are equal to others.
    rng = np.random.default_rng(0)
    coarse = MDMLDetector(FAST, random_state=0).fit(rng.integers(0, 3, size=(400, 2)))
    assert not coarse.recalibrate(rng.integers(0, 3, size=(200, 2))).remarks_


def test_unnamed_normals_beside_several_classes_blur_none_of_them() -> None:
    first = rows_of(("ok", 300), ("other", 300), ("up", 30))
    detector = MDMLDetector(FAST, random_state=0).fit(*first, normal=["ok", "other"])
    told = float(detector.model_._families[0].discriminants.told)
    detector.partial_fit(np.concatenate([rows_of(("ok", 200), seed=1)[0], rows_of(("other", 200), seed=1)[0]]))
    discriminants = detector.model_._families[0].discriminants
    assert discriminants.weights.shape[0] == 2
    assert float(discriminants.told) > 0.9 * told > 0.7
