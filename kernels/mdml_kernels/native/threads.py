"""Work shared by as many threads as PyTorch may use. A compiled kernel leaves the interpreter to the others."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def shared(run: Callable[[int, int], None], n: int, least: int) -> None:
    """Call run(begin, end) on consecutive parts of range(n), side by side; each part has at least so many."""
    parts = max(1, min(torch.get_num_threads(), n // least))
    cuts = [n * i // parts for i in range(parts + 1)]
    own, *rest = itertools.pairwise(cuts)
    others = [_pool(len(rest)).submit(run, *part) for part in rest]
    run(*own)
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mdml-kernels")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
