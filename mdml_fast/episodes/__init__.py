"""Which families play ID and OOD in an episode, and which rows an episode holds."""

from mdml_fast.episodes.directions import Direction, make_directions
from mdml_fast.episodes.families import Families, anomaly_families, normal_families, synthetic_rows
from mdml_fast.episodes.sampler import EpisodeBatch, EpisodeSampler

__all__ = [
    "Direction",
    "EpisodeBatch",
    "EpisodeSampler",
    "Families",
    "anomaly_families",
    "make_directions",
    "normal_families",
    "synthetic_rows",
]
