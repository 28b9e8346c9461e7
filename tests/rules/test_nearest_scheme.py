"""Schemes that a target has no kernel of: held by a wider kernel, or missed with the nearest scheme that it has."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized

INT4, INT8 = torch.int4, torch.int8
N, K = 48, 96


def quantized(config: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype).eval()
    quantize_(model, config)
    linear: nn.Linear = model[0]
    return linear


def export(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> ExportedProgram:
    return torch.export.export(model, (torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype),))


def exact(weight: Any) -> np.ndarray:
    """A weight of torchao's ``IntxUnpackedToInt8Tensor`` as its scheme says it is, in fp64."""
    spread = lambda t: t.double().numpy().repeat(weight.block_size[1], axis=1)  # noqa: E731
    result: np.ndarray = (weight.qdata.double().numpy() - spread(weight.zero_point)) * spread(weight.scale)
    return result


@pytest.mark.parametrize(("dtype", "bits"), [(INT4, 4), (INT8, 8)])
@pytest.mark.parametrize("group", [16, 48])
def test_on_cuda_groups_that_16_divides_are_int8_and_right(dtype: torch.dtype, bits: int, group: int) -> None:
    """Integers of 4 bits are integers of 8 bits: where no int4 kernel has the groups, the int8 kernel does."""
    linear = quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)))
    program = export(linear)
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_int8": 1, "missed": 0})
    assert [(o.fqn, o.detail) for o in report.outcomes] == [("weight", f"int{bits} group {group} -> triton")]
    (x,) = program.example_inputs[0]
    rows, weight = x.double().numpy(), exact(linear.weight)
    wanted = rows @ weight.T
    # Each weight is rounded once to bf16, and the result; sums are fp32.
    allowed = np.abs(rows) @ np.abs(weight).T * (2.0**-8 + 1e-5) + np.abs(wanted) * 2.0**-8
    assert bool((np.abs(rewritten.module()(x).double().numpy() - wanted) <= allowed).all())
    held = {name: (value.dtype, tuple(value.shape)) for name, value in rewritten.state_dict.items()}
    assert held == {"weight.packed": (INT8, (N, K)), "weight.scale": (torch.bfloat16, (N, K // 16))}


TRITON8 = "linear_int8 wanted a group size that the kernel has, found group size {}; triton has 16, 32, 64, 128, 256"
CPU8 = "found group size {}; int8pack_cpu has one scale a row: quantize with PerAxis(0), or in groups with torch.int4"
MISSED = [
    (
        "cuda",
        INT4,
        24,
        "linear_int4",
        "found group size 24; the nearest that triton has is 32: quantize with PerGroup(32)",
    ),
    ("cuda", INT4, 24, "linear_int8", f"{TRITON8.format(24)} and their multiples: quantize with PerGroup(16)"),
    ("cuda", INT8, 24, "linear_int8", f"{TRITON8.format(24)} and their multiples: quantize with PerGroup(16)"),
    *(
        ("cpu", INT4, group, "linear_int4", f"found group size {group}; the nearest that int4pack_cpu has is 32")
        for group in (16, 24, 48)
    ),
    *(("cpu", INT8, group, "linear_int8", CPU8.format(group)) for group in (16, 24, 48)),
    *(
        ("metal", INT4, group, "linear_int4", f"found group size {group}; the nearest that torchao has is 32")
        for group in (16, 24, 48)
    ),
    *(
        ("metal", INT8, group, "linear_int4", "found 8 bits, -128..127; quantize with weight_dtype=torch.int4")
        for group in (16, 24, 48)
    ),
    *(
        ("metal", INT8, group, "linear_int4", f"found group size {group}; the nearest that torchao has is 32")
        for group in (16, 24, 48)
    ),
]


@pytest.mark.parametrize(("target", "dtype", "group", "rule", "reason"), MISSED)
def test_a_group_that_no_kernel_group_divides_is_missed_with_the_nearest(
    target: str, dtype: torch.dtype, group: int, rule: str, reason: str
) -> None:
    report = assert_misses(export(quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)))), reason, target, rule)
    assert [outcome.fqn for outcome in report.outcomes] == ["weight"]


