"""Which normals a learner leaves out, so that it can judge them as it would judge new ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mdml_fast.calibration import check_groups
from mdml_fast.data.labelled import Names

# Which of a model's two learners leaves a normal out. A model of one learner leaves out what both do.
FIRST, SECOND, NEITHER, BOTH = range(4)
LeftOut = npt.NDArray[np.int8]


def left_out_in_turn(n_normals: int, groups: Names | None, share: float, seed: int) -> LeftOut:
    """Which learner leaves each normal [N] out: each about that share of the rows, whole groups [N] where given.

    Of two groups or more each learner leaves out one at least, if the share is a half.

    Raises:
        InputError: all normals are of one group.
    """
    names = np.arange(n_normals) if groups is None else groups.astype(str)
    units, codes, sizes = np.unique(names, return_inverse=True, return_counts=True)
    if groups is not None:
        check_groups(units)
    order = np.random.default_rng(seed).permutation(len(units))
    middles = np.empty(len(units))
    middles[order] = np.cumsum(sizes[order]) - sizes[order] / 2
    last = (1 - share) * n_normals
    learner = np.where(middles <= share * n_normals, FIRST, np.where(middles > last, SECOND, NEITHER))
    return learner[codes].astype(np.int8)


def judged_by(learner: int, left_out: LeftOut) -> npt.NDArray[np.bool_]:
    """Whether a learner leaves each normal out [N]."""
    return np.isin(left_out, (learner, BOTH))
