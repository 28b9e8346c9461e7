"""The garbage collector, out of the way of code that mostly builds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection inside.

    A rewrite allocates and keeps: each collection would walk all that was built so far and free nothing, which was a
    quarter of the time for 2,000 linears and made the whole more than linear in the graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def rare_collector() -> Iterator[None]:
    """Cyclic garbage collection a hundredth as often, and of what is made inside alone.

    For lowering, which is long, builds much and keeps nearly all of it, but whose garbage can hold tensors: it must be
    collected now and then. What there was before is left out of it until the end.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(thresholds[0] * 100, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
