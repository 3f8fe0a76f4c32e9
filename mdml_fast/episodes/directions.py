"""Directions: which ID families are paired with which OOD families."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Direction(NamedTuple):
    """One pairing: the positions of its ID families and of its OOD families."""

    id_families: tuple[int, ...]
    ood_families: tuple[int, ...]


def make_directions(n_id: int, n_ood: int, n_directions: int, rng: np.random.Generator) -> list[Direction]:
    """Random halves of the ID and of the OOD families, complementary in pairs, so that each family plays equally often.

    Args:
        n_id: number of ID families, at least 1.
        n_ood: number of OOD families, at least 1.
        n_directions: how many directions; an even number keeps the pairs whole.
        rng: the source of randomness.
    """
    directions: list[Direction] = []
    while len(directions) < n_directions:
        id_halves, ood_halves = _halves(n_id, rng), _halves(n_ood, rng)
        directions += [Direction(*pair) for pair in zip(id_halves, ood_halves, strict=True)]
    return directions[:n_directions]


def _halves(n: int, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two complementary random halves of range(n); a single family is both halves."""
    order = rng.permutation(n).tolist()
    first, second = order[: n // 2], order[n // 2 :]
    return tuple(sorted(first or second)), tuple(sorted(second))
