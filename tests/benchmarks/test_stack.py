"""The benchmark of a stack of linears, as far as it goes without a GPU."""

import pytest

from benchmarks.stack import VARIANTS, passes
from et_cuda_passes.executorch.cuda import CudaPartitioner


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, *_ in VARIANTS.values() if kernel}))
def test_a_variant_s_passes_are_the_default_ones_with_its_kernel(kernel: str) -> None:
    chosen = passes(kernel)
    CudaPartitioner([], passes=chosen)
    assert [rule.kernel for rule in chosen if rule.name == "linear_int4"] == [kernel]
