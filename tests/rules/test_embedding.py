"""Embeddings: rows against fp64, tables that are tied to a linear, and every reason for a miss.

``tests/executorch/test_quantized_embedding.py`` runs what ``QuantizedEmbedding`` builds in ExecuTorch's runtime.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import Quantized, assert_misses, assert_rewrites
from tests.tables import exact, exported, look_up


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(13, 32, 32), (24, 64, 32), (40, 128, 64), (16, 384, 192), (9, 256, 256)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_int4_rows_match_fp64(n: int, k: int, group: int, zero_points: str | None, target: str) -> None:
    model = Quantized(n, k, group, zero_points=zero_points, form=look_up)
    ids = torch.arange(n).flip(0).view(1, -1)
    rewritten, report = ecp.rewrite(exported(model, ids), target, expect={"embedding_int4": 1, "missed": 0})
    assert report.outcomes[0].op == "aten.embedding"
    got, wanted = rewritten.module()(ids), exact(model).flip(0).unsqueeze(0)
    assert (got.dtype, got.shape) == (torch.bfloat16, (1, n, k))
    # The scales are bf16 already. The zeros and the weights are rounded once; metal's zero is the weight of q = 0.
    spread = model.scale.double().repeat_interleave(group, 1).flip(0)
    steps = 15 if target == "metal" else 8
    assert bool(((got.double() - wanted).abs() <= 2.0**-8 * (wanted.abs() + steps * spread) * 1.02).all())


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize(("group", "low", "high", "storage"), [(40, -128, 127, torch.int8), (8, 0, 255, torch.uint8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_rows_match_fp64(
    group: int, low: int, high: int, storage: torch.dtype, dtype: torch.dtype, target: str
) -> None:
    model = Quantized(13, 40, group, low, high, dtype, None, "random", look_up, storage)
    ids = torch.tensor([[0, 12, 5], [5, 5, 1]])
    rewritten, _ = ecp.rewrite(exported(model, ids), target, expect={"embedding_int8": 1, "missed": 0})
    got, wanted = rewritten.module()(ids), exact(model)[ids]
    steps = model.scale.double().repeat_interleave(group, 1)[ids]
    # In bf16 the result is rounded; in fp32, two products of up to 255 steps and their sum are.
    allowed = wanted.abs() * 2.0**-8 * 1.02 if dtype is torch.bfloat16 else 255 * steps * 2.0**-22
    assert bool(((got.double() - wanted).abs() <= allowed + 255 * steps * 2.0**-22).all())


class Tied(nn.Module):
    """An embedding and the last linear, which share one parameter."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
        self.bfloat16()
        quantize_(self, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.words(ids) * 3))
        return result


TIED = {
    "int4 on cuda": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "cuda", ["packed", "scale_and_zero"]),
    "int4 on metal": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "metal", ["packed", "scale_and_zero"]),
    "int8 on cuda": (IntxWeightOnlyConfig(torch.int8, PerAxis(0)), "cuda", ["packed", "scale"]),
    "int8 in groups on cuda": (IntxWeightOnlyConfig(torch.int8, PerGroup(32)), "cuda", ["packed", "scale"]),
    "asymmetric int8 on cuda": (
        IntxWeightOnlyConfig(torch.int8, PerGroup(64), mapping_type=MappingType.ASYMMETRIC),
        "cuda",
        ["packed", "scale", "zero"],
    ),
    "int8 on cpu": (IntxWeightOnlyConfig(torch.int8, PerAxis(0)), "cpu", ["packed", "scale"]),
}


@pytest.mark.parametrize("case", TIED)
def test_table_tied_to_a_linear_is_stored_once(case: str) -> None:
    config, target, parts = TIED[case]
    rewritten, _ = assert_rewrites(
        exported(Tied(config), torch.tensor([[3, 1], [47, 0]])), target, expect={"rewritten": 2, "missed": 0}, rtol=2e-2
    )
    assert sorted(rewritten.state_dict) == sorted(f"words.weight.{part}" for part in parts)


def test_tied_table_stays_for_a_linear_that_is_missed() -> None:
    ids = torch.tensor([[3, 1], [47, 0]])
    program = exported(Tied(IntxWeightOnlyConfig(torch.int8, PerGroup(8))), ids)
    rewritten, report = assert_rewrites(program, "cuda", expect={"embedding_int8": 1, "missed": 1}, rtol=0)
    assert [outcome.op for outcome in report.outcomes if outcome.status == "missed"] == ["aten.linear"]
    assert {"words.weight.packed", "words.weight.scale", "head.weight"} == set(rewritten.state_dict)


