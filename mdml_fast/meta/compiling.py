"""`torch.compile` where it pays, and never at the cost of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

Compile = bool | Literal["auto"]

log = logging.getLogger("mdml_fast")

# Seconds that compiling saves for each floating point operation of a path, roughly (measured on one core): half of the
# time where the calls cost more than the arithmetic, a twentieth where there is little but products.
_SAVED = {"generic": 0.5 / 2e10, "fused": 0.05 / 6e10}
# Compiling takes half a minute; so much saved has it back twice.
_WORTHWHILE_SECONDS = 60.0


def pays(path: str, flops: float) -> bool:
    """Whether a run of so many floating point operations earns back what compiling takes.

    By a count, not by the clock: the same run decides alike each time, and its bits are the same.
    """
    return flops * _SAVED[path] >= _WORTHWHILE_SECONDS


class Compiled:
    """A function that is compiled at its first call, for arguments of those shapes; others it takes as it is.

    Where compiling fails it stays as it is, which is logged once.
    """

    _warned = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=False, fullgraph=True)
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        shapes = [leaf.shape for leaf in tree_leaves(args)]
        self._shapes = self._shapes or shapes
        if self._compiled is None or shapes != self._shapes:
            return self._plain(*args)
        try:
            return self._compiled(*args)
        except Exception as error:  # whatever a compiler comes up with: where it is ours, the plain function raises it
            self._compiled = None
            if not Compiled._warned:
                Compiled._warned = True
                log.warning("engine: goes on without torch.compile, which failed: %s", str(error).partition("\n")[0])
            return self._plain(*args)
