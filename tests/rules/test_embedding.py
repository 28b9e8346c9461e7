"""embedding_int4 and embedding_int8: rows against fp64, tables tied to a linear, AOTInductor, and every way to miss."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim, ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT8_EMBEDDING
from et_cuda_passes.targets import get_target
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.quantized import Quantized


def look_up(table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every row of the table, in another order than it has."""
    return F.embedding(table, weight)


def exported(model: nn.Module, ids: Tensor) -> ExportedProgram:
    return torch.export.export(model, (ids,))


def exact(model: Quantized) -> Tensor:
    """The table as the scheme says it is, in fp64."""
    spread = lambda t: t.double().repeat_interleave(model.block[1], 1)  # noqa: E731
    points = 0.0 if model.zero_point is None else spread(model.zero_point)
    return (model.data.double() - points) * spread(model.scale)


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(13, 32, 32), (24, 64, 32), (40, 128, 64), (16, 384, 192), (9, 256, 256)]
)
@pytest.mark.parametrize("zero_points", ["random", None])
def test_int4_rows_against_fp64(n: int, k: int, group: int, zero_points: str | None, target: str) -> None:
    model = Quantized(n, k, group, zero_points=zero_points, form=look_up)
    ids = torch.arange(n).flip(0).view(1, -1)
    rewritten, report = ecp.rewrite(exported(model, ids), target, expect={"embedding_int4": 1, "missed": 0})
    assert report.outcomes[0].op == "aten.embedding"
    got, wanted = rewritten.module()(ids), exact(model).flip(0).unsqueeze(0)
    assert (got.dtype, got.shape) == (torch.bfloat16, (1, n, k))
    # Scale and zero are bf16 as given; zero is rounded, and each weight once. Metal's is the weight of q = 0.
    spread = model.scale.double().repeat_interleave(group, 1).flip(0)
    steps = 15 if target == "metal" else 8
    assert bool(((got.double() - wanted).abs() <= 2.0**-8 * (wanted.abs() + steps * spread) * 1.02).all())


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize(("group", "low", "high", "storage"), [(40, -128, 127, torch.int8), (8, 0, 255, torch.uint8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_rows_against_fp64(
    group: int, low: int, high: int, storage: torch.dtype, dtype: torch.dtype, target: str
) -> None:
    model = Quantized(13, 40, group, low, high, dtype, None, "random", look_up, storage)
    ids = torch.tensor([[0, 12, 5], [5, 5, 1]])
    rewritten, _ = ecp.rewrite(exported(model, ids), target, expect={"embedding_int8": 1, "missed": 0})
    got, wanted = rewritten.module()(ids), exact(model)[ids]
    steps = model.scale.double().repeat_interleave(group, 1)[ids]
    # In bf16 the result is rounded; in fp32 two products of up to 255 steps and their sum.
    allowed = wanted.abs() * 2.0**-8 * 1.02 if dtype is torch.bfloat16 else 255 * steps * 2.0**-22
    assert bool(((got.double() - wanted).abs() <= allowed + 255 * steps * 2.0**-22).all())


class Tied(nn.Module):
    """A table of words read by an embedding and, as the same parameter, by the last linear."""

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
def test_a_table_tied_to_the_last_linear_is_held_once(case: str) -> None:
    config, target, parts = TIED[case]
    rewritten, _ = assert_rewrites(
        exported(Tied(config), torch.tensor([[3, 1], [47, 0]])), target, expect={"rewritten": 2, "missed": 0}, rtol=2e-2
    )
    assert sorted(rewritten.state_dict) == sorted(f"words.weight.{part}" for part in parts)


def test_a_tied_table_that_only_the_embedding_gives_up_stays_for_the_linear() -> None:
    ids = torch.tensor([[3, 1], [47, 0]])
    program = exported(Tied(IntxWeightOnlyConfig(torch.int8, PerGroup(8))), ids)
    rewritten, report = assert_rewrites(program, "cuda", expect={"embedding_int8": 1, "missed": 1}, rtol=0)
    assert [outcome.op for outcome in report.outcomes if outcome.status == "missed"] == ["aten.linear"]
    assert {"words.weight.packed", "words.weight.scale", "head.weight"} == set(rewritten.state_dict)


def test_under_aotinductor_with_a_dynamic_length(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.four, self.eight = nn.Embedding(48, 64), nn.Embedding(48, 64)
            self.bfloat16()
            for name, config in (
                ("four", IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC)),
                ("eight", IntxWeightOnlyConfig(torch.int8, PerGroup(16), mapping_type=MappingType.ASYMMETRIC)),
            ):
                quantize_(self, config, filter_fn=lambda _, fqn, name=name: fqn == name)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.four(ids), self.eight(ids)

    model = Both().eval()
    program = torch.export.export(model, (torch.tensor([[3, 1, 2]]),), dynamic_shapes=({1: Dim("length", max=64)},))
    packed, _ = ecp.rewrite(program, "cpu", expect={"embedding_int4": 1, "embedding_int8": 1, "missed": 0})
    compiled = aoti_load_package(aoti_compile_and_package(packed, package_path=str(tmp_path / "both.pt2")))
    ids = torch.arange(48).view(1, 48)
    for got, wanted, eager in zip(compiled(ids), model(ids), packed.module()(ids), strict=True):
        assert torch.equal(got, eager)
        assert (got - wanted).norm() / wanted.norm() < 6e-3


def held_as(layout: str) -> ecp.Target:
    """A target that holds int4 tables in ``layout``."""
    cuda, tables = get_target("cuda"), [get_target(name).kernel("int4_table") for name in ("cpu", "metal")]
    kernel = next(kernel for kernel in (*cuda.kernels["int4_linear"], *tables) if kernel.layout == layout)
    return dataclasses.replace(cuda, kernels={**cuda.kernels, "int4_table": (kernel,)})


@pytest.mark.parametrize("layout", INT4_EMBEDDINGS)
@pytest.mark.parametrize("k", [32, 96, 256])
def test_every_layout_is_read_alike(layout: str, k: int) -> None:
    model, ids = Quantized(16, k, zero_points="random", form=look_up), torch.tensor([[1, 2, 15]])
    program, _ = ecp.rewrite(exported(model, ids), held_as(layout), expect={"embedding_int4": 1})
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
@pytest.mark.parametrize("beyond", [33, 35])
def test_an_id_that_is_no_row_s_is_an_error_though_the_table_is_padded(layout: str, beyond: int) -> None:
    model, last = Quantized(33, 64, form=look_up), torch.tensor([[32]])
    program, _ = ecp.rewrite(exported(model, last), held_as(layout), expect={"embedding_int4": 1})
    assert program.module()(last).shape == (1, 1, 64)
    for table in (model, program.module()):
        with pytest.raises(IndexError):
            table(last - 32 + beyond)


@pytest.mark.parametrize("zeros", [False, True])
def test_registration_of_int8(zeros: bool) -> None:
    packed, scale = torch.randint(-128, 128, (9, 64), dtype=torch.int8), torch.rand(9, 2)
    arguments = (torch.tensor([[1, 2, 8]]), packed, scale, scale - 1 if zeros else None, 32, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(INT8_EMBEDDING, arguments, test_utils=tests)


def test_the_ways_to_miss() -> None:
    ids = torch.tensor([1, 2])
    wide = exported(Quantized(16, 64, 64, -1000, 1000, form=look_up, storage=torch.int16), ids)
    assert_misses(wide, "at most 8 bits, found 11 bits", "cpu", rule="embedding_int8")
    # What has no int4 form is held by the next: 16 to a group, or 48 to a row.
    for model in (Quantized(16, 64, 16, form=look_up), Quantized(16, 48, 48, form=look_up)):
        assert_rewrites(exported(model, ids), "cuda", expect={"embedding_int8": 1}, rtol=0)
    only_four = [ecp.EmbeddingInt4()]
    for model, found in (
        (Quantized(16, 64, 16, form=look_up), "found group size 16"),
        (Quantized(16, 48, 48, form=look_up), "found K = 48"),
        (Quantized(16, 64, dtype=torch.float32, form=look_up), "found float32"),
        (Quantized(16, 64, low=-128, high=127, form=look_up), "found 8 bits, -128..127"),
    ):
        assert_misses(exported(model, ids), found, "cuda", rule="embedding_int4", passes=only_four)
    damaged = Quantized(16, 64, form=look_up)
    damaged.data[0, 0], damaged.scale[1, 1] = 9, float("nan")
    report = assert_misses(exported(damaged, ids), "found integers -8..9 for a range of -8..7", "cpu", passes=only_four)
    assert "found 2 that are NaN or infinite" in str(report) or "found 1 that are NaN or infinite" in str(report)