def target_with(layout: str) -> ecp.Target:
    """A target that stores int4 tables in ``layout``."""
    cuda = get_target("cuda")
    kernels = (kernel for name in ("cuda", "cpu", "metal") for kernel in get_target(name).kernels["int4_linear"])
    kernel = next(kernel for kernel in kernels if kernel.layout == layout)
    return dataclasses.replace(cuda, name="other_table", kernels={**cuda.kernels, "int4_table": (kernel,)})


@pytest.mark.parametrize("layout", INT4_EMBEDDINGS)
@pytest.mark.parametrize("k", [32, 96, 256])
def test_layouts_of_int4_tables_match_fp64(layout: str, k: int) -> None:
    model, ids = Quantized(16, k, zero_points="random", form=look_up), torch.tensor([[1, 2, 15]])
    program, _ = ecp.rewrite(exported(model, ids), target_with(layout), expect={"embedding_int4": 1})
    got, wanted = program.module()(ids).double(), exact(model)[ids]
    spread = model.scale.double().repeat_interleave(32, 1)[ids]
    steps = 15 if layout == "metal" else 8
    assert bool(((got - wanted).abs() <= 2.0**-8 * (wanted.abs() + steps * spread) * 1.02).all())
    constants = [program.state_dict[f"data.{part}"] for part in ("packed", "scale_and_zero")]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(INT4_EMBEDDINGS[layout], (ids, *constants, 32, k, torch.bfloat16), test_utils=tests)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="do not fit"):
        INT4_EMBEDDINGS[layout](ids, *constants, 32, k + 64, torch.bfloat16)


@pytest.mark.parametrize("layout", INT4_EMBEDDINGS)
@pytest.mark.parametrize("outside", [33, 35])
def test_id_of_a_padding_row_raises_an_index_error(layout: str, outside: int) -> None:
    model, last = Quantized(33, 64, form=look_up), torch.tensor([[32]])
    program, _ = ecp.rewrite(exported(model, last), target_with(layout), expect={"embedding_int4": 1})
    assert program.module()(last).shape == (1, 1, 64)
    for table in (model, program.module()):
        with pytest.raises(IndexError):
            table(last - 32 + outside)


@pytest.mark.parametrize("zeros", [False, True])
def test_int8_operator_passes_opcheck(zeros: bool) -> None:
    packed, scale = torch.randint(-128, 128, (9, 64), dtype=torch.int8), torch.rand(9, 2)
    arguments = (torch.tensor([[1, 2, 8]]), packed, scale, scale - 1 if zeros else None, 32, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(INT8_EMBEDDING, arguments, test_utils=tests)


@pytest.mark.parametrize(("k", "group"), [(64, 8), (40, 40)])
def test_int4_table_without_an_int4_layout_becomes_an_int8_table(k: int, group: int) -> None:
    program = exported(Quantized(16, k, group, form=look_up), torch.tensor([1, 2]))
    assert_rewrites(program, "cuda", expect={"embedding_int8": 1}, rtol=0)


# Misses --------------------------------------------------------------------------------------------------------------


class Miss(NamedTuple):
    """A table that one requirement of a rule rejects.

    ``reason`` is a part of what follows the requirement's ``wanted`` in the report: "found ...; hint".
    """

    rule: ecp.Rule
    requirement: str
    program: Callable[[], ExportedProgram]
    reason: str
    target: str = "cuda"


INT4, INT8, EXECUTORCH = ecp.EmbeddingInt4(), ecp.EmbeddingInt8(), ecp.QuantizedEmbedding()
IDS = torch.tensor([1, 2])
BF16, FP32 = torch.bfloat16, torch.float32


def table(
    k: int = 64,
    group: int = 32,
    low: int = -8,
    high: int = 7,
    change: Callable[[Quantized], object] | None = None,
    **options: Any,
) -> Callable[[], ExportedProgram]:
    """Exports an embedding with this table when it is called."""

    def make() -> ExportedProgram:
        model = Quantized(16, k, group, low, high, form=look_up, **options)
        if change is not None:
            change(model)
        return exported(model, IDS)

    return make


def without_data() -> ExportedProgram:
    return exported(Quantized(16, 64, form=look_up).to("meta"), IDS.to("meta"))


def outside_of_the_range(model: Quantized) -> None:
    model.data[0, 0] = model.high + 2


def infinite(model: Quantized) -> None:
    model.scale[1, 1] = float("inf")


def with_large_zero_points(model: Quantized) -> None:
    model.zero_point = torch.full((16, 2), 301, dtype=torch.int32)


def with_minimums() -> ExportedProgram:
    """A table of GGUF's type Q4_K, whose blocks hold 256 weights in 144 bytes."""
    embedding = nn.Embedding(16, 256)
    blocks = ExportableGGUFTensor.from_raw(torch.zeros(16, 144, dtype=torch.uint8), "q4_k", FP32)
    embedding.weight = nn.Parameter(blocks, requires_grad=False)
    return exported(nn.Sequential(embedding), IDS)


def with_too_many_scales() -> ExportedProgram:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", torch.empty(1 << 27, 32, dtype=torch.int8, device="meta"))
            self.register_buffer("scale", torch.empty(1 << 27, 16, device="meta"))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, ecp.DEQUANTIZE(self.data, [1, 2], self.scale, None, torch.int8, -8, 7, FP32))

    return exported(Huge(), IDS.to("meta"))


