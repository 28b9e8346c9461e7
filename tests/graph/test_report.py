"""The report: text, data, counts, merged reports, unmet expectations, and source lines."""

import json
from collections.abc import Callable

import pytest
import torch

import et_cuda_passes as ecp
from et_cuda_passes.graph.report import ExpectationError, Outcome, Reason, Report, user_source_line


def report() -> Report:
    note = Reason("keep_a", "note", "", "runs it itself")
    cat, dog = Reason("fold", "metadata", "a cat", "a dog", "adopt"), Reason(None, "none", "", "no pass takes aten.add")
    detail = "int4 group 32 -> tinygemm"
    return Report(
        target="cuda",
        passes=["linear_int4", "keep_a", "fold"],
        outcomes=[
            Outcome("linear", "aten.linear", "l0.weight", "linear_int4", "rewritten", [], "m.py:3: l0(x)", detail),
            Outcome("linear_1", "aten.linear", "l1.weight", "linear_int4", "rewritten", [], "m.py:4: l1(x)", detail),
            Outcome("mm", "aten.mm", "l2.weight", "keep_a", "kept", [note], "", "int8"),
            Outcome("embedding", "aten.embedding", "e.weight", None, "missed", [cat, dog], "m.py:5: e(x)"),
        ],
        conflicts=["fold at mm gave way to keep_a at mm"],
        warnings=["something odd"],
        applied={"linear_int4": 2, "keep_a": 1},
        bytes_before=4_200_000,
        bytes_after=12_345,
    )


def test_report_text_equals_golden_file(golden: Callable[[str, str], None]) -> None:
    golden("graph/report", str(report()))


def test_report_text_names_every_miss_with_reason_hint_and_line() -> None:
    text = str(report())
    assert text.startswith("cuda: 4 candidates: 2 rewritten, 1 kept, 1 missed; constants 4.2 MB -> 12345 B\n")
    assert "rewritten     2 x linear_int4  int4 group 32 -> tinygemm  (l0.weight, ...)" in text
    for part in ("1 x aten.embedding  (e.weight)", "fold wanted a cat, found a dog; adopt", "at m.py:5: e(x)"):
        assert part in text
    for part in ("runs it itself", "no pass takes aten.add", "gave way to keep_a", "something odd"):
        assert part in text


def test_report_text_counts_rewrites_without_a_candidate() -> None:
    given = report()
    assert "then" not in str(given)
    given.applied |= {"gate": 30, "combine": 1}
    lines = str(given).splitlines()
    assert lines[4] == "  then      30 x gate, 1 x combine"  # behind what was rewritten and kept
    assert lines[:4] + lines[5:] == str(report()).splitlines()
    alone = str(Report("cuda", applied={"combine": 2}))
    assert alone == "cuda: 0 candidates: 0 rewritten, 0 kept, 0 missed; constants 0 B -> 0 B\n  then      2 x combine"


def test_report_text_without_candidates_has_the_warnings() -> None:
    text = str(Report("cuda", warnings=["look here"]))
    assert text == (
        "cuda: no candidates, the program holds no quantized weight that an operator reads\n  warning   look here"
    )


def test_counts_are_by_status_and_by_rule() -> None:
    assert report().counts() == {"rewritten": 2, "kept": 1, "missed": 1, "linear_int4": 2, "keep_a": 1}
    assert Report("cuda").counts() == {"rewritten": 0, "kept": 0, "missed": 0}


def test_dict_and_json_hold_every_field_of_every_outcome() -> None:
    given = report()
    data = json.loads(given.to_json())
    assert data == given.to_dict()
    assert data["counts"] == given.counts()
    assert (data["target"], data["passes"]) == (given.target, given.passes)
    assert (data["bytes_before"], data["bytes_after"]) == (4_200_000, 12_345)
    rebuilt = [
        Outcome(**{**outcome, "reasons": [Reason(**reason) for reason in outcome["reasons"]]})
        for outcome in data["outcomes"]
    ]
    assert rebuilt == given.outcomes
    assert (data["conflicts"], data["warnings"]) == (given.conflicts, given.warnings)


def test_merged_report_has_all_outcomes_and_summed_counts() -> None:
    one = report()
    assert Report.merge([one]) is one
    both = Report.merge([one, report()])
    assert both.counts() == {name: 2 * count for name, count in one.counts().items()}
    assert both.outcomes == one.outcomes * 2
    assert (both.target, both.passes, both.bytes_before) == ("cuda", one.passes, 8_400_000)
    assert (both.conflicts, both.warnings) == (one.conflicts * 2, one.warnings * 2)
    assert one.counts() == report().counts()


def test_reason_text_is_a_sentence() -> None:
    assert str(Reason("r", "metadata", "a cat", "a dog")) == "r wanted a cat, found a dog"
    assert str(Reason("r", "metadata", "a cat", "a dog", "adopt")) == "r wanted a cat, found a dog; adopt"
    assert str(Reason(None, "none", "", "nothing", "add a rule")) == "nothing; add a rule"
    assert str(Reason("r", "note", "", "by the way")) == "by the way"


def test_expectation_error_names_the_differences_and_has_the_report() -> None:
    given = report()
    error = ExpectationError({"linear_int4": 3, "kept": 1, "fold": 2}, given)
    first, _, rest = str(error).partition("\n")
    assert first == "linear_int4: expected 3, got 2; fold: expected 2, got 0"
    assert rest == str(given)
    assert error.report is given


def test_expectations_are_checked_against_the_passes_that_ran() -> None:
    from et_cuda_passes.rewrite import check_expectations

    check_expectations({"linear_int4": 2, "fold": 0, "missed": 1}, report())
    check_expectations(None, report())
    with pytest.raises(ecp.ExpectationError, match="missed: expected 0, got 1"):
        check_expectations({"linear_int4": 2, "missed": 0}, report())
    with pytest.raises(ValueError, match=r"expect contains 'linear_int8', .*; the nearest names are linear_int4"):
        check_expectations({"linear_int8": 0}, report())


# Source lines --------------------------------------------------------------------------------------------------------


HERE = '  File "/src/model.py", line 12, in forward\n    y = self.up(x)\n'
INNER = '  File "/src/blocks.py", line 3, in up\n    return F.linear(x, w)\n'
TORCH = '  File "/venv/lib/torch/nn/modules/linear.py", line 125, in forward\n    return F.linear(input, self.weight)\n'
TORCHAO = '  File "/venv/lib/torchao/quantization/x.py", line 9, in _\n    return dequant\n'


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        (HERE, "/src/model.py:12: y = self.up(x)"),
        (HERE + INNER, "/src/blocks.py:3: return F.linear(x, w)"),
        (HERE + TORCH + TORCHAO, "/src/model.py:12: y = self.up(x)"),
        (TORCH, "/venv/lib/torch/nn/modules/linear.py:125: return F.linear(input, self.weight)"),
        ("", ""),
        (None, ""),
        ("no frames here", ""),
    ],
)
def test_source_line_is_the_innermost_line_outside_of_libraries(trace: str | None, line: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert user_source_line(node) == line


def test_source_line_of_a_node_without_a_trace_is_empty() -> None:
    assert user_source_line(torch.fx.Graph().placeholder("x")) == ""


def test_source_line_of_an_export_is_in_this_file() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1

    program = torch.export.export(Model(), (torch.randn(3),))
    (relu,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert user_source_line(relu).startswith(__file__)
    assert user_source_line(relu).endswith(": return x.relu() + 1")
