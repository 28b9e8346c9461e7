"""Products with a weight that is packed for their own kernel: unpacked, and packed for each target."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import Int4TilePackedTo4dTensor

import et_cuda_passes as ecp
from et_cuda_passes.graph.program import Program
from et_cuda_passes.layouts import LAYOUTS, mma_tiled, scale_and_zero, tile_packed_to_4d
from et_cuda_passes.ops import DEQUANTIZE_INT4_TILES
from et_cuda_passes.quant.decoders import decode, is_dequantize
from et_cuda_passes.quant.weight import weight_rows, weight_values
from et_cuda_passes.rules.restore import UnpackLinear
from et_cuda_passes.testing import assert_misses

GROUP = 32
TARGETS = {"cuda": "linear_int4", "cpu": "linear_int4", "metal": "linear_int4", "xnnpack": "fold_dequantize"}
ALL = ["cuda", "cpu", "metal", "xnnpack", "vulkan", "coreml", "openvino", "mlx", "tensorrt"]


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def tiles(n: int, k: int, zeros: bool = True, group: int = GROUP) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A linear with torchao's tensor, which torchao itself makes on a CUDA device only; q, scale, zero and the weight.

    torchao pads K to a multiple of 1024, and N to one of 8.
    """
    torch.manual_seed(n + k)
    rows, columns = padded(n, 8), padded(k, 1024)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group) * 0.05 + 0.01).bfloat16()
    zero = torch.randn(rows, columns // group).bfloat16() * zeros
    pairs = scale_and_zero.pack(scale, zero)
    weight = Int4TilePackedTo4dTensor(tile_packed_to_4d.pack(q, 8), pairs, [1, group], torch.Size((n, k)))
    model = nn.Sequential(nn.Linear(k, n)).bfloat16().eval()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    spread = [part.float().repeat_interleave(group, dim=1) for part in (scale, zero)]
    dense = ((q.float() - 8) * spread[0] + spread[1]).bfloat16()
    return model, q, scale, zero, dense[:n, :k]


def exported(model: nn.Module, *shape: int) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return torch.export.export(model, (x,)), x


def off(program: ExportedProgram, x: Tensor, dense: Tensor, bias: Tensor | None) -> float:
    """The relative error against a product with the weight."""
    found = program.module()(x).detach()
    wanted = F.linear(x.double(), dense.double(), None if bias is None else bias.detach().double())
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(48, 1024), (20, 576)])
@pytest.mark.parametrize("target", TARGETS)
def test_tile_packed_weight_is_packed_for_the_target(target: str, n: int, k: int, decomposed: bool) -> None:
    model, *_, dense = tiles(n, k)
    program, x = exported(model, 2, 3, k)
    program = program.run_decompositions({}) if decomposed else program
    rewritten, report = ecp.rewrite(program, target, expect={"unpack_linear": 1, TARGETS[target]: 1, "missed": 0})
    (outcome,) = report.outcomes
    assert (outcome.node, outcome.fqn) == ("_weight_int4pack_mm", "0.weight")
    assert outcome.detail.startswith("int4 group 32 packed for _weight_int4pack_mm -> ")
    assert outcome.shape == [padded(n, 8), padded(k, 1024)]
    # Zeros are rounded to bf16 again where the kernel has others than tinygemm.
    assert off(rewritten, x, dense, model[0].bias) < 6e-3


def test_constants_are_those_of_the_integers_scales_and_zeros() -> None:
    model, q, scale, zero, _ = tiles(48, 1024)
    program, _ = exported(model, 3, 1024)
    cuda, _ = ecp.rewrite(program, "cuda")
    assert torch.equal(cuda.state_dict["0.weight.packed"], mma_tiled.pack(q))
    wanted = mma_tiled.scale_and_zero(scale.float(), zero.float(), torch.bfloat16, 1024)
    assert torch.equal(cuda.state_dict["0.weight.scale_and_zero"], wanted)
    again, _ = ecp.rewrite(program, "cuda", [UnpackLinear(), ecp.LinearInt4(kernel="tinygemm")])
    assert torch.equal(again.state_dict["0.weight.packed"], model[0].weight.qdata)
    assert torch.equal(again.state_dict["0.weight.scale_and_zero"], model[0].weight.scale_and_zero)


