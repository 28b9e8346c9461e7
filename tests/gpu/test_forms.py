"""Forms of weights on a GPU: 4-bit and 8-bit floats, groups of 16, and weights that torchao packed for tinygemm."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.llm.export.mx import ExportableMXConfig
from executorch.extension.llm.export.nvfp4 import ExportableNVFP4Config
from torch import Tensor, nn
from torch.export import Dim
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from et_cuda_passes.kernels.choose import BOUNDS
from et_cuda_passes.layouts import mma_tiled
from et_cuda_passes.ops import DEQUANTIZE_FLOAT4, FLOAT8_DTYPES, FLOAT8_LINEAR, INT4_LINEARS

pytestmark = pytest.mark.gpu
INT4_LINEAR = INT4_LINEARS["mma_tiled"].op
EDGES = sorted({1, 1500, 4097, *(bound + more for bound in BOUNDS for more in (0, 1))})
MOST = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().cpu())


def float4_weight(n: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Two numbers a byte, with every byte among them, and scales: e4m3 in groups of 16 as nvfp4, else powers of two."""
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    data.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)[: data.numel()]
    powers = 2.0 ** torch.randint(-9, 6, (n, k // group)).float()
    if group == 16:
        return data, (powers * (1 + torch.randint(0, 8, powers.shape) / 8)).to(torch.float8_e4m3fn)
    return data, powers.to(torch.float8_e8m0fnu)


def packed_float4(data: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)
    qparams = mma_tiled.scale_and_zero(scale.float(), None, dtype, codes.shape[1])
    return mma_tiled.pack(codes).cuda(), qparams.cuda()


@both_dtypes
@pytest.mark.parametrize(("k", "group"), [(256, 16), (256, 32), (208, 16), (96, 32)])
def test_4_bit_floats_are_all_converted_exactly(k: int, group: int, dtype: torch.dtype) -> None:
    """A product with the identity gives the weights."""
    torch.manual_seed(k)
    data, scale = float4_weight(256, k, group)
    packed, qparams = packed_float4(data, scale, dtype)
    got = INT4_LINEAR(torch.eye(k, device="cuda", dtype=dtype), packed, qparams, None, group, 256, float4=True).T
    assert torch.equal(got.cpu(), DEQUANTIZE_FLOAT4(data, scale, None, group, dtype))


FLOAT4 = [(8192, 3072, 16, torch.bfloat16), (1000, 1104, 16, torch.float16), (1280, 1280, 32, torch.bfloat16)]
"""N, K, group size, dtype"""


@pytest.mark.parametrize("case", FLOAT4, ids=str)
def test_4_bit_floats_agree_with_fp64_at_every_bound_and_repeat_bit_for_bit(case: tuple) -> None:
    n, k, group, dtype = case
    torch.manual_seed(n + k)
    data, scale = float4_weight(n, k, group)
    packed, qparams = packed_float4(data, scale, dtype)
    weight = DEQUANTIZE_FLOAT4(data, scale, None, group, torch.float32).double().cuda()
    for m in EDGES:
        x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
        y = INT4_LINEAR(x, packed, qparams, bias, group, n, "silu", float4=True)
        wanted = torch.nn.functional.silu(x.double() @ weight.T + bias.double())
        assert off(y, wanted) < MOST[dtype], m
        assert all(
            torch.equal(INT4_LINEAR(x, packed, qparams, bias, group, n, "silu", float4=True), y) for _ in range(3)
        ), m


GROUPS_OF_16 = [(1152, 4304, True, torch.bfloat16), (45, 80, False, torch.float16), (8192, 3072, False, torch.bfloat16)]
"""N, K, zeros, dtype"""


@pytest.mark.parametrize("case", GROUPS_OF_16, ids=str)
def test_groups_of_16_agree_with_fp64_at_every_bound_and_repeat_bit_for_bit(case: tuple) -> None:
    n, k, zeros, dtype = case
    torch.manual_seed(n + k)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // 16) * 0.02 + 0.005, torch.randn(n, k // 16) * 0.02 * zeros
    packed, qparams = mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, dtype, k).cuda()
    s, z = (part.to(dtype).double().repeat_interleave(16, dim=1).cuda() for part in (scale, zero))
    weight = ((q.cuda().double() - 8) * s + z).to(dtype).double()
    for m in EDGES:
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
        del poison  # the output will probably reuse this memory
        y = INT4_LINEAR(x, packed, qparams, None, 16, n)
        assert off(y, x.double() @ weight.T) < MOST[dtype], m
        assert all(torch.equal(INT4_LINEAR(x, packed, qparams, None, 16, n), y) for _ in range(3)), m


@both_dtypes
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("k", [64, 80, 208])
def test_integers_in_groups_of_16_are_converted_exactly(k: int, zeros: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    q = torch.randint(0, 16, (64, k), dtype=torch.uint8)
    scale, zero = torch.rand(64, k // 16) * 0.02 + 0.005, torch.randn(64, k // 16) * 0.02 * zeros
    packed, qparams = mma_tiled.pack(q).cuda(), mma_tiled.scale_and_zero(scale, zero, dtype, k).cuda()
    got = INT4_LINEAR(torch.eye(k, device="cuda", dtype=dtype), packed, qparams, None, 16, 64).T
    s, z = (part.to(dtype).double().repeat_interleave(16, dim=1) for part in (scale, zero))
    dense = (q.double() - 8) * s + z
    if not zeros:
        assert torch.equal(got.cpu().double(), dense.to(dtype).double())
    # torch rounds fp64 to fp32 first.
    last_place = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert bool(((got.cpu().double() - dense).abs() <= dense.abs() * last_place * 1.001 + 1e-7).all())


def float8_weight(n: int, k: int, group: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The bytes of numbers, with every finite one among them, their scales, and the weight in fp64, on the GPU."""
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8_DTYPES[bits])
    every = every[every.float().isfinite()]
    places = torch.randint(0, len(every), (n, k))
    places.view(-1)[: len(every)] = torch.arange(len(every))
    numbers = every[places]
    # Powers of two in float16, which leaves no room for the largest numbers of e5m2 times another scale.
    scale = (2.0 ** -torch.randint(1, 8, (n, k // group)).float()).to(dtype)
    scale = (scale * (1 + torch.rand(scale.shape))).to(dtype) if dtype is torch.bfloat16 else scale
    dense = numbers.double() * scale.double().repeat_interleave(group, dim=1)
    return numbers.view(torch.int8).cuda(), scale.cuda(), dense.cuda()


@both_dtypes
@pytest.mark.parametrize("bits", FLOAT8_DTYPES)
@pytest.mark.parametrize("group", [16, 32, 128, 256])
def test_8_bit_floats_are_all_converted_exactly(group: int, bits: int, dtype: torch.dtype) -> None:
    """A product with the identity gives the weights, rounded once."""
    torch.manual_seed(group)
    packed, scale, dense = float8_weight(256, 256, group, bits, dtype)
    got = FLOAT8_LINEAR(torch.eye(256, device="cuda", dtype=dtype), packed, scale, None, group, bits).T
    assert torch.equal(got, dense.to(dtype))


FLOAT8 = [(8192, 3072, 3072, 4), (3072, 8192, 128, 4), (1000, 1536, 32, 5), (45, 96, 96, 4)]
"""N, K, group size, bits of the exponent"""


@pytest.mark.parametrize("case", FLOAT8, ids=str)
def test_8_bit_floats_agree_with_fp64_at_every_bound_and_repeat_bit_for_bit(case: tuple) -> None:
    n, k, group, bits = case
    torch.manual_seed(n + k)
    packed, scale, dense = float8_weight(n, k, group, bits, torch.bfloat16)
    weight = dense if group == k else dense.bfloat16().double()
    for m in EDGES:
        x, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((m, k), (n,)))
        y = FLOAT8_LINEAR(x, packed, scale, bias, group, bits)
        assert off(y, x.double() @ weight.T + bias.double()) < MOST[torch.bfloat16], m
        assert all(torch.equal(FLOAT8_LINEAR(x, packed, scale, bias, group, bits), y) for _ in range(3)), m


class Model(nn.Module):
    """A linear in each form; K of the last is no multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"nvfp4": (256, 256), "own": (256, 256), "mx": (256, 256), "fp8": (256, 272), "group": (272, 256)}
        self.layers = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}).bfloat16()
        for name, config in (
            ("nvfp4", ExportableNVFP4Config()),
            ("own", NVFP4WeightOnlyConfig()),
            ("mx", ExportableMXConfig()),
            ("fp8", Float8WeightOnlyConfig()),
            ("group", IntxWeightOnlyConfig(torch.int4, PerGroup(16))),
        ):
            quantize_(self, config, filter_fn=lambda _, fqn, name=name: fqn == f"layers.{name}")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = nn.functional.silu(layer(x)) * 4
        return x


def test_lowered_program_of_all_forms_agrees_with_eager(tmp_path: Path) -> None:
    model = Model().eval()
    x = torch.randn(16, 256).bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=1, max=1024)},))
    expect = {"linear_float4": 2, "linear_float8": 2, "linear_int4": 1, "missed": 0}
    partitioner = ecp.CudaPartitioner([], expect=expect)
    with torch.no_grad():
        rewritten, _ = ecp.rewrite(program, "cuda", expect=expect)
        lowered = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    run = load(tmp_path / "model.pte")
    for rows in (1, 2, 16, 33, 100, 1000):
        x = torch.randn(rows, 256).bfloat16()
        wanted = rewritten.module()(x)
        assert off(run(x.cuda())[0], wanted) < 1e-2
        assert off(wanted, model(x)) < 2e-2


@pytest.mark.parametrize(("n", "k"), [(256, 1024), (250, 576)])
def test_weight_that_torchao_packed_for_tinygemm_agrees_with_it(n: int, k: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).bfloat16().cuda().eval()
    quantize_(model, Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    x = torch.randn(5, k, device="cuda").bfloat16()
    program = torch.export.export(model, (x,))
    rewritten, report = ecp.rewrite(program, "cuda", expect={"unpack_linear": 1, "linear_int4": 1, "missed": 0})
    assert report.outcomes[0].detail.startswith("int4 group 32 packed for _weight_int4pack_mm")
    assert off(rewritten.module()(x), model(x)) < 8e-3
