"""Work shared by as many threads as PyTorch may use. A compiled kernel leaves the interpreter to the others."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def shared(run: Callable[[int, int], None], n: int, least: int) -> None:
    """Call run(begin, end) on consecutive parts of range(n), side by side; each part has at least so many."""
    parts = max(1, min(torch.get_num_threads(), n // least))
    cuts = [n * i // parts for i in range(parts + 1)]
    others = [_pool(parts - 1).submit(run, *cut) for cut in zip(cuts[1:-1], cuts[2:], strict=True)] if parts > 1 else []
    run(0, cuts[1])
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mdml-kernels")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
