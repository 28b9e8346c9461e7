"""Products with the weights of experts: every form that models export, against fp64, and every reason for a miss."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.rules.experts import PACKED_STACK
from et_cuda_passes.testing import Experts, Sketch, assert_misses, assert_rewrites, export, floats
from tests.experts import DEQUANTIZE, FORMS, IDS, OFFS, E, K, N, off
from tests.helpers import Together
from tests.rules.test_near_misses import outside_of_branches

aten = torch.ops.aten

# The weights and the result are rounded to bf16, half a unit in the last place each; a sum of results adds a little.
TOLERANCE = 6e-3
TOKENS = "einsum of a token's experts"
BMM, INDEXED, GROUPED = FORMS["bmm"][1], FORMS["index"][1], FORMS["grouped mm"][1]
OTHERS = [("cuda", None), ("cpu", "random")]
"""The packing of zero points does not depend on the form of the product: each target has one of the two cases."""


@cache
def exported(name: str) -> ExportedProgram:
    return export(Experts(FORMS[name][1]), *FORMS[name][3])


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: value for name, value in program.state_dict.items() if "packed" in name or "scale_and" in name}


@pytest.mark.parametrize(
    ("target", "zero_points"),
    [("cuda", "random"), ("cpu", None), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)],
)
@pytest.mark.parametrize("decompose", [False, True], ids=["as exported", "decomposed"])
def test_product_is_rewritten_and_matches_fp64(zero_points: str | None, decompose: bool, target: str) -> None:
    """A decomposed einsum is a bmm."""
    names = [name for name in FORMS if not (decompose and name.startswith("einsum"))]
    models = [Experts(FORMS[name][1], zero_points=zero_points) for name in names]
    given = [tuple(x.clone() for x in FORMS[name][3]) for name in names]
    program = export(Together(models), given, decompose=decompose)
    rewritten, report = assert_rewrites(program, target, expect={"missed": 0, "kept": 0})
    rules = {name: {o.rule for o in report.outcomes if o.fqn.startswith(f"parts.{n}.")} for n, name in enumerate(names)}
    assert rules == {name: {FORMS[name][0]} for name in names}
    assert report.counts()["rewritten"] == len(report.outcomes)
    for name, model, inputs, y in zip(names, models, given, rewritten.module()(given), strict=True):
        wanted = FORMS[name][2](model.exact(), *(x.double() if x.is_floating_point() else x for x in inputs))
        assert off(y, wanted) < TOLERANCE, name
    assert not [node for node in rewritten.graph.nodes if "dequantize" in node.name]
    assert set(rewritten.state_dict) == set(constants(rewritten))


COLUMNS = {
    "bmm": lambda w, x: torch.bmm(x, w),
    "index": lambda w, x, ids: torch.bmm(x.unsqueeze(1), w[ids]).squeeze(1),
    "grouped mm": lambda w, x, offs: F.grouped_mm(x, w, offs=offs),
}


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("zero_points", ["random", None])
@pytest.mark.parametrize("name", COLUMNS)
def test_stack_stored_as_columns_matches_fp64(name: str, zero_points: str | None, target: str) -> None:
    """[E, K, N], as gpt-oss stores it, multiplied without a transpose."""
    rule, _, plain, inputs = FORMS[name]
    model = Experts(COLUMNS[name], zero_points=zero_points, columns=True)
    rewritten, _ = assert_rewrites(export(model, *inputs), target, expect={rule: 1, "missed": 0})
    wanted = plain(model.exact(), *(x.double() if x.is_floating_point() else x for x in inputs))
    assert off(rewritten.module()(*inputs), wanted) < TOLERANCE


@pytest.mark.parametrize("block", [(1, 1, 64), (1, 4, 32), (E, N, 32), (1, N, 96), (1, 1, 96)], ids=str)
def test_scales_of_wide_blocks_are_repeated_for_each_row(block: tuple[int, ...]) -> None:
    k = 192 if block[2] == 64 else K
    model, x = Experts(BMM, block, shape=(E, N, k)), floats(E, 3, k)
    rewritten, _ = assert_rewrites(export(model, x), "cuda", expect={"bmm_int4": 1})
    assert off(rewritten.module()(x), torch.bmm(x.double(), model.exact().transpose(1, 2))) < TOLERANCE


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm", "select", TOKENS])
def test_dynamic_number_of_tokens_matches_fp64(name: str, target: str) -> None:
    _, form, plain, inputs = FORMS[name]
    tokens = Dim("tokens", min=2, max=64)
    both = ({0: tokens}, {0: tokens})
    axes: dict[str, tuple[Any, ...]] = {"bmm": ({1: tokens},), "index": both, TOKENS: both}
    model = Experts(form)
    program = export(model, *inputs, dynamic=axes.get(name, ({0: tokens}, None)[: len(inputs)]))
    rewritten, _ = assert_rewrites(program, target, expect={"missed": 0})
    for count in (2, 7, 33):
        given = [floats(E, count, K, seed=count) if name == "bmm" else floats(count, K, seed=count)]
        given += [torch.arange(count) % E] if name == "index" else []
        given += [torch.arange(2 * count).view(count, 2) % E] if name == TOKENS else []
        given += [torch.tensor([1, count // 2, count // 2, count], dtype=torch.int32)] if name == "grouped mm" else []
        wanted = plain(model.exact(), *(x.double() if x.is_floating_point() else x for x in given))
        assert off(rewritten.module()(*given), wanted) < TOLERANCE


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("equation", ["tk,snk->stn", "tk,snk->tsn", "snk,tk->nts"])
def test_einsum_of_dynamic_tokens_and_ids_matches_fp64(equation: str, target: str) -> None:
    left = equation.startswith("s")
    model = Experts(lambda w, x, ids: torch.einsum(equation, *((w[ids], x) if left else (x, w[ids]))))
    dynamic = ({0: Dim("tokens", min=2, max=64)}, {0: Dim("ids", min=2, max=64)})
    program = export(model, floats(5, K), IDS, dynamic=dynamic)
    rewritten, _ = assert_rewrites(program, target, expect={"einsum_int4": 1})
    for tokens, count in ((5, 6), (2, 3), (33, 7)):
        x, ids = floats(tokens, K, seed=tokens), torch.arange(count) % E
        weight = model.exact()[ids]
        wanted = torch.einsum(equation, *((weight, x.double()) if left else (x.double(), weight)))
        assert off(rewritten.module()(x, ids), wanted) < TOLERANCE


# equation -> the shape of x
EINSUMS = {
    "ebk,enk->ben": (E, 5, K),
    "ebk,enk->ebn": (E, 5, K),
    "tk,enk->etn": (5, K),
    "tk,enk->nte": (5, K),
    "abk,enk->bane": (2, 3, K),
    "eabk,enk->aenb": (E, 2, 3, K),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_result_keeps_its_strides(equation: str) -> None:
    model, x = Experts(lambda w, x: torch.einsum(equation, x, w)), floats(*EINSUMS[equation])
    program = export(model, x)
    rewritten, _ = assert_rewrites(program, "cuda", expect={"einsum_int4": 1})
    assert rewritten.module()(x).stride() == program.module()(x).stride()


def test_decomposed_einsum_that_a_view_reads_is_rewritten() -> None:
    model = Experts(lambda w, x: torch.einsum("ebk,enk->ben", x, w).transpose(0, 1).reshape(E * 5, N))
    program = export(model, floats(E, 5, K)).run_decompositions({})
    assert_rewrites(program, "cuda", expect={"missed": 0, "rewritten": 1})


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["index", "index, rows on the left", TOKENS])
def test_zero_tokens_give_an_empty_result(name: str, target: str) -> None:
    _, form, _, inputs = FORMS[name]
    tokens = Dim("tokens", min=0, max=64)
    program = export(Experts(form), *inputs, dynamic=({0: tokens}, {0: tokens}))
    rewritten, _ = assert_rewrites(program, target, expect={"missed": 0})
    none = [given[:0] for given in inputs]
    assert rewritten.module()(*none).shape == program.module()(*none).shape


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_dynamic_number_of_rows_beside_weights_on_the_left_is_rewritten(target: str) -> None:
    """The number of rows depends on the values of x."""
    model = Experts(lambda weight, x: torch.bmm(weight, x[:, (x[0, :, 0] > 0).nonzero().squeeze(1)].mT))
    assert_rewrites(export(model, floats(E, 5, K)), target, expect={"bmm_int4": 1, "missed": 0})


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_rows_after_the_last_offset_are_zero(target: str) -> None:
    program = export(Experts(GROUPED), floats(14, K), OFFS)
    rewritten, _ = ecp.rewrite(program, target, expect={"grouped_mm_int4": 1})
    y = rewritten.module()(floats(14, K), OFFS)
    assert not y[11:].any() and y[:11].any(dim=1).all()


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_id_that_is_no_expert_raises_an_index_error(target: str) -> None:
    rewritten, _ = ecp.rewrite(export(Experts(INDEXED), floats(6, K), IDS), target, expect={"indexed_bmm_int4": 1})
    with pytest.raises(IndexError):
        rewritten.module()(floats(6, K), torch.tensor([0, 1, 2, 3, 4, 0]))


def test_stack_that_several_products_read_is_packed_once_per_layout() -> None:
    def form(w: Tensor, x: Tensor, ids: Tensor, offs: Tensor) -> tuple[Tensor, ...]:
        return BMM(w, x[None].expand(E, -1, -1)), INDEXED(w, x, ids), GROUPED(w, x, offs), INDEXED(w, x, ids + 0)

    program = export(Experts(form), floats(6, K), IDS, OFFS)
    expect = {"bmm_int4": 1, "indexed_bmm_int4": 2, "grouped_mm_int4": 1, "missed": 0}
    on_cuda, _ = assert_rewrites(program, "cuda", expect=expect)
    assert {name: tuple(value.shape) for name, value in constants(on_cuda).items()} == {
        "data.packed": (E, N, 128 // 8),
        "data.scale_and_zero": (2, E, N, 8),
    }
    # On the CPU the products with ids share a second layout.
    on_cpu, _ = assert_rewrites(program, "cpu", expect=expect)
    assert sorted(constants(on_cpu)) == sorted(
        f"data.{kind}{more}" for kind in ("packed", "scale_and_zero") for more in ("", "_2")
    )


@pytest.mark.parametrize("block", [(1, 64, 64), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_square_stack_that_is_multiplied_both_ways_matches_fp64(target: str, block: tuple[int, ...]) -> None:
    """Both products read the same integers, which each of them packs in its own order."""
    model, x = Experts(lambda w, x: (x @ w.mT, x @ w), block, shape=(3, 64, 64)), floats(3, 5, 64)
    rewritten, _ = assert_rewrites(export(model, x), target, expect={"bmm_int4": 2})
    weight = model.exact()
    for got, wanted in zip(rewritten.module()(x), (x.double() @ weight.mT, x.double() @ weight), strict=True):
        assert off(got, wanted) < TOLERANCE


def test_only_the_experts_that_are_used_are_packed() -> None:
    def form(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, w[1]) + F.linear(x + 1, w[1]) + F.linear(x, w[-1])

    program = export(Experts(form, zero_points=None), floats(5, K))
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int4": 3, "missed": 0})
    kinds = ("packed", "scale_and_zero")
    assert sorted(constants(rewritten)) == [f"data.expert_{e}_{kind}" for e in (1, 3) for kind in kinds]
    assert {outcome.fqn for outcome in report.outcomes} == {"data"}


def test_slice_and_split_select_one_expert() -> None:
    def form(w: Tensor, x: Tensor) -> Tensor:
        last, piece, first = w[-1:].squeeze(0), w.split([2, 1, 1])[1].squeeze(0), w[:1].squeeze(0)
        return torch.cat([F.linear(x, last), F.linear(x, piece), F.linear(x, first)])

    model, x = Experts(form), floats(5, K)
    rewritten, _ = assert_rewrites(export(model, x), "cuda", expect={"linear_int4": 3, "missed": 0})
    wanted = torch.cat([x.double() @ model.exact()[e].T for e in (3, 2, 0)])
    assert off(rewritten.module()(x), wanted) < TOLERANCE


def test_two_methods_share_packed_experts() -> None:
    model = Experts(lambda w, x, ids=None: BMM(w, x) if ids is None else INDEXED(w, x, ids))
    pool = ConstantCache()
    prefill, _ = ecp.rewrite(export(model, floats(E, 5, K)), "cuda", pool=pool)
    decode, _ = ecp.rewrite(export(model, floats(6, K), IDS), "cuda", pool=pool)
    first, second = constants(prefill), constants(decode)
    assert sorted(first) == sorted(second) == ["data.packed", "data.scale_and_zero"]
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm", "unbind"])
def test_two_rewrites_give_equal_bytes(name: str) -> None:
    def saved() -> bytes:
        buffer = io.BytesIO()
        torch.export.save(ecp.rewrite(exported(name), "cuda")[0], buffer)
        return buffer.getvalue()

    assert saved() == saved()


def test_single_int8_expert_becomes_an_int8_linear() -> None:
    model = Experts(lambda w, x: F.linear(x, w[2]), (1, 1, K), -128, 127, zero_points=None)
    rewritten, _ = assert_rewrites(export(model, floats(5, K)), "cpu", expect={"linear_int8": 1})
    assert off(rewritten.module()(floats(5, K)), floats(5, K).double() @ model.exact()[2].T) < TOLERANCE


@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm"])
def test_stack_is_folded_for_xnnpack(name: str) -> None:
    _, report = assert_rewrites(exported(name), "xnnpack", expect={"fold_dequantize": 1, "missed": 0}, rtol=0)
    assert "as large as before it was quantized" in str(report.outcomes[0].reasons[0])


# Misses --------------------------------------------------------------------------------------------------------------


class Miss(NamedTuple):
    """A program that one requirement of a rule rejects.

    ``reason`` is a part of what follows the requirement's ``wanted`` in the report: "found ...; hint".
    """

    rule: type[ecp.Rule]
    requirement: str
    program: Callable[[], ExportedProgram]
    reason: str
    target: str | ecp.Target = "cuda"


def programs(
    form: Callable[..., Any], *inputs: Tensor, dynamic: Any = None, decompose: bool = False, **options: Any
) -> Any:
    """Exports an :class:`Experts` of these options when it is called."""
    return lambda: export(Experts(form, **options), *inputs, dynamic=dynamic, decompose=decompose)


def damaged(change: Callable[[Experts], None]) -> Callable[[], ExportedProgram]:
    def make() -> ExportedProgram:
        model = Experts(BMM)
        change(model)
        return export(model, floats(E, 5, K))

    return make


def infinite(model: Experts) -> None:
    model.scale[1, 2, 0] = float("inf")


def outside(model: Experts) -> None:
    model.data[3, 0, 0] = 8


def without_data() -> ExportedProgram:
    return export(Experts(BMM).to("meta"), floats(E, 5, K).to("meta"))


class Autocast(nn.Module):
    """Experts in fp32 under autocast to bf16."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = Experts(form, dtype=torch.float32)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.experts(x)


