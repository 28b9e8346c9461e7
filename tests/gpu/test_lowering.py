"""From a generic quantization to a .pte that runs on the GPU with correct results."""

from pathlib import Path

import pytest
import torch
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner as StockCudaPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor
from torch.export import Dim
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.delegate import Program, load
from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling
from et_cuda_passes.layouts import mma_tiled
from tests.gpu.lowered import Block, lower, quantized, relative, save

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("features", "granularity", "batch"),
    [
        ((256, 512), PerGroup(32), ()),
        ((576, 1536), PerGroup(64), (1,)),
        ((320, 512), PerAxis(0), (2,)),
        ((256, 896), PerGroup(128), (1,)),
    ],
)
def test_lowered_program_agrees_with_eager(
    features: tuple[int, int], granularity: object, batch: tuple[int, ...], tmp_path: Path
) -> None:
    model = quantized(*features, granularity=granularity)
    x = torch.randn(*batch, 16, features[0]).bfloat16()
    length = {len(batch): Dim("length", min=1, max=2048)}
    program = torch.export.export(model, (x,), dynamic_shapes=(length,))
    pte, partitioner = lower(program, tmp_path, expect={"linear_int4": 2, "missed": 0})
    run = load(pte)
    assert partitioner.report.counts()["rewritten"] == 2
    assert {name for name in run.weights if "packed" in name} == {"up.weight.packed", "down.weight.packed"}
    for rows in (1, 2, 16, 17, 100, 300, 1000):
        x = torch.randn(*batch, rows, features[0]).bfloat16()
        assert relative(run(x.cuda())[0], model(x)) < 8e-3, rows


@pytest.mark.parametrize("batch", [1, 2])
def test_lowered_program_agrees_in_tiles_of_two_pieces(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tilings = {160: Tiling(128, 64, 64, 1, 0, 4, 3, 1, 32), UNBOUNDED: Tiling(128, 64, 64, 1, 1, 4, 4, 1, 64)}
    monkeypatch.setattr(linear_launch, "buckets_for", lambda *_: tilings)
    model = quantized(256, 512)
    x = torch.randn(batch, 16, 256).bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("length", min=1, max=2048)},))
    pte, _ = lower(program, tmp_path, expect={"linear_int4": 2, "missed": 0})
    run = load(pte)
    for rows in (1, 100, 160, 161, 333, 1000):
        x = torch.randn(batch, rows, 256).bfloat16()
        assert relative(run(x.cuda())[0], model(x)) < 8e-3, rows


