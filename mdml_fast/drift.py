"""Whether a stream of scores still looks like the calibration normals: a test that may be read after every row."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

from mdml_fast.data.encoding import Floats

# The martingale's bets: small ε wins on a few very strange rows, ε near 1 on many slightly strange ones.
BETS = np.arange(0.05, 1.0, 0.05)
# Drift is reported where exchangeable rows would show as much once in so many streams.
DRIFT_CHANCE = 0.01


class DriftMonitor:
    """How strongly scores, in the order they come, speak against "all of this is like the calibration normals".

    The evidence is the log of an exchangeability martingale. While the rows are exchangeable with the calibration
    normals, it ever reaches log(1/δ) with probability δ at most (Ville's inequality). It grows when rows score lower
    than normals do: drift, or more anomalies than a few. Each row's p-value is taken among all rows before it; the
    wealth bets ε p^(ε-1) on it, mixed evenly over ε (Vovk, Nouretdinov, Gammerman, "Testing exchangeability on-line",
    2003).

    Scores are compared as float16, of which there are 65 536: rounding keeps exchangeable rows exchangeable, and so
    many counters hold a stream of any length.

    Args:
        calibration: scores of calibration normals [n].
        seed: of the random tie-breaking that the theorem asks for.
    """

    def __init__(self, calibration: Floats, seed: int = 0) -> None:
        self._counts = _RunningCounts()
        for code in _float16_codes(calibration).tolist():
            self._counts.add(code)
        self._rng = np.random.default_rng(seed)
        self._log_wealth = np.zeros(len(BETS))
        self._n_rows = 0
        self.first_row: int | None = None

    def evidence(self, scores: Floats) -> Floats:
        """The evidence after each of the next rows of the stream, float64 [N].

        `first_row` is then the number, from 1, of the first row of all so far at which exchangeable rows would show
        as much with a chance of `DRIFT_CHANCE` at most; None without one.
        """
        log_p = np.empty(len(scores))
        codes, ties = _float16_codes(scores).tolist(), self._rng.random(len(scores)).tolist()
        for row, (code, tie) in enumerate(zip(codes, ties, strict=True)):
            low, high = self._counts.below(code), self._counts.below(code + 1)
            log_p[row] = math.log((low + (1 - tie) * (high - low + 1)) / (self._counts.total + 1))
            self._counts.add(code)
        steps = np.log(BETS) + (BETS - 1) * log_p[:, None]
        wealth = self._log_wealth + np.cumsum(steps, axis=0)
        evidence: Floats = logsumexp(wealth, axis=1) - math.log(len(BETS))
        if len(scores):
            self._log_wealth = wealth[-1]
        found = np.flatnonzero(evidence >= -math.log(DRIFT_CHANCE))
        if self.first_row is None and len(found):
            self.first_row = self._n_rows + int(found[0]) + 1
        self._n_rows += len(scores)
        return evidence


class _RunningCounts:
    """How many of the codes so far lie below one, in 16 steps (Fenwick, "A new data structure for cumulative frequency
    tables", 1994).
    """

    def __init__(self) -> None:
        self.total = 0
        self._sums = [0] * (2**16 + 1)

    def add(self, code: int) -> None:
        self.total += 1
        place = code + 1
        while place <= 2**16:
            self._sums[place] += 1
            place += place & -place

    def below(self, code: int) -> int:
        count, place = 0, code
        while place:
            count += self._sums[place]
            place -= place & -place
        return count


def _float16_codes(scores: Floats) -> np.ndarray:
    """Integers in [0, 65536) in the order of the scores rounded to float16; beyond its range they are infinite."""
    with np.errstate(over="ignore"):
        # Adding 0 makes one zero of the two.
        bits = (np.asarray(scores).astype(np.float16) + np.float16(0)).view(np.uint16).astype(np.int64)
    return np.where(bits < 2**15, bits + 2**15, 2**16 - 1 - bits)
