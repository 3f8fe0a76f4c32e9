"""Work shared by threads on each of which torch computes alone."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def workers(n: int) -> ThreadPoolExecutor:
    """So many threads; torch's settings are a thread's own. On a GPU their work takes its turn in this one's stream."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def start() -> None:
        torch.set_num_threads(1)
        if stream is not None:
            torch.cuda.set_stream(stream)  # and the stream's device

    return ThreadPoolExecutor(n, "mdml-fast", initializer=start)


def in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Item] | None], ahead: int, *, helping: bool = False
) -> Iterator[Item]:
    """The results of jobs in their order, of which so many more run, or wait for a thread, meanwhile.

    None among the jobs: the next one may be long in coming; the results of those before it are given first.

    helping: where this thread would wait for a result, it takes a job that no other has begun. It is awake already;
        to wake another for each core there is costs a tenth of a job of some milliseconds, and more on a busy machine.
    """
    pending: deque[tuple[Future[Item], Callable[[], Item]]] = deque()

    def first() -> Item:
        while helping and not pending[0][0].done() and _help(pending):
            pass
        return pending.popleft()[0].result()

    for job in jobs:
        if job is not None:
            pending.append((pool.submit(job), job))
        while len(pending) > (0 if job is None else ahead):
            yield first()
    while pending:
        yield first()


def _help(pending: deque[tuple[Future[Item], Callable[[], Item]]]) -> bool:
    """Do the first job that has not begun; False where there is none."""
    for i, (future, job) in enumerate(pending):
        if future.cancel():
            own: Future[Item] = Future()
            own.set_result(job())
            pending[i] = own, job
            return True
    return False


def side_by_side(jobs: Sequence[Callable[[], Item]]) -> list[Item]:
    """The results of jobs, in order: as many at once as torch may use threads here, each on one of its own."""
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        return [job() for job in jobs]
    with workers(n_threads - 1) as pool, single_thread():
        return list(in_order(pool, jobs, len(jobs), helping=True))


@contextlib.contextmanager
def beside(job: Callable[[], Item]) -> Iterator[Callable[[], Item]]:
    """A job that another thread does meanwhile, where torch may use more than one; gives what waits for the result."""
    if torch.get_num_threads() == 1:
        yield job
        return
    with workers(1) as pool:
        yield pool.submit(job).result


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Torch computes on this thread alone: for what is too little to be worth waking others."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
