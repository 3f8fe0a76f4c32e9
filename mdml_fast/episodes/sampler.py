"""Drawing many episodes at once, on the device, each a pure function of (seed, episode number)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdml_fast.episodes.directions import Direction
from mdml_fast.episodes.families import Families
from mdml_fast.episodes.random import uniform

# Episodes whose rows are drawn at once: that costs little more than one's, and a run takes them one after the other.
BLOCK = 64


class EpisodeBatch(NamedTuple):
    """E episodes.

    Attributes:
        support: normal rows of the inner loop [E, n, d].
        query: normal, then anomalous rows of the outer step [E, q, d].
        is_ood: which query rows are anomalous, bool [E, q].
        direction: the number of each episode's direction, int64 [E].
    """

    support: Tensor
    query: Tensor
    is_ood: Tensor
    direction: Tensor


class EpisodeSampler:
    """Episodes of a fixed size over fixed rows and directions.

    Episode e learns from direction e mod D. A row is drawn by drawing a family of the direction, then one of its rows.
    Support and ID query never share a row (unless a family has only one): each episode cuts each family's rows, in a
    shuffled order, into two halves at a place of its own.

    Args:
        rows: all rows that episodes may hold, float [N, d], on the device that shall sample.
        id_families: positions in rows of each ID family.
        ood_families: positions in rows of each OOD family.
        directions: pairings of the two.
        n_support: support rows per episode.
        n_query_id: normal query rows per episode.
        n_query_ood: anomalous query rows per episode.
        seed: any int.

    Attributes:
        direction_names: for people, each direction's number and families.
    """

    def __init__(
        self,
        rows: Tensor,
        id_families: Families,
        ood_families: Families,
        directions: Sequence[Direction],
        *,
        n_support: int,
        n_query_id: int,
        n_query_ood: int,
        seed: int,
    ) -> None:
        self.rows = rows
        self.n_support, self.n_query_id, self.n_query_ood = n_support, n_query_id, n_query_ood
        self.seed = seed
        self.n_directions = len(directions)
        self.direction_names = [
            f"{number + 1}: {_listed(id_families, own.id_families)} against {_listed(ood_families, own.ood_families)}"
            for number, own in enumerate(directions)
        ]
        rng = np.random.default_rng(seed)
        self._kept: dict[int, Tensor] = {}
        self._id = _FamilyTable(id_families, [direction.id_families for direction in directions], rng, rows.device)
        self._ood = _FamilyTable(ood_families, [direction.ood_families for direction in directions], rng, rows.device)

    def directions(self, first: int, n_episodes: int) -> Tensor:
        """The number of the direction of episodes first, …, first + n_episodes - 1, int64 [n_episodes]."""
        return torch.arange(first, first + n_episodes, device=self.rows.device) % self.n_directions

    def batch(self, first: int, n_episodes: int) -> EpisodeBatch:
        """Episodes first, …, first + n_episodes - 1."""
        end, start = first + n_episodes, first // BLOCK
        blocks = [self._block(block) for block in range(start, max(-(-end // BLOCK), start + 1))]
        drawn = torch.cat(blocks)[first - start * BLOCK : end - start * BLOCK]
        support, query = (self._rows(part) for part in (drawn[:, : self.n_support], drawn[:, self.n_support :]))
        is_ood = torch.arange(query.shape[1], device=self.rows.device) >= self.n_query_id
        return EpisodeBatch(support, query, is_ood.expand(n_episodes, -1), self.directions(first, n_episodes))

    def _rows(self, positions: Tensor) -> Tensor:
        # Faster than indexing.
        return self.rows.index_select(0, positions.flatten()).view(*positions.shape, self.rows.shape[1])

    def _block(self, block: int) -> Tensor:
        """The positions of the rows of a block's episodes, int64 [BLOCK, n + q]; the last blocks are kept."""
        kept = self._kept
        if block not in kept:
            # Put in place whole: threads may sample at once.
            kept = self._kept = dict([*kept.items()][-3:]) | {block: self._drawn(block)}
        return kept[block]

    def _drawn(self, block: int) -> Tensor:
        episode = torch.arange(block * BLOCK, (block + 1) * BLOCK, device=self.rows.device).unsqueeze(-1)
        direction = episode % self.n_directions
        # Each kind of draw has numbers of its own: two for each row, and the cut of each family.
        sizes = [self.n_support, self.n_query_id, self.n_query_ood]
        support, query_id, query_ood = torch.arange(sum(sizes), device=self.rows.device).split(sizes)  # type: ignore[no-untyped-call]
        draws = [
            self._id.draw(self.seed, episode, direction, support, half=0),
            self._id.draw(self.seed, episode, direction, query_id, half=1),
            self._ood.draw(self.seed, episode, direction, query_ood, half=None),
        ]
        return torch.cat(draws, dim=1)


def _listed(families: Families, chosen: Sequence[int]) -> str:
    """The names of families, each once."""
    return ", ".join(dict.fromkeys(families.names[position] for position in chosen))


class _FamilyTable:
    """Families as flat tensors, so that a draw is arithmetic and one gather."""

    def __init__(
        self, families: Families, chosen: Sequence[Sequence[int]], rng: np.random.Generator, device: torch.device
    ) -> None:
        sizes = np.array([len(rows) for rows in families.rows])
        widest = max(map(len, chosen))
        padded = [[*choice, *[choice[0]] * (widest - len(choice))] for choice in chosen]
        self.rows = torch.as_tensor(np.concatenate([rng.permutation(rows) for rows in families.rows]), device=device)
        self.size = torch.as_tensor(sizes, device=device)  # [F]
        self.offset = torch.as_tensor(np.cumsum(sizes) - sizes, device=device)  # [F]
        self.choice = torch.as_tensor(padded, device=device)  # [D, widest]
        self.n_choices = torch.as_tensor([len(choice) for choice in chosen], device=device)  # [D]

    def draw(self, seed: int, episode: Tensor, direction: Tensor, draw: Tensor, half: int | None) -> Tensor:
        """Positions of rows, int64 [E, len(draw)]; half 0 or 1 of each family's rows, None for all of them."""
        slot = (uniform(seed, episode, 2 * draw) * self.n_choices[direction]).long()
        family = self.choice[direction, slot]
        size = self.size[family]
        place = uniform(seed, episode, 2 * draw + 1)
        if half is None:
            return self.rows[self.offset[family] + (place * size).long()]
        # Negative draw numbers belong to the cuts: one for each family, whatever rows the episode draws.
        cut = (uniform(seed, episode, -1 - family) * size).long()
        first_half = (size // 2).clamp(min=1)
        start, length = (0, first_half) if half == 0 else (first_half, (size - first_half).clamp(min=1))
        within = cut + start + (place * length).long()
        return self.rows[self.offset[family] + within % size]
