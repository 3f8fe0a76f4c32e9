"""From scores to p-values and alarms that hold their rate."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupShuffleSplit

from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import Names
from mdml_fast.errors import InputError

Positions = npt.NDArray[np.intp]

# The share of the normals that is kept out of training to calibrate on.
CALIBRATION_SHARE = 0.2


class ConformalCalibration:
    """Split-conformal p-values from the scores of normals that nothing was learned from.

    Args:
        scores: of the calibration normals [n], higher is more normal.
    """

    def __init__(self, scores: Floats) -> None:
        self.scores = np.sort(scores)

    def p_value(self, scores: Floats) -> Floats:
        """(1 + number of calibration scores ≤ s) / (n + 1) for each score s [N].

        For a new normal row, P(p_value ≤ α) ≤ α for every α (Vovk, Gammerman, Shafer, "Algorithmic learning in a
        random world", 2005), as long as it is exchangeable with the calibration normals.
        """
        ranks = np.searchsorted(self.scores, scores, side="right")
        return (ranks.astype(np.float64) + 1.0) / (len(self.scores) + 1.0)

    @property
    def lowest_rate(self) -> float:
        """The lowest false-alarm rate at which an alarm can be raised at all."""
        return 1.0 / (len(self.scores) + 1.0)


def calibration_split(
    n_normals: int, false_alarm_rate: float, groups: Names | None, seed: int
) -> tuple[Positions, Positions]:
    """Positions of the normals to train on, and of those to calibrate on.

    A fifth is for calibration; more, up to half, where the promised rate needs it: ⌈1/α⌉ - 1 normals.

    Args:
        n_normals: how many normals there are.
        false_alarm_rate: the promised rate α.
        groups: group of each normal [n_normals], none of which may be on both sides; or None.
        seed: of the choice.

    Raises:
        InputError: all normals are of one group.
    """
    needed = math.ceil(1 / false_alarm_rate) - 1
    n_calibration = min(n_normals // 2, max(math.ceil(CALIBRATION_SHARE * n_normals), needed))
    if groups is None:
        order = np.random.default_rng(seed).permutation(n_normals)
        return np.sort(order[n_calibration:]), np.sort(order[:n_calibration])
    return split_by_group(groups, n_calibration / n_normals, seed)


def split_by_group(groups: Names, share: float, seed: int) -> tuple[Positions, Positions]:
    """Positions in groups [N] of the rest, and of about `share` of the groups.

    Raises:
        InputError: there is one group only.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    if len(names) < 2:
        raise InputError(f"all normal rows are of one group, {names[0]!r}; a split needs two: leave the group out")
    n_held_out = min(max(round(share * len(names)), 1), len(names) - 1)
    splitter = GroupShuffleSplit(1, test_size=n_held_out, random_state=seed)
    rest, held_out = next(splitter.split(codes, groups=codes))
    return rest, held_out
