"""The supervised head: extra trees that speak only where they are sure.

They are kept as plain arrays and walked here, so that a model holds no pickled object.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.tree import BaseDecisionTree
from torch import Tensor

from mdml_fast.data.encoding import Floats, Rows

# Nodes visited at once: rows times trees.
BLOCK_VALUES = 2**21


class TreeHead:
    """Extra trees, whose probability of "anomaly" counts where it passes a gate.

    Args:
        tensors: all trees' nodes in one table [n]: `feature`, `threshold`, `left`, `right` (positions of the children;
            a leaf is its own child) and `anomaly`, the probability at a leaf; `roots` [trees]; scalars `depth`, `gate`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def fit(
        cls, normals: Rows, anomalies: Rows, n_trees: int, quantile: float, seed: int, device: torch.device
    ) -> Self:
        """Balanced extra trees on bootstrap samples (Geurts, Ernst, Wehenkel, "Extremely randomized trees", 2006).

        Args:
            normals: float32 [n, d].
            anomalies: float32 [M, d].
            n_trees: how many.
            quantile: the gate is this quantile of the normals' out-of-bag probabilities.
            seed: of the trees.
            device: where the trees shall be walked.
        """
        forest = ExtraTreesClassifier(
            n_trees,
            class_weight="balanced",
            bootstrap=True,
            oob_score=True,
            random_state=seed,
            n_jobs=torch.get_num_threads(),
        )
        is_anomaly = np.arange(len(normals) + len(anomalies)) >= len(normals)
        with warnings.catch_warnings():
            # With few trees a row may be in every bag; its probability is then unknown, and taken as 0 below.
            warnings.simplefilter("ignore")
            forest.fit(np.concatenate([normals, anomalies]), is_anomaly)
        out_of_bag = np.nan_to_num(forest.oob_decision_function_[: len(normals), 1])
        gate = torch.tensor(np.quantile(out_of_bag, quantile), dtype=torch.float32)
        tensors = _tables(forest.estimators_) | {"gate": gate}
        return cls({name: tensor.to(device) for name, tensor in tensors.items()})

    def excess(self, rows: Tensor) -> Tensor:
        """How far the probability of rows [N, d] passes the gate [N]: 0 up to it, 1 where the trees are certain."""
        return excess(self.probability(rows), self.tensors["gate"])

    def probability(self, rows: Tensor) -> Tensor:
        """The probability of "anomaly" [N] of rows [N, d]."""
        t = self.tensors
        step = max(1, BLOCK_VALUES // len(t["roots"]))
        return torch.cat([self._walk(rows[start : start + step]) for start in range(0, len(rows), step)])

    def _walk(self, rows: Tensor) -> Tensor:
        t = self.tensors
        node = t["roots"].expand(len(rows), -1)
        for _ in range(int(t["depth"])):
            goes_left = rows.gather(1, t["feature"][node]) <= t["threshold"][node]
            node = torch.where(goes_left, t["left"][node], t["right"][node])
        return t["anomaly"][node].mean(1)


def excess(probability: Tensor, gate: Tensor) -> Tensor:
    """How far probabilities [N] pass a gate: 0 up to it, 1 at certainty."""
    return (probability - gate).clamp(min=0) / (1 - gate).clamp(min=1e-6)


def _tables(trees: list[BaseDecisionTree]) -> dict[str, Tensor]:
    counts = np.array([tree.tree_.node_count for tree in trees])
    roots = np.cumsum(counts) - counts

    def nodes(name: str) -> np.ndarray:
        return np.concatenate([getattr(tree.tree_, name) for tree in trees])

    itself, offsets = np.arange(counts.sum()), np.repeat(roots, counts)
    is_leaf = nodes("children_left") < 0
    value = nodes("value")[:, 0]
    return {
        "feature": torch.as_tensor(np.where(is_leaf, 0, nodes("feature"))),
        "threshold": torch.as_tensor(_rounded_down(nodes("threshold"))),
        "left": torch.as_tensor(np.where(is_leaf, itself, nodes("children_left") + offsets)),
        "right": torch.as_tensor(np.where(is_leaf, itself, nodes("children_right") + offsets)),
        "anomaly": torch.as_tensor(value[:, 1] / value.sum(axis=1), dtype=torch.float32),
        "roots": torch.as_tensor(roots),
        "depth": torch.tensor(max(tree.tree_.max_depth for tree in trees)),
    }


def _rounded_down(thresholds: Floats) -> Rows:
    """The largest float32 up to each: a float32 row compares with it as with the float64."""
    rounded = thresholds.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded > thresholds, below, rounded)