def test_the_nearest_group_divides_the_row() -> None:
    """24 is as near to 32 as to 16, and 72 nearer to 64: but rows of 240 and of 1008 are not made of such groups."""
    for k, group, nearest in ((160, 40, 32), (240, 24, 16), (576, 72, 64), (1008, 72, 16)):
        model = Quantized(8, k, group, -128, 127)
        program = torch.export.export(model, (torch.randn(2, k).bfloat16(),))
        assert_misses(program, f"and their multiples: quantize with PerGroup({nearest})", "cuda", "linear_int8")


@pytest.mark.parametrize("dtype", [INT4, INT8])
@pytest.mark.parametrize("group", [16, 24, 48])
def test_on_xnnpack_they_are_folded_exactly(dtype: torch.dtype, group: int) -> None:
    linear = quantized(IntxWeightOnlyConfig(dtype, PerGroup(group)), torch.float32)
    program = torch.export.export(linear, (torch.eye(K),))
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect={"fold_dequantize": 1, "missed": 0})
    assert torch.equal(rewritten.module()(torch.eye(K)), linear(torch.eye(K)))
    np.testing.assert_allclose(rewritten.module()(torch.eye(K)).T.double().numpy(), exact(linear.weight), rtol=1e-6)


def in_blocks(rows: int, columns: int, low: int, high: int) -> Quantized:
    """A weight in blocks of [rows, columns]."""
    model = Quantized(N, K, columns, low, high, zero_points=None, form=lambda x, w, b: F.linear(x, w))
    random = torch.Generator().manual_seed(2)
    model.block = [rows, columns]
    model.scale = (torch.rand(N // rows, K // columns, generator=random) * 0.02 + 0.005).bfloat16()
    return model


# A scale for several rows is repeated for each; what decides is the size along K.
BLOCKS = {
    (4, 2, 32): {"cuda": "linear_int4", "metal": "linear_int4", "cpu": "linear_int4"},
    (4, N, K): {"cuda": "linear_int4", "metal": "linear_int4", "cpu": "linear_int4"},
    (8, 2, 96): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "linear_int8"},
    (8, N, K): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "linear_int8"},
    (8, 2, 32): {"cuda": "linear_int8", "metal": "at most 4 bits", "cpu": "one scale a row"},
    (4, 2, 16): {"cuda": "linear_int8", "metal": "the nearest that torchao has is 32", "cpu": "the nearest"},
    (4, 2, 24): dict.fromkeys(("cuda", "metal", "cpu"), "found group size 24; the nearest that"),
    (4, 8, 1): dict.fromkeys(("cuda", "metal", "cpu"), "found group size 1; the nearest that"),
}


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_over_both_axes(block: tuple[int, int, int], target: str) -> None:
    bits, rows, columns = block
    model = in_blocks(rows, columns, -(1 << bits - 1), (1 << bits - 1) - 1)
    program, wanted = export(model), BLOCKS[block][target]
    if not wanted.startswith("linear_"):
        assert_misses(program, wanted, target)
        return
    rewritten, _ = ecp.rewrite(program, target, expect={wanted: 1, "missed": 0})
    (x,) = program.example_inputs[0]
    scale = model.scale.double().numpy().repeat(rows, axis=0).repeat(columns, axis=1)
    weight, inputs = model.data.double().numpy() * scale, x.double().numpy()
    # A weight's steps from -8 and its zero are rounded apart in some int4 layouts, by 16 steps of 2**-8 together.
    allowed = np.abs(inputs) @ (np.abs(weight) + (bits == 4) * 32 * scale).T * (2.0**-8 + 1e-5)
    result = inputs @ weight.T
    assert bool((np.abs(rewritten.module()(x).double().numpy() - result) <= allowed + np.abs(result) * 2.0**-8).all())


