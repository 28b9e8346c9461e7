"""``match``: the tree of a pattern, where the attempt stopped, and the requirements."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from et_cuda_passes.testing import Quantized, export, floats
from tests.cli.command import Run


class Net(nn.Module):
    """An int4 linear with a gelu, another in groups of 8, a float one, and an in-place relu."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Quantized(64, 64), Quantized(64, 64, group=8)
        self.c = nn.Linear(64, 64).bfloat16()

    def forward(self, x: Tensor) -> Any:
        return self.c(F.gelu(self.a(x))).relu_() + self.b(x)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("match") / "model.pt2"
    torch.export.save(export(Net(), floats(2, 64)), path)
    return path


def places(text: str) -> list[list[str]]:
    """The lines of each place."""
    return [block.splitlines() for block in text.split("\n\n")[1:]]


def test_match_prints_the_tree_of_each_place(command: Run, model: Path) -> None:
    result = command("match", "linear_int4", model)
    assert result.code == 0, result.err
    assert result.out.startswith("linear_int4 for cuda: 3 tried, 1 match\n")
    first, second, third = places(result.out)
    assert first[0].startswith("linear (aten.linear) at ")
    assert first[1:5] == [
        "  ✓ aten.linear linear",
        "  ├─ ✓ input: x = x",
        "  ├─ ✓ weight: a dequantized weight dequantize_affine as weight",
        "  └─ ✓ bias: bias = p_a_bias",
    ]
    assert all(line.startswith("  ✓ ") for line in first[6:])
    failed = [line for line in second if line.startswith("  ✗ ")]
    assert failed == [
        "  ✗ kernel_has_group_size: wanted a group size that the kernel has, found group size 8; triton has 16, 32, "
        "64, 128 and their multiples: quantize with PerGroup(16)"
    ]
    assert "  · scales_are_finite: scales and zeros that are finite where they are stored" in second
    assert third[1:] == [
        "  ✓ aten.linear linear_1",
        "  ├─ ✓ input: x = gelu",
        "  ├─ ✗ weight: wanted a dequantized weight, found placeholder p_c_weight",
        "  └─ · bias: bias",
        "  stopped: linear_int4 wanted a dequantized weight, found placeholder p_c_weight; the weight is not "
        "quantized: quantize this layer",
    ]


def test_match_runs_the_passes_before_the_rule(command: Run, model: Path) -> None:
    result = command("match", "fuse_activation", model, "--nearest", "1")
    assert "fuse_activation for cuda: 1 tried, 1 match" in result.out
    (place,) = places(result.out)
    assert place[0].startswith("gelu (aten.gelu) at ")
    assert "self: et_cuda_passes.int4_linear_mma_tiled linear as linear" in place[2]


def test_match_at_a_node_prints_the_places_that_contain_it(command: Run, model: Path) -> None:
    result = command("match", "linear_int4", model, "--at", "dequantize_affine_1")
    assert "1 tried, 0 match" in result.out
    assert result.out.count("(aten.linear)") == 1


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (
            "linear_9",
            "no node 'linear_9' when it is the turn of the rule; the nearest names are linear",
        ),
        (
            "linear",
            "linear is et_cuda_passes.int4_linear_mma_tiled, which no attempt reaches; linear_int4, which",
        ),
        ("dequantize_affine", "no node 'dequantize_affine' when it is the turn of the rule; the nearest names are"),
        ("x", "x is a placeholder, which no attempt reaches"),
    ],
)
def test_match_at_a_node_that_is_not_there_is_an_error(at: str, error: str, command: Run, model: Path) -> None:
    result = command("match", "linear_int8", model, "--at", at)
    assert result.code == 2 and error in result.error


RULE = '''
import dataclasses
import torch
import et_cuda_passes as ecp
aten = torch.ops.aten

@dataclasses.dataclass(frozen=True)
class LinearRelu(ecp.Rule):
    """relu(linear(x)) -> linear(x)"""

    def pattern(self, x):
        return ecp.op(aten.relu.default)(ecp.op(aten.linear.default)(x, ..., name="linear"))

    def rewrite(self, b, m):
        return m.linear

NUMBER = 1
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of a rule that no list has."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_match_of_a_rule_in_a_module_shows_the_in_place_form(own: str, command: Run, model: Path) -> None:
    result = command("match", f"{own}:LinearRelu", model, "--at", "linear_1")
    assert result.code == 0, result.err
    (place,) = places(result.out)
    assert place[1:4] == [
        "  ✗ wanted aten.relu as the reader of linear_1, found aten.relu_ (relu_)",
        "  └─ ✓ self: aten.linear linear_1 as linear",
        "     └─ ✓ input: x = gelu",
    ]
    assert place[4].endswith(
        "found aten.relu_ (relu_); the in-place form is not matched: write aten.relu in the model, or call "
        "run_decompositions({}) on the program first"
    )


def test_match_of_a_pattern_that_fits_nowhere_prints_the_pattern(command: Run, model: Path) -> None:
    result = command("match", "largest_alone", model, "--target", "xnnpack")
    assert "largest_alone for xnnpack: 0 tried, 0 match" in result.out
    assert "no operator fits a call of the pattern:\n  · getitem\n  ├─ · aten.max as largest\n" in result.out


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("linear_int5", "target cuda has no rule 'linear_int5'; the nearest names are linear_int8, linear_int4"),
        ("fold_dequantize", "target cuda has no rule 'fold_dequantize'"),
        ("nowhere:Rule", "RULE nowhere:Rule cannot be imported (ModuleNotFoundError"),
        ("nowhere:", "write MODULE:NAME, the module, a colon, and the name of the rule in it"),
        ("own:NUMBER", "is 1, not an et_cuda_passes.Rule"),
    ],
)
def test_match_of_an_unknown_rule_is_an_error_with_the_fix(
    rule: str, error: str, own: str, command: Run, model: Path
) -> None:
    result = command("match", rule.replace("own:", f"{own}:"), model)
    assert result.code == 2 and error in result.error


def test_rule_of_another_target_names_that_target(command: Run, model: Path) -> None:
    result = command("match", "keep_dynamic_int4", model)
    assert result.code == 2
    assert "target cuda has no rule 'keep_dynamic_int4'; xnnpack has it: --target xnnpack" in result.error


def test_module_without_the_rule_gives_no_advice_on_folders(command: Run, model: Path) -> None:
    result = command("match", "et_cuda_passes:NoSuchRule", model)
    assert result.code == 2 and "AttributeError" in result.error and "PYTHONPATH" not in result.error
