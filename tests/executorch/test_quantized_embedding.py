"""QuantizedEmbedding: every form that the rule accepts, run by ExecuTorch's own runtime, against fp64."""

import io
from typing import Any

import executorch.kernels.quantized  # noqa: F401  (the runtime's kernels)
import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized, assert_misses, assert_rewrites
from tests.tables import exact, exported, look_up

REWRITTEN = {"quantized_embedding": 1, "missed": 0}


def lowered(program: ExportedProgram, partitioner: Any) -> bytes:
    buffer: bytes = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch().buffer
    return buffer


def output(pte: bytes, *inputs: Tensor) -> Tensor:
    result: Tensor = Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))[0]
    return result.clone()


def rounded_once(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of a kernel that computes in fp32: the products here have few bits, and are rounded to dtype once."""
    return wanted.float().to(dtype)


FORMS = {
    # low, high, storage, K, group, operator
    "int4 group 32": (-8, 7, torch.int8, 64, 32, "embedding_4bit"),
    "int4 per-axis": (-8, 7, torch.int8, 36, 36, "embedding_4bit"),
    "int4 group 2": (-8, 7, torch.int8, 6, 2, "embedding_4bit"),
    "unsigned int4": (0, 15, torch.uint8, 64, 16, "embedding_4bit"),
    "int4 of an odd K": (-8, 7, torch.int8, 15, 5, "embedding_byte"),
    "int3": (-4, 3, torch.int8, 64, 32, "embedding_4bit"),
    "int2": (-2, 1, torch.int8, 64, 32, "embedding_2bit"),
    "int2 of K = 6": (-2, 1, torch.int8, 6, 6, "embedding_4bit"),
    "int8 group 32": (-128, 127, torch.int8, 64, 32, "embedding_byte"),
    "int8 per-axis": (-128, 127, torch.int8, 40, 40, "embedding_byte"),
    "unsigned int8": (0, 255, torch.uint8, 40, 8, "embedding_byte"),
    "int5 in int32": (-16, 15, torch.int32, 64, 32, "embedding_byte"),
}
IDS = torch.tensor([[0, 7, 12], [5, 5, 1]])


def outputs(pte: bytes, *inputs: Tensor) -> list[Tensor]:
    return [each.clone() for each in Runtime.get().load_program(pte).load_method("forward").execute(list(inputs))]


class Together(nn.Module):
    """Tables that are lowered as one, since each lowering takes half a second; one tensor of ids for each."""

    def __init__(self, tables: list[Quantized]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)

    def forward(self, *ids: Tensor) -> list[Tensor]:
        return [table(each) for table, each in zip(self.tables, ids, strict=True)]


def separate_ids(tables: list[Quantized]) -> list[Tensor]:
    """:data:`IDS` for each table. ``torch.export`` would make one input of equal objects."""
    return [IDS.clone() for _ in tables]


def all_rewritten(tables: list[Quantized]) -> dict[str, int]:
    return {"quantized_embedding": len(tables), "missed": 0}


@pytest.mark.parametrize("zero_points", ["random", pytest.param(None, marks=pytest.mark.slow)])
def test_widths_and_groups_match_fp64(zero_points: str | None) -> None:
    tables = [
        Quantized(13, k, group, low, high, torch.float32, None, zero_points, look_up, storage)
        for low, high, storage, k, group, _ in FORMS.values()
    ]
    given = separate_ids(tables)
    ours = ecp.XnnpackPartitioner(expect=all_rewritten(tables))
    found = outputs(lowered(exported(Together(tables), *given), ours), *given)
    for form, table, got, outcome in zip(FORMS, tables, found, ours.report.outcomes, strict=True):
        assert torch.equal(got, rounded_once(exact(table)[IDS], torch.float32)), form
        assert outcome.detail.endswith(f" -> {FORMS[form][-1]}"), form


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("zero_points", ["random", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-128, 127)])
def test_dtypes_of_scales_and_result_match_fp64(low: int, high: int, zero_points: str | None) -> None:
    tables = [
        Quantized(13, 64, 32, low, high, dtype, scales, zero_points, look_up) for scales in DTYPES for dtype in DTYPES
    ]
    given = separate_ids(tables)
    program = exported(Together(tables), *given)
    found = outputs(lowered(program, ecp.XnnpackPartitioner(expect=all_rewritten(tables))), *given)
    rewritten, _ = ecp.rewrite(program, "xnnpack", expect=all_rewritten(tables))
    for table, got, before in zip(tables, found, rewritten.module()(*given), strict=True):
        wanted = rounded_once(exact(table)[IDS], table.dtype)
        assert got.dtype is table.dtype and torch.equal(got, wanted), (table.scale.dtype, table.dtype)
        assert torch.equal(before, wanted), (table.scale.dtype, table.dtype)


@pytest.mark.parametrize("check_ids", [True, False])
def test_ids_of_any_shape_and_of_int32_match_fp64(check_ids: bool) -> None:
    given = [IDS.int(), torch.tensor(7), torch.tensor([[[12]]]), IDS.new_empty(2, 0)]
    tables = [
        Quantized(13, 64, 32, -128, 127, torch.float32, zero_points="random", form=look_up, seed=seed)
        for seed in range(len(given))
    ]
    ours = ecp.XnnpackPartitioner(passes=[ecp.QuantizedEmbedding(check_ids)], expect=all_rewritten(tables))
    found = outputs(lowered(exported(Together(tables), *given), ours), *given)
    for ids, table, got in zip(given, tables, found, strict=True):
        assert torch.equal(got, rounded_once(exact(table)[ids.long()], torch.float32)), ids


def test_pt2e_zero_points_match_fp64() -> None:
    class PerChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            random = torch.Generator().manual_seed(0)
            self.register_buffer("q", torch.randint(-127, 128, (13, 20), generator=random).to(torch.int8))
            self.register_buffer("scale", torch.rand(13, generator=random) * 0.01 + 0.002)
            self.register_buffer("zero", torch.randint(-5, 5, (13,), generator=random))

        def forward(self, ids: Tensor) -> Tensor:
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
            return F.embedding(ids, dequantize(self.q, self.scale, self.zero, 0, -127, 127, torch.int8))

    model = PerChannel()
    found = output(lowered(exported(model, IDS), ecp.XnnpackPartitioner(expect=REWRITTEN)), IDS)
    wanted = (model.q.double() - model.zero.double().unsqueeze(1)) * model.scale.double().unsqueeze(1)
    assert torch.equal(found, rounded_once(wanted[IDS], torch.float32))


def test_id_outside_of_the_table_is_an_error_of_the_run() -> None:
    tables = [
        Quantized(13, 64, 32, low, high, torch.float32, form=look_up) for low, high in ((-2, 1), (-8, 7), (-128, 127))
    ]
    given = separate_ids(tables)
    pte = lowered(exported(Together(tables), *given), ecp.XnnpackPartitioner(expect=all_rewritten(tables)))
    for number in range(len(tables)):
        for beyond in (-1, 13, 10**9):
            wrong = [*given]
            wrong[number] = torch.tensor([[0, 7, 12], [5, beyond, 1]])
            with pytest.raises(RuntimeError, match="0x12"):
                outputs(pte, *wrong)
    for table, got in zip(tables, outputs(pte, *given), strict=True):
        assert torch.equal(got, rounded_once(exact(table)[IDS], torch.float32))


def test_id_outside_of_the_table_is_no_error_without_check_ids() -> None:
    model = Quantized(13, 64, 32, dtype=torch.float32, form=look_up)
    passes = [ecp.QuantizedEmbedding(check_ids=False)]
    pte = lowered(exported(model, torch.tensor([3])), ecp.XnnpackPartitioner(passes=passes))
    # The kernel reads the bytes after the table, which are still inside of the file.
    assert output(pte, torch.tensor([13])).shape == (1, 64)


class Decoder(nn.Module):
    """An embedding and the last linear, which share one parameter if ``tied``. The input is int64 [1, length]."""

    def __init__(self, table: Any, head: Any = None, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.to(dtype)
        if tied and head is None:
            quantize_(self, table, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
            self.head.weight = self.words.weight
            return
        if tied:
            self.head.weight = self.words.weight
            quantize_(self, head, filter_fn=lambda module, _: isinstance(module, nn.Linear))
        quantize_(self, table, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
        if head is not None and not tied:
            quantize_(self, head, filter_fn=lambda module, _: isinstance(module, nn.Linear))

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.words(ids)))
        return result


FOUR = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
EIGHT = IntxWeightOnlyConfig(torch.int8, PerAxis(0), mapping_type=MappingType.ASYMMETRIC)
LENGTH = Dim("length", min=1, max=32)
TOKENS = torch.tensor([[3, 1, 95]])


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("config", [FOUR, EIGHT], ids=["int4", "int8"])
def test_tied_table_is_packed_for_the_embedding_and_folded_for_the_linear(config: Any) -> None:
    model = Decoder(config, tied=True).eval()
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=({1: LENGTH},))
    rewritten, report = assert_rewrites(
        program, "xnnpack", expect={"quantized_embedding": 1, "fold_dequantize": 1, "missed": 0}, rtol=1e-6
    )
    notes = {outcome.op: str(outcome.reasons[0]) for outcome in report.outcomes}
    assert "the table is tied to aten.linear (linear)" in notes["aten.embedding"]
    assert "a second time" in notes["aten.embedding"]
    assert "folded to float32" in notes["aten.linear"]
    parts = {name.removeprefix("words.weight.").removeprefix("head.weight.") for name in rewritten.state_dict}
    assert parts == {"packed", "scale", "zeros", "dequantized"} | ({"zero_point"} if config is EIGHT else set())

    ours = ecp.XnnpackPartitioner()
    pte = lowered(program, ours)
    for length in (1, 3, 32):
        ids = torch.arange(length).view(1, -1) * 3
        assert error(output(pte, ids), model(ids)) < 1e-5
    # The delegate has a float copy of the linear's weight. A folded embedding would add a second one.
    assert len(pte) < len(lowered(program, ecp.XnnpackPartitioner(passes=[ecp.FoldDequantize()]))) - 2 * 96 * 64


def test_embedding_beside_a_linear_in_the_delegate_matches_eager() -> None:
    dynamic = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32), weight_scale_dtype=torch.bfloat16
    )
    model = Decoder(FOUR, dynamic).eval()
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=({1: LENGTH},))
    ours = ecp.XnnpackPartitioner(expect={"quantized_embedding": 1, "keep_dynamic_int4": 1, "missed": 0})
    edge = to_edge_transform_and_lower(program, partitioner=[ours])
    called = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    assert [name for name in called if "embedding_4bit" in name] and not [name for name in called if "linear" in name]
    pte = edge.to_executorch().buffer
    folded = lowered(program, ecp.XnnpackPartitioner(passes=[ecp.KeepDynamicInt4(), ecp.FoldDequantize()]))
    for length in (1, 3, 32):
        ids = torch.arange(length).view(1, -1) * 3
        found = output(pte, ids)
        # The rows are equal, and so are the delegate's logits. In eager an activation may be rounded another way.
        assert torch.equal(found, output(folded, ids))
        assert error(found, model(ids)) < 3e-3


def test_bf16_result_equals_the_folded_one() -> None:
    model = Decoder(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), dtype=torch.bfloat16)
    program = exported(model, TOKENS)
    found = output(lowered(program, ecp.XnnpackPartitioner(expect=REWRITTEN)), TOKENS)
    folded = output(lowered(program, ecp.XnnpackPartitioner(passes=[ecp.FoldDequantize()])), TOKENS)
    assert found.dtype is torch.bfloat16 and torch.equal(found, folded)


def test_report_names_the_kernels_that_the_runtime_needs() -> None:
    model = Quantized(13, 64, 32, dtype=torch.float32, form=look_up)
    _, report = ecp.rewrite(exported(model, IDS), "xnnpack", expect=REWRITTEN)
    assert "import executorch.kernels.quantized" in str(report.outcomes[0].reasons[0])


def test_second_rewrite_changes_nothing() -> None:
    program = exported(Decoder(EIGHT), TOKENS)
    first, _ = ecp.rewrite(program, "xnnpack", expect=REWRITTEN)
    second, report = ecp.rewrite(first, "xnnpack")
    assert report.outcomes == [] and report.warnings == []
    assert str(second.graph) == str(first.graph)
    assert set(second.state_dict) == set(first.state_dict)


def test_two_lowerings_give_equal_bytes() -> None:
    program = exported(Decoder(EIGHT), TOKENS)
    assert lowered(program, ecp.XnnpackPartitioner()) == lowered(program, ecp.XnnpackPartitioner())


def test_rewritten_program_can_be_saved_and_loaded() -> None:
    model = Quantized(13, 64, 32, dtype=torch.float32, form=look_up)
    rewritten, _ = ecp.rewrite(exported(model, IDS), "xnnpack", expect=REWRITTEN)
    file = io.BytesIO()
    torch.export.save(rewritten, file)
    again = torch.export.load(io.BytesIO(file.getvalue()))
    found = output(lowered(again, ecp.XnnpackPartitioner()), IDS)
    assert torch.equal(found, rounded_once(exact(model)[IDS], torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_program_matches_fp64(dtype: torch.dtype) -> None:
    model = Quantized(13, 64, 32, -128, 127, dtype, torch.float32, "random", look_up)
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge(exported(model, IDS.int()), compile_config=config).exported_program()
    rewritten, _ = ecp.rewrite(edge, "xnnpack", expect=REWRITTEN)
    targets = [node.target for node in rewritten.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, EdgeOpOverload) for target in targets)
    assert torch.equal(rewritten.module()(IDS.int()), rounded_once(exact(model)[IDS], dtype))


def test_two_tables_with_three_embeddings_are_rewritten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Quantized(13, 64, 32, dtype=torch.float32, form=look_up)
            self.two = Quantized(13, 64, 64, -128, 127, torch.float32, form=look_up, seed=1)

        def forward(self, ids: Tensor) -> Tensor:
            weight = self.one.weight()
            return F.embedding(ids, weight) + self.two(ids) + F.embedding(ids.flip(0), weight)

    model = Twice()
    ours = ecp.XnnpackPartitioner(expect={"quantized_embedding": 3, "missed": 0})
    found = output(lowered(exported(model, IDS), ours), IDS)
    wanted = exact(model.one)[IDS] + exact(model.two)[IDS] + exact(model.one)[IDS.flip(0)]
    assert error(found, wanted.float()) < 1e-6


def test_embedding_in_a_branch_is_rewritten() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Quantized(13, 64, 32, dtype=torch.float32, zero_points="random", form=look_up)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return torch.cond(
                x.sum() > 0, lambda y, i: F.embedding(i, self.table.weight()) + y, lambda y, i: y * 2, (x, ids)
            )

    model, x = Lookup(), torch.ones(13, 64)
    ids = torch.arange(13)
    program = torch.export.export(model, (x, ids))
    pte = lowered(program, ecp.XnnpackPartitioner(expect=REWRITTEN))
    for sign in (1, -1):
        assert error(output(pte, x * sign, ids), model(x * sign, ids)) < 1e-6


def with_large_zero_points() -> Quantized:
    model = Quantized(13, 64, dtype=torch.bfloat16, zero_points="random", form=look_up)
    model.zero_point = torch.full((13, 2), 301, dtype=torch.int32)
    return model


def with_integer_outside_of_the_range() -> Quantized:
    model = Quantized(13, 64, dtype=torch.float32, form=look_up)
    model.data[0, 0] = 9
    return model


FOLDED = {
    # model, and the reason why no operator holds the table
    "int11": (
        lambda: Quantized(13, 64, 64, -1000, 1000, torch.float32, form=look_up, storage=torch.int16),
        "found 11 bits",
    ),
    "groups of 1": (lambda: Quantized(13, 64, 1, dtype=torch.float32, form=look_up), "found group size 1"),
    "float64 scales": (
        lambda: Quantized(13, 64, scale_dtype=torch.float64, dtype=torch.float32, form=look_up),
        "found float64, float32",
    ),
    "zero points of 301": (with_large_zero_points, "found 26 that are not"),
    # Folded, an integer outside of the stated range is a float like any other.
    "integer outside of the range": (with_integer_outside_of_the_range, "found integers -8..9 for a range of -8..7"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_missed_table_is_folded_and_matches_eager(name: str) -> None:
    make, found = FOLDED[name]
    model = make()
    program = exported(model, IDS)
    assert_misses(program, found, "xnnpack", rule="quantized_embedding", passes=[ecp.QuantizedEmbedding()])
    ours = ecp.XnnpackPartitioner(expect={"fold_dequantize": 1, "missed": 0})
    assert error(output(lowered(program, ours), IDS), model(IDS)) < 1e-6
    assert found in str(ours.report.outcomes[0].reasons[0])


def test_table_that_is_neither_packed_nor_folded_stops_the_lowering() -> None:
    damaged = Quantized(13, 64, dtype=torch.float32, form=look_up)
    damaged.scale[1, 1] = float("nan")
    with pytest.raises(ValueError, match="quantized_embedding .*found 1 that are NaN or infinite"):
        lowered(exported(damaged, IDS), ecp.XnnpackPartitioner())
