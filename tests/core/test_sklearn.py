"""The detector among scikit-learn's tools, and PyOD's."""

import pickle
from collections.abc import Callable

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from mdml_fast import InputError, MDMLDetector
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.paper import PaperConfig

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=4, n_prototypes=16, n_queries=16, n_anomalies=8, n_synthetic=32, steps=2),
    n_trees=4,
)
FEW = "the check fits on fewer than 20 normals, which are refused: calibration would mean nothing"
EXPECTED_FAILURES = {
    "check_n_features_in_after_fitting": FEW,
    "check_classifier_data_not_an_array": FEW,
    "check_fit2d_1sample": f"{FEW}; the message says so, in other words than the check looks for",
    "check_fit2d_1feature": FEW,
    "check_outliers_fit_predict": "contamination is what the normals may hold unlabelled; the share of alarms among "
    "new normals is false_alarm_rate, which is calibrated on held-out normals and not counted off on training rows",
    "check_outliers_train": "there is no offset_: alarms may depend on the row's group (p-values by group) or on the "
    "batch (promise fdr), so decision_function is the p-value less its level, and not the score less a constant",
}


# As scikit-learn's outlier detectors do, the checks ignore y, which holds classes of no meaning.
@parametrize_with_checks(
    [MDMLDetector(FAST, normal="all", false_alarm_rate=0.2)], expected_failed_checks=lambda _: EXPECTED_FAILURES
)
def test_scikit_learns_checks(estimator: MDMLDetector, check: Callable[[MDMLDetector], None]) -> None:
    check(estimator)


