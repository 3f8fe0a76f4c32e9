"""Trees of the head that may ask how far a row lies from the normals, beside its features.

The idea of XGBOD (Zhao, Hryniewicki, "XGBOD: improving supervised outlier detection with unsupervised representation
learning", 2018). What such trees learn of the seen classes carries over to others, which are far from the normals too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdml_fast.meta.neighbourhood import Neighbourhood
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.trees import Trees, grow


@dataclass(frozen=True)
class DistanceTrees:
    """The trees that may ask distances too."""

    # About a third of the head's: more find other classes better, and the seen ones less well.
    n: int = 30
    # To tell which distances are unusual takes no more normals, whose distances take time.
    normals: int = 1_000
    # The fewest rows in a leaf: how far out a single row lies is chance.
    leaf: int = 2

    def grow(self, neighbourhood: Neighbourhood, normals: Tensor, anomalies: Tensor, seed: int) -> Trees:
        """Grow them.

        A normal is left out of what it is compared with, but not its group: anomalies keep theirs, if they have any.

        Args:
            neighbourhood: whose views, encoders and centre count.
            normals: what distances are from, the first of them also learned from; none that is held out. Float [n, d].
            anomalies: float [M, d].
            seed: of the trees.
        """
        if not self.n:
            return []
        each, same = torch.arange(len(normals), device=normals.device), neighbourhood
        learned = Neighbourhood(same.config, same.views, same.encoders, normals, each, same.centre)
        normals, each = normals[: self.normals], each[: self.normals]
        near = learned.distances(learned.place(normals), each)
        far = learned.distances(learned.place(anomalies))
        tails = Tails.fit(near)
        asked = [asked_of(rows, tails, own).cpu().numpy() for rows, own in ((normals, near), (anomalies, far))]
        return grow(asked[0], asked[1], self.n, seed + 1, self.leaf)


def asked_of(rows: Tensor, tails: Tails, distances: Tensor) -> Tensor:
    """Features of rows [N, d], and how far out by these tails their distances by `SCORES` [6, N] are: [N, d + 6]."""
    return torch.cat([rows, tails.outlyingness(distances).T], dim=1)
