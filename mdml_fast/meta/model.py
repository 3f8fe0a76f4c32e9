"""What the detector asks of a trained model, whatever its algorithm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names


class TrainingRows(NamedTuple):
    """Encoded training rows: normals [N, d] with classes [N], anomalies [M, d] with classes [M]; M may be 0.

    `groups` [N]: normals of one group resemble each other more than those of two; or None.
    """

    normals: Rows
    normal_labels: Names
    anomalies: Rows
    anomaly_labels: Names
    groups: Names | None = None


class HeldOut(NamedTuple):
    """Training normals scored as if nothing had been learned from them: positions [n], and the scores [n]."""

    positions: npt.NDArray[np.intp]
    scores: Floats


class Model(Protocol):
    """A trained model: scores encoded rows, higher for more normal ones."""

    config: Any
    losses: list[float]
    # Whether it scores its own training normals, as new ones would be scored; if not, some must be kept from it.
    calibrates_itself: bool
    held_out: HeldOut | None

    def score(self, rows: Rows) -> Floats:
        """The score of each row [N, d] -> [N]."""

    def adapt(self, normals: Rows) -> None:
        """Take normals [n, d] of a new family as normal too; what was learned before stays as it is."""

    def to_tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name, on the CPU."""


def fingerprint(rows: TrainingRows, config: Any, seed: int, dtype: torch.dtype | None) -> str:
    """What decides the weights' bits: the data, the settings and torch's version."""
    labels = [rows.normal_labels.tolist(), rows.anomaly_labels.tolist()]
    settings = [asdict(config), seed, str(dtype), torch.__version__, *labels]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for matrix in (rows.normals, rows.anomalies):
        digest.update(np.ascontiguousarray(matrix).tobytes())
    return digest.hexdigest()


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix and a dot, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
