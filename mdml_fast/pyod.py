"""The detector as PyOD's users know theirs; PyOD itself is not needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from mdml_fast.data.encoding import Floats

if TYPE_CHECKING:
    from mdml_fast.detector import MDMLDetector


class PyODDetector:
    """PyOD's names and signs: scores are higher for more anomalous rows, labels are 0 and 1.

    Args:
        detector: what scores; `fit` fits it.

    Attributes:
        decision_scores_: of the rows of `fit` [N]. Where the detector came fitted, those rows are gone: then of its
            calibration normals.
        threshold_: rows whose score is above it are alarms.
        labels_: of the same rows as `decision_scores_`, 1 for alarms [N].

    Example:
        >>> scores = detector.as_pyod().decision_function(X_new)
    """

    def __init__(self, detector: MDMLDetector) -> None:
        self.detector = detector
        if hasattr(detector, "calibration_"):
            self._remember(-detector.calibration_.scores)

    @property
    def contamination(self) -> float:
        """The share of the rows that PyOD expects to be alarms; here the share of false ones."""
        return self.detector.false_alarm_rate

    def fit(self, X: Any, y: Any = None) -> Self:
        """As `MDMLDetector.fit`; returns itself."""
        self.detector.fit(X, y)
        self._remember(self.decision_function(X))
        return self

    def decision_function(self, X: Any) -> Floats:
        """The anomaly score of each row [N]."""
        return -self.detector.score_samples(X)

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """1 for alarms, 0 for the other rows [N]."""
        return (self.decision_function(X) > self.threshold_).astype(np.int64)

    def _remember(self, scores: Floats) -> None:
        calibration = self.detector.calibration_
        level = self.detector.alarm_level(self.detector.p_value_at(-scores))
        self.decision_scores_, self.threshold_ = scores, -calibration.score_threshold(level)
        self.labels_ = (scores > self.threshold_).astype(np.int64)
