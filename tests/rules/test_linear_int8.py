"""linear_int8: schemes against fp64, the kernel under AOTInductor, and every way to miss."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT8_LINEAR
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

# A kernel that takes all that the operator can express; what a target has may be less.
GENERAL = dataclasses.replace(
    get_target("cpu"),
    kernels={
        **get_target("cpu").kernels,
        "int8_linear": (
            Kernel(
                "general",
                "int8",
                (torch.bfloat16, torch.float32),
                (32, 64),
                scale_dtype=torch.float32,
                per_row=True,
            ),
        ),
    },
    passes=lambda: [ecp.LinearInt8()],
)


def export(model: torch.nn.Module, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype),))


def no_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight)


def exact(model: Quantized) -> np.ndarray:
    """The weight as the scheme says it is, in fp64."""
    spread = lambda t: t.double().numpy().repeat(model.block[1], axis=1)  # noqa: E731
    points = 0.0 if model.zero_point is None else spread(model.zero_point)
    return (model.data.double().numpy() - points) * spread(model.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (13, 48), (48, 64), (40, 1008)])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-127, 127), (-64, 63), (-16, 15)])
def test_per_axis_outputs_against_fp64(n: int, k: int, low: int, high: int, dtype: torch.dtype) -> None:
    model = Quantized(n, k, k, low, high, dtype, form=no_bias)
    program = export(model, 3, k, dtype=dtype)
    rewritten, report = ecp.rewrite(program, "cpu", expect={"linear_int8": 1, "missed": 0})
    bits = (high - low).bit_length()
    assert report.outcomes[0].detail == f"int{bits} per-axis -> int8pack_cpu"
    (x,) = program.example_inputs[0]
    rows, weight = x.double().numpy(), exact(model)
    wanted = rows @ weight.T
    # One rounding of the result, and sums in fp32.
    allowed = np.abs(wanted) * DTYPES[dtype] + np.abs(rows) @ np.abs(weight).T * 1e-5
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())


@pytest.mark.parametrize("storage", [torch.uint8, torch.int16])
def test_unsigned_integers_around_128_are_symmetric(storage: torch.dtype) -> None:
    model = Quantized(16, 48, 48, 0, 255, storage=storage)
    model.zero_point.fill_(128)
    rewritten, _ = assert_rewrites(export(model, 3, 48), "cpu", expect={"linear_int8": 1}, rtol=6e-3)
    (packed,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".packed"))
    assert packed.dtype is torch.int8
    assert torch.equal(packed.int(), model.data.int() - 128)
    assert not any(name.endswith(".zero") for name in rewritten.state_dict)


def test_what_no_int4_kernel_takes_is_held_by_the_next_that_does() -> None:
    """K = 48 has no int4 tiles, and per-axis int8 holds 4 bits exactly."""
    _, report = assert_rewrites(export(Quantized(16, 48, 48), 3, 48), "cpu", expect={"linear_int8": 1}, rtol=6e-3)
    assert report.outcomes[0].detail == "int4 per-axis -> int8pack_cpu"


@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("zero_points", ["random", "zero", None])
@pytest.mark.parametrize(("low", "high", "storage"), [(-128, 127, torch.int8), (0, 255, torch.uint8)])
def test_the_operator_holds_groups_and_zero_points_exactly(
    group: int, zero_points: str | None, low: int, high: int, storage: torch.dtype
) -> None:
    """With fp32 scales and fp32 zeros from them, nothing is rounded but the sums."""
    model = Quantized(8, 2 * group, group, low, high, torch.float32, None, zero_points, no_bias, storage)
    rewritten, _ = ecp.rewrite(
        export(model, 2 * group, 2 * group, dtype=torch.float32), GENERAL, expect={"linear_int8": 1}
    )
    weight = rewritten.module()(torch.eye(2 * group)).T
    np.testing.assert_allclose(weight.double().numpy(), exact(model), rtol=1e-5, atol=1e-6)
    (scale,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale"))
    assert scale.shape == (8, 2 * group // {32: 32, 64: 64, 96: 32, 192: 64}[group])
    assert any(name.endswith(".zero") for name in rewritten.state_dict) == (zero_points == "random" or low == 0)


CONFIGS = {
    "group 32": (
        IntxWeightOnlyConfig(torch.int8, PerGroup(32)),
        "found group size 32; int8pack_cpu has one scale a row: quantize with PerAxis(0)",
    ),
    "asymmetric": (
        IntxWeightOnlyConfig(torch.int8, PerAxis(0), mapping_type=MappingType.ASYMMETRIC),
        "found others; int8pack_cpu is symmetric: quantize with mapping_type=MappingType.SYMMETRIC",
    ),
}


@pytest.mark.parametrize("scheme", CONFIGS)
def test_what_the_cpu_kernel_cannot_express_is_missed(scheme: str) -> None:
    config, reason = CONFIGS[scheme]
    model = torch.nn.Sequential(torch.nn.Linear(64, 16)).bfloat16().eval()
    quantize_(model, config)
    assert_misses(export(model, 2, 64), reason, "cpu", rule="linear_int8")


def test_the_other_ways_to_miss() -> None:
    wide = Quantized(16, 64, 64, -1000, 1000, storage=torch.int16)
    assert_misses(export(wide, 2, 64), "at most 8 bits, found 11 bits, -1000..1000", "cpu", rule="linear_int8")
    # The kernel would write past its result.
    odd = Quantized(16, 40, 40, -128, 127)
    assert_misses(export(odd, 2, 40), "found K = 40; K must be a multiple of 16", "cpu", rule="linear_int8")
    half = export(Quantized(16, 64, 64, -128, 127, torch.float16), 2, 64, dtype=torch.float16)
    assert_misses(half, "found float16; general has bfloat16, float32", GENERAL, rule="linear_int8")
    infinite = Quantized(16, 64, 64, -128, 127, scale_dtype=torch.float32)
    infinite.scale[3] = 3.4e38
    assert_misses(export(infinite, 2, 64), "found 1 that are NaN or infinite", "cpu", rule="linear_int8")
    outside = Quantized(16, 64, 64, -64, 63)
    outside.data[0, 0] = 64
    assert_misses(export(outside, 2, 64), "found integers -64..64 for a range of -64..63", "cpu", rule="linear_int8")
    integers = export(Quantized(16, 64, 64, -128, 127), 2, 64)
    assert_misses(integers, "metal, which has no int8 kernel", "metal", passes=[ecp.LinearInt8()])
    with pytest.raises(ValueError, match="target cpu has no int8 kernel 'marlin'; it has: int8pack_cpu"):
        ecp.rewrite(export(Quantized(16, 64), 2, 64), "cpu", [ecp.LinearInt8(kernel="marlin")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("k", "group"), [(48, 48), (64, 16), (192, 96), (256, 128), (256, 256), (1536, 768), (272, 16)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_on_cuda_groups_and_zero_points_against_fp64(
    k: int, group: int, zero_points: str | None, dtype: torch.dtype
) -> None:
    model = Quantized(13, k, group, -128, 127, dtype, None, zero_points, no_bias)
    program = export(model, 3, k, dtype=dtype)
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_int8": 1, "missed": 0})
    assert report.outcomes[0].detail.endswith("-> triton")
    (x,) = program.example_inputs[0]
    rows, weight, points = x.double().numpy(), exact(model), 255 * model.scale.double().numpy().repeat(group, axis=1)
    wanted, got = rows @ weight.T, rewritten.module()(x).double().numpy()
    # Each weight is rounded once, and the result; sums and zeros are fp32.
    allowed = np.abs(rows) @ (np.abs(weight) * DTYPES[dtype] + points * 1e-5).T + np.abs(wanted) * DTYPES[dtype]
    assert bool((np.abs(got - wanted) <= allowed).all())
    assert torch.equal(rewritten.module()(x), rewritten.module()(x))
    (scale,) = (value for name, value in rewritten.state_dict.items() if name.endswith(".scale"))
    native = group if group == k else max(size for size in (16, 32, 64, 128, 256) if group % size == 0)
    assert tuple(scale.shape) == (13, k // native)
    zeros = [value.dtype for name, value in rewritten.state_dict.items() if name.endswith(".zero")]
    assert zeros == ([torch.float32] if zero_points else [])


def test_the_ways_to_miss_on_cuda() -> None:
    for model, found in (
        (Quantized(16, 64, 8, -128, 127), "found group size 8; triton has 16, 32, 64, 128, 256 and their multiples"),
        (Quantized(16, 40, 40, -128, 127), "found K = 40; K must be a multiple of 16"),
    ):
        assert_misses(export(model, 2, model.data.shape[1]), found, "cuda", rule="linear_int8")
    single = export(Quantized(16, 64, 64, -128, 127, torch.float32), 2, 64, dtype=torch.float32)
    assert_misses(single, "found float32; triton has bfloat16, float16", "cuda", rule="linear_int8")
    with pytest.raises(ValueError, match="target cuda has no int8 kernel 'int8pack_cpu'; it has: triton"):
        ecp.rewrite(export(Quantized(16, 64), 2, 64), "cuda", [ecp.LinearInt8(kernel="int8pack_cpu")])


def test_an_outcome_on_cuda_names_its_tilings() -> None:
    _, report = ecp.rewrite(export(Quantized(512, 256, 64, -128, 127), 3, 256), "cuda")
    assert report.outcomes[0].explanation.startswith("tilings on sm_90 for 512 x 256, group size 64: M = 3: 8x")


def test_a_target_without_an_int8_kernel_names_the_scheme_that_it_has() -> None:
    program = export(Quantized(16, 64, 64, -128, 127), 2, 64)
    assert_misses(program, "found 8 bits, -128..127; quantize with weight_dtype=torch.int4", "metal")


def test_views_of_a_decomposed_linear_go() -> None:
    table = torch.export.default_decompositions()
    table.pop(torch.ops.torchao.dequantize_affine.default, None)
    program = export(Quantized(16, 64, 64, -128, 127), 2, 3, 64).run_decompositions(table)
    rewritten, _ = assert_rewrites(program, "cpu", expect={"linear_int8": 1, "linear_views": 1})
    assert [node.target for node in rewritten.graph.nodes if node.op == "call_function"] == [INT8_LINEAR]
