"""The int4 kernel on a GPU: against fp64 around every bound of a bucket, deterministic, and compared with tinygemm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.kernels.choose import BOUNDS
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.linear_launch import Epilogue, launch_int4
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.layouts import mma_tiled, scale_and_zero, tile_packed_to_4d
from et_cuda_passes.ops import INT4_LINEARS

pytestmark = pytest.mark.gpu
LINEAR = INT4_LINEARS["mma_tiled"].op
EDGES = sorted({1, 1500, 4097, *(bound + more for bound in BOUNDS for more in (0, 1))})
ACTIVATE = {
    "": lambda y: y,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
# N, K, group size, zeros, dtype, bias, activation, factor, addend
CASES = [
    (8192, 3072, 32, False, torch.bfloat16, False, "", False, False),
    (3072, 8192, 32, True, torch.bfloat16, True, "silu", False, True),
    (576, 576, 64, False, torch.bfloat16, True, "", True, True),
    (1000, 1536, 128, True, torch.float16, False, "gelu", True, False),
    (1280, 1280, 32, False, torch.float16, True, "gelu_tanh", False, False),
    (45, 96, 32, True, torch.bfloat16, True, "relu", False, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_fp64_at_every_bound_and_repeats_bit_for_bit(case: tuple) -> None:
    n, k, group, zeros, dtype, has_bias, activation, has_factor, has_addend = case
    torch.manual_seed(n + k)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // group) * 0.02 + 0.005, torch.randn(n, k // group) * 0.02 * zeros
    packed, qparams = mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, dtype, k).cuda()
    s, z = (part.to(dtype).double().repeat_interleave(group, dim=1).cuda() for part in (scale, zero))
    # The kernel's weights are rounded once to the dtype.
    weight = ((q.cuda().double() - 8) * s + z).to(dtype).double()
    for m in EDGES:
        x, bias, factor, addend = (
            torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((m, k), (n,), (m, n), (m, n))
        )

        def call(x: Tensor = x, b: Tensor = bias, f: Tensor = factor, a: Tensor = addend) -> Tensor:
            poison = torch.full((x.shape[0], n), float("nan"), device="cuda", dtype=dtype)
            del poison  # the output will probably reuse this memory
            given = (f if has_factor else None, a if has_addend else None)
            return LINEAR(x, packed, qparams, b if has_bias else None, group, n, activation, *given)

        y = call()
        wanted = ACTIVATE[activation](x.double() @ weight.T + (bias.double() if has_bias else 0))
        wanted = wanted * (factor.double() if has_factor else 1) + (addend.double() if has_addend else 0)
        assert ((y.double() - wanted).norm() / wanted.norm()).item() < (4e-3 if dtype is torch.bfloat16 else 6e-4), m
        assert all(torch.equal(call(), y) for _ in range(3)), m


@pytest.mark.parametrize("waves", [0, 1])
@pytest.mark.parametrize(
    "shape",
    [
        (16, 16, 256, 4, 4, 3, 0),
        (64, 64, 128, 1, 4, 4, 0),
        (128, 64, 128, 1, 4, 3, 0),
        (128, 128, 64, 1, 8, 4, 0),
        (64, 64, 64, 1, 4, 6, 1),
        (128, 64, 64, 1, 4, 4, 1),
        (256, 128, 64, 1, 8, 4, 1),
    ],
)
@pytest.mark.parametrize(
    ("k", "group", "zeros"), [(1056, 32, True), (1024, 64, False), (2048, 32, False), (640, 128, True)]
)
def test_tilings_of_every_kind_agree_with_fp64(
    shape: tuple[int, ...], waves: int, k: int, group: int, zeros: bool
) -> None:
    *blocks, segments, warps, stages, bulk = shape
    if segments > 1 and waves:
        pytest.skip("segments and cut tiles are two answers to the same question")
    check_tiling(Tiling(*blocks, segments, waves, warps, stages, bulk), k, group, zeros)


@pytest.mark.parametrize(
    ("tiling", "k", "group", "zeros"),
    [
        (Tiling(32, 64, 64, 1, 0, 4, 6, 1, 16), 1056, 32, True),
        (Tiling(64, 64, 64, 1, 1, 4, 6, 1, 32), 640, 128, True),
        (Tiling(64, 64, 128, 1, 1, 4, 3, 0, 16), 1056, 32, True),
        (Tiling(128, 64, 64, 1, 0, 4, 3, 1, 32), 1024, 64, False),
        (Tiling(128, 64, 64, 1, 1, 4, 4, 1, 64), 1056, 32, True),
        (Tiling(128, 128, 64, 1, 0, 8, 4, 1, 64), 640, 128, True),
        (Tiling(256, 128, 64, 1, 1, 8, 3, 1, 64), 2048, 32, False),
        (Tiling(256, 128, 64, 1, 0, 8, 3, 1, 128), 1024, 64, False),
    ],
    ids=str,
)
def test_tilings_of_two_pieces_agree_with_fp64(tiling: Tiling, k: int, group: int, zeros: bool) -> None:
    check_tiling(tiling, k, group, zeros)


def check_tiling(tiling: Tiling, k: int, group: int, zeros: bool) -> None:
    """Compare with fp64, and require equal bits from every way to read x."""
    n, dtype = 700, torch.bfloat16
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // group) * 0.02 + 0.005, torch.randn(n, k // group) * 0.02 * zeros
    packed, qparams = mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, dtype, k).cuda()
    s, z = (part.to(dtype).double().repeat_interleave(group, dim=1).cuda() for part in (scale, zero))
    weight = ((q.cuda().double() - 8) * s + z).to(dtype).double()
    gpu = gpu_of(packed.device)
    for m in (1, 100, 333):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        size = max(tiling.waves, 1) * gpu.processors * tiling.tile_m * tiling.block_n
        parts = torch.full((size,), float("nan"), device="cuda")
        results = []
        for batch in ((), (1,), (1,), (1, 1)):
            y = torch.full((*batch, m, n), float("nan"), device="cuda", dtype=dtype)
            launch_int4(
                x.view(*batch, m, k),
                m,
                packed,
                qparams,
                Epilogue(),
                y,
                parts,
                group,
                tiling,
                1,
                gpu.wgmma,
                gpu.processors,
            )
            results.append(y.view(m, n))
        wanted = x.double() @ weight.T
        assert ((results[0].double() - wanted).norm() / wanted.norm()).item() < 4e-3, m
        assert all(torch.equal(other, results[0]) for other in results[1:]), m


GATES = [(8192, 3072, 32, False, False, "silu"), (1000, 1536, 128, True, True, "gelu")]
"""N, K, group size, zeros, bias, activation"""


def alternating_rows(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Eight rows of ``gate``, eight of ``up``, and so on along ``dim``."""
    eights = [part.unflatten(dim, (-1, 8)) for part in (gate, up)]
    return torch.stack(eights, dim + 1).flatten(dim, dim + 2).contiguous()


