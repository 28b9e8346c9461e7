"""Context managers that disable or throttle garbage collection, and restore its state afterwards."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from et_cuda_passes.executorch.lower import gc_throttled
from et_cuda_passes.graph.driver import gc_disabled


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def cycles_left(count: int) -> int:
    """Create ``count`` objects that only refer to themselves, and return how many still exist."""
    created = [weakref.ref(Cycle()) for _ in range(count)]
    return sum(each() is not None for each in created)


@pytest.mark.parametrize("context", [gc_disabled, gc_throttled])
def test_collector_state_is_restored_afterwards(context: Callable[[], AbstractContextManager[None]]) -> None:
    def state() -> tuple[object, ...]:
        return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()

    def failing() -> None:
        with context():
            assert state() != before
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        failing()
    assert state() == before


def test_disabled_collector_frees_nothing_and_throttled_collector_frees_large_piles() -> None:
    count = gc.get_threshold()[0] * 3
    assert cycles_left(count) < count
    with gc_disabled():
        assert cycles_left(count) == count
    with gc_throttled():
        assert cycles_left(count) == count
        assert cycles_left(count * 100) < count * 100


def test_collector_that_is_disabled_stays_disabled() -> None:
    gc.disable()
    try:
        for context in (gc_disabled, gc_throttled):
            with context():
                assert not gc.isenabled()
            assert not gc.isenabled()
    finally:
        gc.enable()
