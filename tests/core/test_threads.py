"""Work shared by threads: the order of results, who does what, and what torch is told."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mdml_fast.threads import beside, in_order, side_by_side, single_thread, workers


def slow(i: int) -> tuple[int, int]:
    """The number, and the thread that was asked."""
    time.sleep(0.02 if i % 3 == 0 else 0.001)
    return i, threading.get_ident()


@pytest.mark.parametrize("helping", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 4, 50])
def test_results_come_in_order(helping: bool, ahead: int) -> None:
    with workers(2) as pool:
        found = list(in_order(pool, (lambda i=i: slow(i) for i in range(20)), ahead, helping=helping))
    assert [i for i, _ in found] == list(range(20))
    assert helping or threading.get_ident() not in {thread for _, thread in found}


def test_what_is_done_is_given_before_a_job_that_may_be_long_in_coming() -> None:
    given: list[int] = []

    def jobs() -> Iterator[Callable[[], int] | None]:
        yield lambda: 0
        yield lambda: 1
        yield None
        assert given == [0, 1]
        yield lambda: 2

    with workers(2) as pool:
        given.extend(in_order(pool, jobs(), 10))
    assert given == [0, 1, 2]


def test_on_a_gpu_workers_take_the_stream_of_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    own, taken = object(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: own)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: taken.append((threading.get_ident(), stream)))
    with workers(1) as pool:
        worker = pool.submit(threading.get_ident).result()
    assert taken == [(worker, own)]
    assert worker != threading.get_ident()


def test_a_helper_does_what_nobody_begins() -> None:
    begun, release = threading.Event(), threading.Event()

    def block() -> int:
        begun.set()
        assert release.wait(10)
        return -1

    with workers(1) as pool:
        blocked = pool.submit(block)
        assert begun.wait(10)
        assert list(in_order(pool, (lambda i=i: i for i in range(5)), 2, helping=True)) == list(range(5))
        release.set()
        assert blocked.result() == -1


@pytest.mark.parametrize("n_threads", [1, 3])
def test_jobs_side_by_side_have_a_thread_each_and_no_more_than_torch_may_use(n_threads: int) -> None:
    n_running = threading.Semaphore(n_threads)
    together = threading.Barrier(n_threads)

    def job(i: int) -> tuple[int, int]:
        assert n_running.acquire(blocking=False)
        together.wait(10)  # as many at once as there may be
        n_running.release()
        together.wait(10)
        return i, torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert side_by_side([lambda i=i: job(i) for i in range(6)]) == [(i, 1) for i in range(6)]
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("helping", [False, True])
def test_an_error_reaches_whoever_takes_the_results(helping: bool) -> None:
    def fail() -> None:
        raise ValueError("of the job")

    with workers(1) as pool, pytest.raises(ValueError, match="of the job"):
        list(in_order(pool, [fail, fail, fail], 1, helping=helping))


def test_torch_has_its_threads_back_after_an_error() -> None:
    def fail() -> None:
        raise ValueError(f"{torch.get_num_threads()} threads")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="1 threads"), single_thread():
            fail()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_job_beside_another_is_done_once_and_in_another_thread_where_there_may_be_two(n_threads: int) -> None:
    before, done = torch.get_num_threads(), []

    def job() -> str:
        done.append((threading.get_ident(), torch.get_num_threads()))
        return "result"

    torch.set_num_threads(n_threads)
    try:
        with beside(job) as result:
            assert result() == "result"
        assert len(done) == 1
        thread, its_threads = done[0]
        assert (thread == threading.get_ident()) == (n_threads == 1)
        assert its_threads == 1
        with pytest.raises(ZeroDivisionError), beside(lambda: 1 / 0) as result:
            result()
    finally:
        torch.set_num_threads(before)
