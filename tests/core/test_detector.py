import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from mdml_fast import ArtifactError, InputError, MDMLDetector
from mdml_fast.artifact import SCHEMA_VERSION
from mdml_fast.calibration import ConformalCalibration, split_by_group
from mdml_fast.meta.paper import PaperConfig

FAST = PaperConfig(outer_steps=20, episodes_per_step=8)


def data(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Normals around 0; 'up' and 'side' are anomaly classes."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n + 40, 6))
    rows[n : n + 20, 0] += 6
    rows[n + 20 :, 1] -= 6
    return rows, np.array(["ok"] * n + ["up"] * 20 + ["side"] * 20)


@pytest.fixture(scope="module")
def fitted() -> MDMLDetector:
    return MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])


def test_seen_classes_are_scored_as_less_normal(fitted: MDMLDetector) -> None:
    rows, labels = data(seed=1)
    scores = fitted.score_samples(rows)
    assert scores.shape == (340,)
    assert roc_auc_score(labels == "ok", scores) > 0.9


def test_p_values_and_alarms_agree(fitted: MDMLDetector) -> None:
    rows, _ = data(seed=1)
    p_values = fitted.p_value(rows)
    assert ((p_values > 0) & (p_values <= 1)).all()
    fitted_rate = clone(fitted).set_params(false_alarm_rate=0.05).fit(*data(), normal=["ok"])
    alarms = fitted_rate.predict(rows) == -1
    np.testing.assert_array_equal(alarms, fitted_rate.p_value(rows) <= 0.05)
    assert alarms.any()
    np.testing.assert_array_equal(alarms, fitted_rate.decision_function(rows) < 0)


@pytest.mark.parametrize("second_order", [False, True])
def test_paper_options_train(second_order: bool) -> None:
    config = PaperConfig(
        outer_steps=20,
        episodes_per_step=4,
        second_order=second_order,
        learn_temperature=True,
        reconstruction_weight=0.1,
    )
    detector = MDMLDetector(config, random_state=0).fit(*data(), normal=["ok"])
    assert detector.losses_[-1] < detector.losses_[0]
    assert detector.model_.to_tensors()["loss.log_temperature"] != 0


def test_training_lowers_the_outer_loss(fitted: MDMLDetector) -> None:
    assert len(fitted.losses_) == 20
    assert np.mean(fitted.losses_[-3:]) < 0.9 * np.mean(fitted.losses_[:3])


def test_the_same_seed_gives_the_same_bytes_on_one_thread_and_on_two() -> None:
    threads, weights = torch.get_num_threads(), []
    try:
        for n_threads in (1, 1, 2, 2):
            torch.set_num_threads(n_threads)
            tensors = MDMLDetector(FAST, random_state=3).fit(*data(), normal=["ok"]).model_.to_tensors()
            weights.append({name: value.numpy().tobytes() for name, value in tensors.items()})
    finally:
        torch.set_num_threads(threads)
    assert weights[0] == weights[1] == weights[2] == weights[3]
    other = MDMLDetector(FAST, random_state=4).fit(*data(), normal=["ok"]).model_.to_tensors()
    assert other["head.weight"].numpy().tobytes() != weights[0]["head.weight"]


def test_without_anomalies_it_learns_from_normals_alone_and_says_so() -> None:
    rows, labels = data()
    detector = MDMLDetector(FAST, random_state=0).fit(rows[labels == "ok"])
    assert any("normals alone" in note for note in detector.notes_)
    assert np.isfinite(detector.score_samples(rows)).all()


def test_few_normals_train_and_the_attainable_rate_is_said() -> None:
    rows, labels = data(n=20)
    detector = MDMLDetector(FAST, random_state=0).fit(rows, labels, normal=["ok"])
    assert any("0.01 can't be promised with 10 calibration normals" in note for note in detector.notes_)
    with pytest.raises(InputError, match="only 19 normal rows"):
        MDMLDetector(FAST).fit(rows[1:], labels[1:], normal=["ok"])


def test_notes_are_of_the_settings_as_they_are() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])
    assert not any("promised" in note for note in detector.notes_)
    detector.set_params(false_alarm_rate=1e-4)
    assert any("0.0001 can't be promised" in note for note in detector.notes_)


def test_numbers_of_numpy_as_settings_are_saved(tmp_path: Path) -> None:
    settings = {"false_alarm_rate": np.float32(0.125), "confidence": np.float64(0.9), "contamination": np.int64(0)}
    MDMLDetector(FAST, random_state=0, **settings).fit(*data(), normal=["ok"]).save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    assert {name: getattr(loaded, name) for name in settings} == settings


@pytest.mark.parametrize("labels", [(1, -1), (0, 1), ("0", "1")])
def test_conventional_labels_need_no_names(labels: tuple[object, object]) -> None:
    rows, names = data()
    y = [labels[0] if name == "ok" else labels[1] for name in names]
    detector = MDMLDetector(PaperConfig(outer_steps=1)).fit(rows, y)
    assert detector.normal_classes_ == [str(labels[0])]


