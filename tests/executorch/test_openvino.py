"""OpenVINO: every form of a weight is lowered, run by ExecuTorch's runtime, and compared with eager.

The packages that the backend needs are an extra (`pip install 'et-cuda-passes[openvino]'`). Without them these
tests are skipped.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from executorch.backends.openvino.partitioner import OpenvinoPartitioner as Stock
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import Partitioner
from executorch.runtime import Runtime

from et_cuda_passes.executorch.openvino import OpenvinoPartitioner

BF16 = 2**-6
"""OpenVINO computes in bfloat16 on a CPU that has instructions for it."""


def lowered(program: ExportedProgram, partitioner: Partitioner) -> bytes:
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=config)
    buffer: bytes = edge.to_executorch().buffer
    return buffer


def output(pte: bytes, *inputs: Tensor) -> Tensor:
    result: Tensor = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))[0]
    return result.clone()


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def lookup(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding(x, weight)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.t()


CASES: dict[str, dict[str, Any]] = {
    "4 bits in groups": {},
    "4 bits per row": {"group": 512},
    "4 bits, asymmetric": {"zero_points": "random"},
    "4 bits, no zero points": {"zero_points": None},
    "4 bits, groups of 8": {"group": 8},
    "4 bits, groups of 48, N 7": {"n": 7, "k": 96, "group": 48},
    "unsigned 4 bits": {"low": 0, "high": 15, "zero_points": "random"},
    "unsigned 4 bits as uint8": {"low": 0, "high": 15, "zero_points": "random", "storage": torch.uint8},
    "2 bits": {"low": -2, "high": 1},
    "3 bits, asymmetric": {"low": -4, "high": 3, "zero_points": "random"},
    "5 bits": {"low": -16, "high": 15},
    "8 bits in groups": {"low": -128, "high": 127},
    "8 bits per row": {"low": -128, "high": 127, "group": 512},
    "8 bits, asymmetric": {"low": -128, "high": 127, "zero_points": "random"},
    "unsigned 8 bits": {"low": 0, "high": 255, "zero_points": "random", "storage": torch.uint8, "group": 512},
    "4 bits in float16": {"dtype": torch.float16},
    "8 bits in float16": {"dtype": torch.float16, "low": -128, "high": 127},
    "4 bits, scales in bfloat16": {"scale_dtype": torch.bfloat16},
    "4 bits, a product": {"form": product},
}


@pytest.mark.parametrize("name", CASES)
def test_linear_runs_as_in_eager(name: str) -> None:
    options = {"n": 64, "k": 512, "dtype": torch.float32, "form": linear, **CASES[name]}
    model = Quantized(**options)
    x = torch.randn(5, options["k"], generator=torch.Generator().manual_seed(1)).to(options["dtype"])
    partitioner = OpenvinoPartitioner(expect={"rewritten": 1, "missed": 0, "fold_dequantize": 0})
    pte = lowered(torch.export.export(model, (x,)), partitioner)
    assert error(output(pte, x), model(x)) < BF16


class Many(nn.Module):
    """Linears of several schemes in one program, so that one lowering serves all."""

    def __init__(self, *options: dict[str, Any]) -> None:
        super().__init__()
        made = [Quantized(dtype=torch.float32, form=linear, seed=seed, **each) for seed, each in enumerate(options)]
        self.linears = nn.ModuleList(made)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(each(x) for each, x in zip(self.linears, inputs, strict=True))

    def inputs(self, rows: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(1)
        return tuple(torch.randn(rows, each.data.shape[1], generator=random) for each in self.linears)


RANGES = [{"low": -8, "high": 7}, {"low": -128, "high": 127}]
SIZES = [
    (36, 2),
    (64, 4),
    (40, 8),
    (48, 16),
    (96, 32),
    (34, 34),
    (96, 48),
    (160, 80),
    (192, 96),
    (320, 160),
    (256, 128),
]
OTHERS = [(33, 11), (35, 35), (42, 6), (30, 10), (36, 12), (40, 20)]


def many(sizes: list[tuple[int, int]]) -> Many:
    return Many(
        *(
            {"n": n, "k": k, "group": group, "zero_points": points, **limits}
            for (k, group) in sizes
            for limits in RANGES
            for points in ("zero", "random")
            for n in (7, 8)
        )
    )


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(40, marks=pytest.mark.slow)])
def test_groups_run_as_in_eager(rows: int) -> None:
    model = many(SIZES)
    inputs = model.inputs(rows)
    partitioner = OpenvinoPartitioner(expect={"fold_dequantize": 0, "missed": 0})
    pte = lowered(torch.export.export(model, inputs), partitioner)
    found = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))
    assert max(map(error, found, model(*inputs))) < BF16


@pytest.mark.parametrize("rows", [1, 5])
def test_other_groups_are_folded_and_run_as_in_eager(rows: int) -> None:
    model = many(OTHERS)
    inputs = model.inputs(rows)
    partitioner = OpenvinoPartitioner(expect={"fold_dequantize": len(inputs), "missed": 0})
    pte = lowered(torch.export.export(model, inputs), partitioner)
    found = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))
    assert max(map(error, found, model(*inputs))) < BF16


def test_openvino_computes_other_numbers_for_groups_of_odd_sizes() -> None:
    """The reason of the fold: the same arithmetic as plain operators of a model."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            random = torch.Generator().manual_seed(0)
            self.register_buffer("data", torch.randint(-128, 128, (8, 3, 11), generator=random).to(torch.int8))
            self.register_buffer("scale", torch.rand(8, 3, 1, generator=random))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.data.to(torch.float32) * self.scale).reshape(8, 33))

    model, x = Plain(), torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    pte = lowered(torch.export.export(model, (x,)), Stock([CompileSpec("device", b"CPU")]))
    assert error(output(pte, x), model(x)) > 4 * BF16


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-128, 127)], ids=["int4", "int8"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 2)], ids=str)
def test_activations_of_any_rank_run_as_in_eager(shape: tuple[int, ...], low: int, high: int) -> None:
    model = Quantized(64, 128, low=low, high=high, dtype=torch.float32, form=linear)
    x = torch.randn(*shape, 128, generator=torch.Generator().manual_seed(1))
    pte = lowered(torch.export.export(model, (x,)), OpenvinoPartitioner(expect={"missed": 0}))
    assert error(output(pte, x), model(x)) < BF16


