"""Rows whose class is known, kept to say what other rows are like."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from mdml_kernels.native import loader
from mdml_kernels.native.neighbours import NeighbourSearch
from torch import Tensor

from mdml_fast.calibration import Positions
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names

# So many rows are kept, evenly over the families, of each at least the smaller number: enough to name a neighbour by,
# a small part of what scoring compares with.
MAX_ROWS, MIN_FAMILY_ROWS = 5_000, 100
# A row is like a family if it is as near to one of its rows as this share of the family's own rows are.
MEMBER_SHARE = 0.95
# Squared distances held at once: 64 MiB.
BLOCK_VALUES = 2**23


class KnownRows:
    """Encoded rows of named families, normal ones or seen anomaly classes.

    Args:
        rows: float32 [n, d].
        names: the family of each [n].
    """

    def __init__(self, rows: Rows, names: Names) -> None:
        self.rows, self.names = rows, names.astype(str)

    @classmethod
    def sample(cls, rows: Rows, names: Names, seed: int) -> KnownRows:
        """A bounded number of rows [N, d], of each family as many, where it has them."""
        order = np.random.default_rng(seed).permutation(len(rows))
        families = np.unique(names.astype(str))
        most = max(MIN_FAMILY_ROWS, MAX_ROWS // max(len(families), 1))
        kept = [order[names[order] == name][:most] for name in families]
        chosen = np.sort(np.concatenate(kept)) if kept else order
        return cls(rows[chosen], names[chosen])

    def with_family(self, rows: Rows, name: str) -> KnownRows:
        """These and the rows [n, d] of one more family."""
        own = KnownRows.sample(rows, np.full(len(rows), name, dtype=object), 0)
        return KnownRows(np.concatenate([self.rows, own.rows]), np.concatenate([self.names, own.names]))

    def nearest(self, rows: Rows) -> tuple[Positions, Floats]:
        """The position of the known row nearest to each row [N, d], and its distance, both [N].

        Where nothing can be measured, or there is none, any position, and inf.
        """
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.intp), np.full(len(rows), np.inf)
        if self._search:
            places, distances = self._search.nearest(torch.as_tensor(rows))
            return places.clamp(min=0).numpy(), distances.nan_to_num(nan=torch.inf).double().numpy()
        known = torch.as_tensor(self.rows).double()
        squares = known.square().sum(1)
        step = max(1, BLOCK_VALUES // len(self.rows))
        found = [
            torch.addmm(squares, block.double(), known.T, alpha=-2.0).min(1).indices
            for block in torch.split(torch.as_tensor(rows), step)
        ]
        positions: Positions = torch.cat(found).numpy()
        with np.errstate(over="ignore"):
            return positions, np.linalg.norm(rows - self.rows[positions], axis=1).astype(np.float64)

    def resembled(self, rows: Rows, distance_to_normals: Floats) -> Names:
        """The family that each row [N, d] is like [N], or ``new``.

        It is that of the nearest known row, where that is nearer than the nearest normal [N], and as near as the
        family's own rows are to each other.
        """
        positions, distances = self.nearest(rows)
        kinds: Names = np.full(len(rows), "new", dtype=object)
        if len(self.rows):
            names = self.names[positions]
            reach = np.array([self._reach[name] for name in names])
            # A family of one row has no distance of its own to go by: half the way to the normals has to do.
            reach = np.where(np.isnan(reach), distance_to_normals / 2, reach)
            like = (distances < distance_to_normals) & (distances <= reach)
            kinds[like] = names[like]
        return kinds

    @cached_property
    def _search(self) -> NeighbourSearch | None:
        """By the compiled kernels, where there are any."""
        known = torch.as_tensor(self.rows)
        return NeighbourSearch(known) if loader.serves(known) else None

    @cached_property
    def _reach(self) -> dict[str, float]:
        """How far rows of each family lie from the nearest other one; nan where there is none."""
        reach = {}
        for name in np.unique(self.names):
            own = torch.as_tensor(self.rows[self.names == name])
            apart = _apart(own)
            reach[str(name)] = float(np.quantile(apart, MEMBER_SHARE, method="higher")) if len(own) > 1 else np.nan
        return reach


def _apart(rows: Tensor) -> Floats:
    """The distance of each row [n, d] to the nearest other one [n]."""
    distances = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf)
    return np.asarray(distances.amin(1))
