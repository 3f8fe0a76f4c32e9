"""Which normals a model leaves out, so that it can judge them as it would judge new ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mdml_fast.calibration import calibration_rows, check_groups
from mdml_fast.data.labelled import Names

# Which model leaves a normal out: the one that is kept, its sibling (see `left_out_in_turn`), neither, or both.
FIRST, SECOND, NEITHER, BOTH = range(4)
LeftOut = npt.NDArray[np.int8]


def left_out_by_both(n_normals: int, needed: int, seed: int) -> LeftOut:
    """Left out [N] are the `calibration_rows`, by any model."""
    left_out = np.full(n_normals, NEITHER, dtype=np.int8)
    left_out[calibration_rows(n_normals, needed, seed)] = BOTH
    return left_out


def left_out_in_turn(groups: Names, seed: int) -> LeftOut:
    """Which of two models leaves each normal [N] out: about half of them each, whole groups [N], one at least.

    Rows of a group resemble each other, so a group is judged by a model that has learned nothing from it; with two, no
    group is left without normals to calibrate on.

    Raises:
        InputError: all normals are of one group.
    """
    names, codes, sizes = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    check_groups(names)
    order = np.random.default_rng(seed).permutation(len(names))
    middles = np.empty(len(names))
    middles[order] = np.cumsum(sizes[order]) - sizes[order] / 2
    return np.where(middles <= len(groups) / 2, FIRST, SECOND)[codes].astype(np.int8)


def judged_by(model: int, left_out: LeftOut) -> npt.NDArray[np.bool_]:
    """Whether a model, FIRST or SECOND, leaves each normal out [N]."""
    return np.isin(left_out, (model, BOTH))
