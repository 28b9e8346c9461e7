"""Threads of packing: the same bytes with any number, and torch's number of threads as before."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from et_cuda_passes.layouts import cpu, embedding_table, mma_tiled, mps, tile_packed_to_4d
from et_cuda_passes.threads import for_chunks, ranges, single_threaded_operators

CPU = torch.device("cpu")
PACK = {
    "mma_tiled": partial(mma_tiled.pack, offset=8),
    "tile_packed_to_4d": partial(tile_packed_to_4d.pack, inner_k_tiles=2, offset=8),
    "mps": partial(mps.pack, inner_k_tiles=2, offset=8),
    "cpu": partial(cpu.pack, offset=8),
    "embedding_table": partial(embedding_table.pack, bits=4, offset=8),
}


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PACK)
def test_packing_in_several_threads_gives_the_bytes_of_one(name: str) -> None:
    q = torch.randint(-8, 8, (1040, 192), dtype=torch.int8)
    several = PACK[name](q, chunk_bytes=64 * 192)
    torch.set_num_threads(1)
    assert torch.equal(several, PACK[name](q))


@pytest.mark.parametrize("name", PACK)
def test_weight_outside_the_range_in_a_late_chunk_is_refused(name: str) -> None:
    q = torch.randint(-8, 8, (1040, 192), dtype=torch.int8)
    q[900, 5] = 9
    with pytest.raises(ValueError, match=r"weights must lie in -8\.\.7 \(offset 8\), found -8\.\.9"):
        PACK[name](q, chunk_bytes=64 * 192)
    assert torch.get_num_threads() == 3


def test_chunks_cover_all_rows_once_and_run_in_several_threads() -> None:
    seen, inside, workers = [], [], []
    together = threading.Barrier(3, timeout=30)

    def worker() -> Callable[[tuple[int, int]], None]:
        workers.append(threading.get_ident())
        together.wait()

        def work(piece: tuple[int, int]) -> None:
            seen.append(piece)
            inside.append(torch.get_num_threads())

        return work

    for_chunks(ranges(10, 3), worker, CPU)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert set(inside) == {1} and len(set(workers)) == 3
    assert torch.get_num_threads() == 3


def test_number_of_threads_is_restored_after_nested_and_overlapping_blocks() -> None:
    inner_entered, outer_left = threading.Event(), threading.Event()
    allowed = []

    def other() -> None:
        with single_threaded_operators() as count:
            allowed.append(count)
            inner_entered.set()
            outer_left.wait(30)

    thread = threading.Thread(target=other)
    with single_threaded_operators() as count:
        allowed.append(count)
        assert torch.get_num_threads() == 1
        with single_threaded_operators() as nested:
            allowed.append(nested)
        thread.start()
        assert inner_entered.wait(30)
    outer_left.set()
    thread.join()
    assert allowed == [3, 3, 3]
    found = []
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [3] and torch.get_num_threads() == 3


def test_chunks_inside_a_chunk_run_in_its_thread() -> None:
    threads = []

    def inner() -> Callable[[tuple[int, int]], None]:
        return lambda piece: threads.append(threading.get_ident())

    def outer() -> Callable[[tuple[int, int]], None]:
        def work(piece: tuple[int, int]) -> None:
            before = len(threads)
            for_chunks(ranges(4, 1), inner, CPU)
            assert threads.count(threading.get_ident()) >= 4 and len(threads) > before

        return work

    for_chunks(ranges(12, 1), outer, CPU)
    assert len(threads) == 48


def test_first_failure_is_raised_after_all_threads_have_ended() -> None:
    ended = []

    def worker() -> Callable[[tuple[int, int]], None]:
        def work(piece: tuple[int, int]) -> None:
            if piece == (0, 1):
                raise ValueError("the first")
            time.sleep(0.1)
            ended.append(piece)

        return work

    with pytest.raises(ValueError, match="the first"):
        for_chunks(ranges(3, 1), worker, CPU)
    assert sorted(ended) == [(1, 2), (2, 3)]


def test_fork_of_a_process_with_threads_gets_threads_of_its_own() -> None:
    for_chunks(ranges(9, 1), lambda: lambda piece: None, CPU)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for threads of its parent
        done: list[tuple[int, int]] = []
        for_chunks(ranges(9, 1), lambda: done.append, CPU)
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
