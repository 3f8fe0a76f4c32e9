import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mdml_fast import InputError, evaluate
from mdml_fast.baselines import BASELINES, Scorer, baseline, installed_baselines
from mdml_fast.comparison import paired_difference
from mdml_fast.data import LabelledTable
from mdml_fast.evaluation import EvaluationProtocol, class_metrics

PROTOCOL = EvaluationProtocol(splits=4, seeds=2)


def table(groups: bool = False) -> LabelledTable:
    """100 normals, four anomaly classes of 30 rows and one of 3; every fifth normal is a copy of another."""
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(100, 2))
    normals[::5] = normals[1::5]
    centers = [(6, 0), (0, 6), (-6, 0), (0, -6)]
    anomalies = [rng.normal(center, 1, (30, 2)) for center in centers] + [rng.normal(12, 1, (3, 2))]
    rows = np.concatenate([normals, *anomalies])
    labels = np.array(["ok"] * 100 + [c for c in "abcd" for _ in range(30)] + ["tiny"] * 3, dtype=object)
    group_names = np.array([f"g{i // 10}" for i in range(len(rows))], dtype=object) if groups else None
    return LabelledTable(pa.table({"u": rows[:, 0], "v": rows[:, 1]}), labels, ("ok",), group_names)


class Recorder:
    """A method that remembers what it was given, and scores by the distance from 0."""

    def __init__(self) -> None:
        self.fits: list[LabelledTable] = []
        self.tests: list[pa.Table] = []

    def __call__(self, train: LabelledTable, seed: int) -> Scorer:
        self.fits.append(train)

        def score(features: pa.Table) -> np.ndarray:
            self.tests.append(features)
            return -np.hypot(features["u"].to_numpy(), features["v"].to_numpy())

        return score


