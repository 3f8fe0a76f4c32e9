"""Two methods on the same splits: paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def paired_difference(
    ours: Sequence[float | None], theirs: Sequence[float | None], *, higher_is_better: bool = True
) -> dict[str, Any]:
    """How much better ours is, split by split.

    The interval is Student's, over the splits that both have a value for. Splits of one table share rows and classes,
    so it says how sure the difference is on this table, not on others.

    Args:
        ours: a metric on each split; None where the split has none.
        theirs: the same of the other method, in the same order.
        higher_is_better: False turns the sign of the comparison: positive is better for ours all the same.

    Returns:
        `mean` and `worst` gain of ours, `low` and `high` of the 95 % interval of the mean (null with fewer than two
        splits), and on how many splits ours `wins`, `loses` and `ties`; means are null without any split.
    """
    sign = 1.0 if higher_is_better else -1.0
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    gains = sign * np.array([a - b for a, b in pairs])
    margin = None
    if len(gains) > 1:
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1) * stats.sem(gains))
    mean = float(gains.mean()) if len(gains) else None
    return {
        "mean": mean,
        "low": None if mean is None or margin is None else mean - margin,
        "high": None if mean is None or margin is None else mean + margin,
        "worst": float(gains.min()) if len(gains) else None,
        "wins": int((gains > 0).sum()),
        "losses": int((gains < 0).sum()),
        "ties": int((gains == 0).sum()),
    }
