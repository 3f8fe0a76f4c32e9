"""The detector against its peers on real tables, and what each part of it is worth: paired over the same splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mdml_kernels.benchmark import environment

from mdml_fast.baselines import Method, baseline, installed_baselines, mdml
from mdml_fast.data.open_sets import Loader
from mdml_fast.evaluation import EvaluationProtocol, evaluate
from mdml_fast.meta.default import DefaultConfig

__all__ = ["ABLATIONS", "environment", "peers", "run", "summary", "without_parts"]

_FULL = DefaultConfig()

ABLATIONS: dict[str, DefaultConfig] = {
    "no outer steps": replace(_FULL, ensemble=replace(_FULL.ensemble, steps=0)),
    "no synthetic anomalies": replace(_FULL, ensemble=replace(_FULL.ensemble, synthetic=False)),
    "no labelled anomalies in the encoders": replace(_FULL, ensemble=replace(_FULL.ensemble, labelled=False)),
    "no learned weights": replace(_FULL, fusion=replace(_FULL.fusion, steps=0)),
    "no anchor": replace(_FULL, fusion=replace(_FULL.fusion, anchor=1 / 6, few_normals=0, pull=0.0, fallback=False)),
    "no way back to the anchor": replace(_FULL, fusion=replace(_FULL.fusion, fallback=False)),
    "5 neighbours in the embeddings": replace(_FULL, neighbourhood=replace(_FULL.neighbourhood, neighbours=5)),
    "no trees that ask distances": replace(_FULL, n_trees=100, distance_trees=replace(_FULL.distance_trees, n=0)),
    "one weight for every head": replace(_FULL, fusion=replace(_FULL.fusion, most_doublings=0)),
    "no tree head": replace(_FULL, n_trees=0),
    "no discriminants": replace(_FULL, fusion=replace(_FULL.fusion, discriminants=0.0)),
}
"""The default with one part taken out, by what is missing."""


def peers(device: str, dtype: str) -> dict[str, Method]:
    """Ours, the paper's, and every baseline that is installed."""
    ours = {"mdml": mdml("default", device, dtype), "paper": mdml("paper", device, dtype)}
    return ours | {name: baseline(name) for name in installed_baselines()}


def without_parts(device: str, dtype: str) -> dict[str, Method]:
    """Ours, and ours with one part taken out."""
    return {"mdml": mdml("default", device, dtype)} | {
        name: mdml(config, device, dtype) for name, config in ABLATIONS.items()
    }


def run(
    tables: Mapping[str, Loader],
    methods: Mapping[str, Method],
    splits: int,
    progress: Callable[[str, int, int, str], None],
) -> dict[str, Any]:
    """The evaluation's document of each table, by its name.

    Args:
        tables: what to evaluate on.
        methods: the first is ours, which the others are compared with.
        splits: of the anomaly classes; one seed for each.
        progress: told (table, fits done, fits in all, method).
    """
    protocol = EvaluationProtocol(splits=splits, seeds=1)

    def one(name: str, load: Loader) -> dict[str, Any]:
        return evaluate(load(), methods, protocol, lambda *state: progress(name, *state))

    return {name: one(name, load) for name, load in tables.items()}


def summary(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over tables of what ours gains on each other method: unseen and seen AUROC, unseen FPR95.

    The interval joins those of the tables, as if these tables were all there is.
    """
    names = documents[0]["differences"]
    sides = {"unseen": "auroc", "seen": "auroc", "fewer false alarms": "fpr95"}
    return {
        name: {
            what: _joined(
                [
                    document["differences"][name]["seen" if what == "seen" else "unseen"][metric]
                    for document in documents
                ]
            )
            for what, metric in sides.items()
        }
        for name in names
    }


def _joined(gains: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [gain for gain in gains if gain["mean"] is not None]
    if not known:
        return {"mean": None, "low": None, "high": None, "losses": 0, "splits": 0}
    mean = sum(gain["mean"] for gain in known) / len(known)
    halves = [gain["high"] - gain["mean"] for gain in known if gain["high"] is not None]
    half = math.hypot(*halves) / len(known) if len(halves) == len(known) else None
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "losses": sum(gain["losses"] for gain in known),
        "splits": sum(gain["wins"] + gain["losses"] + gain["ties"] for gain in known),
    }