def test_metrics_of_known_scores() -> None:
    normals, anomalies = np.array([0.0, 1.0, 2.0, 3.0]), np.array([2.5, 4.0])
    metrics = class_metrics(normals, anomalies)
    assert metrics["auroc"] == pytest.approx(7 / 8)
    assert metrics["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["fpr95"] == pytest.approx(1 / 4)


def test_no_row_is_in_both_training_and_test() -> None:
    method = Recorder()
    document = evaluate(table(), {"it": method}, PROTOCOL)
    assert len(method.fits) == len(method.tests) == 8
    for fit, test in zip(method.fits, method.tests, strict=True):
        train_rows = set(zip(*fit.features.to_pydict().values(), strict=True))
        test_rows = set(zip(*test.to_pydict().values(), strict=True))
        assert not train_rows & test_rows
        assert fit.is_normal.sum() == 60
        assert all(rows == 10 for rows in fit.anomaly_classes().values())
    assert document["data"]["dropped_duplicates"] > 0


def test_half_of_the_large_classes_are_seen_in_complementary_pairs() -> None:
    document = evaluate(table(), {"it": Recorder()}, PROTOCOL)
    splits = document["results"]["it"]["splits"]
    assert [split["seed"] for split in splits] == [0, 1] * 4
    for first, second in zip(splits[0:8:4], splits[2:8:4], strict=True):
        assert len(first["seen"]) == len(second["seen"]) == 2
        assert set(first["seen"]) | set(second["seen"]) == set("abcd")
    per_class = document["results"]["it"]["per_class"]
    assert per_class["tiny"]["auroc_seen"] is None
    assert per_class["tiny"]["auroc"] == 1.0
    assert per_class["a"]["rows"] == 30


def test_small_classes_are_left_out_of_the_mean() -> None:
    class Blind(Recorder):
        """Takes class tiny, beyond 8, for the most normal."""

        def __call__(self, train: LabelledTable, seed: int) -> Scorer:
            inner = super().__call__(train, seed)
            return lambda features: np.where(features["u"].to_numpy() > 8.5, 99.0, inner(features))

    result = evaluate(table(), {"it": Blind()}, PROTOCOL)["results"]["it"]
    assert result["per_class"]["tiny"]["auroc"] == 0
    assert result["unseen"]["auroc"]["mean"] > 0.9


def test_groups_of_normals_are_on_one_side() -> None:
    method = Recorder()
    data = table(groups=True)
    evaluate(data, {"it": method}, EvaluationProtocol(splits=1, seeds=3))
    for fit in method.fits:
        assert fit.groups is not None
        assert len(set(fit.groups[fit.is_normal])) == 6
        assert all(np.sum(fit.groups[fit.is_normal] == name) == 10 for name in set(fit.groups[fit.is_normal]))


UNSUPERVISED = {"knn", "knn-clipped", "isolation-forest", "lof", "ecod", "copod"}


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines(name: str) -> None:
    if name not in installed_baselines():
        with pytest.raises(InputError, match=f"baseline {name} needs .*: pip install"):
            baseline(name)
        return
    result = evaluate(table(), {name: baseline(name)}, PROTOCOL)["results"][name]
    assert result["seen"]["auroc"]["mean"] > 0.75
    # What learns from labels alone is lost in other directions, or not, as luck has it; COPOD adds up one column's tail
    # after the other, and is the weaker where one alone tells.
    least = 0.3 if name not in UNSUPERVISED else 0.8 if name == "copod" else 0.95
    assert result["unseen"]["auroc"]["mean"] > least
    normals_alone = table().take(np.arange(100))
    scores = baseline(name)(normals_alone, 0)(normals_alone.features)
    assert (np.unique(scores).size > 50) == (name in UNSUPERVISED)


def test_differences_are_paired_over_the_splits() -> None:
    class Worse(Recorder):
        """Misses class a."""

        def __call__(self, train: LabelledTable, seed: int) -> Scorer:
            inner = super().__call__(train, seed)
            return lambda features: np.where(features["u"].to_numpy() > 4, 9.0, inner(features))

    document = evaluate(table(), {"ours": Recorder(), "worse": Worse(), "same": Recorder()}, PROTOCOL)
    assert set(document["differences"]) == {"worse", "same"}
    per_split = [[split["auroc_unseen"] for split in document["results"][name]["splits"]] for name in ("ours", "worse")]
    gains = np.subtract(*per_split)
    found = document["differences"]["worse"]["unseen"]["auroc"]
    assert found["mean"] == pytest.approx(gains.mean())
    assert found["worst"] == pytest.approx(gains.min())
    assert found["low"] < found["mean"] < found["high"]
    assert (found["wins"], found["losses"], found["ties"]) == ((gains > 0).sum(), 0, (gains == 0).sum())
    assert 0 < found["wins"] < 8
    assert document["differences"]["worse"]["unseen"]["fpr95"]["mean"] > 0
    assert document["differences"]["same"]["seen"]["auroc"]["ties"] == 8


def test_paired_difference_of_known_numbers() -> None:
    found = paired_difference([0.9, 0.8, None, 0.7], [0.8, 0.8, 0.1, 0.8])
    assert found["mean"] == pytest.approx(0)
    assert found["high"] == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 1)
    assert paired_difference([0.1], [0.3], higher_is_better=False)["mean"] == pytest.approx(0.2)
    assert paired_difference([None], [0.3])["mean"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_peak_memory() -> None:
    # In a process of its own: what the system takes back from a large one meanwhile would hide the block.
    script = """
import numpy as np
from mdml_fast.resources import PeakMemory
memory = PeakMemory()
before = memory.bytes()
np.ones(2**24)
print(before, memory.bytes())
"""
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    before, after = map(int, found.split())
    assert before < 2**24
    assert 2**27 - 2**22 <= after < 2**27 + 2**24


def test_one_anomaly_class_is_unseen() -> None:
    data = table()
    rows = np.flatnonzero(np.isin(data.labels.astype(str), ["ok", "a"]))
    result = evaluate(data.take(rows), {"it": Recorder()}, PROTOCOL)["results"]["it"]
    assert result["unseen"]["auroc"]["mean"] > 0.9
    assert result["seen"]["auroc"] == {"mean": None, "std": None}


def test_max_rows_keeps_the_shares() -> None:
    document = evaluate(table(), {"it": Recorder()}, EvaluationProtocol(splits=1, seeds=1, max_rows=112))
    assert document["data"]["rows"] == 223
    assert document["data"]["normals"] == 50
    assert document["data"]["families"] == {"a": 15, "b": 15, "c": 15, "d": 15, "tiny": 2}


def test_what_cannot_be_evaluated_is_refused() -> None:
    data = table()
    with pytest.raises(InputError, match="no anomaly classes"):
        evaluate(data.take(np.arange(100)), {"it": Recorder()}, PROTOCOL)
    with pytest.raises(InputError, match="splits must be 1 or more"):
        EvaluationProtocol(splits=0)
    with pytest.raises(InputError, match="no baseline 'oracle'; the baselines are knn"):
        baseline("oracle")
