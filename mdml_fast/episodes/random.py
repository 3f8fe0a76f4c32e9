"""Counter-based random numbers: a pure function of (seed, episode, draw), the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(seed: int, episode: Tensor, draw: Tensor) -> Tensor:
    """Uniform float64 in [0, 1), of integer tensors that broadcast.

    SplitMix64's finaliser, applied to the seed, then the episode, then the draw (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014). No state: any draw of any episode can be had alone.
    """
    state = _mix(torch.full_like(episode, _signed(seed * _GOLDEN)))
    state = _mix(state + episode * _signed(_GOLDEN))
    state = _mix(state + draw * _signed(_GOLDEN))
    return _shift_right(state, 11).double() * 2.0**-53


_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of value; int64 products wrap, as the algorithm wants."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    shifted: Tensor = (bits >> count) & (2 ** (64 - count) - 1)
    return shifted


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)
