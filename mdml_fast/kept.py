"""The rows that further training goes on from, so that `partial_fit` needs no earlier table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binom
from torch import Tensor

from mdml_fast.calibration import CALIBRATION_ROWS, Positions
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names
from mdml_fast.errors import InputError
from mdml_fast.meta.left_out import BOTH, FIRST, NEITHER, SECOND, LeftOut, judged_by
from mdml_fast.meta.model import TrainingRows
from mdml_fast.meta.neighbours import innermost

# What a row is, if it is no normal; of a normal it says which model leaves it out.
ANOMALY = 4
Parts = npt.NDArray[np.int8]
# So many rows stay: normals that no model leaves out, as many as encoders and views learn from, and anomalies of each
# class.
TRAINING_ROWS, FAMILY_ROWS = 20_000, 1_000
# So few equal rows move no rate, and fewer than in this share of all cases are taken for chance.
FEW_EQUAL, NOT_RARE = 0.01, 0.999


@dataclass(frozen=True)
class KeptRows:
    """Encoded rows, and what each is for.

    Every row draws a key once, and those with the smallest keys stay: the normals, and each anomaly class, are a
    uniform sample of all that were ever seen.

    Attributes:
        rows: float32 [n, d].
        labels: the class of each [n].
        parts: ANOMALY, or of a normal the model that leaves it out [n].
        keys: in [0, 1) [n].
        groups: the group of each [n], or None.
        n_seen: how many normals there ever were that the first model leaves out, the second, neither, or both.
    """

    rows: Rows
    labels: Names
    parts: Parts
    keys: Floats
    groups: Names | None
    n_seen: tuple[int, ...]

    @classmethod
    def draw(
        cls, rows: Rows, labels: Names, parts: Parts, groups: Names | None, contamination: float, seed: int
    ) -> KeptRows:
        """These rows, each with a new key, but for the share of the normals that may be unlabelled anomalies."""
        normals = np.flatnonzero(parts != ANOMALY)
        stays = parts == ANOMALY
        stays[normals[innermost(rows[normals], contamination, seed)]] = True
        parts = parts[stays]
        return cls(
            rows[stays],
            labels[stays],
            parts,
            np.random.default_rng([seed, 2]).random(len(parts)),
            None if groups is None else groups[stays],
            tuple(np.bincount(parts, minlength=ANOMALY)[:ANOMALY].tolist()),
        )

    def with_rows(self, other: KeptRows) -> KeptRows:
        """These and others."""
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = np.concatenate([self.groups, other.groups])
        return KeptRows(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.parts, other.parts]),
            np.concatenate([self.keys, other.keys]),
            groups,
            tuple(map(sum, zip(self.n_seen, other.n_seen, strict=True))),
        )

    def bounded(self) -> KeptRows:
        """A bounded number of them, in their order."""
        names = self.labels.astype(str)
        bounds = {FIRST: CALIBRATION_ROWS, SECOND: CALIBRATION_ROWS, NEITHER: TRAINING_ROWS, BOTH: CALIBRATION_ROWS}
        stay = [self._smallest(self.parts == part, bound) for part, bound in bounds.items()]
        anomalies = self.parts == ANOMALY
        stay += [self._smallest(anomalies & (names == name), FAMILY_ROWS) for name in np.unique(names[anomalies])]
        return self._take(np.sort(np.concatenate(stay)))

    def recalibrated(self, rows: Rows, label: str, groups: Names | None) -> KeptRows:
        """With these normals [n, d] of a class to calibrate on, of groups [n] or none, in place of the earlier ones.

        What was left out before is learned from.
        """
        parts = np.where(self.parts == ANOMALY, ANOMALY, NEITHER).astype(np.int8)
        others = replace(self, parts=parts, n_seen=(0, 0, sum(self.n_seen), 0))
        labels = np.full(len(rows), label, dtype=object)
        parts = np.full(len(rows), BOTH, dtype=np.int8)
        # Rows of no named group are one of their own.
        names = labels if groups is None else groups
        return others.with_rows(KeptRows.draw(rows, labels, parts, names, 0.0, len(rows))).bounded()

    def given_before(self, rows: Rows, adapted: Rows) -> list[str]:
        """A line, where more of further rows [n, d] equal one of these than rows of these equal each other.

        Or one of those that were adapted to [m, d].
        """
        known = Counter(row.tobytes() for row in self.rows)
        known_or_adapted = known.keys() | {row.tobytes() for row in adapted}
        n_equal = sum(row.tobytes() in known_or_adapted for row in rows)
        chance = sum(count for count in known.values() if count > 1) / len(self.rows)
        if n_equal <= binom.ppf(NOT_RARE, len(rows), max(chance, FEW_EQUAL)):
            return []
        equal = f"{n_equal} of {len(rows)} rows equal rows that were given before"
        return [f"{equal}: alarms will be more frequent than promised; give each row once"]

    @property
    def in_turn(self) -> bool:
        """Whether two models leave normals out in turn."""
        return bool(np.isin(self.parts, (FIRST, SECOND)).any())

    def training(self, model: int = FIRST) -> TrainingRows:
        """What the first or the second model is given.

        Raises:
            InputError: outliers were so many that no normals are left to learn from, or to calibrate on.
        """
        anomalies = self.parts == ANOMALY
        groups = None if self.groups is None else self.groups[~anomalies]
        held_out = judged_by(model, self.parts[~anomalies])
        if held_out.all() or not held_out.any():
            what = "learn from" if held_out.all() else "calibrate on"
            raise InputError(f"no normals are left to {what}: the contamination takes whole groups; lower it")
        return TrainingRows(
            self.rows[~anomalies],
            self.labels[~anomalies],
            held_out,
            self.rows[anomalies],
            self.labels[anomalies],
            groups,
        )

    def with_further(
        self,
        rows: Rows,
        labels: Names,
        is_normal: npt.NDArray[np.bool_],
        groups: Names | None,
        contamination: float,
        seed: int,
    ) -> KeptRows:
        """With further rows [n, d], of classes [n] and groups [n] or none; see `draw` for the rest."""
        parts = np.full(len(rows), ANOMALY, dtype=np.int8)
        own = None if groups is None else groups[is_normal]
        parts[is_normal] = self._divide(own, int(is_normal.sum()), np.random.default_rng([seed, 1]))
        return self.with_rows(KeptRows.draw(rows, labels, parts, groups, contamination, seed)).bounded()

    def _divide(self, groups: Names | None, n_normals: int, rng: np.random.Generator) -> LeftOut:
        """Which model leaves each of so many further normals out: each as large a share of them as of the earlier.

        Normals of a group that is known join it; with groups, a new one is left out as often as a known one is.
        """
        if groups is None or self.groups is None:
            return rng.choice(ANOMALY, n_normals, p=np.array(self.n_seen) / sum(self.n_seen)).astype(np.int8)
        is_normal = self.parts != ANOMALY
        known = dict(zip(self.groups[is_normal].tolist(), self.parts[is_normal].tolist(), strict=True))
        drawn = dict(known)
        for name in np.unique(groups.astype(str)):
            if name not in known:
                drawn[name] = rng.choice(list(known.values()))
        return np.array([drawn[name] for name in groups], dtype=np.int8)

    def to_tensors(self) -> dict[str, Tensor]:
        """The numbers, by name; names are positions in the lists of `to_json`."""
        tensors = {"rows": self.rows, "parts": self.parts, "keys": self.keys}
        for name, values in self._named().items():
            tensors[name] = np.unique(values.astype(str), return_inverse=True)[1].astype(np.int32)
        return {name: torch.from_numpy(values) for name, values in tensors.items()}

    def to_json(self) -> dict[str, Any]:
        """The rest, as plain JSON values."""
        names = {name: np.unique(values.astype(str)).tolist() for name, values in self._named().items()}
        return {"n_seen": list(self.n_seen)} | names

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> KeptRows:
        """The inverse of `to_tensors` and `to_json`.

        Raises:
            KeyError, TypeError, IndexError: they do not fit together.
        """
        named = {
            name: np.array(document[name], dtype=object)[tensors[name].numpy()]
            for name in ("labels", "groups")
            if name in tensors
        }
        return cls(
            tensors["rows"].numpy(),
            named["labels"],
            tensors["parts"].numpy(),
            tensors["keys"].numpy(),
            named.get("groups"),
            tuple(document["n_seen"]),
        )

    def _named(self) -> dict[str, Names]:
        return {"labels": self.labels} | ({} if self.groups is None else {"groups": self.groups})

    def _smallest(self, chosen: npt.NDArray[np.bool_], most: int) -> Positions:
        """Positions of those chosen [n] with the smallest keys, so many at most."""
        positions = np.flatnonzero(chosen)
        return positions[np.argsort(self.keys[positions], kind="stable")[:most]]

    def _take(self, positions: Positions) -> KeptRows:
        groups = None if self.groups is None else self.groups[positions]
        return KeptRows(
            self.rows[positions],
            self.labels[positions],
            self.parts[positions],
            self.keys[positions],
            groups,
            self.n_seen,
        )
