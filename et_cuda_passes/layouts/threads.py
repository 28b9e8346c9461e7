"""Threads: chunks of rows side by side, and one thread for each operator.

An operator on n threads ends with a barrier. Where other processes hold some of the cores, each of its many small
operators waits for its slowest thread: packing the 405 linears of a Voxtral on 16 cores, beside other work, spent 315
of 420 s in such barriers. Chunks of a weight need no barrier before the end.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_allowed = 1


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


def for_chunks(count: int, rows: int, worker: Callable[[], Callable[[int, int], None]], device: torch.device) -> None:
    """Work on each chunk of ``rows`` of ``count`` rows, on the CPU in several threads.

    Args:
        count: number of rows.
        rows: rows of a chunk.
        worker: called once in each thread, for its buffers. It returns the function that works on (start, stop).
        device: of the tensors.

    Raises:
        Exception: any exception of a worker; of several, that of the lowest thread.
    """
    starts = range(0, count, rows)

    def every(first: int, step: int) -> None:
        work = worker()
        for start in starts[first::step]:
            work(start, min(start + rows, count))

    if device.type != "cpu" or len(starts) == 1:
        every(0, 1)
        return
    with single_threaded_operators() as allowed:
        threads = min(allowed, len(starts))
        if threads == 1:
            every(0, 1)
            return

        def in_thread(first: int) -> None:
            torch.set_num_threads(1)  # OpenMP's number of this thread
            every(first, threads)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(in_thread, range(threads)))
