"""How many episodes are computed at once: measured at start-up, remembered for each machine and shape.

One at a time the calls cost more than the arithmetic; too many, and the working set leaves the cache. Where the best
lies is the machine's business, so it is tried out. The results are the same whatever comes of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mdml_kernels.native import loader as native

from mdml_fast.files import replace_file
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.resources import free_memory

# Tried in this order, until one takes so much longer than the best before it.
CANDIDATES = (2, 4, 8, 16, 32, 64, 128, 256)
WORSE = 1.03
# Times an episode that differ by less are one.
EQUAL = 1.01
# Each candidate is timed so often, and the best time counts: what disturbs only adds.
REPEATS = 3

# Of what is measured, and how: sizes found for another are forgotten.
_VERSION = 3

# Values in the widest vector register there is: 64 bytes of bfloat16.
_VECTOR = 32


class Shape(NamedTuple):
    """Support rows, query rows and the features of a row, in however many dims."""

    n_support: int
    n_query: int
    n_features: int


def granule(shape: Shape, group: int) -> int:
    """Chunks of whole granules give the same bits, whatever their size: so many episodes, in whole groups.

    A vectorised loop may round the few values behind its last whole vector in another way than all before them. The
    rows of a granule fill whole vectors, so the tails of all chunks fall on the same episodes.
    """
    return math.lcm(group, *(_VECTOR // math.gcd(_VECTOR, n) for n in (shape.n_support, shape.n_query)))


def candidates(n_episodes: int, episode_bytes: int, memory: int, granule: int) -> list[int]:
    """The chunk sizes that come into question: whole granules, no more than there are episodes, within the memory.

    Where not even the smallest fits, the largest part of a granule that does.
    """
    sizes = {min(size, -(-n_episodes // granule) * granule) for size in CANDIDATES if size % granule == 0}
    fitting = sorted(size for size in sizes if size * episode_bytes <= memory)
    return fitting or [max(1, min(min(sizes), memory // episode_bytes))]


def cuts(n_episodes: int, size: int) -> list[tuple[int, int]]:
    """Chunks as (first episode, how many). A last one of a single episode goes with the chunk before it.

    Products of a batch of one may be taken in another way than those of many, which their bits would show.
    """
    starts = list(range(0, n_episodes, size))
    if len(starts) > 1 and size > 1 and n_episodes - starts[-1] == 1:
        starts.pop()
    return [(start, end - start) for start, end in itertools.pairwise([*starts, n_episodes])]


def episode_bytes(engine: MetaEngine, shape: Shape) -> int:
    """Roughly what one episode takes while it is computed: its own weights thrice, its rows in every layer, logits."""
    sizes = [value.numel() for value in engine.parameters().values()]
    widths = [value.shape[-2] for value in engine.parameters().values() if value.ndim - bool(engine.n_directions) == 2]
    rows = shape.n_support + shape.n_query
    per_row = shape.n_features + 3 * sum(widths) + 2 * shape.n_support * engine.takes_support
    steps = 1 if engine.settings.first_order else 1 + engine.settings.inner_steps
    return 4 * steps * (3 * sum(sizes) // (engine.n_directions or 1) + rows * per_row)


def available_memory(device: torch.device) -> int:
    """A quarter of the bytes that are free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return free_memory() // 4


def measure(seconds: Callable[[int], float], sizes: Sequence[int]) -> int:
    """The size with the least time an episode, or a larger one that takes hardly more: fewer chunks have less around.

    seconds(size) computes so many episodes and says how long it took.
    """
    each: dict[int, float] = {}
    for size in sizes:
        seconds(size)  # allocates, and warms caches up
        each[size] = min(seconds(size) for _ in range(REPEATS)) / size
        if each[size] > WORSE * min(each.values()):
            break
    return max(size for size, least in each.items() if least <= EQUAL * min(each.values()))


class ChunkCache:
    """What was measured, in a JSON file of the user's cache folder; one that can't be read or written is no cache."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _users_folder() / "chunks.json"

    def get(self, key: str) -> int | None:
        """The size stored under the key."""
        size = self._read().get(key)
        return size if isinstance(size, int) and size > 0 else None

    def put(self, key: str, size: int) -> None:
        """Store a size."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(self.path) as temporary:
                temporary.write_text(json.dumps(self._read() | {key: size}, indent=1) + "\n")

    def _read(self) -> dict[str, object]:
        try:
            document = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}


def _users_folder() -> Path:
    """Ours in the user's cache; /dev/null, in which nothing can be kept, where the user has none."""
    try:
        return native.cache_folder("mdml-fast")
    except OSError:
        return Path(os.devnull)


def cache_key(engine: MetaEngine, shape: Shape, sizes: Sequence[int], threads: int) -> str:
    """What a measurement depends on: the machine, the computation, its shapes."""
    first = next(iter(engine.parameters().values()))
    device = torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else platform.processor()
    parameters = {name: list(value.shape) for name, value in engine.parameters().items()}
    facts = [
        _VERSION,
        *(platform.node(), device, os.cpu_count(), torch.__version__, threads),
        *(engine.choice.path, native.native().reason, str(engine.settings), list(shape), list(sizes), parameters),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
