"""The promise about packing: at most 64 MB above input and output, at least 300 MB of weights a second on one core.

Time is the thread's own, so that neighbours on the machine do not count, and the best of several runs.
"""

import sys

import pytest

from benchmarks.packing import PACK, cpu_all_at_once, measure

N, K = 8192, 8192


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", PACK)
def test_packing_is_frugal_and_fast(name: str) -> None:
    rate, extra = measure(PACK[name], None, N, K)
    assert extra <= 64e6
    assert rate >= 300e6


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_measurement_sees_a_packing_that_is_not_frugal() -> None:
    _, extra = measure(cpu_all_at_once, None, N, K, repeats=1)
    assert extra >= 4 * N * K  # the int32 weights
