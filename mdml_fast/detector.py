"""The detector: scikit-learn's interface over encoding, meta-learning and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted

from mdml_fast.alarms import AlarmsMixin
from mdml_fast.calibration import ConformalCalibration, Promise, needed_normals
from mdml_fast.data import FeatureEncoder, as_table
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.errors import InputError
from mdml_fast.explanation import Explanation, explain
from mdml_fast.inputs import (
    check_count,
    further_labels,
    named_groups,
    named_labels,
    resolve_device,
    resolve_dtype,
    unnamed_normal,
)
from mdml_fast.kept import ANOMALY, KeptRows
from mdml_fast.known import KnownRows
from mdml_fast.meta.left_out import BOTH, FIRST, SECOND, left_out_by_both, left_out_in_turn
from mdml_fast.meta.model import HeldOut, Model
from mdml_fast.meta.training import Progress
from mdml_fast.presets import Config, model_class, preset_config
from mdml_fast.stored import load_detector, save_detector

if TYPE_CHECKING:
    from mdml_fast.pyod import PyODDetector

# Of fewer normals all scale the columns, also those that are held out: distances by the scales of half of 25 normals
# cost 0.1 AUROC, and so few hold no low rate whatever they have seen.
FEW_NORMALS = 200


class MDMLDetector(AlarmsMixin, OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Find anomalies of classes that were never labelled, from normals and a few labelled anomalies of other classes.

    Args:
        preset: ``default``, ``paper``, or a `DefaultConfig` or `PaperConfig`.
        normal: the names of the normal classes in y. None: 1 where y is of 1 and -1, 0 where it is of 0 and 1. ``all``:
            every row is normal, whatever y says.
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
        known_normals_, known_anomalies_: `KnownRows`, by which `explain` says what a row is like.
        kept_: `KeptRows`, from which `partial_fit` goes on.
        normal_classes_: names of the normal classes.
        anomaly_classes_: names of the anomaly classes seen in training.
        remarks_: what `adapt`, `partial_fit` and `recalibrate` found out about their rows, a line each.

    Example:
        >>> detector = MDMLDetector(random_state=0).fit(X, y, normal=["ok"])
        >>> alarms = detector.predict(X_new) == -1
    """

    remarks_: list[str]

    def __init__(
        self,
        preset: str | Config = "default",
        *,
        normal: Sequence[Any] | str | None = None,
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
            groups: group of each row [N]: what judges a normal to calibrate on has learned nothing from its group (but
                the scales of the columns), and a normal is not compared with its own group. By ``default`` that takes
                a second training, so that no group is without calibration normals. They are remembered for `p_value`.
            progress: told after each outer step, of the second training too.
            checkpoint: a file for the state of the first training, which stays when the run is cut off.
            resume: go on from that file, where there is one.

        Raises:
            InputError: the rows, classes or settings can't be used; the message says what to do.
        """
        config, how = preset_config(self.preset), self._how(progress)
        table = as_table(X)
        labels, normal_classes = named_labels(y, self.normal if normal is None else normal, table.num_rows)
        seed = int(check_random_state(self.random_state).randint(2**31))

        is_normal = np.isin(labels.astype(str), normal_classes)
        normals = np.flatnonzero(is_normal)
        group_names = named_groups(groups, table.num_rows)
        parts = np.full(len(labels), ANOMALY, dtype=np.int8)
        if group_names is None:
            needed = needed_normals(self.false_alarm_rate, Promise(self.promise), self.confidence)
            parts[normals] = left_out_by_both(len(normals), needed, seed)
        else:
            parts[normals] = left_out_in_turn(group_names[normals], seed)
        scaled_by = np.flatnonzero(parts != BOTH) if len(normals) >= FEW_NORMALS else None
        encoder = FeatureEncoder.fit(table, is_normal, scaled_by)
        kept = KeptRows.draw(encoder.transform(table), labels, parts, group_names, self.contamination, seed)
        self._learn(kept, encoder, normal_classes, config, seed, checkpoint=checkpoint, resume=resume, **how)
        self.remarks_ = []
        self.feature_names_in_ = np.array(table.column_names, dtype=object)
        self.n_features_in_ = table.num_columns
        return self

    def partial_fit(
        self,
        X: Any,
        y: Any = None,
        *,
        normal: Sequence[Any] | None = None,
        groups: Any = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from further normals and labelled anomalies too, without starting over; the first time it is `fit`.

        Training goes on for a few steps, on these rows and on a bounded sample of all earlier ones, which the detector
        keeps: what it costs does not grow with what it has seen. No row may be given twice, here, to `fit` or to
        `adapt`: alarms would be more frequent than promised. Columns stay encoded as they are: a column that was
        constant at first stays unused, a category that was unknown stays one of the others. With groups the second
        training (see `fit`) starts over.

        Args:
            X: N rows, as in `fit`.
            y: class of each row [N]; None means that all are normal. New classes are anomalies, unless `normal` says
                otherwise.
            normal: the names of further normal classes.
            groups: group of each row [N], if and only if `fit` was given groups.
            progress: told after each outer step.

        Raises:
            InputError: the rows, classes or settings can't be used; the message says what to do.
        """
        if not hasattr(self, "model_"):
            return self.fit(X, y, normal=normal, groups=groups, progress=progress)
        how = self._how(progress)
        rows = self._encoded(X)
        further = self.normal if normal is None and isinstance(self.normal, str) else normal
        labels, normal_classes = further_labels(y, further, self.normal_classes_, self.anomaly_classes_, len(rows))
        group_names = named_groups(groups, len(rows))
        if (groups is None) != (self.kept_.groups is None):
            raise InputError("groups must be given to partial_fit if they were to fit, and only then")
        seed = int(check_random_state(self.random_state).randint(2**31)) + sum(self.kept_.n_seen)

        is_normal = np.isin(labels.astype(str), normal_classes)
        kept = self.kept_.with_further(rows, labels, is_normal, group_names, self.contamination, seed)
        told = self._given_before(rows)
        self._learn(kept, self.encoder_, normal_classes, self.model_.config, seed, self.model_, **how)
        self.remarks_ = self.remarks_ + told
        return self

    def _how(self, progress: Progress | None) -> dict[str, Any]:
        """How a model is trained; raises InputError for settings that can't be used."""
        self.check_settings()
        return {"device": resolve_device(self.device), "dtype": resolve_dtype(self.dtype), "progress": progress}

    def _learn(
        self,
        rows: KeptRows,
        encoder: FeatureEncoder,
        normal_classes: Sequence[str],
        config: Config,
        seed: int,
        previous: Model | None = None,
        **how: Any,
    ) -> None:
        """Train the model on the rows, from the previous one if there is one, and calibrate it.

        Only then anything of this detector changes: a training that is broken off leaves it as it was.
        """
        model, held_out = self._trained(rows, config, seed, previous, **how)
        labels, anomalies = rows.labels.astype(str), rows.parts == ANOMALY
        normals = np.isin(labels, normal_classes)
        known_normals = KnownRows.sample(rows.rows[normals], rows.labels[normals], seed)
        for name in self._adapted() if previous else ():
            family = self.known_normals_.rows[self.known_normals_.names == name]
            model.adapt(family)
            known_normals = known_normals.with_family(family, name)
        groups = None if rows.groups is None else rows.groups[rows.parts != ANOMALY][held_out.positions]
        self.calibration_ = ConformalCalibration(held_out.scores, groups)
        self.encoder_, self.model_, self.kept_ = encoder, model, rows.bounded()
        self.normal_classes_ = list(normal_classes)
        self.known_normals_: KnownRows = known_normals
        self.known_anomalies_ = KnownRows.sample(rows.rows[anomalies], rows.labels[anomalies], seed)
        self.anomaly_classes_ = np.unique(labels[anomalies]).tolist()

    def _trained(
        self,
        rows: KeptRows,
        config: Config,
        seed: int,
        previous: Model | None,
        checkpoint: Path | None = None,
        resume: bool = False,
        **how: Any,
    ) -> tuple[Model, HeldOut]:
        """The model, and the normals to calibrate on with their scores.

        What is left out in turn gets a sibling of the model, from scratch, which judges what the model learns from, if
        their scores mean the same.
        """
        fit = model_class(config).fit
        given = rows.training(FIRST)
        model: Model = fit(given, config, seed=seed, previous=previous, checkpoint=checkpoint, resume=resume, **how)
        assert model.held_out is not None
        if not (rows.in_turn and model.comparable):
            return model, model.held_out
        sibling: Model = fit(rows.training(SECOND), config, seed=seed, **how)
        assert sibling.held_out is not None
        return model, model.held_out.with_others(sibling.held_out)

    def score_samples(self, X: Any) -> Floats:
        """The score of each row [N], higher is more normal."""
        check_is_fitted(self)
        return self.model_.score(self._encoded(X))

    def explain(self, X: Any) -> Explanation:
        """The score of each row [N], and what each of the d columns adds to it [N, d].

        A row is compared with its nearest normal: a column in which both agree adds nothing. The indicators of a text
        column, and that of missing values, count for their column. Contributions and `remainder` sum to the score.
        """
        check_is_fitted(self)
        names = self.feature_names_in_.tolist()
        return explain(
            as_table(X, names), names, self.encoder_, self.model_, self.known_normals_, self.known_anomalies_
        )

    def recalibrate(self, X: Any, groups: Any = None) -> Self:
        """Take these normals [N], which nothing was learned from, to calibrate on, in place of the earlier ones.

        Args:
            X: rows that are normal, as normals are today; none that `fit`, `partial_fit` or `adapt` was given.
            groups: the group of each [N], for alarms calibrated by group.

        Raises:
            InputError: there are fewer than 20 rows, or the settings can't be used.
        """
        check_is_fitted(self)
        self.check_settings()
        rows = self._encoded(X)
        check_count(len(rows), "calibrate on")
        scores, names = self.model_.score(rows), named_groups(groups, len(rows))
        self.calibration_ = ConformalCalibration(scores, names, self.contamination)
        self.remarks_ = self.remarks_ + self._given_before(rows)
        label, stays = unnamed_normal(self.normal_classes_), scores >= self.calibration_.scores[0]
        self.kept_ = self.kept_.recalibrated(rows[stays], label, None if names is None else names[stays])
        return self

    def adapt(self, X: Any) -> Self:
        """Take a new family of normals (a new machine, a new user) as normal, without training.

        Anomalies that are near to it are harder to find from then on; `notes_` says so of labelled ones.

        Args:
            X: rows of that family, some tens; all of them normal.

        Raises:
            InputError: there are fewer than 20 rows.
        """
        check_is_fitted(self)
        rows = self._encoded(X)
        check_count(len(rows), "adapt to")
        found = self._labelled_alarms()
        self.model_.adapt(rows)
        if (still := self._labelled_alarms()) < found:
            self.remarks_ = [
                *self.remarks_,
                f"of {len(self.known_anomalies_.rows)} labelled anomalies {found} were alarms before adapting to "
                f"{len(rows)} rows, {still} after it: adapt the model from before to more rows at once, or give them "
                f"to partial_fit as a normal class instead",
            ]
        self.known_normals_ = self.known_normals_.with_family(rows, f"adapted {len(self._adapted()) + 1}")
        return self

    def _given_before(self, rows: Rows) -> list[str]:
        known = self.known_normals_
        return self.kept_.given_before(rows, known.rows[np.isin(known.names, self._adapted())])

    def _labelled_alarms(self) -> int:
        """How many labelled anomalies are alarms, of those that are kept."""
        rows = self.known_anomalies_.rows
        return int(self.alarms_at(self.model_.score(rows)).is_alarm.sum()) if len(rows) else 0

    def _encoded(self, X: Any) -> Rows:
        return self.encoder_.transform(as_table(X, self.feature_names_in_.tolist()))

    def _adapted(self) -> list[str]:
        """The families that were adapted to, by the names that `explain` gives them."""
        return [name for name in np.unique(self.known_normals_.names).tolist() if name not in self.normal_classes_]

    def as_pyod(self) -> PyODDetector:
        """This detector with PyOD's names and signs: scores are higher for more anomalous rows, labels are 0 and 1."""
        from mdml_fast.pyod import PyODDetector

        return PyODDetector(self)

    def save(self, path: Path | str, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the model to a folder, with what was measured of it, where given.

        Raises:
            InputError: there is something else at that path.
        """
        check_is_fitted(self)
        save_detector(self, Path(path), metrics or {})

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> MDMLDetector:
        """The detector that was saved to a folder.

        Raises:
            InputError: there is no model, or it is damaged, foreign or of another version.
        """
        return load_detector(cls, Path(path), device)

    @property
    def losses_(self) -> list[float]:
        """The mean outer loss of each training step."""
        return self.model_.history.losses

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        return tags

    @property
    def notes_(self) -> list[str]:
        """What a user should know about this fit and these settings, a line each."""
        notes = self.encoder_.notes()
        if not self.anomaly_classes_:
            notes.append("no labelled anomalies: learned from normals alone, with synthetic anomalies")
        return [*notes, *self.remarks_, *self.attainable_notes()]