@pytest.mark.parametrize(
    ("low", "high", "zero_points"),
    [(-8, 7, "zero"), (-8, 7, "random"), (-128, 127, "zero"), (-128, 127, "random")],
    ids=["int4", "asymmetric int4", "int8", "asymmetric int8"],
)
def test_embedding_runs_as_in_eager(low: int, high: int, zero_points: str) -> None:
    model = Quantized(512, 64, low=low, high=high, zero_points=zero_points, dtype=torch.float32, form=lookup)
    ids = torch.tensor([[0, 511, 7], [8, 8, 3]])
    pte = lowered(torch.export.export(model, (ids,)), OpenvinoPartitioner(expect={"missed": 0}))
    assert error(output(pte, ids), model(ids)) < BF16


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 4),
        ({"zero_points": "random"}, 4),
        ({"low": -128, "high": 127}, 8),
        ({"low": -128, "high": 127, "zero_points": "random"}, 8),
    ],
    ids=["int4", "asymmetric int4", "int8", "asymmetric int8"],
)
def test_lowered_linear_holds_the_quantized_weight(options: dict[str, Any], bits: int) -> None:
    """Weight, a scale in float32 and a zero point of at most a byte for each group, and the graph."""
    n, k = 512, 1024
    model = Quantized(n, k, dtype=torch.float32, form=linear, **options)
    x = torch.randn(2, k)
    size = len(lowered(torch.export.export(model, (x,)), OpenvinoPartitioner()))
    groups = n * k // 32
    assert n * k * bits // 8 + 4 * groups < size < n * k * bits // 8 + 5 * groups + 40_000


