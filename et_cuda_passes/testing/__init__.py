"""For tests of rules: assertions on a rewrite, near misses of each requirement, and small quantized programs.

Everything here works in the tests of other packages. It needs no pytest.
"""

from et_cuda_passes.attempts import Attempt, attempts
from et_cuda_passes.testing.assertions import (
    RTOL,
    as_text,
    assert_golden,
    assert_misses,
    assert_rewrites,
    assert_same_results,
)
from et_cuda_passes.testing.modules import Experts, Quantized, export, floats
from et_cuda_passes.testing.near_misses import NearMiss, assert_near_misses
from et_cuda_passes.testing.programs import attention, embedding, experts, gated_layer, linear
from et_cuda_passes.testing.sketch import Sketch

__all__ = [
    "RTOL",
    "Attempt",
    "Experts",
    "NearMiss",
    "Quantized",
    "Sketch",
    "as_text",
    "assert_golden",
    "assert_misses",
    "assert_near_misses",
    "assert_rewrites",
    "assert_same_results",
    "attempts",
    "attention",
    "embedding",
    "experts",
    "export",
    "floats",
    "gated_layer",
    "linear",
]
