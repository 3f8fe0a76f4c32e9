"""The supervised head: extra trees that tell the seen classes from the normals (for some of them see `DistanceTrees`).

They are kept as plain arrays and walked here or by the compiled kernels: a model holds no pickled object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from mdml_kernels.native import loader
from mdml_kernels.native import trees as native
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.tree import BaseDecisionTree
from torch import Tensor
from torch.nn.functional import embedding_bag

from mdml_fast.data.encoding import Floats, Rows

Trees = list[BaseDecisionTree]

# Where a row goes.
STRUCTURE = ("feature", "threshold", "left", "right", "roots")
# Nodes visited at once: rows times trees.
BLOCK_VALUES = 2**16
# Levels between two looks at who has arrived.
LEVELS = 6
# Changes of probability held at once, nodes times features: 64 MiB.
PATH_VALUES = 2**24
# A smaller rise of probability is rounding.
LEAST_RISE = 1e-5
# A vote more for each side, of a hundred trees: rows that all trees agree on have odds too.
VOTE = 0.01


def grow(normals: Rows, anomalies: Rows, n_trees: int, seed: int, leaf: int = 1) -> Trees:
    """Balanced extra trees (Geurts, Ernst, Wehenkel, "Extremely randomized trees", 2006).

    Args:
        normals: float32 [n, d].
        anomalies: float32 [M, d].
        n_trees: how many.
        seed: of the trees.
        leaf: the fewest rows in one.
    """
    if not n_trees:
        return []
    forest = ExtraTreesClassifier(
        n_trees, class_weight="balanced", min_samples_leaf=leaf, random_state=seed, n_jobs=torch.get_num_threads()
    )
    forest.fit(np.concatenate([normals, anomalies]), np.arange(len(normals) + len(anomalies)) >= len(normals))
    trees: Trees = forest.estimators_
    return trees


class TreeHead:
    """Extra trees, and the probability of "anomaly" that they give.

    Args:
        tensors: all trees' nodes in one table [n]: `feature`, `threshold`, `left`, `right` (positions of the children;
            a leaf is its own child) and `anomaly`, the probability at a leaf; `roots` [trees]; a scalar `depth`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._depth = int(self.tensors["depth"])
        # Right and left child of each node, side by side: one look-up for both.
        self._children = torch.stack([self.tensors["right"], self.tensors["left"]], dim=1).flatten()
        self._packed = native.packed(*(self.tensors[name] for name in STRUCTURE))

    @classmethod
    def of(cls, trees: Trees, device: torch.device) -> Self:
        """Trees that were grown, to be walked on a device."""
        return cls({name: tensor.to(device) for name, tensor in _tables(trees).items()})

    def probability(self, rows: Tensor) -> Tensor:
        """The probability of "anomaly" [N] of rows [N, d]."""
        forest = self._forest(rows)
        return self.mean(self.leaves(rows)) if forest is None else native.means(rows, forest, self.tensors["anomaly"])

    def leaves(self, rows: Tensor) -> Tensor:
        """The leaf of each tree that each row [N, d] falls into, a position in the table of nodes [N, trees]."""
        if torch.compiler.is_exporting():
            # A program can't depend on who has arrived.
            return self._walk_all(rows)
        step = max(1, BLOCK_VALUES // len(self.tensors["roots"]))
        return torch.cat([self._walk(rows[start : start + step]) for start in range(0, len(rows), step)])

    def shares(self, rows: Tensor, normals: Tensor, nearest: Tensor) -> Tensor:
        """The share of each feature in the probability of rows, compared with a normal for each [N, d].

        On its way to a leaf a row's probability changes with every split, which belongs to the split's feature (Saabas,
        "Interpreting random forests", 2014). The normal's changes are taken from the row's. What raises the probability
        has a share in proportion, if row and normal differ in it; the shares sum to that of the row's probability which
        lies above the normal's. Where nothing does, there are none.

        Args:
            rows: float32 [N, d].
            normals: float32 [n, d].
            nearest: which of them each row is compared with, int64 [N].
        """
        changes, changes_of_normals = self._changes(torch.cat([rows, normals])).tensor_split([len(rows)])
        begin = self.tensors["anomaly"][self.tensors["roots"]].mean()
        above, below = begin + changes.sum(1), (begin + changes_of_normals.sum(1))[nearest]
        more = above - below > LEAST_RISE
        differs = (rows != normals[nearest]) * more.unsqueeze(1)
        raised = (changes - changes_of_normals[nearest]).clamp(min=0) * differs
        share = (1 - below / above) / raised.sum(1).clamp(min=torch.finfo(raised.dtype).tiny)
        return raised * share.where(more, 0.0).unsqueeze(1)

    def mean(self, leaves: Tensor) -> Tensor:
        """The mean probability [N] of leaves [N, trees]."""
        return self.tensors["anomaly"][leaves].mean(1, dtype=torch.float64).float()

    def _forest(self, rows: Tensor) -> native.Forest | None:
        """The trees as the compiled kernels walk them; None where they can't."""
        return self._packed if loader.serves(rows, self.tensors["anomaly"]) else None

    def _walk(self, rows: Tensor) -> Tensor:
        t, n_trees = self.tensors, len(self.tensors["roots"])
        values, first_value = rows.reshape(-1), torch.arange(len(rows), device=rows.device) * rows.shape[1]
        node, offset = t["roots"].repeat(len(rows)), first_value.repeat_interleave(n_trees)
        walking = torch.arange(len(node), device=rows.device)
        # The deepest leaves are far below most: walkers that have arrived are left behind every few levels.
        for _ in range(0, self._depth, LEVELS):
            here, own = node[walking], offset[walking]
            for _ in range(LEVELS):
                value = values.index_select(0, own + t["feature"].index_select(0, here))
                goes_left = value <= t["threshold"].index_select(0, here)
                here = self._children.index_select(0, 2 * here + goes_left)
            node[walking] = here
            walking = walking[self._children[2 * here] != here]
        return node.view(len(rows), n_trees)

    def _walk_all(self, rows: Tensor) -> Tensor:
        """`_walk`, every row down to the depth of the deepest tree."""
        t = self.tensors
        node = t["roots"].expand(rows.shape[0], -1)
        for _ in range(self._depth):
            goes_left = rows.gather(1, t["feature"][node]) <= t["threshold"][node]
            node = torch.where(goes_left, t["left"][node], t["right"][node])
        return node

    def _changes(self, rows: Tensor) -> Tensor:
        """The changes of probability from root to leaf, by feature and averaged over the trees [N, d]."""
        forest = self._forest(rows)
        if forest is not None:
            return native.changes(rows, forest, self.tensors["anomaly"])
        leaves = self.leaves(rows)
        roots, n_features = self.tensors["roots"], rows.shape[1]
        n_nodes = len(self.tensors["left"])
        # So many trees at once that their table of changes is of bounded size.
        n_trees = max(1, PATH_VALUES * len(roots) // (n_nodes * n_features))
        ends = [*roots[n_trees::n_trees].tolist(), n_nodes]
        changes = leaves.new_zeros((len(leaves), n_features), dtype=torch.float32)
        for place, (own, end) in enumerate(zip(torch.split(roots, n_trees), ends, strict=True)):
            first = int(own[0])
            nodes = leaves[:, place * n_trees : place * n_trees + len(own)] - first
            changes += embedding_bag(nodes, self._changes_to(own, end, n_features), mode="sum")
        return changes / len(roots)

    def _changes_to(self, roots: Tensor, end: int, n_features: int) -> Tensor:
        """The changes of probability on the way to each node of these trees, by feature [nodes, d]."""
        t, first = self.tensors, int(roots[0])
        changes = t["anomaly"].new_zeros((end - first, n_features))
        level = roots
        while len(level):
            parents = level[t["left"][level] != level]
            for side in ("left", "right"):
                children = t[side][parents]
                changes[children - first] = changes[parents - first]
                changes[children - first, t["feature"][parents]] += t["anomaly"][children] - t["anomaly"][parents]
            level = torch.cat([t["left"][parents], t["right"][parents]])
        return changes


def odds(probability: Tensor) -> Tensor:
    """The odds of probabilities, of any shape."""
    return (probability + VOTE) / (1 + VOTE - probability)


def _tables(trees: Trees) -> dict[str, Tensor]:
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
