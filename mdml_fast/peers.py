"""Detectors of other packages, as baselines where they are installed; nothing of ours needs them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Peer:
    """A detector of another package.

    Attributes:
        package: what has to be installed.
        module: where its class is.
        name: the class.
        supervised: it learns from labelled anomalies too, y being 1 for those.
        settings: made from a seed; all else is the package's default.
        remedy: how to install it.
    """

    package: str
    module: str
    name: str
    supervised: bool
    settings: Callable[[int], dict[str, Any]]
    remedy: str = "pip install 'mdml-fast[peers]'"

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None

    def fit(self, rows: Any, *labels_and_seed: Any) -> Callable[[Any], Any]:
        """Fit on encoded rows [N, d], with is_anomaly bool [N] where supervised, and a seed; gives the scorer."""
        *labels, seed = labels_and_seed
        detector = getattr(importlib.import_module(self.module), self.name)(**self.settings(seed))
        detector.fit(rows, *(is_anomaly.astype(np.int64) for is_anomaly in labels))
        return lambda rows: -np.asarray(detector.decision_function(rows), dtype=np.float64)


def _deepod(name: str) -> Peer:
    # Its releases pin a torch of years ago, but run with today's.
    remedy = "pip install --no-deps deepod==0.4.1, and its pandas and tqdm"
    return Peer(
        "deepod",
        "deepod.models.tabular",
        name,
        supervised=True,
        settings=lambda seed: {"device": "cpu", "verbose": 0, "random_state": seed},
        remedy=remedy,
    )


def _pyod(module: str, name: str, supervised: bool = False, seeded: bool = False) -> Peer:
    settings = (lambda seed: {"random_state": seed}) if seeded else (lambda seed: {})  # noqa: ARG005
    return Peer("pyod", f"pyod.models.{module}", name, supervised, settings)


PEERS = {
    "deepsad": _deepod("DeepSAD"),
    "devnet": _deepod("DevNet"),
    "prenet": _deepod("PReNet"),
    "rosas": _deepod("RoSAS"),
    "ecod": _pyod("ecod", "ECOD"),
    "copod": _pyod("copod", "COPOD"),
}