@pytest.mark.parametrize("case", GATES, ids=str)
def test_gate_agrees_with_fp64_at_every_bound_and_repeats_bit_for_bit(case: tuple) -> None:
    n, k, group, zeros, has_bias, activation = case
    torch.manual_seed(n)
    parts = []
    for _ in range(2):
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale, zero = torch.rand(n, k // group) * 0.02 + 0.005, torch.randn(n, k // group) * 0.02 * zeros
        pair = mma_tiled.scale_and_zero(scale, zero, torch.bfloat16, k)
        s, z = (part.bfloat16().double().repeat_interleave(group, dim=1).cuda() for part in (scale, zero))
        weight = ((q.cuda().double() - 8) * s + z).bfloat16().double()
        parts.append((mma_tiled.pack(q).cuda(), pair.cuda(), torch.randn(n, device="cuda").bfloat16(), weight))
    packed, qparams, bias = (alternating_rows(parts[0][i], parts[1][i], dim) for i, dim in ((0, 0), (1, 1), (2, 0)))
    for m in EDGES:
        x, addend = (torch.randn(m, size, device="cuda").bfloat16() for size in (k, n))
        given = (x, packed, qparams, bias if has_bias else None, group, n, activation, None, addend, True)
        y = LINEAR(*given)
        both = [x.double() @ weight.T + (b.double() if has_bias else 0) for *_, b, weight in parts]
        wanted = ACTIVATE[activation](both[0]) * both[1] + addend.double()
        assert ((y.double() - wanted).norm() / wanted.norm()).item() < 4e-3, m
        assert all(torch.equal(LINEAR(*given), y) for _ in range(3)), m


def test_unaligned_rows_are_copied_by_all_threads() -> None:
    m, n, k = 300, 1024, 512
    packed, qparams = mma_tiled.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8)), torch.rand(n, k // 32) * 0.02
    weight = (packed.cuda(), mma_tiled.scale_and_zero(qparams, qparams * 0, torch.bfloat16, k).cuda(), None, 32, n)
    memory = torch.randn(m * k + 3, device="cuda").bfloat16()
    x = memory[3:].view(m, k)
    torch.testing.assert_close(LINEAR(x, *weight), LINEAR(x.clone(), *weight), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("m", [1, 300])
def test_bias_may_have_any_strides(m: int) -> None:
    n, k = 96, 512
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed = mma_tiled.pack(q).cuda()
    qparams = mma_tiled.scale_and_zero(torch.rand(n, k // 32), torch.zeros(n, k // 32), torch.bfloat16, k).cuda()
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(2 * n, 3, device="cuda", dtype=torch.bfloat16)
    for bias in (table[::2, 1], table[:n, 0], table[0, :1].expand(n)):
        y = LINEAR(x, packed, qparams, bias, 32, n)
        assert torch.equal(y, LINEAR(x, packed, qparams, bias.clone(memory_format=torch.contiguous_format), 32, n))
        assert not torch.equal(y, LINEAR(x, packed, qparams, None, 32, n))


@pytest.mark.parametrize("m", [1, 5, 64, 300])
def test_kernel_agrees_with_tinygemm(m: int) -> None:
    n, k, group = 1024, 2048, 64
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // group) * 0.02 + 0.005, torch.randn(n, k // group) * 0.02
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    ours = LINEAR(x, mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, x.dtype, k).cuda(), None, group, n)
    pair = scale_and_zero.pack(scale, zero).cuda()
    theirs = torch.ops.aten._weight_int4pack_mm(x, tile_packed_to_4d.pack(q, 8).cuda(), group, pair)
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max()))
