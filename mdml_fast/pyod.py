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

    Example:
        >>> scores = detector.as_pyod().decision_function(X_new)
    """

    def __init__(self, detector: MDMLDetector) -> None:
        self.detector = detector
        self._fitted_on: Floats | None = None

    @property
    def contamination(self) -> float:
        """The share of the rows that PyOD expects to be alarms; here the share of false ones."""
        return self.detector.false_alarm_rate

    @property
    def decision_scores_(self) -> Floats:
        """Of the rows of `fit` [N], as it scored them; where the detector came fitted: of its calibration normals."""
        return -self.detector.calibration_.scores if self._fitted_on is None else self._fitted_on

    @property
    def threshold_(self) -> float:
        """Rows whose score is above it are alarms; with the promise ``fdr`` if they come with `decision_scores_`."""
        level = self.detector.alarm_level(self.detector.p_value_at(-self.decision_scores_))
        return -self.detector.calibration_.score_threshold(level)

    @property
    def labels_(self) -> npt.NDArray[np.int64]:
        """Of the rows of `decision_scores_`, 1 for alarms [N]."""
        return (self.decision_scores_ > self.threshold_).astype(np.int64)

    def fit(self, X: Any, y: Any = None) -> Self:
        """As `MDMLDetector.fit`; returns itself."""
        self.detector.fit(X, y)
        self._fitted_on = self.decision_function(X)
        return self

    def decision_function(self, X: Any) -> Floats:
        """The anomaly score of each row [N]."""
        return -self.detector.score_samples(X)

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """1 for alarms, 0 for the other rows [N]."""
        return np.where(self.detector.predict(X) == -1, 1, 0)
