"""assert_golden and the error about an operator without an implementation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import et_cuda_passes as ecp
from et_cuda_passes.testing import as_text, assert_golden, assert_rewrites

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class NegToAbs(ecp.Rule):
    """neg(x) -> abs(x)"""

    def pattern(self, x: Any) -> Any:
        return ecp.op(aten.neg.default)(x)

    def rewrite(self, b: Any, m: Any) -> Any:
        return b.call(aten.abs.default, m.x)


class Neg(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x + 1


GOLDEN = """
    before

    x  # float32 [2, s]
    neg = aten.neg(x)  # float32 [2, s]
    add = aten.add(neg, 1)  # float32 [2, s]
    output = output((add,))

    after

    x  # float32 [2, s]
    neg = aten.abs(x)  # float32 [2, s]
    add = aten.add(neg, 1)  # float32 [2, s]
    output = output((add,))

    report

    cpu: 0 candidates: 0 rewritten, 0 kept, 0 missed; constants 0 B -> 0 B
      then      1 x neg_to_abs
"""


@pytest.fixture(scope="module")
def rewritten() -> tuple[Any, Any, Any]:
    before = torch.export.export(Neg(), (torch.randn(2, 3),), dynamic_shapes=({1: torch.export.Dim("length")},))
    return before, *ecp.rewrite(before, "cpu", [NegToAbs()])


def test_golden_text_is_compared(rewritten: tuple[Any, Any, Any]) -> None:
    assert_golden(*rewritten, GOLDEN)
    with pytest.raises(AssertionError) as error:
        assert_golden(*rewritten, GOLDEN.replace("aten.abs", "aten.exp"))
    assert "-neg = aten.exp(x)  # float32 [2, s]\n+neg = aten.abs(x)" in str(error.value)


def test_golden_file_is_compared_and_written(
    rewritten: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden" / "neg.txt"
    with pytest.raises(AssertionError, match=r"does not exist: run the test with ETCP_UPDATE_GOLDEN=1"):
        assert_golden(*rewritten, path)
    monkeypatch.setenv("ETCP_UPDATE_GOLDEN", "1")
    assert_golden(*rewritten, path)
    monkeypatch.delenv("ETCP_UPDATE_GOLDEN")
    assert_golden(*rewritten, path)
    path.write_text(path.read_text().replace("abs", "exp"))
    with pytest.raises(AssertionError, match="if the new text is right, run the test with ETCP_UPDATE_GOLDEN=1"):
        assert_golden(*rewritten, path)


def test_golden_text_has_no_folder_of_a_source_file() -> None:
    from et_cuda_passes.testing import linear

    before = linear("8w", 16)
    after, report = ecp.rewrite(before, "metal")
    assert f"at {Path(torch.__file__).parent}" in str(report) or "at /" in str(report)
    with pytest.raises(AssertionError) as error:
        assert_golden(before, after, report, "")
    assert "at linear.py:" in str(error.value) or "at programs.py:" in str(error.value)


def test_text_of_a_program_has_a_line_for_each_node(rewritten: tuple[Any, Any, Any]) -> None:
    assert len(as_text(rewritten[0]).splitlines()) == len(rewritten[0].graph.nodes)


def test_operator_without_an_implementation_is_an_error_with_the_fix() -> None:
    with torch.library._scoped_library("testing_rules", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        torch.library.register_fake("testing_rules::twice", lambda x: x.clone(), lib=library)

        @dataclasses.dataclass(frozen=True)
        class Twice(ecp.Rule):
            """neg(x) -> twice(x)"""

            def pattern(self, x: Any) -> Any:
                return ecp.op(aten.neg.default)(x)

            def rewrite(self, b: Any, m: Any) -> Any:
                return b.call(torch.ops.testing_rules.twice.default, m.x)

        program = torch.export.export(Neg(), (torch.randn(2, 3),))
        with pytest.raises(AssertionError) as error:
            assert_rewrites(program, "cpu", [Twice()])
    assert str(error.value).startswith("the operator testing_rules::twice has no implementation for the CPU")
    assert "@torch.library.impl('testing_rules::twice', 'CPU')" in str(error.value)