def table(n: int = 200, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Normals, a tenth of "up", a tenth of "down"."""
    rng = np.random.default_rng(seed)
    labels = np.array((["ok"] * 8 + ["up", "down"]) * (n // 10), dtype=object)
    shift = np.select([labels == "up", labels == "down"], [5.0, -5.0], 0.0)
    frame = pd.DataFrame({"a": rng.normal(size=n) + shift, "b": rng.normal(size=n), "c": rng.choice(["x", "y"], n)})
    return frame, labels


@pytest.fixture(scope="module")
def fitted() -> MDMLDetector:
    return MDMLDetector(FAST, normal=["ok"], random_state=0).fit(*table())


def test_a_pipeline_scores_as_its_steps_do_and_keeps_feature_names() -> None:
    frame, labels = table()
    numbers = frame[["a", "b"]]
    scaler = StandardScaler().set_output(transform="pandas")
    pipeline = make_pipeline(scaler, MDMLDetector(FAST, normal=["ok"], random_state=0)).fit(numbers, labels)
    alone = MDMLDetector(FAST, normal=["ok"], random_state=0).fit(scaler.transform(numbers), labels)
    np.testing.assert_array_equal(pipeline.score_samples(numbers), alone.score_samples(scaler.transform(numbers)))
    assert pipeline[-1].feature_names_in_.tolist() == ["a", "b"]
    assert set(pipeline.predict(numbers)) <= {1, -1}
    pipeline.set_output(transform="default")
    np.testing.assert_array_equal(pipeline.score_samples(numbers), alone.score_samples(scaler.transform(numbers)))


def test_a_grid_search_chooses_by_how_normals_and_anomalies_are_told_apart() -> None:
    frame, labels = table()

    def auroc(detector: MDMLDetector, X: pd.DataFrame, y: np.ndarray) -> float:
        return float(roc_auc_score(y == "ok", detector.score_samples(X)))

    search = GridSearchCV(
        MDMLDetector(FAST, normal=["ok"], random_state=0), {"contamination": [0.0, 0.2]}, scoring=auroc, cv=2
    )
    search.fit(frame, labels)
    assert search.best_score_ > 0.9
    assert search.best_estimator_.contamination in (0.0, 0.2)


def test_a_clone_is_unfitted_and_has_the_settings(fitted: MDMLDetector) -> None:
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "model_")


@pytest.mark.parametrize("preset", [FAST, PaperConfig(outer_steps=2)], ids=["default", "paper"])
def test_a_pickled_detector_scores_the_same(preset: DefaultConfig | PaperConfig) -> None:
    frame, _ = table(seed=1)
    fitted = MDMLDetector(preset, normal=["ok"], random_state=0).fit(*table())
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.score_samples(frame), fitted.score_samples(frame))


def test_frames_of_every_kind_score_the_same_whatever_the_order_of_their_columns(fitted: MDMLDetector) -> None:
    frame, _ = table(seed=1)
    expected = fitted.score_samples(frame)
    categorical = frame.assign(c=frame["c"].astype("category"), unused=0)[["unused", "c", "b", "a"]]
    for same in (pl.from_pandas(frame), categorical, pl.from_pandas(categorical), frame.to_numpy(dtype=object)):
        np.testing.assert_array_equal(fitted.score_samples(same), expected)
    with pytest.raises(InputError, match="X has 2 features, but MDMLDetector is expecting 3 features as input"):
        fitted.score_samples(frame.to_numpy(dtype=object)[:, :2])
    with pytest.raises(InputError, match="no column 'b'"):
        fitted.score_samples(frame.drop(columns="b"))


def test_tags_say_what_it_takes(fitted: MDMLDetector) -> None:
    tags = get_tags(fitted)
    assert tags.estimator_type == "outlier_detector"
    assert tags.input_tags.allow_nan
    assert tags.input_tags.string
    assert tags.input_tags.categorical
    assert not tags.input_tags.sparse
    assert not tags.target_tags.required


def test_all_rows_can_be_normal_whatever_y_says() -> None:
    frame, labels = table()
    detector = MDMLDetector(FAST, normal="all", random_state=0).fit(frame, labels)
    assert detector.normal_classes_ == ["down", "ok", "up"]
    assert detector.anomaly_classes_ == []
    with pytest.raises(InputError, match="normal must be a list of classes, or 'all'; got 'ok'"):
        MDMLDetector(FAST, normal="ok").fit(frame, labels)


@pytest.mark.parametrize("promise", ["marginal", "certificate", "fdr"])
def test_pyods_names_and_signs_say_the_same(promise: str) -> None:
    frame, labels = table(400)
    detector = MDMLDetector(FAST, normal=["ok"], random_state=0, promise=promise, false_alarm_rate=0.1)
    pyod = detector.as_pyod().fit(frame, labels)
    np.testing.assert_array_equal(pyod.decision_scores_, -detector.score_samples(frame))
    np.testing.assert_array_equal(pyod.labels_, detector.predict(frame) == -1)
    np.testing.assert_array_equal(pyod.predict(frame), pyod.labels_)
    assert 40 < pyod.labels_.sum() < 200
    assert pyod.contamination == 0.1
    again = detector.as_pyod()
    assert len(again.decision_scores_) == len(detector.calibration_.scores)
    new = table(400, seed=3)[0]
    np.testing.assert_array_equal(again.predict(new), detector.predict(new) == -1)
    if promise == "fdr":
        return
    assert again.threshold_ == pyod.threshold_
    np.testing.assert_array_equal(again.predict(new), again.decision_function(new) > again.threshold_)
    detector.recalibrate(new[:100])
    np.testing.assert_array_equal(again.predict(new), detector.predict(new) == -1)
    np.testing.assert_array_equal(again.predict(new), again.decision_function(new) > again.threshold_)


def test_no_row_passes_a_threshold_that_no_row_can_reach() -> None:
    frame, labels = table()
    pyod = MDMLDetector(FAST, normal=["ok"], false_alarm_rate=1e-6, random_state=0).as_pyod().fit(frame, labels)
    assert pyod.threshold_ == np.inf
    assert not pyod.labels_.any()


def test_pyods_own_evaluation_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    data = pytest.importorskip("pyod.utils.data", reason="PyOD is not installed: pip install 'mdml-fast[peers]'")
    X, X_new, y, y_new = data.generate_data(200, 100, n_features=4, contamination=0.1, random_state=0)
    pyod = MDMLDetector(FAST, random_state=0).as_pyod().fit(X, y)
    data.evaluate_print("mdml", y_new, pyod.decision_function(X_new))
    printed = capsys.readouterr().out
    assert printed.startswith("mdml ROC:1.0, precision @ rank n:1.0"), printed
