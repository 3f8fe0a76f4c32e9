"""Decision trees by the compiled kernels: the means of the values where rows arrive, and the changes on the way.

A row goes left where its value is up to the threshold, so with a NaN it goes right. Rows are float32 [N, d] on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdml_kernels.native.calls import call, whole

# Features and distances between nodes that the kernel has room for.
_MOST = 1 << 16
# Fewer walks, rows times trees, than this are not worth a thread of their own.
_LEAST_WALKS = 1 << 12


class Forest(NamedTuple):
    """Trees packed: int16 [n, 4], each node in 8 bytes; the roots' places [trees]; how many features they ask."""

    nodes: Tensor
    roots: Tensor
    n_features: int


def packed(feature: Tensor, threshold: Tensor, left: Tensor, right: Tensor, roots: Tensor) -> Forest | None:
    """A table of nodes [n], packed; None where the kernel can't walk it.

    Thresholds are float32, the others int64: `left`, `right` and `roots` [trees] are places in the table, a leaf's its
    own. The kernel wants everything on a CPU and in range, and a left child next to its parent.
    """
    if threshold.device.type != "cpu" or not len(roots):
        return None
    own = torch.arange(len(right))
    step = right - own
    is_leaf = step == 0
    bounds = ((feature, _MOST), (step, _MOST), (right, len(right)), (roots, len(right)))
    in_range = all(int(values.min()) >= 0 and int(values.max()) < end for values, end in bounds)
    if not (in_range and torch.equal(left, own + ~is_leaf)):
        return None
    parts = threshold.where(~is_leaf, torch.nan).view(torch.int16).view(-1, 2), torch.stack([feature, step], 1).short()
    return Forest(torch.cat(parts, 1), roots.long().contiguous(), 1 + int(feature.max()))


def means(rows: Tensor, forest: Forest, values: Tensor) -> Tensor:
    """The mean over the trees [N] of the leaves' values, float32 [n]: summed in float64, tree after tree."""
    out = rows.new_empty(len(rows))
    _walk("mdml_tree_means", rows, forest, values, out)
    return out


def changes(rows: Tensor, forest: Forest, values: Tensor) -> Tensor:
    """The mean changes of value [N, d] on the way to the leaves, each by the feature of its split."""
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    _walk("mdml_tree_changes", rows, forest, values, out)
    return out


def _walk(kernel: str, rows: Tensor, forest: Forest, values: Tensor, out: Tensor) -> None:
    if rows.shape[1] < forest.n_features:
        raise IndexError(f"rows have {rows.shape[1]} features, the trees ask for {forest.n_features}")
    if len(values) != len(forest.nodes):
        raise IndexError(f"{len(values)} values for {len(forest.nodes)} nodes")
    sizes = (len(forest.roots), rows.shape[1])
    call(
        *(kernel, len(rows), sizes[0], _LEAST_WALKS, *sizes),
        *(forest.nodes, forest.roots, whole(values), whole(rows), out),
    )
