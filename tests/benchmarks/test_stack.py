"""The parts of the benchmark of a stack of linears that need no GPU."""

import pytest

from benchmarks.limit import Limit
from benchmarks.stack import VARIANTS, floors, passes, table
from et_cuda_passes.executorch.cuda import CudaPartitioner


@pytest.mark.parametrize("kernel", sorted({variant.kernel for variant in VARIANTS.values() if variant.kernel}))
def test_passes_of_a_variant_are_the_default_ones_with_its_kernel(kernel: str) -> None:
    chosen = passes(kernel)
    CudaPartitioner([], passes=chosen)
    assert [rule.kernel for rule in chosen if rule.name == "linear_int4"] == [kernel]


def test_program_of_one_length_has_times_of_that_length_alone() -> None:
    times = {"triton": {1: 100.0, 16: 120.0}, "triton, 1 row": {1: 80.0}}
    shown = table(times, (1, 16), {"triton": 1e-3}, {"triton": "114.0 MB, 60 s"}, {1: 40.0, 16: 48.0})
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["triton", "triton, 1 row", "triton / triton, 1 row", "of the limit"]
    assert cells[1] == ["100", "80", "1.25", "40 %"]
    assert cells[2] == ["120", "", "", "40 %"]


def test_lower_bound_is_of_bytes_with_few_rows_and_of_operations_with_many() -> None:
    least = floors(Limit(bandwidth=3e12, rate=7e14), (1, 4096), group=32)
    # 201 million weights at 4.5 bits; 2 x 4096 operations for each.
    assert least[1] == pytest.approx(201_326_592 * 4.5 / 8 / 3e12 * 1e6, rel=1e-3)
    assert least[4096] == pytest.approx(2 * 4096 * 201_326_592 / 7e14 * 1e6)
