"""Products with experts' weights: every form that models export, against fp64, and the reason where one is missed."""

import io
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.testing import assert_misses, assert_rewrites
from tests.experts import FORMS, IDS, OFFS, E, Experts, K, N, export, floats, off

# The weights in bf16, and the result: half a unit in the last place of each; a sum of results a little more.
MOST = 6e-3
TOKENS = "einsum of a token's experts"
BMM, CHOSEN, GROUPED = FORMS["bmm"][1], FORMS["index"][1], FORMS["grouped mm"][1]


# As exported, and taken apart into core operators; an einsum that is taken apart is none.
TAKEN = [(name, False) for name in FORMS] + [(name, True) for name in FORMS if not name.startswith("einsum")]


@cache
def exported(name: str, zero_points: str | None, decompose: bool) -> tuple[Experts, ExportedProgram]:
    model = Experts(FORMS[name][1], zero_points=zero_points)
    return model, export(model, *FORMS[name][3], decompose=decompose)


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: value for name, value in program.state_dict.items() if "packed" in name or "scale_and" in name}


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("zero_points", ["random", None])
@pytest.mark.parametrize(("name", "decompose"), TAKEN)
def test_every_form_is_rewritten_and_computes_what_fp64_does(
    name: str, zero_points: str | None, decompose: bool, target: str
) -> None:
    (model, program), (rule, _, plain, inputs) = exported(name, zero_points, decompose), FORMS[name]
    rewritten, report = assert_rewrites(program, target, expect={"missed": 0, "kept": 0})
    assert {outcome.rule for outcome in report.outcomes} == {rule}
    assert report.counts()["rewritten"] == len(report.outcomes) > 0
    wanted = plain(model.exact(), *(x.double() if x.is_floating_point() else x for x in inputs))
    assert off(rewritten.module()(*inputs), wanted) < MOST
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
def test_a_stack_that_is_stored_as_columns(name: str, zero_points: str | None, target: str) -> None:
    """[E, K, N], as gpt-oss has it, multiplied as it is."""
    rule, _, plain, inputs = FORMS[name]
    model = Experts(COLUMNS[name], zero_points=zero_points, columns=True)
    rewritten, _ = assert_rewrites(export(model, *inputs), target, expect={rule: 1, "missed": 0})
    wanted = plain(model.exact(), *(x.double() if x.is_floating_point() else x for x in inputs))
    assert off(rewritten.module()(*inputs), wanted) < MOST


@pytest.mark.parametrize("block", [(1, 1, 64), (1, 4, 32), (E, N, 32), (1, N, 96), (1, 1, 96)], ids=str)
def test_wider_blocks_are_repeated_for_each_row(block: tuple[int, ...]) -> None:
    k = 192 if block[2] == 64 else K
    model, x = Experts(BMM, block, shape=(E, N, k)), floats(E, 3, k)
    rewritten, _ = assert_rewrites(export(model, x), "cuda", expect={"bmm_int4": 1})
    assert off(rewritten.module()(x), torch.bmm(x.double(), model.exact().transpose(1, 2))) < MOST


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm", "select", TOKENS])
def test_any_number_of_tokens(name: str, target: str) -> None:
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
        assert off(rewritten.module()(*given), wanted) < MOST


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_one_expert_for_a_number_of_batches_that_is_not_known_is_missed(target: str) -> None:
    model = Experts(lambda w, x, ids: torch.matmul(x, w[ids].mT))
    program = export(model, floats(4, 5, K), IDS[:1], dynamic=({0: Dim("batches", min=2, max=64)}, None))
    assert_misses(program, "for ids [1]; give x as many batches as there are ids", target)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("equation", ["tk,snk->stn", "tk,snk->tsn", "snk,tk->nts"])
def test_an_einsum_of_any_tokens_with_any_experts(equation: str, target: str) -> None:
    left = equation.startswith("s")
    model = Experts(lambda w, x, ids: torch.einsum(equation, *((w[ids], x) if left else (x, w[ids]))))
    dynamic = ({0: Dim("tokens", min=2, max=64)}, {0: Dim("ids", min=2, max=64)})
    program = export(model, floats(5, K), IDS, dynamic=dynamic)
    rewritten, _ = assert_rewrites(program, target, expect={"einsum_int4": 1})
    for tokens, count in ((5, 6), (2, 3), (33, 7)):
        x, ids = floats(tokens, K, seed=tokens), torch.arange(count) % E
        weight = model.exact()[ids]
        wanted = torch.einsum(equation, *((weight, x.double()) if left else (x.double(), weight)))
        assert off(rewritten.module()(x, ids), wanted) < MOST


