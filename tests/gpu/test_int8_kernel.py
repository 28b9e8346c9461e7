"""The int8 kernel on a GPU: against fp64 around every bound of a bucket, deterministic, and in a .pte."""

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate import load
from et_cuda_passes.kernels.choose import BOUNDS
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.linear_launch import launch_int8
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.ops import INT8_LINEAR

pytestmark = pytest.mark.gpu
EDGES = sorted({1, 1500, 4097, *(bound + more for bound in BOUNDS for more in (0, 1))})
MOST = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# N, K, group size, zeros, dtype, bias
CASES = [
    (8192, 3072, 3072, False, torch.bfloat16, False),
    (8192, 3072, 32, False, torch.bfloat16, True),
    (3072, 8192, 8192, True, torch.bfloat16, True),
    (3072, 8192, 128, True, torch.bfloat16, False),
    (576, 576, 64, False, torch.bfloat16, True),
    (1000, 1536, 256, False, torch.float16, False),
    (1280, 1280, 1280, False, torch.float16, True),
    (1280, 1280, 16, False, torch.float16, False),
    (45, 96, 32, True, torch.float16, True),
    (45, 48, 48, False, torch.bfloat16, False),
    (1, 208, 208, True, torch.bfloat16, True),
]


def weight(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, with every value among them, scales and zeros, on the GPU."""
    packed = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed.view(-1)[:256] = torch.arange(-128, 128, dtype=torch.int8)[: packed.numel()]
    scale = (torch.rand(n, k // group) * 0.002 + 0.0005).to(dtype)
    zero = torch.randn(n, k // group) * 0.02 if zeros else None
    return packed.cuda(), scale.cuda(), None if zero is None else zero.cuda()


def exact(packed: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """The kernel's weights in fp64, rounded once to the scales' dtype unless they have one scale a row and no zeros."""
    dense = packed.double() * scale.double().repeat_interleave(group, dim=1)
    if zero is not None:
        dense = dense + zero.double().repeat_interleave(group, dim=1)
    whole = zero is None and scale.shape[1] == 1
    return dense if whole else dense.to(scale.dtype).double()


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().cpu())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_fp64_at_every_bound_and_repeats_bit_for_bit(case: tuple) -> None:
    n, k, group, zeros, dtype, has_bias = case
    torch.manual_seed(n + k)
    parts = weight(n, k, group, zeros, dtype)
    dense = exact(*parts, group)
    for m in EDGES:
        x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)

        def call(x: Tensor = x, bias: Tensor = bias) -> Tensor:
            poison = torch.full((x.shape[0], n), float("nan"), device="cuda", dtype=dtype)
            del poison  # the output will probably reuse this memory
            return INT8_LINEAR(x, *parts, bias if has_bias else None, group)

        y = call()
        wanted = x.double() @ dense.T + (bias.double() if has_bias else 0)
        assert off(y, wanted) < MOST[dtype], m
        assert all(torch.equal(call(), y) for _ in range(3)), m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("zeros", [False, True])
def test_integers_are_all_converted_exactly(group: int, zeros: bool, dtype: torch.dtype) -> None:
    """A product with the identity gives the weights: they equal those of fp64, rounded once."""
    parts = weight(256, 256, group, zeros, dtype)
    got = INT8_LINEAR(torch.eye(256, device="cuda", dtype=dtype), *parts, None, group).T
    dense = exact(*parts, group)
    if not zeros:
        assert torch.equal(got.double(), dense.to(dtype).double())
    # The sum with a zero is first rounded to fp32.
    last_place = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    assert bool(((got.double() - dense).abs() <= dense.abs() * last_place + 1e-7).all())


@pytest.mark.parametrize("waves", [0, 1, 2])
@pytest.mark.parametrize(
    "shape", [(16, 64, 128, 1), (64, 64, 64, 1), (128, 128, 64, 1), (8, 16, 128, 4), (8, 32, 256, 2)]
)
@pytest.mark.parametrize(("k", "group"), [(1040, 1040), (1024, 128), (1152, 64), (1536, 256)])
def test_split_tiles_and_segments_agree_with_fp64(
    shape: tuple[int, int, int, int], waves: int, k: int, group: int
) -> None:
    n, dtype = 700, torch.bfloat16
    if shape[3] > 1 and waves:
        pytest.skip("segments and cut tiles are two answers to the same question")
    packed, scale, zero = weight(n, k, group, False, dtype)
    dense = exact(packed, scale, zero, group)
    gpu = gpu_of(packed.device)
    tiling = Tiling(*shape, waves, 4 if shape[1] < 128 else 8, 3)
    for m in (1, 100, 300):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        parts = torch.full((max(waves, 1) * gpu.processors * shape[0] * shape[1],), float("nan"), device="cuda")
        results = []
        for _ in range(3):
            y = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
            launch_int8(x, m, packed, scale, zero, None, y, parts, group, tiling, 1, gpu.wgmma, gpu.processors)
            results.append(y)
        assert off(results[0], x.double() @ dense.T) < MOST[dtype]
        assert all(torch.equal(other, results[0]) for other in results[1:])


def test_rows_beyond_two_gigabytes_agree_with_fp64() -> None:
    n, k = 2**20 + 5, 2304
    packed = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    packed[-4:] = torch.randint(-128, 128, (4, k), dtype=torch.int8, device="cuda")
    scale = torch.ones(n, 1, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(3, k, device="cuda", dtype=torch.bfloat16)
    y = INT8_LINEAR(x, packed, scale, None, None, k)
    assert off(y[:, -4:], x.double() @ packed[-4:].double().T) < MOST[torch.bfloat16]
    assert not y[:, :-4].any()


class Model(nn.Module):
    """A table of words, two linears, and the table again as the last linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(1000, 256), nn.Linear(256, 512), nn.Linear(512, 256)
        self.head = nn.Linear(256, 1000, bias=False)
        self.bfloat16()
        for name, config in (
            ("words", IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
            ("up", IntxWeightOnlyConfig(torch.int8, PerGroup(64), mapping_type=MappingType.ASYMMETRIC)),
            ("down", IntxWeightOnlyConfig(torch.int8, PerGroup(32))),
        ):
            quantize_(self, config, filter_fn=lambda _, fqn, name=name: fqn == name)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(torch.nn.functional.silu(self.up(x)))
        result: Tensor = self.head(x)
        return result


def test_lowered_program_agrees_with_eager_and_holds_a_tied_table_once(tmp_path: Path) -> None:
    model = Model().eval()
    length = Dim("length", min=1, max=1024)
    program = torch.export.export(model, (torch.arange(16).view(1, 16),), dynamic_shapes=({1: length},))
    expect = {"linear_int8": 3, "embedding_int8": 1, "missed": 0}
    partitioner = ecp.CudaPartitioner([], expect=expect)
    with torch.no_grad():
        lowered = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch()
    lowered.save(str(tmp_path / "model.pte"))
    lowered.write_tensor_data_to_file(str(tmp_path))
    run = load(tmp_path / "model.pte")
    packed = {name for name in run.weights if name.endswith("packed")}
    assert packed == {"words.weight.packed", "up.weight.packed", "down.weight.packed"}
    for rows in (1, 2, 16, 33, 100, 1000):
        ids = torch.randint(0, 1000, (1, rows))
        assert off(run(ids.cuda())[0], model(ids)) < 1e-2