def under_autocast(form: Callable[..., Tensor]) -> Callable[[], ExportedProgram]:
    return lambda: torch.export.export(Autocast(form), (floats(E, 5, K, dtype=torch.float32),))


def grouped_batches() -> ExportedProgram:
    """Written node by node: torch's operator takes no batches with offsets, and that of transformers might."""
    sketch = Sketch()
    data = sketch.buffer("data", torch.zeros(E, N, K, dtype=torch.int8))
    scale = sketch.buffer("scale", torch.ones(E, N, K // 32, dtype=torch.bfloat16))
    x, offs = sketch.input("x", E, 5, K, dtype=torch.bfloat16), sketch.input("offs", E, dtype=torch.int32)
    weight = sketch.call(DEQUANTIZE, data, [1, 1, 32], scale, None, torch.int8, -8, 7, torch.bfloat16)
    stack = sketch.call(aten.transpose.int, weight, 1, 2)
    y = torch.empty(E, 5, N, dtype=torch.bfloat16)
    return sketch.program(sketch.raw(aten._grouped_mm.default, x, stack, offs, val=y))


class Branch(nn.Module):
    """Experts inside a branch of a cond, where their weights are dequantized."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(BMM)

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.experts(x), lambda x: x[..., :N] * 2, (x,))


BATCHES, TWO = {0: Dim("batches", min=2, max=64)}, (Dim("tokens", min=2, max=64), Dim("rows", min=2, max=64))
MATMUL: Callable[..., Tensor] = lambda w, x: x @ w.mT  # noqa: E731
SELECTED: Callable[..., Tensor] = lambda w, x, ids: torch.matmul(x, w[ids].mT)  # noqa: E731
MISSES = {
    "no data": Miss(
        ecp.BmmInt4, "weight_has_data", without_data, "found meta or fake tensors; export with real weights"
    ),
    "no kernel on metal": Miss(
        ecp.GroupedMmInt4,
        "target_multiplies_experts",
        programs(GROUPED, floats(11, K), OFFS),
        "found target metal, which has none; multiply by one expert at a time, selected by its number",
        "metal",
    ),
    "groups along N": Miss(
        ecp.BmmInt4,
        "stack_is_grouped_along_k",
        programs(BMM, floats(E, 5, K), block=(1, 8, 1)),
        "found blocks of 8 rows and 1 along K; the groups lie along N: quantize in groups along K",
    ),
    "columns in groups along N": Miss(
        ecp.BmmInt4,
        "stack_is_grouped_along_k",
        programs(lambda w, x: torch.bmm(x, w), floats(E, 5, K), block=(1, 1, 8), columns=True),
        "in blocks of (1, 1, 32) of [E, N, K] or (1, 32, 1) of [E, K, N]",
        "cpu",
    ),
    "scales that some experts share": Miss(
        ecp.BmmInt4,
        "stack_is_grouped_along_k",
        programs(BMM, floats(E, 5, K), block=(2, 8, 32)),
        "found scales in blocks of [2, 8, 32], which several experts share in part",
    ),
    "sum over experts": Miss(
        ecp.EinsumInt4,
        "stack_is_grouped_along_k",
        programs(lambda w, x: torch.einsum("etk,enk->tn", x, w), floats(E, 5, K)),
        "found the equation 'etk,enk->tn', which is no product of rows with matrices: write it as linear or bmm",
    ),
    "int8": Miss(
        ecp.BmmInt4,
        "weight_fits_4_bits",
        programs(BMM, floats(E, 5, K), low=-128, high=127),
        "found 8 bits, -128..127; quantize with weight_dtype=torch.int4",
    ),
    "groups of 16": Miss(
        ecp.BmmInt4,
        "kernel_has_group_size",
        programs(BMM, floats(E, 5, K), block=(1, 1, 16)),
        "found group size 16; triton has 32, 64, 128 and their multiples",
    ),
    "K of 48": Miss(
        ecp.BmmInt4,
        "kernel_tiles_divide_k",
        programs(BMM, floats(E, 5, 48), block=(1, 1, 48), shape=(E, N, 48)),
        "found K = 48; K must be a multiple of 32",
    ),
    "branch of a cond": Miss(
        ecp.BmmInt4,
        "kernel_runs_in_control_flow",
        lambda: torch.export.export(Branch(), (floats(E, 5, K),)),
        "found control flow at",
        outside_of_branches(),
    ),
    "float32": Miss(
        ecp.BmmInt4,
        "kernel_has_activation_dtype",
        programs(BMM, floats(E, 5, K, dtype=torch.float32), dtype=torch.float32),
        "found float32; triton has bfloat16, float16: export the model in one of these",
    ),
    "bmm under autocast": Miss(
        ecp.BmmInt4, "same_dtype", under_autocast(BMM), "found float32 for a result in bfloat16; autocast", "cpu"
    ),
    "indexed bmm under autocast": Miss(
        ecp.IndexedBmmInt4,
        "same_dtype",
        under_autocast(lambda w, x: SELECTED(w, x, torch.tensor([2, 0, 1, 1]))),
        "found float32 for a result in bfloat16; autocast",
        "cpu",
    ),
    "einsum under autocast": Miss(
        ecp.EinsumInt4,
        "same_dtype",
        under_autocast(lambda w, x: torch.einsum("emk,enk->emn", x, w)),
        "found float32 for a result in bfloat16; autocast",
        "cpu",
    ),
    "integer outside of the range": Miss(
        ecp.BmmInt4, "integers_are_in_range", damaged(outside), "found integers -8..8 for a range of -8..7"
    ),
    "infinite scale": Miss(
        ecp.BmmInt4,
        "scales_are_finite",
        damaged(infinite),
        "found 2 that are NaN or infinite; quantize the weight again",
    ),
    "decomposed product with x of four dimensions": Miss(
        ecp.BmmInt4,
        "stack_keeps_its_shape",
        programs(MATMUL, floats(1, E, 5, K), decompose=True),
        "found [4, 96, 40] as [1, 4, 96, 40] as [4, 96, 40]; reshape x to [E, M, K] instead",
    ),
    "decomposed product of selected experts with x of four dimensions": Miss(
        ecp.IndexedBmmInt4,
        "stack_keeps_its_shape",
        programs(SELECTED, floats(1, 6, 5, K), IDS, decompose=True),
        "found [6, 96, 40] as [1, 6, 96, 40] as [6, 96, 40]",
    ),
    "x of four dimensions": Miss(
        ecp.BmmInt4,
        "x_has_rows_for_all_experts",
        programs(MATMUL, floats(2, 1, 5, K)),
        "found x [2, 1, 5, 96] for 4 experts; reshape x",
    ),
    "matrix of ids": Miss(
        ecp.IndexedBmmInt4,
        "ids_are_a_vector",
        programs(SELECTED, floats(3, 2, 1, K), IDS.view(3, 2)),
        "found ids torch.int64 [3, 2]; flatten the ids",
    ),
    "one id for several batches": Miss(
        ecp.IndexedBmmInt4,
        "x_has_rows_for_each_id",
        programs(SELECTED, floats(4, 5, K), IDS[:1]),
        "found x [4, 5, 96] for ids [1]; give x as many batches as there are ids",
        "cpu",
    ),
    "one id for a dynamic number of batches": Miss(
        ecp.IndexedBmmInt4,
        "x_has_rows_for_each_id",
        programs(SELECTED, floats(4, 5, K), IDS[:1], dynamic=(BATCHES, None)),
        "for ids [1]; give x as many batches as there are ids",
    ),
    "grouped batches": Miss(
        ecp.GroupedMmInt4,
        "rows_are_sorted_by_expert",
        grouped_batches,
        "found x [4, 5, 96], offs torch.int32 [4]; sort the rows by expert and flatten them",
    ),
    "mask instead of ids": Miss(
        ecp.EinsumInt4,
        "ids_are_integers",
        programs(
            lambda w, x, mask: torch.einsum("sk,snk->sn", x, w[mask]),
            floats(2, K),
            torch.tensor([True, False, True, False]),
        ),
        "found ids torch.bool; look experts up by their numbers: weight[ids]",
    ),
    "einsum that repeats x": Miss(
        ecp.EinsumInt4,
        "axes_match",
        programs(lambda w, x: torch.einsum("etk,enk->etn", x, w), floats(1, 5, K)),
        "found x [1, 5, 96] for weights [4, 40, 96]; expand x first",
    ),
    "two dynamic axes": Miss(
        ecp.EinsumInt4,
        "one_dynamic_axis",
        programs(
            lambda w, x, ids: torch.einsum("tarsk,tank->tarsn", x, w[ids]),
            floats(3, 2, 5, 2, K),
            IDS.view(3, 2),
            dynamic=({0: TWO[0], 2: TWO[1]}, {0: TWO[0]}),
        ),
        "found t, r; flatten x and the ids to one axis of tokens each",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_product_is_missed_with_its_reason(name: str) -> None:
    miss = MISSES[name]
    (wanted,) = (need.wanted for need in miss.rule.requirements if need.name == miss.requirement)
    report = assert_misses(miss.program(), miss.reason, miss.target, rule=miss.rule.name)
    reasons = [reason for outcome in report.outcomes for reason in outcome.reasons if miss.reason in str(reason)]
    assert wanted in {reason.wanted for reason in reasons}


@pytest.mark.parametrize("rule", [ecp.BmmInt4, ecp.IndexedBmmInt4, ecp.GroupedMmInt4, ecp.EinsumInt4])
def test_requirements_have_a_miss_each(rule: type[ecp.Rule]) -> None:
    """Requirements that all rules of experts share are missed by one of them at least."""
    missed = {miss.requirement for miss in MISSES.values() if miss.rule is rule}
    shared = {"stack_keeps_its_shape", *(need.name for need in PACKED_STACK)}
    assert {need.name for need in rule.requirements} <= missed | shared
    assert shared <= {miss.requirement for miss in MISSES.values()}


# name -> form, inputs, and the reason; these are no matches of a rule of experts
OTHER_FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "a part of the stack": (
        lambda w, x: torch.bmm(x, w[1:3].mT),
        (floats(2, 5, K),),
        "wanted a dequantized weight, found aten.slice",
    ),
    "an expert that is computed": (
        lambda w, x, e: F.linear(x, w[e]),
        (floats(5, K), torch.tensor(2)),
        "an expert whose number is computed while the program runs (item); look several up at once",
    ),
    "several experts behind a squeeze without effect": (
        lambda w, x: x @ w[1:3].squeeze(0).mT,
        (floats(2, 5, K),),
        "slice_1, which is not one expert",
    ),
    "pieces of several experts": (
        lambda w, x: x @ w.split([2, 2])[1].squeeze(0).mT,
        (floats(2, 5, K),),
        "which does not split the stack into single experts",
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_product_is_missed_with_its_reason(name: str) -> None:
    form, inputs, reason = OTHER_FORMS[name]
    report = assert_misses(export(Experts(form), *inputs), reason)
    assert len(report.outcomes) == 1


class Histogram(nn.Module):
    """The rows of each of ``bins`` experts, as transformers counts them."""

    def __init__(self, bins: int, cast: bool) -> None:
        super().__init__()
        self.bins, self.cast = bins, cast

    def forward(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float() if self.cast else ids, bins=self.bins, min=0, max=self.bins - 1)


@pytest.mark.parametrize("bins", [2, 7, 128])
def test_rows_of_experts_are_counted_by_comparisons(bins: int) -> None:
    for shape in ((50,), (4, 3), (0,)):
        ids = torch.randint(-2, bins + 3, shape)  # those out of range are in no bin
        program = torch.export.export(Histogram(bins, cast=True), (ids,))
        rewritten, report = ecp.rewrite(program, "cuda")
        assert report.applied == {"count_experts": 1}
        assert not any("histc" in str(node.target) for node in rewritten.graph.nodes)
        wanted = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1)
        torch.testing.assert_close(rewritten.module()(ids), wanted, rtol=0, atol=0)


def test_one_bin_has_the_range_of_the_values_and_stays() -> None:
    program = torch.export.export(Histogram(1, cast=True), (torch.arange(5),))
    assert ecp.rewrite(program, "cuda")[1].applied == {}