SUMS = {
    # The equation, and the shape of x.
    "ebk,enk->ben": (E, 5, K),
    "ebk,enk->ebn": (E, 5, K),
    "tk,enk->etn": (5, K),
    "tk,enk->nte": (5, K),
    "abk,enk->bane": (2, 3, K),
    "eabk,enk->aenb": (E, 2, 3, K),
}


@pytest.mark.parametrize("equation", SUMS)
def test_an_einsum_lies_in_memory_as_it_did(equation: str) -> None:
    model, x = Experts(lambda w, x: torch.einsum(equation, x, w)), floats(*SUMS[equation])
    program = export(model, x)
    rewritten, _ = assert_rewrites(program, "cuda", expect={"einsum_int4": 1})
    assert rewritten.module()(x).stride() == program.module()(x).stride()


def test_a_view_of_an_einsum_that_was_taken_apart_stays_one() -> None:
    model, x = (
        Experts(lambda w, x: torch.einsum("ebk,enk->ben", x, w).transpose(0, 1).reshape(E * 5, N)),
        floats(E, 5, K),
    )
    assert_rewrites(export(model, x).run_decompositions({}), "cuda", expect={"missed": 0, "rewritten": 1})


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["index", "index, rows on the left", TOKENS])
def test_no_tokens_at_all(name: str, target: str) -> None:
    _, form, _, inputs = FORMS[name]
    tokens = Dim("tokens", min=0, max=64)
    program = export(Experts(form), *inputs, dynamic=({0: tokens}, {0: tokens}))
    rewritten, _ = assert_rewrites(program, target, expect={"missed": 0})
    none = [given[:0] for given in inputs]
    assert rewritten.module()(*none).shape == program.module()(*none).shape


def test_rows_that_no_expert_has_are_zero() -> None:
    program = export(Experts(GROUPED), floats(14, K), OFFS)
    for target in ("cuda", "cpu"):
        rewritten, _ = ecp.rewrite(program, target, expect={"grouped_mm_int4": 1})
        y = rewritten.module()(floats(14, K), OFFS)
        assert not y[11:].any() and y[:11].any(dim=1).all()


def test_a_number_that_is_no_expert_s_is_an_error() -> None:
    program = export(Experts(CHOSEN), floats(6, K), IDS)
    for target in ("cuda", "cpu"):
        rewritten, _ = ecp.rewrite(program, target)
        with pytest.raises(IndexError):
            rewritten.module()(floats(6, K), torch.tensor([0, 1, 2, 3, 4, 0]))