INT16 = {"low": -1000, "high": 1000, "storage": torch.int16}
MISSES = {
    "int4, no data": Miss(INT4, "weight_has_data", without_data, "found meta or fake tensors; export with real"),
    "int4, integer outside of the range": Miss(
        INT4, "integers_are_in_range", table(change=outside_of_the_range), "found integers -8..9 for a range of -8..7"
    ),
    "int4, 8 bits": Miss(INT4, "weight_fits_4_bits", table(low=-128, high=127), "found 8 bits, -128..127"),
    "int4, groups of 8": Miss(INT4, "kernel_has_group_size", table(group=8), "found group size 8; triton has 16"),
    "int4, no table": Miss(
        INT4, "kernel_has_group_size", table(), "found target xnnpack, which has no int4 table", "xnnpack"
    ),
    "int4, K of 40": Miss(INT4, "kernel_tiles_divide_k", table(40, 40), "found K = 40; K must be a multiple of 16"),
    "int4, float32": Miss(
        INT4,
        "kernel_has_result_dtype",
        table(dtype=FP32),
        "found float32; export the model in one of bfloat16, float16",
    ),
    "int4, infinite scale": Miss(
        INT4, "scales_are_finite", table(change=infinite), "found 2 that are NaN or infinite; quantize the weight again"
    ),
    "int8, no data": Miss(INT8, "weight_has_data", without_data, "found meta or fake tensors; export with real"),
    "int8, integer outside of the range": Miss(
        INT8, "integers_are_in_range", table(change=outside_of_the_range), "found integers -8..9 for a range of -8..7"
    ),
    "int8, 11 bits": Miss(INT8, "weight_fits_8_bits", table(**INT16), "found 11 bits, -1000..1000"),
    "int8, infinite scale": Miss(
        INT8, "scales_are_finite", table(change=infinite), "found 1 that are NaN or infinite; quantize the weight again"
    ),
    "executorch, no data": Miss(
        EXECUTORCH, "weight_has_data", without_data, "found meta or fake tensors; export with real"
    ),
    "executorch, integer outside of the range": Miss(
        EXECUTORCH, "integers_are_in_range", table(change=outside_of_the_range), "found integers -8..9"
    ),
    "executorch, 11 bits": Miss(EXECUTORCH, "table_fits_8_bits", table(**INT16), "found 11 bits, -1000..1000"),
    "executorch, groups of 1": Miss(EXECUTORCH, "groups_have_several_weights", table(group=1), "found group size 1"),
    "executorch, 2**31 scales": Miss(
        EXECUTORCH,
        "scales_can_be_counted",
        with_too_many_scales,
        "found 2147483648 scales; quantize with larger",
    ),
    "executorch, float64 scales": Miss(
        EXECUTORCH, "executorch_has_dtypes", table(scale_dtype=torch.float64), "found float64, bfloat16"
    ),
    "executorch, minimums": Miss(
        EXECUTORCH, "weight_has_no_minimum", with_minimums, "found minimums; quantize the table with torchao"
    ),
    "executorch, zero points of 301": Miss(
        EXECUTORCH, "zero_points_are_exact", table(change=with_large_zero_points), "found 32 that are not"
    ),
    "executorch, infinite scale": Miss(
        EXECUTORCH, "scales_are_finite", table(change=infinite), "found 1 that are NaN or infinite"
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_table_is_missed_with_its_reason(name: str) -> None:
    miss = MISSES[name]
    (wanted,) = (need.wanted for need in miss.rule.requirements if need.name == miss.requirement)
    report = assert_misses(miss.program(), miss.reason, miss.target, miss.rule.name, [miss.rule])
    (outcome,) = report.outcomes
    assert wanted in {reason.wanted for reason in outcome.reasons if miss.reason in str(reason)}


@pytest.mark.parametrize("rule", [INT4, INT8, EXECUTORCH], ids=lambda rule: rule.name)
def test_requirements_have_a_miss_each(rule: ecp.Rule) -> None:
    missed = {miss.requirement for miss in MISSES.values() if miss.rule is rule}
    assert missed == {need.name for need in rule.requirements}
