"""Work shared by threads. A compiled kernel leaves the interpreter to the others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_setting = threading.local()


@contextlib.contextmanager
def shared_by(threads: int) -> Iterator[None]:
    """Within it the kernels that this thread calls share their work by so many, not by as many as PyTorch may use."""
    before = getattr(_setting, "threads", None)
    _setting.threads = threads
    try:
        yield
    finally:
        _setting.threads = before


def shared(run: Callable[[int, int], None], n: int, least: int) -> None:
    """Call run(begin, end) on consecutive parts of range(n), side by side; each part has at least so many.

    Where this thread is interrupted the others go on: run must hold the memory that it works on.
    """
    threads = getattr(_setting, "threads", None) or torch.get_num_threads()
    parts = max(1, min(threads, n // least))
    cuts = [n * i // parts for i in range(parts + 1)]
    own, *rest = itertools.pairwise(cuts)
    others = []
    for part in rest:
        try:
            others.append(_pool().submit(run, *part))
        except RuntimeError:  # the interpreter ends, and starts no more
            run(*part)
    run(*own)
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """It starts a thread where none is idle."""
    return ThreadPoolExecutor(max(64, os.cpu_count() or 1), "mdml-kernels")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