def test_a_stack_that_several_products_read_is_packed_once() -> None:
    def form(w: Tensor, x: Tensor, ids: Tensor, offs: Tensor) -> tuple[Tensor, ...]:
        return BMM(w, x[None].expand(E, -1, -1)), CHOSEN(w, x, ids), GROUPED(w, x, offs), CHOSEN(w, x, ids + 0)

    program = export(Experts(form), floats(6, K), IDS, OFFS)
    expect = {"bmm_int4": 1, "chosen_experts_int4": 2, "grouped_mm_int4": 1, "missed": 0}
    on_cuda, _ = assert_rewrites(program, "cuda", expect=expect)
    assert {name: tuple(value.shape) for name, value in constants(on_cuda).items()} == {
        "data.packed": (E, N, 128 // 8),
        "data.scale_and_zero": (2, E, N, 8),
    }
    # There, what a tensor chooses has a layout of its own, for both places.
    on_cpu, _ = assert_rewrites(program, "cpu", expect=expect)
    assert sorted(constants(on_cpu)) == sorted(
        f"data.{kind}{more}" for kind in ("packed", "scale_and_zero") for more in ("", "_2")
    )


def test_only_the_experts_that_are_used_are_packed_each_once() -> None:
    def form(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, w[1]) + F.linear(x + 1, w[1]) + F.linear(x, w[-1])

    program = export(Experts(form, zero_points=None), floats(5, K))
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int4": 3, "missed": 0})
    kinds = ("packed", "scale_and_zero")
    assert sorted(constants(rewritten)) == [f"data.expert_{e}_{kind}" for e in (1, 3) for kind in kinds]
    assert {outcome.fqn for outcome in report.outcomes} == {"data"}


def test_the_expert_that_a_slice_or_a_piece_is() -> None:
    def form(w: Tensor, x: Tensor) -> Tensor:
        last, piece, first = w[-1:].squeeze(0), w.split([2, 1, 1])[1].squeeze(0), w[:1].squeeze(0)
        return torch.cat([F.linear(x, last), F.linear(x, piece), F.linear(x, first)])

    model, x = Experts(form), floats(5, K)
    rewritten, _ = assert_rewrites(export(model, x), "cuda", expect={"linear_int4": 3, "missed": 0})
    wanted = torch.cat([x.double() @ model.exact()[e].T for e in (3, 2, 0)])
    assert off(rewritten.module()(x), wanted) < MOST


def test_two_methods_share_their_experts() -> None:
    model = Experts(lambda w, x, ids=None: BMM(w, x) if ids is None else CHOSEN(w, x, ids))
    pool = ConstantCache()
    prefill, _ = ecp.rewrite(export(model, floats(E, 5, K)), "cuda", pool=pool)
    decode, _ = ecp.rewrite(export(model, floats(6, K), IDS), "cuda", pool=pool)
    first, second = constants(prefill), constants(decode)
    assert sorted(first) == sorted(second) == ["data.packed", "data.scale_and_zero"]
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm", "unbind"])
def test_two_rewrites_give_the_same_bytes(name: str) -> None:
    def saved() -> bytes:
        buffer = io.BytesIO()
        torch.export.save(ecp.rewrite(exported(name, "random", False)[1], "cuda")[0], buffer)
        return buffer.getvalue()

    assert saved() == saved()


def test_int8_experts_one_by_one_have_the_kernel_that_an_int8_linear_has() -> None:
    model = Experts(lambda w, x: F.linear(x, w[2]), (1, 1, K), -128, 127, zero_points=None)
    rewritten, _ = assert_rewrites(export(model, floats(5, K)), "cpu", expect={"linear_int8": 1})
    assert off(rewritten.module()(floats(5, K)), floats(5, K).double() @ model.exact()[2].T) < MOST


@pytest.mark.parametrize("name", ["bmm", "index", "grouped mm"])
def test_xnnpack_folds_them(name: str) -> None:
    _, program = exported(name, "random", False)
    _, report = assert_rewrites(program, "xnnpack", expect={"fold_dequantize": 1, "missed": 0}, rtol=0)
    assert "as large as before it was quantized" in str(report.outcomes[0].reasons[0])


MISSES: dict[str, tuple[Any, tuple[Tensor, ...], str, str]] = {
    "int8": (
        lambda: Experts(BMM, low=-128, high=127),
        (floats(E, 5, K),),
        "cuda",
        "wanted weights of at most 4 bits, found 8 bits, -128..127; quantize with weight_dtype=torch.int4",
    ),
    "groups of 16": (
        lambda: Experts(BMM, (1, 1, 16)),
        (floats(E, 5, K),),
        "cuda",
        "found group size 16; quantize in groups of 32",
    ),
    "groups along N": (
        lambda: Experts(BMM, (1, 8, 1)),
        (floats(E, 5, K),),
        "cuda",
        "found blocks of 8 rows and 1 along K; its groups lie along N: make them along K",
    ),
    "columns in groups along N": (
        lambda: Experts(lambda w, x: torch.bmm(x, w), (1, 1, 8), columns=True),
        (floats(E, 5, K),),
        "cpu",
        "in blocks of (1, 1, 32) of [E, N, K] or (1, 32, 1) of [E, K, N]",
    ),
    "experts that share scales in part": (
        lambda: Experts(BMM, (2, 8, 32)),
        (floats(E, 5, K),),
        "cuda",
        "found scales in blocks of [2, 8, 32], which several experts share in part",
    ),
    "K": (
        lambda: Experts(BMM, (1, 1, 48), shape=(E, N, 48)),
        (floats(E, 5, 48),),
        "cuda",
        "found K = 48; K must be a multiple of 32: leave these experts unquantized",
    ),
    "float32": (
        lambda: Experts(BMM, dtype=torch.float32),
        (floats(E, 5, K, dtype=torch.float32),),
        "cuda",
        "found float32; triton has bfloat16, float16: export the model in one of these",
    ),
    "a table of numbers": (
        lambda: Experts(lambda w, x, ids: torch.matmul(x, w[ids].mT)),
        (floats(3, 2, 1, K), IDS.view(3, 2)),
        "cuda",
        "wanted a list of experts' numbers, found ids torch.int64 [3, 2]; flatten the ids",
    ),
    "one expert for several batches": (
        lambda: Experts(lambda w, x, ids: torch.matmul(x, w[ids].mT)),
        (floats(4, 5, K), IDS[:1]),
        "cpu",
        "wanted a batch of rows for each of them, or one for all, found x [4, 5, 96] for ids [1]; give x as many",
    ),
    "a part of the stack": (
        lambda: Experts(lambda w, x: torch.bmm(x, w[1:3].mT)),
        (floats(2, 5, K),),
        "cuda",
        "wanted a dequantized weight, found aten.slice",
    ),
    "an expert that is computed": (
        lambda: Experts(lambda w, x, e: F.linear(x, w[e])),
        (floats(5, K), torch.tensor(2)),
        "cuda",
        "an expert whose number is computed while the program runs (item); look several up at once",
    ),
    "an einsum that sums over experts": (
        lambda: Experts(lambda w, x: torch.einsum("etk,enk->tn", x, w)),
        (floats(E, 5, K),),
        "cuda",
        "found the equation 'etk,enk->tn', which is no product of rows with matrices: write it as linear or bmm",
    ),
    "an einsum that repeats x": (
        lambda: Experts(lambda w, x: torch.einsum("etk,enk->etn", x, w)),
        (floats(1, 5, K),),
        "cuda",
        "wanted axes of x as long as those of the weights, found x [1, 5, 96] for weights [4, 40, 96]; expand x first",
    ),
    "an einsum that experts choose with a mask": (
        lambda: Experts(lambda w, x, mask: torch.einsum("sk,snk->sn", x, w[mask])),
        (floats(2, K), torch.tensor([True, False, True, False])),
        "cuda",
        "wanted experts' numbers that are integers, found ids torch.bool",
    ),
    "several experts behind a squeeze that does nothing": (
        lambda: Experts(lambda w, x: x @ w[1:3].squeeze(0).mT),
        (floats(2, 5, K),),
        "cuda",
        "slice_1, which is not one expert",
    ),
    "pieces of several experts": (
        lambda: Experts(lambda w, x: x @ w.split([2, 2])[1].squeeze(0).mT),
        (floats(2, 5, K),),
        "cuda",
        "which does not split the stack into single experts",
    ),
    "x of four dimensions": (
        lambda: Experts(lambda w, x: x @ w.mT),
        (floats(2, 1, 5, K),),
        "cuda",
        "wanted rows [E, M, K], or [M, K] for all experts, found x [2, 1, 5, 96] for 4 experts; reshape x",
    ),
    "metal": (
        lambda: Experts(GROUPED),
        (floats(11, K), OFFS),
        "metal",
        "found target metal, which has none; multiply by one expert at a time, picked by its number",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_miss_says_why_and_what_to_change(name: str) -> None:
    make, inputs, target, reason = MISSES[name]
    report = assert_misses(export(make(), *inputs), reason, target)
    assert len(report.outcomes) == 1


def broken(change: Any) -> ExportedProgram:
    model = Experts(BMM)
    change(model)
    return export(model, floats(E, 5, K))


def test_values_that_cannot_be_packed_are_missed() -> None:
    def infinite(model: Experts) -> None:
        model.scale[1, 2, 0] = float("inf")

    def outside(model: Experts) -> None:
        model.data[3, 0, 0] = 8

    assert_misses(broken(infinite), "found 2 that are NaN or infinite; quantize the weight again", rule="bmm_int4")
    assert_misses(broken(outside), "found integers -8..8 for a range of -8..7", rule="bmm_int4")


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_rows_that_are_data_beside_weights_on_the_left(target: str) -> None:
    model = Experts(lambda weight, x: torch.bmm(weight, x[:, (x[0, :, 0] > 0).nonzero().squeeze(1)].mT))
    assert_rewrites(export(model, floats(E, 5, K)), target, expect={"bmm_int4": 1, "missed": 0})