def torchao_model(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 64, bias=False)).eval()
    quantize_(model, config)
    return model


@pytest.mark.parametrize(
    "config",
    [
        IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
        Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
        Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)),
    ],
    ids=["4w", "8w", "8da4w", "8da8w"],
)
def test_models_of_torchao_run_as_in_eager(config: Any) -> None:
    model, x = torchao_model(config), torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    pte = lowered(torch.export.export(model, (x,)), OpenvinoPartitioner(expect={"rewritten": 2, "missed": 0}))
    assert error(output(pte, x), model(x)) < (2**-5 if "Dynamic" in type(config).__name__ else BF16)


def test_stock_partitioner_leaves_a_weight_of_torchao_without_a_kernel() -> None:
    model, x = torchao_model(IntxWeightOnlyConfig(torch.int4, PerGroup(32))), torch.randn(3, 128)
    with pytest.raises(RuntimeError, match=r"Missing out variants: \{'torchao::dequantize_affine'\}"):
        lowered(torch.export.export(model, (x,)), Stock([CompileSpec("device", b"CPU")]))


def test_convolution_with_larger_kernels_is_folded() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", torch.randint(-128, 128, (8, 4, 3, 3), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(8) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.torchao.dequantize_affine(
                self.data, [1, 4, 3, 3], self.scale, None, torch.int8, -128, 127, torch.float32
            )
            return F.conv2d(x, weight, padding=1)

    model, x = Convolution(), torch.randn(1, 4, 6, 6)
    pte = lowered(torch.export.export(model, (x,)), OpenvinoPartitioner(expect={"fold_dequantize": 1}))
    assert error(output(pte, x), model(x)) < BF16


def test_weight_of_one_row_is_folded() -> None:
    model, x = Quantized(1, 128, dtype=torch.float32, form=linear), torch.randn(4, 128)
    pte = lowered(torch.export.export(model, (x,)), OpenvinoPartitioner(expect={"fold_dequantize": 1}))
    assert error(output(pte, x), model(x)) < BF16


@pytest.mark.parametrize("change", [lambda m: m.scale.mul_(math.inf), lambda m: m.data.add_(100)], ids=["inf", "range"])
def test_damaged_weight_is_not_packed(change: Callable[[Any], Any]) -> None:
    model = Quantized(64, 128, dtype=torch.float32, form=linear)
    change(model)
    _, report = ecp.rewrite(torch.export.export(model, (torch.randn(2, 128),)), "openvino")
    assert report.counts().get("decompress_int4", 0) == 0


def test_dynamic_size_is_refused() -> None:
    model, x = Quantized(64, 128, dtype=torch.float32, form=linear), torch.randn(4, 128)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", max=32)},))
    with pytest.raises(ValueError, match=r"x has a dynamic size, \[.*, 128\], and ExecuTorch's OpenVINO runtime"):
        lowered(program, OpenvinoPartitioner())


def test_stock_runtime_returns_the_largest_size_for_a_dynamic_one() -> None:
    """The reason of the refusal, shown for a float linear."""
    model, x = nn.Linear(128, 64), torch.randn(4, 128)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", max=32)},))
    pte = lowered(program, Stock([CompileSpec("device", b"CPU")]))
    assert output(pte, x).shape == (32, 64)


def test_bfloat16_is_refused() -> None:
    model, x = Quantized(64, 128, form=linear), torch.randn(4, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="openvino has float32, float16: export the model in one of these"):
        lowered(torch.export.export(model, (x,)), OpenvinoPartitioner())


def test_partition_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1(x) + 1

    lowered(torch.export.export(Model(), (torch.randn(3),)), OpenvinoPartitioner())
    assert "Op not supported" not in capfd.readouterr().out
