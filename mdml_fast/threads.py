"""Work shared by threads on each of which torch computes alone."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def workers(n: int) -> ThreadPoolExecutor:
    """So many threads; torch's setting is a thread's own."""
    return ThreadPoolExecutor(n, "mdml-fast", initializer=torch.set_num_threads, initargs=(1,))


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Item]], ahead: int) -> Iterator[Item]:
    """The results of jobs in their order, of which so many more run, or wait for a thread, meanwhile."""
    pending: deque[Future[Item]] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Torch computes on this thread alone: for what is too little to be worth waking others."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
