"""The supervised head: extra trees that speak only where they are sure.

They are kept as plain arrays and walked here, so that a model holds no pickled object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.tree import BaseDecisionTree
from torch import Tensor

from mdml_fast.data.encoding import Floats, Rows

# Nodes visited at once: rows times trees.
BLOCK_VALUES = 2**21


class TreeHead:
    """Extra trees, and the probability of "anomaly" that they give.

    Args:
        tensors: all trees' nodes in one table [n]: `feature`, `threshold`, `left`, `right` (positions of the children;
            a leaf is its own child) and `anomaly`, the probability at a leaf; `roots` [trees]; a scalar `depth`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def fit(
        cls,
        normals: Rows,
        left_out: npt.NDArray[np.intp],
        anomalies: Rows,
        n_trees: int,
        seed: int,
        device: torch.device,
    ) -> tuple[Self, Tensor]:
        """Balanced extra trees, half of them for each learner.

        After Geurts, Ernst, Wehenkel, "Extremely randomized trees", 2006.

        Args:
            normals: float32 [n, d].
            left_out: the learner that leaves each out, 0 or 1, or 2 [n].
            anomalies: float32 [M, d]; both learn from all of them.
            n_trees: how many, both together.
            seed: of the trees.
            device: where the trees shall be walked.

        Returns:
            The head, and for each normal [n] the probability that the trees give that left it out; 0 without any.
        """
        trees: list[BaseDecisionTree] = []
        probability = np.zeros(len(normals))
        for learner in (0, 1):
            own = left_out != learner
            forest = ExtraTreesClassifier(
                math.ceil(n_trees / 2),
                class_weight="balanced",
                random_state=seed + learner,
                n_jobs=torch.get_num_threads(),
            )
            is_anomaly = np.arange(own.sum() + len(anomalies)) >= own.sum()
            forest.fit(np.concatenate([normals[own], anomalies]), is_anomaly)
            trees += forest.estimators_
            # Threads would add up the trees in an order of their own.
            probability[~own] = forest.set_params(n_jobs=1).predict_proba(normals[~own])[:, 1]
        tensors = {name: tensor.to(device) for name, tensor in _tables(trees).items()}
        return cls(tensors), torch.as_tensor(probability, dtype=torch.float32, device=device)

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