@pytest.mark.parametrize(
    ("settings", "fit", "match"),
    [
        ({}, {}, "name the normal classes; the classes are ok, side, up"),
        ({"preset": "best"}, {"normal": ["ok"]}, "no preset 'best'"),
        ({"device": "tpu"}, {"normal": ["ok"]}, "device must be"),
        ({"dtype": "int8"}, {"normal": ["ok"]}, "dtype must be"),
        ({"false_alarm_rate": 1.5}, {"normal": ["ok"]}, "between 0 and 1"),
        ({}, {"normal": ["ok"], "groups": ["one"] * 340}, "all normal rows are of one group"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: dict[str, object], fit: dict[str, object], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        MDMLDetector(**settings).fit(*data(), **fit)


def test_a_saved_model_scores_the_same(fitted: MDMLDetector, tmp_path: Path) -> None:
    rows, _ = data(seed=1)
    fitted.save(tmp_path / "model", metrics={"auroc": 0.5})
    fitted.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.score_samples(rows), fitted.score_samples(rows))
    np.testing.assert_array_equal(loaded.p_value(rows), fitted.p_value(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_damaged_and_foreign_models_are_refused(fitted: MDMLDetector, tmp_path: Path) -> None:
    model = tmp_path / "model"
    fitted.save(model)
    weights, text = (model / "model.safetensors").read_bytes(), (model / "model.json").read_text()

    def refused(match: str, weights: bytes = weights, text: str = text) -> None:
        (model / "model.safetensors").write_bytes(weights)
        (model / "model.json").write_text(text)
        with pytest.raises(ArtifactError, match=match) as caught:
            MDMLDetector.load(model)
        assert "\n" not in str(caught.value)

    refused("sha256", weights=weights[:-1])
    refused("sha256", weights=weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("damaged", text=text[:-20])
    refused("not that of a model", text="{}")
    refused("schema version 99", text=text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    document = json.loads(text)
    del document["features"]
    refused("do not fit together", text=json.dumps(document))
    with pytest.raises(InputError, match="no such model"):
        MDMLDetector.load(tmp_path / "nothing")


def test_what_is_no_model_is_never_replaced(fitted: MDMLDetector, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="exists and is no model"):
            fitted.save(path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_what_lies_beside_a_model_in_its_folder_is_not_lost(fitted: MDMLDetector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"notes\.txt would be lost"):
        fitted.save(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "precious"


def test_the_folder_that_one_is_in_is_not_replaced(
    fitted: MDMLDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the folder that you are in"):
        fitted.save(".")


def test_a_training_that_is_broken_off_leaves_the_detector_as_it_was() -> None:
    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    rows, labels = data()
    detector = MDMLDetector(FAST, normal=["ok"], random_state=0).fit(rows, labels)
    before = detector.score_samples(rows)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(1000 * rows[:, :1], labels, progress=break_off)
    with pytest.raises(KeyboardInterrupt):
        detector.partial_fit(rows, labels, normal=["further"], progress=break_off)
    np.testing.assert_array_equal(detector.score_samples(rows), before)
    assert detector.n_features_in_ == rows.shape[1]
    assert detector.normal_classes_ == ["ok"]
    with pytest.raises(KeyboardInterrupt):
        (unfitted := MDMLDetector(FAST, normal=["ok"])).fit(rows, labels, progress=break_off)
    with pytest.raises(NotFittedError):
        unfitted.score_samples(rows)


@pytest.mark.parametrize(
    "settings", [{"false_alarm_rate": 5}, {"confidence": 0}, {"contamination": 2}, {"promise": "none"}]
)
def test_settings_that_are_changed_are_checked_where_they_count(fitted: MDMLDetector, settings: dict[str, Any]) -> None:
    detector, (rows, _) = copy.deepcopy(fitted).set_params(**settings), data(seed=1)
    calibration = detector.calibration_
    for use in (detector.predict, detector.recalibrate):
        with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
            use(rows)
    assert detector.calibration_ is calibration


def test_a_failed_save_leaves_the_old_model(
    fitted: MDMLDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        fitted.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"

    class CutOffError(Exception):
        pass

    def cut_off(step: int, n_steps: int, loss: float) -> None:
        if step == 7:
            raise CutOffError

    whole = MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"])
    with pytest.raises(CutOffError):
        MDMLDetector(FAST, random_state=0).fit(*data(), normal=["ok"], progress=cut_off, checkpoint=checkpoint)
    assert checkpoint.exists()
    steps: list[int] = []
    resumed = MDMLDetector(FAST, random_state=0).fit(
        *data(), normal=["ok"], progress=lambda step, *_: steps.append(step), checkpoint=checkpoint, resume=True
    )
    assert 1 < steps[0] < 8
    for name, value in whole.model_.to_tensors().items():
        assert torch.equal(value, resumed.model_.to_tensors()[name]), name
    with pytest.raises(ArtifactError, match="other data, settings or versions"):
        MDMLDetector(FAST, random_state=1).fit(*data(), normal=["ok"], checkpoint=checkpoint, resume=True)


def test_conformal_p_values_hold_their_rate() -> None:
    rng = np.random.default_rng(0)
    alarms = [
        (ConformalCalibration(rng.normal(size=199)).p_value(rng.normal(size=100)) <= 0.05).mean() for _ in range(400)
    ]
    # The expectation is 10 / 200; the mean over 400 draws of calibration and test rows deviates by 0.0013.
    assert abs(np.mean(alarms) - 0.05) < 0.005


def test_p_value_counts_ties_against_the_alarm() -> None:
    calibration = ConformalCalibration(np.array([1.0, 2.0, 2.0]))
    p_values = calibration.p_value(np.array([0.0, 1.0, 1.5, 2.0, 9.0]))
    np.testing.assert_allclose(p_values, [0.25, 0.25, 1 / 3, 1.0, 1.0], atol=1e-6)
    # At the level of a whole rank, a row that ties is no alarm.
    assert p_values[1] > 0.25
    # Above tied scores there is no line, and the next score has the rank that it has.
    calibration = ConformalCalibration(np.array([1.0, 1.0, 2.0, 3.0]))
    p_values = calibration.p_value(np.array([0.0, 1.0, 1.5, 2.0, 2.5, 3.0]))
    np.testing.assert_allclose(p_values, [0.2, 0.6, 0.6, 0.6, 0.8 * 3 / 3.5, 1.0], atol=1e-6)


numbers = st.integers(-20, 20) | st.floats(-1e3, 1e3, allow_subnormal=False) | st.sampled_from([-np.inf, np.inf])
scores = st.lists(numbers, min_size=1, max_size=30)


@given(scores, scores, st.floats(0.001, 0.999))
@example([0.0, np.inf], [0.0], 1 / 3)
def test_p_values_order_rows_as_scores_do_and_are_no_more_than_a_rank_below_the_plain_ones(
    calibration: list[float], rows: list[float], level: float
) -> None:
    found, given_scores = ConformalCalibration(np.array(calibration, dtype=float)), np.sort(np.array(rows, dtype=float))
    p_values, n = found.p_value(given_scores), len(calibration)
    assert (np.diff(p_values) >= 0).all()
    plain = (np.searchsorted(found.scores, given_scores, side="right") + 1) / (n + 1)
    assert (p_values <= plain + 1e-12).all()
    assert (p_values > plain - 1 / (n + 1)).all()
    np.testing.assert_allclose(found.p_value(given_scores, between=False), plain, rtol=1e-12)
    # Alarms of a level are the rows below its score, but for rounding, and for one that ties with a single score.
    threshold = found.score_threshold(level)
    clear = np.abs(p_values - level) > 1e-5
    assert ((p_values <= level) == (given_scores < threshold))[clear].all()


def test_scores_that_are_not_finite_have_p_values() -> None:
    calibration = ConformalCalibration(np.array([-np.inf, -np.inf, 0.0, 1.0, np.inf]))
    with np.errstate(all="raise"):
        p_values = calibration.p_value(np.array([-np.inf, -5.0, 0.5, 7.0, np.inf, np.nan]))
    np.testing.assert_allclose(p_values, [3 / 6, 3 / 6, 4 / 6 * 3 / 3.5, 4 / 6, 1.0, 1.0], atol=1e-6)


def test_a_rate_between_ranks_never_exceeds_the_next_rank() -> None:
    """Whatever the distribution: here the distribution functions are linear and concave at the low end."""
    rng = np.random.default_rng(0)
    for draw in (rng.random, lambda size: rng.random(size) ** 3):
        flagged = [(ConformalCalibration(draw(50)).p_value(draw(200)) <= 0.03).mean() for _ in range(3000)]
        # α (n + 1) is 1.53: the next rank is at 0.039; the mean deviates by 0.0005.
        assert 0.03 < np.mean(flagged) < 0.039


def test_between_ranks_a_rate_is_held_exactly_where_plain_p_values_fall_short() -> None:
    """Of exponential scores, as tails give them; of normal ones nearly."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"between": [], "plain": [], "normal": []}
    for _ in range(3000):
        calibration, new = ConformalCalibration(-rng.exponential(size=150)), -rng.exponential(size=300)
        p_values = calibration.p_value(new)
        found["between"].append((p_values <= 0.01).mean())
        found["plain"].append((calibration.p_value(new, between=False) <= 0.01).mean())
        p_values = ConformalCalibration(rng.normal(size=150)).p_value(rng.normal(size=300))
        found["normal"].append((p_values <= 0.01).mean())
    assert np.mean(found["plain"]) < 0.0075
    # The mean deviates by 0.0002.
    assert abs(np.mean(found["between"]) - 0.01) < 0.0006
    assert abs(np.mean(found["normal"]) - 0.01) < 0.0008


def test_a_split_by_group_leaves_one_on_each_side() -> None:
    rest, held_out = split_by_group(np.array(["a", "b"], dtype=object), 0.01, 0)
    assert len(rest) == len(held_out) == 1