class Heads(torch.nn.Module):
    """Linears that read a norm, a transposed view like that of attention, a dense linear, a sum and an embedding."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList(torch.nn.Linear(features, features) for _ in range(5))
        self.dense = torch.nn.Linear(features, features)
        self.norm = torch.nn.LayerNorm(features)
        self.embedding = torch.nn.Embedding(50, features)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.linears[0](self.norm(x))
        heads = y.view(1, x.shape[1], 4, -1).transpose(1, 2) * 2
        y = self.linears[1](heads.transpose(1, 2).reshape(x.shape))
        y = self.linears[2](self.dense(y))
        y = self.linears[3](y + x)
        result: Tensor = y + self.linears[4](self.embedding(tokens))
        return result


def test_linears_lower_for_inputs_of_every_kind(tmp_path: Path) -> None:
    """A descriptor of a tensor that Inductor holds as a view would fail to compile."""
    torch.manual_seed(0)
    model = Heads(256).bfloat16().eval()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda module, name: "linears." in name)
    given = (torch.randn(1, 16, 256).bfloat16(), torch.randint(50, (1, 16)))
    length = Dim("length", min=1, max=2048)
    program = torch.export.export(model, given, dynamic_shapes=({1: length}, {1: length}))
    run = load(lower(program, tmp_path, expect={"linear_int4": 5, "missed": 0})[0])
    for rows in (1, 100, 300, 1000):
        given = (torch.randn(1, rows, 256).bfloat16(), torch.randint(50, (1, rows)))
        assert relative(run(*(each.cuda() for each in given))[0], model(*given)) < 1.2e-2, rows


def test_rows_may_be_no_multiple_of_eight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 45).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    x = torch.randn(3, 128).bfloat16()
    pte, _ = lower(torch.export.export(model, (x,)), tmp_path, expect={"linear_int4": 1})
    got = load(pte)(x.cuda())[0]
    assert got.shape == (3, 45)
    assert relative(got, model(x)) < 8e-3


def test_fp32_model_computes_in_bf16_by_option(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block(128, 256).eval()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    x = torch.randn(5, 128)
    pte, _ = lower(torch.export.export(model, (x,)), tmp_path, passes=[ecp.LinearInt4(cast_to_bf16=True)])
    got = load(pte)(x.cuda())[0]
    assert got.dtype == torch.float32
    assert relative(got, model(x)) < 8e-3


def test_two_methods_share_every_packed_weight_once(tmp_path: Path) -> None:
    model = quantized(256, 512)
    prefill = torch.export.export(model, (torch.randn(64, 256).bfloat16(),))
    decode = torch.export.export(model, (torch.randn(1, 256).bfloat16(),))
    pte, partitioner = lower({"prefill": prefill, "decode": decode}, tmp_path)
    assert partitioner.report.counts()["rewritten"] == 4
    (data,) = tmp_path.glob("*.ptd")
    packed = 256 * 512  # two weights of 256 x 512, half a byte an element
    scales = 2 * (512 * mma_tiled.scale_row(256, 32) + 256 * mma_tiled.scale_row(512, 32))
    assert packed + scales <= data.stat().st_size < packed + scales + 40_000
    program = Program(pte)
    for method, rows in (("prefill", 64), ("decode", 1)):
        x = torch.randn(rows, 256).bfloat16()
        assert relative(program.method(method)(x.cuda())[0], model(x)) < 8e-3


def test_program_packed_on_another_machine_lowers(tmp_path: Path) -> None:
    model = quantized(256, 512)
    x = torch.randn(4, 256).bfloat16()
    packed, _ = ecp.rewrite(torch.export.export(model, (x,)), "cuda")
    torch.export.save(packed, tmp_path / "packed.pt2")
    pte, partitioner = lower(torch.export.load(tmp_path / "packed.pt2"), tmp_path)
    assert partitioner.report.outcomes == []
    assert relative(load(pte)(x.cuda())[0], model(x)) < 8e-3


@pytest.mark.parametrize(("n", "k", "tiles"), [(48, 64, 4), (64, 96, 2), (128, 1024, 8)])
def test_operator_in_eager_runs_the_cuda_kernel(n: int, k: int, tiles: int) -> None:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    halves = (q[:, ::2] << 4 | q[:, 1::2]).cuda()
    packed = ecp.layouts.tile_packed_to_4d.pack(q, tiles).cuda()
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack(halves, tiles))
    scale, zero = torch.rand(n, k // 32) * 0.1, torch.randn(n, k // 32) * 0.1
    pair = ecp.layouts.scale_and_zero.pack(scale, zero).cuda()
    op = ecp.ops.INT4_LINEARS["tile_packed_to_4d"].op
    x, bias = torch.randn(2, 3, k).bfloat16(), torch.randn(n - 3).bfloat16()
    on_gpu = op(x.cuda(), packed, pair, bias.cuda(), 32, n - 3)
    assert relative(on_gpu, op(x, packed.cpu(), pair.cpu(), bias, 32, n - 3)) < 4e-3


def test_stock_partitioner_on_the_generic_program_agrees(tmp_path: Path) -> None:
    """The stock path keeps the generic program, and its compiled library dequantizes the weights."""
    model, x = quantized(256, 512), torch.randn(16, 256).bfloat16()
    program = torch.export.export(model, (x,))
    for name in ("stock", "ours"):
        (tmp_path / name).mkdir()
    with torch.no_grad():
        stock = to_edge_transform_and_lower(
            program, partitioner=[StockCudaPartitioner([CompileSpec("method_name", b"forward")])]
        )
    theirs, ours = save(stock, tmp_path / "stock"), lower(program, tmp_path / "ours")[0]
    assert relative(load(ours)(x.cuda())[0], load(theirs)(x.cuda())[0].cpu()) < 8e-3
    sizes = [next(pte.parent.glob("*.ptd")).stat().st_size for pte in (ours, theirs)]
    assert sizes[0] < 0.65 * sizes[1]


def test_low_memory_mode_agrees_with_eager(tmp_path: Path) -> None:
    model, x = quantized(256, 512), torch.randn(16, 256).bfloat16()
    partitioner = ecp.CudaPartitioner([CompileSpec("low_memory_mode", b"ON")])
    with torch.no_grad():
        edge = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[partitioner])
    assert relative(load(save(edge, tmp_path))(x.cuda())[0], model(x)) < 8e-3


def test_lowering_never_holds_unpacked_weights_on_the_gpu(tmp_path: Path) -> None:
    """A weight of 4096 x 4096 is 32 MB in bf16, 16 MB as integers and 8 MB packed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4096, 4096, bias=False).bfloat16().eval()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
    program = torch.export.export(model, (torch.randn(1, 4096).bfloat16(),))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lower(program, tmp_path)
    # Packed weights and scale_and_zero count twice, since the compiler clones constants.
    assert torch.cuda.max_memory_allocated() - before < 2 * (8.4e6 + 0.6e6) + 1e6