def test_columns_of_zeros_leave_the_program() -> None:
    program, _ = exported(tiles(24, 576)[0], 3, 576)
    rewritten, _ = ecp.rewrite(program, "cuda")
    called = {str(node.target) for node in rewritten.graph.nodes}
    assert not any("pad" in name for name in called)
    assert rewritten.state_dict["0.weight.packed"].shape == (24, 576 // 8)


def test_columns_stay_where_a_group_crosses_their_beginning() -> None:
    model, *_, dense = tiles(24, 608, group=64)
    program, x = exported(model, 3, 608)
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 1})
    assert rewritten.state_dict["0.weight.packed"].shape == (24, 1024 // 8)
    assert off(rewritten, x, dense, model[0].bias) < 6e-3


def test_weight_without_zeros_gets_no_plane_of_zeros() -> None:
    program, _ = exported(tiles(24, 1024, zeros=False)[0], 3, 1024)
    rewritten, _ = ecp.rewrite(program, "cuda")
    assert rewritten.state_dict["0.weight.scale_and_zero"].shape[0] == 1


def test_rows_are_read_from_the_tiles_that_hold_them() -> None:
    model, q, scale, zero, _ = tiles(48, 1024)
    exported_program, _ = exported(model, 3, 1024)
    unpacked, _ = ecp.rewrite(exported_program, "cuda", [UnpackLinear()])
    program = Program(unpacked)
    (node,) = (node for node in program.graph.nodes if is_dequantize(node))
    weight = decode(program, node)
    read = weight_rows(program, weight)
    for rows in (slice(0, 48), slice(3, 21), slice(8, 16), slice(47, 48)):
        values = read(rows)
        assert torch.equal(values.data, q[rows]) and torch.equal(values.scale, scale[rows])
        assert values.minimum is not None and torch.equal(-values.minimum, zero[rows])
    assert torch.equal(weight_values(program, weight).data, q)


@pytest.mark.parametrize("target", ALL)
def test_tile_packed_weight_is_packed_or_reported_on_every_target(target: str) -> None:
    model, *_, dense = tiles(24, 1024)
    program, x = exported(model, 3, 1024)
    rewritten, report = ecp.rewrite(program, target)
    (outcome,) = report.outcomes
    if outcome.status == "missed":
        assert target in ("vulkan", "coreml", "openvino")  # they have no bf16
        assert "found bfloat16" in str(report)
    assert off(rewritten, x, dense, model[0].bias) < 6e-3


def test_product_without_the_rule_is_a_missed_candidate() -> None:
    program, _ = exported(tiles(24, 1024)[0], 3, 1024)
    report = assert_misses(program, "no pass for target cuda rewrites aten._weight_int4pack_mm", passes=[])
    assert report.outcomes[0].scheme == "int4 group 32 packed for _weight_int4pack_mm"


def test_packed_weight_that_is_an_input_is_no_candidate() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs)

    weight = tiles(24, 1024)[0][0].weight
    given = (torch.randn(3, 1024).bfloat16(), weight.qdata, weight.scale_and_zero)
    rewritten, report = ecp.rewrite(torch.export.export(Model(), given), "cuda")
    assert not report.outcomes
    assert any(node.target is torch.ops.aten._weight_int4pack_mm.default for node in rewritten.graph.nodes)


def test_scale_that_is_not_finite_leaves_the_product() -> None:
    model = tiles(24, 1024)[0]
    model[0].weight.scale_and_zero[0, 0, 0] = float("inf")
    program, _ = exported(model, 3, 1024)
    assert_misses(program, "wanted scales and zeros that are finite, found 1", rule="unpack_linear")


def dequantize_tiles() -> tuple[Tensor, Tensor]:
    model, *_, dense = tiles(24, 1024)
    weight = model[0].weight
    return DEQUANTIZE_INT4_TILES(weight.qdata, weight.scale_and_zero, GROUP, 1024), dense


def test_dequantize_computes_the_weight() -> None:
    found, wanted = dequantize_tiles()
    assert torch.equal(found, wanted)


def test_dequantize_rejects_tables_that_do_not_fit() -> None:
    weight = tiles(24, 1024)[0][0].weight
    with pytest.raises(ValueError, match="dequantize_int4_tiles: packed .* do not fit each other"):
        DEQUANTIZE_INT4_TILES(weight.qdata, weight.scale_and_zero[:3], GROUP, 1024)
    assert LAYOUTS["tile_packed_to_4d"].rows is not None
