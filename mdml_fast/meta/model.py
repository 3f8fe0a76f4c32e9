"""What the detector asks of a trained model, whatever its algorithm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.calibration import Positions
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names
from mdml_fast.meta.history import History


class TrainingRows(NamedTuple):
    """Encoded training rows: normals [N, d] with classes [N], anomalies [M, d] with classes [M]; M may be 0.

    `held_out` [N]: the normals to calibrate on, from which a model may learn nothing. `groups` [N]: normals of one
    group resemble each other more than those of two; or None.
    """

    normals: Rows
    normal_labels: Names
    held_out: npt.NDArray[np.bool_]
    anomalies: Rows
    anomaly_labels: Names
    groups: Names | None = None

    def to_learn_from(self) -> TrainingRows:
        """These rows less the normals that are held out."""
        stays = ~self.held_out
        return self._replace(
            normals=self.normals[stays],
            normal_labels=self.normal_labels[stays],
            held_out=self.held_out[stays],
            groups=None if self.groups is None else self.groups[stays],
        )


class HeldOut(NamedTuple):
    """Normals scored as new ones would be: their positions in the training rows [n], and the scores [n]."""

    positions: Positions
    scores: Floats

    def with_others(self, others: HeldOut) -> HeldOut:
        """These and others."""
        return HeldOut(np.concatenate([self.positions, others.positions]), np.concatenate([self.scores, others.scores]))


class Model(Protocol):
    """A trained model: scores encoded rows, higher for more normal ones."""

    config: Any
    history: History
    # What to calibrate on; None in a model that was loaded.
    held_out: HeldOut | None
    # Whether scores of two models of the same kind of rows are on one scale.
    comparable: ClassVar[bool]

    def score(self, rows: Rows) -> Floats:
        """The score of each row [N, d] -> [N]."""

    def explain(self, rows: Rows, normals: Rows, nearest: Positions) -> tuple[Floats, Floats]:
        """The score of each row [N], and what each feature adds to it compared with its normal, both [N, d].

        Args:
            rows: [N, d].
            normals: [n, d].
            nearest: which of them each row is compared with [N].
        """

    def adapt(self, normals: Rows) -> None:
        """Take normals [n, d] of a new family as normal too; what was learned before stays as it is."""

    def to_tensors(self) -> dict[str, Tensor]:
        """What was learned, by name, on the CPU."""

    def to_json(self) -> dict[str, Any]:
        """What was learned beside the tensors, as plain JSON values."""


def fingerprint(rows: TrainingRows, config: Any, seed: int, dtype: torch.dtype | None) -> str:
    """What decides the weights' bits: the data, the settings and torch's version."""
    labels = [rows.normal_labels.tolist(), rows.held_out.tolist(), rows.anomaly_labels.tolist()]
    settings = [asdict(config), seed, str(dtype), torch.__version__, *labels]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for matrix in (rows.normals, rows.anomalies):
        digest.update(np.ascontiguousarray(matrix).tobytes())
    return digest.hexdigest()


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix and a dot, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
