"""The gate of int4_linear_mma_tiled and the errors of its epilogue; the tests of the rules run the rest of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import INT4_LINEARS

LINEAR = INT4_LINEARS["mma_tiled"].op
N, K, GROUP = 24, 96, 32


def parts(rows: int = 2 * N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the packed weight and its pair, and the weight in fp32."""
    random = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (rows, K), dtype=torch.uint8, generator=random)
    scale = torch.rand(rows, K // GROUP, generator=random) * 0.1 + 0.01
    x = torch.randn(2, 5, K, generator=random)
    weight = (q.float() - 8) * scale.repeat_interleave(GROUP, dim=1)
    return x, mma_tiled.pack(q), mma_tiled.scale_and_zero(scale, scale * 0, torch.float32, K), weight


def test_gated_linear_reads_eight_gate_rows_of_sixteen() -> None:
    x, packed, pair, weight = parts()
    bias, addend = torch.randn(2 * N), torch.randn(2, 5, N)
    rows = torch.arange(2 * N).view(-1, 2, 8)
    gate, other = (F.linear(x, weight[which.flatten()], bias[which.flatten()]) for which in rows.unbind(1))
    y = LINEAR(x, packed, pair, bias, GROUP, N, "silu", None, addend, True)
    torch.testing.assert_close(y, F.silu(gate) * other + addend)
    assert y.is_contiguous()
    given = (x, packed, pair, bias, GROUP, N, "silu", None, addend, True)
    torch.library.opcheck(LINEAR, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("rows", [N + 8, 2 * N])
def test_linear_rejects_other_number_of_packed_rows(rows: int) -> None:
    """A gated weight without ``gated`` would otherwise lose half of its result silently."""
    x, packed, pair, _ = parts(rows)
    with pytest.raises(ValueError, match=f"{rows} packed rows for out_features = {N}"):
        LINEAR(x, packed, pair, None, GROUP, N)


def test_gated_linear_rejects_bias_of_one_half() -> None:
    x, packed, pair, _ = parts()
    with pytest.raises(ValueError, match=rf"wanted torch.float32 \[{2 * N}\]"):
        LINEAR(x, packed, pair, torch.zeros(N), GROUP, N, "", None, None, True)


@pytest.mark.parametrize("shape", [(1, 5, N), (2, 1, N), (5, N), (2, 5, 1), (2, 6, N)], ids=str)
def test_linear_rejects_factor_or_addend_of_other_shape(shape: tuple[int, ...]) -> None:
    """The kernel would read past the end of a tensor with fewer rows."""
    x, packed, pair, _ = parts(N)
    other = torch.zeros(shape)
    for given in ((other, None), (None, other)):
        with pytest.raises(ValueError, match=r"like the output, torch.float32 \(2, 5, 24\)"):
            LINEAR(x, packed, pair, None, GROUP, N, "", *given)


@pytest.mark.parametrize(("rows", "n"), [(N, N), (3 * N, N), (2 * 12, 12)])
def test_gated_linear_rejects_other_number_of_packed_rows(rows: int, n: int) -> None:
    x, packed, pair, _ = parts(rows)
    with pytest.raises(ValueError, match=f"2 out_features rows.*given {rows} rows and out_features {n}"):
        LINEAR(x, packed, pair, None, GROUP, n, "", None, None, True)
