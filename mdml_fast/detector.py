"""The detector: scikit-learn's interface over encoding, meta-learning and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from mdml_fast.artifact import load_artifact, save_artifact
from mdml_fast.calibration import ConformalCalibration, Promise, calibration_split
from mdml_fast.data import FeatureEncoder, as_table
from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import MIN_NORMALS, Names, check_normals, class_names
from mdml_fast.errors import ArtifactError, InputError
from mdml_fast.meta.model import Model, TrainingRows
from mdml_fast.meta.neighbours import innermost
from mdml_fast.meta.training import Progress
from mdml_fast.presets import Config, algorithm, config_from_json, model_class, preset_config

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class Alarms(NamedTuple):
    """For each row [N] its score, its p-value, and whether it is an alarm."""

    scores: Floats
    p_values: Floats
    is_alarm: npt.NDArray[np.bool_]


class MDMLDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Find anomalies of classes that were never labelled, from normals and a few labelled anomalies of other classes.

    Args:
        preset: ``default``, ``paper``, or a `DefaultConfig` or `PaperConfig`.
        normal: the names of the normal classes in y. None: 1 where y is of 1 and -1, 0 where it is of 0 and 1.
        false_alarm_rate: the share, in (0, 1), that `promise` is about.
        promise: what `predict` keeps to: ``marginal``, ``certificate`` or ``fdr``, see `Promise`.
        confidence: of the certificate, in (0, 1).
        contamination: the share of the normals, in [0, 0.5), that may be unlabelled anomalies. As many of the most
            distant are left out of training and of calibration; where they were normal, the false-alarm rate may
            exceed its promise by as much.
        random_state: an int makes `fit` repeatable to the bit.
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``, which the networks compute in; weights stay float32.

    Attributes:
        encoder_: the fitted `FeatureEncoder`.
        model_: the trained model.
        calibration_: the `ConformalCalibration`.
        normal_classes_: names of the normal classes.
        anomaly_classes_: names of the anomaly classes seen in training.
        notes_: what a user should know about this fit, a line each.

    Example:
        >>> detector = MDMLDetector(random_state=0).fit(X, y, normal=["ok"])
        >>> alarms = detector.predict(X_new) == -1
    """

    def __init__(
        self,
        preset: str | Config = "default",
        *,
        normal: Sequence[Any] | None = None,
        false_alarm_rate: float = 0.01,
        promise: str = "marginal",
        confidence: float = 0.95,
        contamination: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.preset = preset
        self.normal = normal
        self.false_alarm_rate = false_alarm_rate
        self.promise = promise
        self.confidence = confidence
        self.contamination = contamination
        self.random_state = random_state
        self.device = device
        self.dtype = dtype

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        normal: Sequence[Any] | None = None,
        groups: Any = None,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
        resume: bool = False,
    ) -> Self:
        """Learn from normals and labelled anomalies.

        Args:
            X: N rows: a pyarrow, pandas or polars table, or an array [N, d].
            y: class of each row [N]; None means that all are normal. Without anomalies it learns from normals alone.
            normal: the names of the normal classes; overrides the constructor's.
            groups: group of each row [N]: what scores a normal to calibrate on has learned nothing from its group, and
                a normal is not compared with its own group. They are remembered for `p_value`.
            progress: told after each outer step.
            checkpoint: a file for the state of the run, which stays when the run is cut off.
            resume: go on from that file, where there is one.

        Raises:
            InputError: the rows, classes or settings can't be used; the message says what to do.
        """
        config = preset_config(self.preset)
        device, dtype = resolve_device(self.device), _dtype(self.dtype)
        self.check_settings()
        table = as_table(X)
        labels, normal_classes = _labels(y, self.normal if normal is None else normal, table.num_rows)
        seed = int(check_random_state(self.random_state).randint(2**31))

        is_normal = np.isin(labels.astype(str), normal_classes)
        normals, anomalies = np.flatnonzero(is_normal), np.flatnonzero(~is_normal)
        all_groups = _groups(groups, table.num_rows)
        group_names = None if all_groups is None else all_groups[normals]
        algorithm_class = model_class(config)
        if group_names is not None and len(set(group_names)) < 2:
            raise InputError(
                f"all normal rows are of one group, {group_names[0]!r}; a split needs two: leave the group out"
            )
        train, calibration = np.arange(len(normals)), np.empty(0, dtype=np.intp)
        if not algorithm_class.calibrates_itself:
            train, calibration = calibration_split(len(normals), self.false_alarm_rate, group_names, seed)

        used = np.concatenate([normals[train], anomalies])
        self.encoder_ = FeatureEncoder.fit(table, is_normal, used)
        rows = self.encoder_.transform(table)
        kept = innermost(rows[normals], self.contamination, seed)
        train, calibration = np.intersect1d(train, kept), np.intersect1d(calibration, kept)
        training = TrainingRows(
            rows[normals[train]],
            labels[normals[train]],
            rows[anomalies],
            labels[anomalies],
            None if group_names is None else group_names[train],
        )
        self.model_: Model = algorithm_class.fit(
            training,
            config,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
        if held_out := self.model_.held_out:
            calibration, scores = train[held_out.positions], held_out.scores
        else:
            scores = self.model_.score(rows[normals[calibration]])
        held_out_groups = None if group_names is None else group_names[calibration]
        self.calibration_ = ConformalCalibration(scores, held_out_groups)
        self.normal_classes_ = list(normal_classes)
        self.anomaly_classes_ = np.unique(labels[anomalies].astype(str)).tolist()
        self.n_features_in_ = table.num_columns
        self.feature_names_in_ = np.array(table.column_names, dtype=object)
        self.notes_ = self._notes()
        return self

    def score_samples(self, X: Any) -> Floats:
        """The score of each row [N], higher is more normal."""
        check_is_fitted(self)
        return self.model_.score(self.encoder_.transform(as_table(X)))

    def p_value(self, X: Any, groups: Any = None) -> Floats:
        """The conformal p-value [N] of "this row is normal", in (0, 1].

        Args:
            X: the rows.
            groups: the group of each row [N]; rows are then compared with the calibration normals of their own group,
                where it has any.
        """
        scores = self.score_samples(X)
        return self.calibration_.p_value(scores, _groups(groups, len(scores)))

    def decision_function(self, X: Any, groups: Any = None) -> Floats:
        """The p-value less the level that keeps the promise [N]: above 0 for rows that `predict` passes."""
        p_values = self.p_value(X, groups)
        return p_values - self._level(p_values)

    def predict(self, X: Any, groups: Any = None) -> npt.NDArray[np.int64]:
        """-1 for alarms, rows whose p-value is up to the level that keeps the promise; 1 for the others [N]."""
        return np.where(self.alarms(X, groups).is_alarm, -1, 1)

    def alarms(self, X: Any, groups: Any = None) -> Alarms:
        """Scores, p-values and alarms of rows, scored once; the groups are those of `p_value`."""
        scores = self.score_samples(X)
        p_values = self.calibration_.p_value(scores, _groups(groups, len(scores)))
        return Alarms(scores, p_values, p_values <= self._level(p_values))

    def recalibrate(self, X: Any, groups: Any = None) -> Self:
        """Take these normals [N], which nothing was learned from, to calibrate on, in place of the earlier ones.

        Args:
            X: rows that are normal, as normals are today.
            groups: the group of each [N], for alarms calibrated by group.

        Raises:
            InputError: there are fewer than 20 rows.
        """
        scores = self.score_samples(X)
        _check_count(len(scores), "calibrate on")
        self.calibration_ = ConformalCalibration(scores, _groups(groups, len(scores)), self.contamination)
        self.notes_ = self._notes()
        return self

    def adapt(self, X: Any) -> Self:
        """Take a new family of normals (a new machine, a new user) as normal, without training.

        Args:
            X: rows of that family, some tens; all of them normal.

        Raises:
            InputError: there are fewer than 20 rows.
        """
        check_is_fitted(self)
        rows = self.encoder_.transform(as_table(X))
        _check_count(len(rows), "adapt to")
        self.model_.adapt(rows)
        return self

    def save(self, path: Path | str, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the model to a folder, with what was measured of it, where given.

        Raises:
            InputError: there is something else at that path.
        """
        check_is_fitted(self)
        document = {
            "preset": self.preset if isinstance(self.preset, str) else "custom",
            "algorithm": algorithm(self.model_.config),
            "config": asdict(self.model_.config),
            "false_alarm_rate": self.false_alarm_rate,
            "promise": self.promise,
            "confidence": self.confidence,
            "contamination": self.contamination,
            "calibration_groups": None if (groups := self.calibration_.groups) is None else groups.tolist(),
            "dtype": self.dtype,
            "normal_classes": self.normal_classes_,
            "anomaly_classes": self.anomaly_classes_,
            "columns": self.feature_names_in_.tolist(),
            "features": self.encoder_.to_json(),
            "metrics": dict(metrics or {}),
        }
        calibration = {"calibration.scores": torch.from_numpy(self.calibration_.scores)}
        save_artifact(Path(path), document, self.model_.to_tensors() | calibration)

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> MDMLDetector:
        """The detector that was saved to a folder.

        Raises:
            InputError: there is no model, or it is damaged, foreign or of another version.
        """
        path = Path(path)
        document, tensors = load_artifact(path)
        target = resolve_device(device)
        try:
            config = config_from_json(document["algorithm"], document["config"])
            named = document["preset"] != "custom"
            detector = cls(
                document["preset"] if named else config,
                normal=document["normal_classes"],
                false_alarm_rate=document["false_alarm_rate"],
                promise=document["promise"],
                confidence=document["confidence"],
                contamination=document["contamination"],
                device=device,
                dtype=document["dtype"],
            )
            groups = document["calibration_groups"]
            detector.calibration_ = ConformalCalibration(
                tensors.pop("calibration.scores").numpy(), None if groups is None else np.array(groups, dtype=object)
            )
            detector.model_ = model_class(config).from_tensors(config, tensors, target, _dtype(document["dtype"]))
            detector.encoder_ = FeatureEncoder.from_json(document["features"])
            detector.normal_classes_ = document["normal_classes"]
            detector.anomaly_classes_ = document["anomaly_classes"]
            detector.feature_names_in_ = np.array(document["columns"], dtype=object)
            detector.n_features_in_ = len(document["columns"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ArtifactError(
                f"{path} is damaged: its parts do not fit together ({error}); train it again"
            ) from error
        detector.notes_ = detector._notes()
        return detector

    def _notes(self) -> list[str]:
        notes = self.encoder_.notes()
        if not self.anomaly_classes_:
            notes.append("no labelled anomalies: learned from normals alone, with synthetic anomalies")
        return notes + self.attainable_notes()

    def attainable_notes(self) -> list[str]:
        """What keeps the false-alarm rate from being promised with these calibration normals, a line each."""
        rate, calibration = self.false_alarm_rate, self.calibration_
        lowest = calibration.lowest_rate(Promise(self.promise), self.confidence)
        notes = []
        if lowest > rate:
            notes.append(
                f"a false-alarm rate of {rate:g} can't be promised with {len(calibration.scores)} calibration normals; "
                f"the lowest attainable is {lowest:.2g}"
            )
        if calibration.groups is not None and 1 / ((n_groups := len(set(calibration.groups))) + 1) > rate:
            notes.append(
                f"calibrated on {n_groups} groups: in a new group a rate of {rate:g} holds as far as groups are alike"
            )
        return notes

    def _level(self, p_values: Floats) -> float:
        return self.calibration_.alarm_level(p_values, self.false_alarm_rate, Promise(self.promise), self.confidence)

    def check_settings(self) -> None:
        """Raise InputError for settings of alarms that can't be used."""
        if not 0 < self.false_alarm_rate < 1:
            raise InputError(f"false_alarm_rate must be between 0 and 1, got {self.false_alarm_rate}")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not 0 <= self.contamination < 0.5:
            raise InputError(f"contamination must be at least 0 and below 0.5, got {self.contamination}")
        if self.promise not in list(Promise):
            raise InputError(f"promise must be one of {', '.join(Promise)}, got {self.promise!r}")


def resolve_device(name: str) -> torch.device:
    """The torch device of ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: it is none of these, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _labels(y: Any, normal: Sequence[Any] | None, n_rows: int) -> tuple[Names, tuple[str, ...]]:
    """The class of each row, and the names of the normal classes."""
    if y is None:
        labels: Names = np.full(n_rows, "normal", dtype=object)
        normal = ["normal"]
    else:
        labels = class_names(y, "y")
    if len(labels) != n_rows:
        raise InputError(f"y has {len(labels)} labels for {n_rows} rows")
    if normal is None:
        normal = _conventional_normal(set(labels))
    names = tuple(class_names(list(normal), "normal"))
    check_normals(labels, names)
    return labels, names


def _groups(groups: Any, n_rows: int) -> Names | None:
    if groups is None:
        return None
    names = class_names(groups, "groups")
    if len(names) != n_rows:
        raise InputError(f"groups has {len(names)} entries for {n_rows} rows")
    return names


def _check_count(n_rows: int, purpose: str) -> None:
    if n_rows < MIN_NORMALS:
        raise InputError(f"only {n_rows} normal rows to {purpose}; at least {MIN_NORMALS} are needed")


def _conventional_normal(present: set[str]) -> list[str]:
    """The normal class of scikit-learn's 1 / -1 and of the usual 0 / 1; [] where the labels are neither."""
    if "-1" in present and present <= {"1", "-1"}:
        return ["1"]
    return ["0"] if "0" in present and present <= {"0", "1"} else []
