"""From the scores of a fitted detector to p-values and alarms that keep its promise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mdml_fast.calibration import ConformalCalibration, Counts, Promise
from mdml_fast.data.encoding import Floats
from mdml_fast.errors import InputError
from mdml_fast.inputs import named_groups


class Alarms(NamedTuple):
    """For each row [N] its score, its p-value, and whether it is an alarm."""

    scores: Floats
    p_values: Floats
    is_alarm: npt.NDArray[np.bool_]


class AlarmsMixin:
    """What a detector with `score_samples`, a calibration and a promise says of rows."""

    false_alarm_rate: float
    promise: str
    confidence: float
    contamination: float
    calibration_: ConformalCalibration

    def score_samples(self, X: Any) -> Floats:
        """The score of each row [N], higher is more normal."""
        raise NotImplementedError  # the detector has it: all else here is made of it

    def p_value(self, X: Any, groups: Any = None) -> Floats:
        """The conformal p-value [N] of "this row is normal", in (0, 1].

        Args:
            X: the rows.
            groups: the group of each row [N]; rows are then compared with the calibration normals of their own group,
                where it has any.
        """
        return self.p_value_at(self.score_samples(X), groups)

    def p_value_at(self, scores: Floats, groups: Any = None) -> Floats:
        """The p-values of rows that have these scores already [N]; of whole ranks, where the promise is ``fdr``."""
        return self.calibration_.p_value(scores, named_groups(groups, len(scores)), self.promise != Promise.FDR)

    def decision_function(self, X: Any, groups: Any = None) -> Floats:
        """How far the p-value lies above the level that keeps the promise [N]: below 0 for alarms alone."""
        p_values = self.p_value(X, groups)
        # A row at the very level is an alarm.
        return p_values - float(np.nextafter(self.alarm_level(p_values), 1.0))

    def predict(self, X: Any, groups: Any = None) -> npt.NDArray[np.int64]:
        """-1 for alarms, rows whose p-value is up to the level that keeps the promise; 1 for the others [N]."""
        return np.where(self.alarms(X, groups).is_alarm, -1, 1)

    def alarms(self, X: Any, groups: Any = None) -> Alarms:
        """Scores, p-values and alarms of rows, scored once; the groups are those of `p_value`."""
        return self.alarms_at(self.score_samples(X), groups)

    def alarms_at(self, scores: Floats, groups: Any = None) -> Alarms:
        """The alarms of rows that have these scores already [N]; the groups are those of `p_value`."""
        p_values = self.p_value_at(scores, groups)
        return Alarms(scores, p_values, p_values <= self.alarm_level(p_values))

    def attainable_notes(self) -> list[str]:
        """What keeps the false-alarm rate from being promised with these calibration normals, a line each."""
        self.check_settings()
        rate, calibration = self.false_alarm_rate, self.calibration_
        lowest = calibration.lowest_rate(Promise(self.promise), self.confidence)
        notes = []
        if lowest > rate:
            notes.append(
                f"a false-alarm rate of {rate:g} can't be promised with {len(calibration.scores)} calibration normals; "
                f"the lowest attainable is {lowest:.2g}"
            )
        sizes = calibration.group_sizes()
        level = rate if self.promise == Promise.FDR else self.alarm_level()
        small = [size for size in sizes if 1 / (size + 1) > level]
        if small and lowest <= rate:
            notes.append(
                f"held against their own group, rows of {len(small)} of the {len(sizes)} groups can't be alarms at a "
                f"rate of {rate:g}: these have {min(small)} to {max(small)} calibration normals; leave groups out or "
                f"ask for a higher rate"
            )
        n_groups = len(sizes)
        if n_groups and 1 / (n_groups + 1) > rate:
            of = f"{n_groups} group{'s' * (n_groups > 1)}"
            notes.append(f"calibrated on {of}: in a new group a rate of {rate:g} holds as far as groups are alike")
        return notes

    def alarm_level(self, p_values: Floats | None = None, counts: Counts | None = None) -> float:
        """The p-value up to which rows are alarms.

        Args:
            p_values: of the whole batch [N]; only the promise ``fdr`` depends on them.
            counts: how many rows have each of them [N]; one, where not given.

        Raises:
            InputError: the settings can't be used.
        """
        self.check_settings()
        values = np.empty(0) if p_values is None else p_values
        promise = Promise(self.promise)
        return self.calibration_.alarm_level(values, self.false_alarm_rate, promise, self.confidence, counts)

    def fixed_level(self) -> float:
        """The p-value up to which any row is an alarm, whatever the other rows.

        Raises:
            InputError: the promise is about a batch.
        """
        if self.promise == Promise.FDR:
            raise InputError("the promise fdr depends on all rows of a batch; export needs marginal or certificate")
        return self.alarm_level()

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
