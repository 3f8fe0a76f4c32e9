"""The rows that further training goes on from, so that `partial_fit` needs no earlier table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.calibration import CALIBRATION_ROWS, Positions
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names
from mdml_fast.meta.model import TrainingRows
from mdml_fast.meta.neighbours import innermost

# What a row is for.
TRAINING, CALIBRATION, ANOMALY = range(3)
Parts = npt.NDArray[np.int8]
# So many rows stay: training normals, as many as encoders and views learn from, and anomalies of each class.
TRAINING_ROWS, FAMILY_ROWS = 20_000, 1_000


@dataclass(frozen=True)
class KeptRows:
    """Encoded rows, and what each is for.

    Every row draws a key once, and those with the smallest keys stay: the normals, and each anomaly class, are a
    uniform sample of all that were ever seen.

    Attributes:
        rows: float32 [n, d].
        labels: the class of each [n].
        parts: TRAINING, CALIBRATION or ANOMALY [n].
        keys: in [0, 1) [n].
        groups: the group of each [n], or None.
        n_seen: how many training and calibration normals there ever were.
    """

    rows: Rows
    labels: Names
    parts: Parts
    keys: Floats
    groups: Names | None
    n_seen: tuple[int, int]

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
            (int((parts == TRAINING).sum()), int((parts == CALIBRATION).sum())),
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
            (self.n_seen[0] + other.n_seen[0], self.n_seen[1] + other.n_seen[1]),
        )

    def bounded(self) -> KeptRows:
        """A bounded number of them, in their order."""
        names = self.labels.astype(str)
        stay = [self._smallest(self.parts == TRAINING, TRAINING_ROWS)]
        stay += [self._smallest(self.parts == CALIBRATION, CALIBRATION_ROWS)]
        anomalies = self.parts == ANOMALY
        stay += [self._smallest(anomalies & (names == name), FAMILY_ROWS) for name in np.unique(names[anomalies])]
        return self._take(np.sort(np.concatenate(stay)))

    def recalibrated(self, rows: Rows, label: str, groups: Names | None) -> KeptRows:
        """With these normals [n, d] of a class to calibrate on, of groups [n] or none, in place of the earlier ones."""
        others = replace(self._take(np.flatnonzero(self.parts != CALIBRATION)), n_seen=(self.n_seen[0], 0))
        labels = np.full(len(rows), label, dtype=object)
        parts = np.full(len(rows), CALIBRATION, dtype=np.int8)
        # Rows of no named group are one of their own.
        names = labels if groups is None else groups
        return others.with_rows(KeptRows.draw(rows, labels, parts, names, 0.0, len(rows))).bounded()

    def training(self) -> TrainingRows:
        """What a model learns from."""
        normals, anomalies = self.parts == TRAINING, self.parts == ANOMALY
        groups = None if self.groups is None else self.groups[normals]
        return TrainingRows(
            self.rows[normals], self.labels[normals], self.rows[anomalies], self.labels[anomalies], groups
        )

    def calibration(self) -> tuple[Rows, Names | None]:
        """The calibration normals and their groups."""
        chosen = self.parts == CALIBRATION
        return self.rows[chosen], None if self.groups is None else self.groups[chosen]

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
        held_out = self._divide(own, int(is_normal.sum()), np.random.default_rng([seed, 1]))
        parts[is_normal] = np.where(held_out, CALIBRATION, TRAINING)
        return self.with_rows(KeptRows.draw(rows, labels, parts, groups, contamination, seed)).bounded()

    def _divide(self, groups: Names | None, n_normals: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Whether each of so many further normals is for calibration: as large a share of them as of the earlier ones.

        Normals of a group that is known join it; with groups, a new one is for calibration as often as a known one is.
        """
        if groups is None or self.groups is None:
            return rng.random(n_normals) < self.n_seen[1] / sum(self.n_seen)
        held_out, trained_on = (set(self.groups[self.parts == part].tolist()) for part in (CALIBRATION, TRAINING))
        share = len(held_out) / (len(held_out) + len(trained_on))
        for name in np.unique(groups.astype(str)):
            if name not in trained_on and rng.random() < share:
                held_out.add(name)
        return np.array([name in held_out for name in groups], dtype=np.bool_)

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
        trained_on, held_out = document["n_seen"]
        return cls(
            tensors["rows"].numpy(),
            named["labels"],
            tensors["parts"].numpy(),
            tensors["keys"].numpy(),
            named.get("groups"),
            (trained_on, held_out),
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
