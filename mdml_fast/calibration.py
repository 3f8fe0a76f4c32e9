"""From scores to p-values and alarms that hold their rate."""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, norm, t
from sklearn.model_selection import GroupShuffleSplit

from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import Names
from mdml_fast.errors import InputError

Positions = npt.NDArray[np.intp]
Counts = npt.NDArray[np.int64]

# The share of the normals that is kept out of training to calibrate on.
CALIBRATION_SHARE = 0.25
# More calibration normals than this only cost time: a rate of 1 % is then known to a tenth of itself.
CALIBRATION_ROWS = 10_000
# A score that equals a calibration score is so far on the way to the next: at levels of whole ranks it is no alarm.
TIE = 1e-6


class Promise(StrEnum):
    """What an alarm promises at a rate α.

    - marginal: of new normal rows a share of α is flagged, on average over calibration sets of n: where α (n + 1) is
      whole at most α, and in no case more than the next α for which it is.
    - certificate: with the stated confidence, this calibration set flags a share of α at most. Where rows of a group
      resemble each other, it allows for as many rows less as their alarms come in groups.
    - fdr: of the alarms in a batch, a share of α at most is false, on average over batches.
    """

    MARGINAL = "marginal"
    CERTIFICATE = "certificate"
    FDR = "fdr"


class ConformalCalibration:
    """Conformal p-values from the scores of normals that were held out.

    Args:
        scores: of the calibration normals [n], higher is more normal.
        groups: the group of each [n], where a row shall be compared with its own group; or None.
        trim: the share of the lowest scores that is left out, because so many of the normals may be anomalies. Where
            none is, the false-alarm rate may exceed its promise by as much.
    """

    def __init__(self, scores: Floats, groups: Names | None = None, trim: float = 0.0) -> None:
        order = np.argsort(scores, kind="stable")[math.floor(trim * len(scores)) :]
        self.scores = scores[order]
        self.groups = None if groups is None else groups[order].astype(str)
        self._codes = None if self.groups is None else np.unique(self.groups, return_inverse=True)[1]

    def p_value(self, scores: Floats, groups: Names | None = None, between: bool = True) -> Floats:
        """(k + 1) k / (k + 1 - u) / (n + 1) for each score [N], where k of n calibration scores are up to it.

        u is how far it is on the way to the next one. With u = 1 these are (k + 1) / (n + 1), and P(p_value ≤ α) ≤ α
        for a new normal row and every α (Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005), as
        long as it is exchangeable with the calibration normals: with those of its own group, where the groups of both
        are given. But at an α between two ranks it is then less than α, by up to 1 / (n + 1). With u from 0 to 1 it is
        α where the logarithm of the scores' distribution function is linear between two of them, as in the lower tail
        of scores that are logarithms themselves: U_k^(1-u) U_(k+1)^u has this mean, U the order statistics of uniform
        variables. Below and above all calibration scores, and above tied ones, u is 1. A row of a group without
        calibration normals is compared with all.

        Args:
            scores: of the rows [N].
            groups: of the rows [N], or None.
            between: False: u is 1, for what wants whole ranks; there are then few different p-values.
        """
        p_values = _p_values(self.scores, scores, between)
        if groups is not None and self.groups is not None:
            for name in np.unique(self.groups):
                own = groups.astype(str) == name
                p_values[own] = _p_values(self.scores[self.groups == name], scores[own], between)
        return p_values

    def alarm_level(
        self,
        p_values: Floats,
        rate: float,
        promise: Promise = Promise.MARGINAL,
        confidence: float = 0.95,
        counts: Counts | None = None,
    ) -> float:
        """The p-value up to which rows are alarms; 0 where no alarm can keep the promise.

        Args:
            p_values: of the batch [N], of whole ranks; only the FDR depends on them.
            rate: α in (0, 1).
            promise: of what kind.
            confidence: 1 - δ, of a certificate.
            counts: how many rows have each of the p-values [N]; one, where not given.
        """
        if promise is Promise.CERTIFICATE:
            n = len(self.scores)
            return certified_rank(n, rate, confidence, self._effect(math.ceil(rate * n), confidence)) / (n + 1)
        if promise is Promise.FDR:
            return benjamini_hochberg(p_values, rate, counts)
        return rate

    def score_threshold(self, level: float) -> float:
        """Rows without a group are alarms at a level where they score below this; -inf where none is, inf for all."""
        n = len(self.scores)
        rank = math.floor(level * (n + 1) + TIE / 2)
        if rank < 1 or rank > n:
            return -math.inf if rank < 1 else math.inf
        starts, widths = gaps(self.scores)
        way = rank + 1 - rank * (rank + 1) / (level * (n + 1)) if np.isfinite(starts[rank]) else 0.0
        return float(self.scores[rank - 1] + (way * widths[rank] if way > 0 else 0.0))  # a width may be infinite

    def lowest_rate(self, promise: Promise = Promise.MARGINAL, confidence: float = 0.95) -> float:
        """The lowest rate at which an alarm can be raised at all."""
        n = len(self.scores)
        if promise is not Promise.CERTIFICATE:
            return 1 / (n + 1)
        for flagged in range(1, n + 1):  # rates up to flagged / n have the design effect of so many
            # The lowest score bounds the share below it by a Beta(1, n / effect) variable, as in `certified_rank`.
            lowest = float(1 - (1 - confidence) ** (self._effect(flagged, confidence) / n))
            if lowest <= flagged / n:
                return max(lowest, (flagged - 1) / n)
        return 1.0

    def group_sizes(self) -> list[int]:
        """How many calibration normals each group has; [] without groups."""
        return [] if self._codes is None else np.bincount(self._codes).tolist()

    def _effect(self, flagged: int, confidence: float) -> float:
        """The design effect on alarms that are so many of the lowest scores."""
        if self._codes is None:
            return 1.0
        return design_effect(np.arange(len(self.scores)) < flagged, self._codes, confidence)


