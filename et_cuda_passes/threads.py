"""Threads: chunks of rows side by side, and one thread for each operator.

An operator on n threads ends with a barrier. Where other processes hold some of the cores, each of its many small
operators waits for its slowest thread: packing the 405 linears of a Voxtral on 16 cores, beside other work, spent 315
of 420 s in such barriers. Chunks of a weight need no barrier before the end.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

_T = TypeVar("_T")
_lock = threading.Lock()
_MOST_THREADS = 4
"""More get in each other's way: each operator takes Python's lock before and after. The rewrite of 8 billion weights
took 10 s with 4 threads, 13 with 8, and 14 to 20 with 16, on 16 cores of a host with H200."""
_users = 0
_allowed = 1
_here = threading.local()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By process and number of threads. A fork has no threads of its parent, so it does not get a pool of it."""


@contextmanager
def single_threaded_operators() -> Iterator[int]:
    """Inside, an operator of torch uses one thread. Yields the number of threads that operators had before.

    torch has one number for the process (and OpenMP one for each thread of it): the first of several users saves it,
    and all restore it.
    """
    global _users, _allowed
    with _lock:
        if _users == 0:
            _allowed = torch.get_num_threads()
        _users += 1
        allowed = _allowed
        torch.set_num_threads(1)
    try:
        yield allowed
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_allowed)


def for_chunks(pieces: Sequence[_T], worker: Callable[[], Callable[[_T], None]], device: torch.device) -> None:
    """Work on each of ``pieces``, on the CPU in several threads.

    Args:
        pieces: parts of the work, such as ranges of rows. Neighbours belong together: a thread gets a run of them.
        worker: called once in each thread, for its buffers. It returns the function that works on one piece.
        device: of the tensors.

    Raises:
        Exception: any exception of a worker; of several, that of the lowest thread.
    """

    def every(run: Sequence[_T]) -> None:
        work = worker()
        for piece in run:
            work(piece)

    if device.type != "cpu" or len(pieces) == 1:
        every(pieces)
        return
    with single_threaded_operators() as allowed:
        threads = min(allowed, len(pieces), _MOST_THREADS)
        if threads == 1 or getattr(_here, "is_of_pool", False):  # a pool that waits for itself never ends
            every(pieces)
            return
        bounds = [number * len(pieces) // threads for number in range(threads + 1)]
        pool = _pool(threads)
        futures = [pool.submit(every, pieces[low:high]) for low, high in itertools.pairwise(bounds)]
        wait(futures)  # also where one has failed: the others still write into tensors of the caller
        for future in futures:
            future.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    """The process's pool of so many threads. A rewrite needs one several times for each weight."""

    def initialise() -> None:
        torch.set_num_threads(1)  # OpenMP's number of this thread
        _here.is_of_pool = True

    with _lock:
        key = os.getpid(), threads
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, "et_cuda_passes", initializer=initialise)
        return _pools[key]


def ranges(count: int, step: int, period: int | None = None) -> list[tuple[int, int]]:
    """0..count in ranges of at most ``step``, none of which crosses a multiple of ``period``."""
    period = period or count
    return [
        (start, min(start + step, base + period))
        for base in range(0, count, period)
        for start in range(base, base + period, step)
    ]