@pytest.mark.parametrize("target", ecp.targets())
@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_target_advises_is_what_it_takes(target: str, bits: int) -> None:
    text = get_target(target).advised.for_bits(bits)
    names = {
        "IntxWeightOnlyConfig": IntxWeightOnlyConfig,
        "Int8DynamicActivationIntxWeightConfig": Int8DynamicActivationIntxWeightConfig,
    }
    config = eval(text, {"torch": torch, "PerGroup": PerGroup, "PerAxis": PerAxis, **names})
    dtype = torch.float32 if target == "xnnpack" else torch.bfloat16
    status = "kept" if target == "xnnpack" else "rewritten"
    _, report = ecp.rewrite(export(quantized(config, dtype), dtype), target, expect={status: 1, "missed": 0})
    # A target with one width advises that for all.
    assert report.outcomes[0].rule.endswith("int4" if target == "metal" else f"int{bits}")  # type: ignore[union-attr]


class Mixed(nn.Module):
    """One input into a linear of every scheme."""

    def __init__(self, configs: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: quantized(config, seed=i) for i, (name, config) in enumerate(configs.items())}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers.values()]


ALL = {
    "int4_32": IntxWeightOnlyConfig(INT4, PerGroup(32)),
    "int4_16": IntxWeightOnlyConfig(INT4, PerGroup(16)),
    "int4_24": IntxWeightOnlyConfig(INT4, PerGroup(24)),
    "int4_48": IntxWeightOnlyConfig(INT4, PerGroup(48)),
    "int8": IntxWeightOnlyConfig(INT8, PerAxis(0)),
    "int8_24": IntxWeightOnlyConfig(INT8, PerGroup(24)),
    "again": IntxWeightOnlyConfig(INT4, PerGroup(32)),
    "fp8": Float8WeightOnlyConfig(),
    "bytes": Int8WeightOnlyConfig(),
    "integers": Int8DynamicActivationInt8WeightConfig(),
    "mx": MXDynamicActivationMXWeightConfig(),
    "nvfp4": NVFP4WeightOnlyConfig(),
}
REWRITTEN = {
    "cuda": {"int4_32": 4, "again": 4, "int4_16": 8, "int4_48": 8, "int8": 8},
    "cpu": {"int4_32": 4, "again": 4, "int8": 8},
    "metal": {"int4_32": 4, "again": 4},
}


@pytest.mark.parametrize("target", REWRITTEN)
@pytest.mark.parametrize("without", [("mx",), ("nvfp4",), ()])
def test_a_model_of_all_schemes_is_rewritten_at_once(target: str, without: tuple[str, ...]) -> None:
    """Weights in nvfp4 keep torch from unwrapping any other; MX weights stand wrapped or as their decomposition."""
    configs = {name: config for name, config in ALL.items() if name not in without}
    program = export(Mixed(configs))
    if "mx" in without:
        _, report = assert_rewrites(program, target, rtol=2.0**-7)
    else:  # which no CPU computes
        _, report = ecp.rewrite(program, target)
    rules = {name: f"linear_int{bits}" for name, bits in REWRITTEN[target].items()}
    if target == "cuda":  # two of one scheme, of one input
        rules |= dict.fromkeys(("int4_32", "again"), "fused_linear_int4")
    found = {outcome.fqn.split(".")[1]: outcome.rule for outcome in report.outcomes}
    assert found == {name: rules.get(name) for name in configs}
    assert len(report.outcomes) == len(configs)
    text = str(report)
    assert f"  2 x {rules['again']}  int4 group 32 -> " in text
    assert "(layers.int4_32.weight, ...)" in text
    if target == "cuda":
        assert "  1 x linear_int8  int4 group 16 -> triton  (layers.int4_16.weight)" in text
        assert "  1 x linear_int8  int4 group 48 -> triton  (layers.int4_48.weight)" in text
    for name in set(configs) - set(rules):
        (line,) = (
            line for line in text.splitlines() if line.startswith("  missed") and f"layers.{name}.weight" in line
        )
        assert "  1 x aten." in line
