"""The benchmark of a stack of linears, as far as it goes without a GPU."""

import pytest

from benchmarks.stack import VARIANTS, passes, table
from et_cuda_passes.executorch.cuda import CudaPartitioner


@pytest.mark.parametrize("kernel", sorted({variant.kernel for variant in VARIANTS.values() if variant.kernel}))
def test_a_variant_s_passes_are_the_default_ones_with_its_kernel(kernel: str) -> None:
    chosen = passes(kernel)
    CudaPartitioner([], passes=chosen)
    assert [rule.kernel for rule in chosen if rule.name == "linear_int4"] == [kernel]


def test_a_program_of_one_length_has_times_of_that_length_alone() -> None:
    times = {"triton": {1: 100.0, 16: 120.0}, "triton, 1 row": {1: 80.0}}
    shown = table(times, (1, 16), {"triton": 1e-3}, {"triton": "114.0 MB, 60 s"})
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["triton", "triton, 1 row", "triton / triton, 1 row"]
    assert cells[1] == ["100", "80", "1.25"]
    assert cells[2] == ["120", "", ""]
