"""The limits of packing: at most 64 MB beside input and output, at least 300 MB of weights a second on one core.

The time is the thread's CPU time, so that other processes do not count, and the best of several runs.
"""

import sys

import pytest

from benchmarks.packing import PACK, cpu_all_at_once, measure

N, K = 8192, 8192


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", PACK)
def test_pack_keeps_memory_and_speed_limits(name: str) -> None:
    rate, extra = measure(PACK[name], None, N, K)
    assert extra <= 64e6
    assert rate >= 300e6


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_measurement_detects_unchunked_packing() -> None:
    _, extra = measure(cpu_all_at_once, None, N, K, repeats=1)
    assert extra >= 4 * N * K  # the int32 weights
