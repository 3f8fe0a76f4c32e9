"""The compiled walk through decision trees against a plain one, node by node."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdml_kernels.native import trees

N_FEATURES = 5
# Few, so that many a value is equal to a threshold.
THRESHOLDS = np.array([-np.inf, -1.5, -0.0, 0.0, 0.5, np.inf], dtype=np.float32)
VALUES = np.append(THRESHOLDS, np.float32(np.nan))

# A leaf is None, another node the pair of its subtrees.
SHAPES = st.recursive(st.none(), lambda below: st.tuples(below, below), max_leaves=20)


def chain(length, side):
    shape = None
    for _ in range(length):
        shape = (shape, None) if side == "left" else (None, shape)
    return shape


CHAINS = st.builds(chain, st.integers(1, 200), st.sampled_from(["left", "right"]))


def table(shapes, rng):
    """Feature, threshold, left and right of all nodes, depth first, and the roots; what splits is random."""
    children = []

    def add(shape):
        place = len(children)
        children.append((place, place))
        if shape is not None:
            children[place] = add(shape[0]), add(shape[1])
        return place

    roots = [add(shape) for shape in shapes]
    left, right = torch.tensor(children).T
    feature = torch.as_tensor(rng.integers(N_FEATURES, size=len(left)))
    return feature, torch.as_tensor(rng.choice(THRESHOLDS, len(left))), left, right, torch.tensor(roots)


def walked(rows, feature, threshold, left, right, roots):
    """The leaves [N, trees], and all steps: (row, feature, node, next node)."""
    places, steps = [], []
    for place, row in enumerate(rows.tolist()):
        for node in roots.tolist():
            while left[node] != node:
                goes_left = row[feature[node]] <= threshold[node]
                steps.append((place, int(feature[node]), node, node := int((left if goes_left else right)[node])))
            places.append(node)
    return torch.tensor(places).view(len(rows), len(roots)), steps


def leaves(rows, packed):
    """The leaves [N, trees]: each tree's mean alone of the places of the nodes."""
    places = torch.arange(len(packed.nodes), dtype=torch.float32)
    return torch.stack(
        [trees.means(rows, packed._replace(roots=own), places) for own in packed.roots.split(1)], 1
    ).long()


@settings(deadline=None, max_examples=60)
@given(shapes=st.lists(SHAPES | CHAINS, min_size=1, max_size=4), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_row_falls_into_the_leaves_of_a_plain_walk(shapes, n, seed):
    rng = np.random.default_rng(seed)
    forest = table(shapes, rng)
    rows = torch.as_tensor(rng.choice(VALUES, (n, N_FEATURES)))
    packed, values = trees.packed(*forest), torch.as_tensor(rng.random(len(forest[0]), dtype=np.float32))
    expected, steps = walked(rows, *forest)
    assert torch.equal(leaves(rows, packed), expected)
    total = sum(values[own].double() for own in expected.T)
    assert torch.equal(trees.means(rows, packed, values), (total / len(shapes)).float())
    changes = torch.zeros(n, N_FEATURES, dtype=torch.float64)
    for row, feature, node, following in steps:
        changes[row, feature] += (values[following].double() - values[node].double()) / len(shapes)
    torch.testing.assert_close(trees.changes(rows, packed, values).double(), changes, rtol=0, atol=1e-5)


def test_blocks_threads_and_strides_change_no_bit():
    rng = np.random.default_rng(0)
    forest = table([chain(40, "left"), chain(70, "right"), None], rng)
    packed, values = trees.packed(*forest), torch.as_tensor(rng.random(len(forest[0]), dtype=np.float32))
    rows = torch.as_tensor(rng.choice(VALUES, (N_FEATURES, 9000))).T
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        arrived, means = leaves(rows, packed), trees.means(rows, packed, values)
    finally:
        torch.set_num_threads(before)
    few = [0, 1, 255, 256, 257, 2999, 3000, 3001, 6000, 8999]
    assert torch.equal(arrived[few], walked(rows[few], *forest)[0])
    assert torch.equal(arrived, torch.cat([leaves(part, packed) for part in rows.split(777)]))
    assert torch.equal(means, torch.cat([trees.means(part, packed, values) for part in rows.split(777)]))
    assert trees.means(rows[:0], packed, values).shape == (0,)


def test_only_what_fits_is_packed():
    """Beyond memory is where a table that is not one of ours could lead."""
    feature, threshold, left, right, roots = table([((None, None), None), (None, None)], np.random.default_rng(0))
    changes = {
        "a feature": (feature + 2**16, left, right, roots),
        "no feature": (feature - N_FEATURES, left, right, roots),
        "breadth first": (feature, right, left, roots),
        "beyond the end": (feature, left, right.index_fill(0, torch.tensor(5), 8), roots),
        "back": (feature, left, right.index_fill(0, torch.tensor(1), 0), roots),
        "a root": (feature, left, right, roots + 5),
        "no tree": (feature, left, right, roots[:0]),
    }
    assert trees.packed(feature, threshold, left, right, roots) is not None
    for changed, (own, *others) in changes.items():
        assert trees.packed(own, threshold, *others) is None, changed


def test_subtrees_of_any_size_that_fits():
    """The right child is as far as the left subtree is large: one more node than 16 bits count is too many."""
    for n_nodes, fits in ((2**16 - 1, True), (2**16 + 1, False)):
        place = torch.arange(n_nodes)
        left, right = place.clone(), place.clone()
        left[0], right[0] = 1, n_nodes - 1
        forest = (torch.zeros_like(place), torch.zeros(n_nodes), left, right, torch.tensor([0]))
        packed = trees.packed(*forest)
        assert (packed is not None) == fits
        if fits:
            assert leaves(torch.tensor([[0.0], [1.0]]), packed).tolist() == [[1], [n_nodes - 1]]


def test_rows_without_all_features_are_told():
    packed = trees.packed(*table([(None, None)] * 20, np.random.default_rng(0)))
    with pytest.raises(IndexError, match="4 features, the trees ask for 5"):
        trees.means(torch.zeros(3, 4), packed, torch.zeros(len(packed.nodes)))
    with pytest.raises(IndexError, match="1 values for"):
        trees.means(torch.zeros(3, 5), packed, torch.zeros(1))