def _p_values(calibration: Floats, scores: Floats, between: bool) -> Floats:
    ranks, way = np.searchsorted(calibration, scores, side="right"), np.ones(len(scores))
    if between:
        starts, widths = (values[ranks] for values in gaps(calibration))
        within = np.isfinite(starts)
        way[within] = ((scores[within] - starts[within]) / widths[within]).clip(TIE, 1.0)
    # Of rank 0 the way is 1.
    p_values: Floats = (ranks + 1) * np.maximum(ranks, 1) / np.maximum(ranks + 1 - way, 1) / (len(calibration) + 1.0)
    return p_values


def gaps(calibration: Floats) -> tuple[Floats, Floats]:
    """Where the gaps between ordered calibration scores [n] begin, and how wide they are.

    Both by rank [n + 1]: how many of these a score has reached. Of a gap that begins at -inf all scores are at the end.
    """
    starts, widths = np.concatenate([[-np.inf], calibration]), np.ones(len(calibration) + 1)
    tied = np.flatnonzero(calibration[1:] == calibration[:-1])
    # Among tied scores, and above them.
    starts[tied + 1] = starts[tied + 2] = starts[-1] = -np.inf
    within = np.flatnonzero(np.isfinite(starts))
    widths[within] = calibration[within] - calibration[within - 1]
    return starts, widths


def certified_rank(n: int, rate: float, confidence: float, effect: float = 1.0) -> int:
    """The largest r such that fewer than a share `rate` of normals score below the r-th lowest of n, with confidence.

    The share of normals below that order statistic is a Beta(r, n + 1 - r) variable, or smaller where scores tie
    (Wilks, "Determination of sample sizes for setting tolerance limits", 1941). 0 where there is none. With a design
    effect the n rows, and the r - 1 below, say as much as n / effect independent ones, of which (r - 1) / effect (Korn,
    Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from survey
    data", 1998).
    """
    below = np.arange(n)
    return int(np.sum(beta.cdf(rate, below / effect + 1, (n - below) / effect) >= confidence))


def design_effect(flags: npt.NDArray[np.bool_], codes: Positions, confidence: float) -> float:
    """How many times as much the share of flags [n] varies between draws of groups as between draws of rows; ≥ 1.

    Groups are told by their codes [n], 0 and following.

    The ratio of the cluster estimate of its variance to the binomial one (Kish, "Survey sampling", 1965), and as much
    more as that estimate, of few groups, is unsure at this confidence: the squared ratio of Student's quantile to the
    normal one, as Korn and Graubard have it. 1 where all flags are equal, there is one group, or no confidence to
    speak of (up to a half).
    """
    share, n_groups = flags.mean(), codes.max() + 1
    binomial = share * (1 - share) * len(flags)
    if n_groups < 2 or not binomial or confidence <= 0.5:
        return 1.0
    totals = np.bincount(codes, flags - share)
    unsure = (t.ppf(confidence, n_groups - 1) / norm.ppf(confidence)) ** 2
    return max(1.0, float(unsure * n_groups / (n_groups - 1) * np.square(totals).sum() / binomial))


def benjamini_hochberg(p_values: Floats, rate: float, counts: Counts | None = None) -> float:
    """The largest p-value p_(k) ≤ k/N · rate, or 0: alarms up to it have a false discovery rate of at most `rate`.

    Holds for conformal p-values that share their calibration set (Bates, Candès, Lei, Romano, Sesia, "Testing for
    outliers with conformal p-values", 2023). `counts` says how many rows have each p-value; one, where not given.
    """
    order = np.argsort(p_values)
    ranks = np.cumsum(np.ones(len(order)) if counts is None else counts[order])
    passing = np.flatnonzero(p_values[order] <= rate * ranks / max(ranks[-1:].sum(), 1))
    return float(p_values[order[passing[-1]]]) if len(passing) else 0.0


def needed_normals(rate: float, promise: Promise, confidence: float) -> int:
    """How many calibration normals it takes for alarms at a rate α: ⌈1/α⌉ - 1, and more for a certificate."""
    if promise is Promise.CERTIFICATE:
        return math.ceil(math.log(1 - confidence) / math.log(1 - rate))
    return math.ceil(1 / rate) - 1


def calibration_rows(n_normals: int, needed: int, seed: int) -> Positions:
    """Positions, increasing, of the normals to calibrate on.

    A quarter of them; more, up to half, where the promise needs it; at most 10 000.

    Args:
        n_normals: how many normals there are.
        needed: how many the promise needs.
        seed: of the choice.
    """
    share = max(math.ceil(CALIBRATION_SHARE * n_normals), needed)
    n_calibration = min(n_normals // 2, share, CALIBRATION_ROWS)
    return np.sort(np.random.default_rng(seed).permutation(n_normals)[:n_calibration])


def split_by_group(groups: Names, share: float, seed: int) -> tuple[Positions, Positions]:
    """Positions in groups [N] of the rest, and of about `share` of the groups, one at least.

    Raises:
        InputError: there is one group only.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    check_groups(names)
    n_held_out = min(max(round(share * len(names)), 1), len(names) - 1)
    splitter = GroupShuffleSplit(1, test_size=n_held_out, random_state=seed)
    rest, held_out = next(splitter.split(codes, groups=codes))
    return rest, held_out


def check_groups(names: npt.NDArray[np.str_]) -> None:
    """Raise InputError where there is one group only."""
    if len(names) < 2:
        raise InputError(f"all normal rows are of one group, {str(names[0])!r}; a split needs two: leave the group out")
