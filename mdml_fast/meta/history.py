"""What training went through: the losses of each step, by direction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class History(NamedTuple):
    """The losses of S outer steps over D directions.

    Attributes:
        directions: what each learns from, for people; no two are the same [D].
        losses: the mean outer loss of each step's episodes [S].
        by_direction: that of each direction's own episodes [S, D]; None where a step had none.
    """

    directions: list[str]
    losses: list[float]
    by_direction: list[list[float | None]]

    def add(self, losses: Tensor, direction: Tensor) -> None:
        """Take a step: the outer losses of its episodes [E], and the number of each one's direction [E]."""
        losses, direction = losses.cpu().double(), direction.cpu()
        self.losses.append(float(losses.mean()))
        counts = direction.bincount(minlength=len(self.directions)).tolist()
        sums = direction.bincount(losses, minlength=len(self.directions)).tolist()
        self.by_direction.append([total / n if n else None for total, n in zip(sums, counts, strict=True)])

    def followed_by(self, later: History) -> History:
        """This training, and then another, some of whose directions may be the same."""
        directions = list(dict.fromkeys([*self.directions, *later.directions]))
        by_direction: list[list[float | None]] = []
        for history in (self, later):
            for losses in history.by_direction:
                known = dict(zip(history.directions, losses, strict=True))
                by_direction.append([known.get(name) for name in directions])
        return History(directions, self.losses + later.losses, by_direction)
