"""The collector is out of the way inside, and as it was afterwards, whatever happens."""

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


def made_of_cycles(count: int) -> int:
    """How many of ``count`` objects that only themselves hold are left."""
    made = [weakref.ref(Cycle()) for _ in range(count)]
    return sum(each() is not None for each in made)


@pytest.mark.parametrize("context", [gc_disabled, gc_throttled])
def test_it_is_as_it_was_afterwards(context: Callable[[], AbstractContextManager[None]]) -> None:
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


def test_paused_it_frees_nothing_and_rare_it_frees_what_piles_up() -> None:
    count = gc.get_threshold()[0] * 3
    assert made_of_cycles(count) < count
    with gc_disabled():
        assert made_of_cycles(count) == count
    with gc_throttled():
        assert made_of_cycles(count) == count
        assert made_of_cycles(count * 100) < count * 100


def test_one_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        for context in (gc_disabled, gc_throttled):
            with context():
                assert not gc.isenabled()
            assert not gc.isenabled()
    finally:
        gc.enable()
