"""assert_near_misses: it fails for each requirement without a near miss, and for each program that is none."""

import dataclasses
from typing import Any

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.testing import NearMiss, Quantized, assert_near_misses, attempts, export, floats

aten = torch.ops.aten


@ecp.requirement("few rows")
def few_rows(m: Any) -> ecp.Failure | None:
    rows = m.val(m.x).shape[0]
    return None if rows <= m.rule.most else ecp.Failure(f"{rows} rows")


@ecp.requirement("few columns")
def few_columns(m: Any) -> ecp.Failure | None:
    columns = m.val(m.x).shape[1]
    return None if columns <= 64 else ecp.Failure(f"{columns} columns")


@ecp.requirement("a weight without large integers", stage="values")
def small_integers(m: Any) -> ecp.Failure | None:
    largest = int(ecp.weight_values(m.program, ecp.weight_of(m)).data.max())
    return None if largest < 100 else ecp.Failure(f"{largest}")


@dataclasses.dataclass(frozen=True)
class Small(ecp.Rule):
    """linear(x, w) -> linear(x, w)"""

    most: int = 4
    requirements = (few_rows, few_columns, small_integers)

    def pattern(self, x: Any) -> Any:
        return ecp.op(aten.linear.default)(x, ecp.dequantized(..., name="weight", shared=True), ...)

    def rewrite(self, b: Any, m: Any) -> Any:
        return b.call(aten.linear.default, m.x, m.weight)


def program(rows: int = 2, k: int = 64, high: int = 7) -> Any:
    return lambda: export(Quantized(8, k, k, -high - 1, high), floats(rows, k))


COMPLETE = {"few_rows": program(rows=5), "few_columns": program(k=96), "small_integers": program(high=127)}


def test_near_misses_of_every_requirement_are_accepted() -> None:
    assert_near_misses(Small(), COMPLETE, "cpu")
    assert_near_misses(Small(), {**COMPLETE, "few_rows": program(rows=5)()}, "cpu")
    assert_near_misses(Small(2), {**COMPLETE, "few_rows": program(rows=3)}, "cpu")


@pytest.mark.parametrize("name", COMPLETE)
def test_requirement_without_a_near_miss_is_an_error(name: str) -> None:
    programs = {other: each for other, each in COMPLETE.items() if other != name}
    with pytest.raises(AssertionError, match=f"rule small has no near miss of {name}: add a program"):
        assert_near_misses(Small(), programs, "cpu")


def test_near_miss_of_an_unknown_requirement_is_an_error() -> None:
    with pytest.raises(AssertionError, match="rule small has no requirement few_row; it has few_rows, few_col"):
        assert_near_misses(Small(), {**COMPLETE, "few_row": program()}, "cpu")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (program(), "✓ few_rows: few rows"),
        (program(k=96), "✗ few_columns: wanted few columns, found 96 columns"),
        (program(rows=5, k=96), "✗ few_rows: wanted few rows, found 5 rows"),
        (lambda: export(torch.nn.ReLU(), floats(5, 64)), "the pattern fits nowhere"),
    ],
    ids=["a match", "another requirement", "two requirements", "no match of the pattern"],
)
def test_program_that_is_no_near_miss_is_an_error(wrong: Any, found: str) -> None:
    with pytest.raises(AssertionError) as error:
        assert_near_misses(Small(), {**COMPLETE, "few_rows": wrong}, "cpu")
    assert "the program for few_rows is not one that few_rows alone rejects:\n" in str(error.value)
    assert found in str(error.value)


def test_near_miss_may_name_requirements_that_fail_with_it() -> None:
    both = program(rows=5, k=96)
    assert_near_misses(Small(), {**COMPLETE, "few_rows": NearMiss(both, also=("few_columns",))}, "cpu")
    with pytest.raises(AssertionError, match="few_rows and few_columns reject"):
        assert_near_misses(Small(), {**COMPLETE, "few_rows": NearMiss(program(rows=5), also=("few_columns",))}, "cpu")


def test_near_miss_may_have_options_and_a_target_of_its_own() -> None:
    near = {**COMPLETE, "few_rows": NearMiss(program(rows=3), target="metal", rule=Small(2))}
    assert_near_misses(Small(), near, "cpu")


def test_attempts_are_sorted_by_how_far_they_fit() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Quantized(96, 64), Quantized(8, 96)
            self.c = torch.nn.Linear(8, 8).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.c(self.b(self.a(x)))
            return y

    found = attempts(export(Two(), floats(2, 64)), Small(), "cpu")
    assert [(each.matches, each.reason is None, len(each.failures)) for each in found] == [
        (True, True, 0),
        (False, True, 1),
        (False, False, 0),
    ]
    assert [each.progress for each in found] == [2, 2, 1]
    assert found[1].failures[0].requirement == "few_columns"


def test_near_misses_of_two_requirements_with_one_name_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Twice(Small):
        requirements = (few_rows, dataclasses.replace(few_columns, name="few_rows"))

    with pytest.raises(AssertionError, match=r"rule twice has two requirements named few_rows, .*dataclasses\.replace"):
        assert_near_misses(Twice(), {"few_rows": program(rows=5)}, "cpu")
