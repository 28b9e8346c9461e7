"""Vulkan: what the rules predict, what the stock partitioner takes, and the numbers that stand in the lowered program.

ExecuTorch's Python package has no Vulkan runtime. The tests read the delegate's graph back and compute with it.
"""

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.rule import Keep
from et_cuda_passes.rules.fold import DropActivationQuantization
from et_cuda_passes.testing import Quantized, export
from tests.vulkan import DYNAMIC, KERNELS, LINEAR, TABLE, VulkanPartitioner, _Stock, lowered, unpacked, weight_in


@dataclass(frozen=True)
class Case:
    """A program, and the requirement that must exclude it although the stock partitioner has a kernel for it."""

    program: ExportedProgram
    x: Tensor
    excluded_by: str = ""


def linear(config: Any, n: int, k: int, shape: tuple[int, ...], bias: bool = True, dynamic: bool = False) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias)).eval()
    quantize_(model, config)
    x = torch.randn(*shape, k)
    sizes = ({0: Dim("rows", min=2, max=64)},) if dynamic else None
    return Case(torch.export.export(model, (x,), dynamic_shapes=sizes), x)


def plain(excluded_by: str = "", shape: tuple[int, ...] = (4,), **options: Any) -> Case:
    options = {"n": 64, "k": 256, "dtype": torch.float32, **options}
    x = torch.randn(*shape, options["k"], generator=torch.Generator().manual_seed(3)).to(options["dtype"])
    return Case(torch.export.export(Quantized(**options), (x,)), x, excluded_by)


def table(excluded_by: str = "", **options: Any) -> Case:
    ids = torch.tensor([[1, 5, 0], [2, 2, 7]])
    options = {"n": 64, "k": 256, "dtype": torch.float32, **options}
    model = Quantized(form=lambda x, weight, bias: F.embedding(x, weight), **options)
    return Case(torch.export.export(model, (ids,)), ids, excluded_by)


def viewed(
    view: Callable[[Tensor], Tensor], *shape: int, config: Any = None, excluded_by: str = "", k: int = 256
) -> Case:
    """A linear behind a view of what an operator computes."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(k, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(view(x * 2))

    torch.manual_seed(0)
    model, x = Viewed().eval(), torch.randn(*shape)
    quantize_(model, config or int4())
    return Case(torch.export.export(model, (x,)), x, excluded_by)


def int4(size: int = 32, **options: Any) -> Any:
    return IntxWeightOnlyConfig(torch.int4, PerGroup(size) if size else PerAxis(0), **options)


def dynamic_int4(size: int = 32, **options: Any) -> Any:
    granularity = PerGroup(size) if size else PerAxis(0)
    return Int8DynamicActivationIntxWeightConfig(torch.int4, granularity, **options)


ZEROS, ROWS = "zero points that are all 0", "activations of which at most the last two axes"
VIEW = "no view of others with another last axis or with a batch"
GROUPS, K8 = "a group size that 4 divides", "in_features that 8 divides"

FOR_LINEAR = {
    "4 bits in groups": lambda: linear(int4(), 64, 256, (4,)),
    "4 bits, no bias": lambda: linear(int4(), 64, 256, (4,), bias=False),
    "4 bits, groups of 8": lambda: linear(int4(8), 64, 256, (4,)),
    "4 bits, groups of 12": lambda: linear(int4(12), 64, 96, (4,)),
    "4 bits, groups of 128": lambda: linear(int4(128), 64, 256, (4,)),
    "4 bits per row": lambda: linear(int4(0), 64, 256, (4,)),
    "4 bits, one row": lambda: linear(int4(), 64, 256, (1,)),
    "4 bits, a vector": lambda: linear(int4(), 64, 256, ()),
    "4 bits, batch of 1": lambda: linear(int4(), 64, 256, (1, 4)),
    "4 bits, dynamic length": lambda: linear(int4(), 64, 256, (4,), dynamic=True),
    "4 bits, N 68": lambda: linear(int4(), 68, 256, (4,)),
    "4 bits in float16": lambda: plain(dtype=torch.float16),
    "2 bits": lambda: plain(low=-2, high=1),
    "3 bits": lambda: plain(low=-4, high=3),
    "8 bits that fit in 4": lambda: _small_int8(),
    "4 bits behind a view of a batch of 1": lambda: viewed(lambda x: x.view(-1, 256), 1, 4, 256),
    "4 bits behind flatten and an axis": lambda: viewed(lambda x: x.flatten(1).unsqueeze(0), 1, 64, 2, 2),
    "4 bits behind squeeze": lambda: viewed(lambda x: x.squeeze(1), 4, 1, 256),
}
FOR_DYNAMIC = {
    "dynamic activations": lambda: linear(dynamic_int4(), 64, 256, (4,)),
    "dynamic activations per row": lambda: linear(dynamic_int4(0), 64, 256, (4,)),
    "dynamic activations, dynamic length": lambda: linear(dynamic_int4(), 64, 256, (4,), dynamic=True),
    "dynamic activations, batch of 1": lambda: linear(dynamic_int4(), 64, 256, (1, 4)),
    "dynamic activations behind flatten": lambda: viewed(lambda x: x.flatten(1), 4, 2, 128, config=dynamic_int4()),
}
FOR_TABLE = {
    "table": lambda: table(),
    "table per row": lambda: table(group=256),
    "table, no zero points": lambda: table(zero_points=None),
    "table in float16": lambda: table(dtype=torch.float16),
}
FOR_NONE = {
    "4 bits, N 66": lambda: linear(int4(), 66, 256, (4,)),
    "4 bits, N 7": lambda: linear(int4(), 7, 256, (4,)),
    "4 bits, asymmetric": lambda: plain(ZEROS, zero_points="random"),
    "4 bits, no zero points": lambda: plain(zero_points=None),
    "4 bits, batch of 2": lambda: plain(ROWS, shape=(2, 3)),
    "4 bits, batches": lambda: plain(ROWS, shape=(2, 1, 3)),
    "4 bits behind flatten": lambda: viewed(lambda x: x.flatten(1), 1, 64, 2, 2),
    "4 bits behind flatten of heads": lambda: viewed(lambda x: x.flatten(1), 4, 2, 128),
    "4 bits behind einsum": lambda: viewed(lambda x: torch.einsum("shd,hde->se", x, torch.ones(2, 8, 256)), 4, 2, 8),
    "4 bits behind a split": lambda: viewed(lambda x: x.view(-1, 256), 4, 512),
    "4 bits behind a view of a batch": lambda: viewed(lambda x: x.view(-1, 256), 2, 4, 256, excluded_by=VIEW),
    "4 bits, groups of 10": lambda: plain(GROUPS, k=40, group=10),
    "4 bits, K 36": lambda: plain(K8, k=36, group=12),
    "4 bits, K 30": lambda: plain(k=30, group=10),
    "4 bits in bfloat16": lambda: plain(dtype=torch.bfloat16),
    "5 bits": lambda: plain(low=-16, high=15),
    "unsigned 4 bits": lambda: plain(low=0, high=15),
    "8 bits in groups": lambda: plain(low=-128, high=127),
    "8 bits per row": lambda: linear(IntxWeightOnlyConfig(torch.int8, PerAxis(0)), 64, 256, (4,)),
    "8 bits stored as int32": lambda: plain(storage=torch.int32),
    "dynamic activations, N 66": lambda: linear(dynamic_int4(), 66, 256, (4,)),
    "dynamic activations, 8 bits": lambda: linear(
        Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)), 64, 256, (4,)
    ),
    "table of rows of 48": lambda: table(k=48, group=16),
    "table, 3 bits": lambda: table(low=-4, high=3),
    "table, 8 bits": lambda: table(low=-128, high=127),
    "table, asymmetric": lambda: table(zero_points="random"),
}
CASES = FOR_LINEAR | FOR_DYNAMIC | FOR_TABLE | FOR_NONE
OPERATOR = dict.fromkeys(FOR_LINEAR, LINEAR) | dict.fromkeys(FOR_DYNAMIC, DYNAMIC) | dict.fromkeys(FOR_TABLE, TABLE)
"""The operator that computes each case; a case that is not here is folded or refused."""


def _small_int8() -> Case:
    """Integers of 4 bits in a weight that says int8."""
    model = Quantized(64, 256, dtype=torch.float32)
    model.low, model.high = -128, 127
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    return Case(torch.export.export(model, (x,)), x)


def _predicted(case: Case) -> tuple[str, ecp.Report]:
    """The operator that a rule predicts, "" where no rule keeps the weight; and the report."""
    _, report = ecp.rewrite(case.program, "vulkan")
    (outcome,) = report.outcomes
    return (outcome.detail.rpartition(" ")[2] if outcome.status == "kept" else ""), report


def _taken(program: ExportedProgram) -> str:
    """The 4-bit operator that the stock partitioner and backend write, "" where they write another or fail."""
    try:
        found = [name for name in lowered(program, _Stock()).names if name in KERNELS]
    except Exception:  # assertions and exceptions of every kind
        return ""
    return found[0].removesuffix(".default") if found else ""


def _reasons(report: ecp.Report) -> str:
    return "; ".join([*(str(reason) for outcome in report.outcomes for reason in outcome.reasons), *_rejected(report)])


def _rejected(report: ecp.Report) -> list[str]:
    return [text for texts in report.rejected.values() for text in texts]


@pytest.mark.parametrize("name", CASES)
def test_rules_predict_the_operator(name: str) -> None:
    case = CASES[name]()
    predicted, report = _predicted(case)
    assert predicted == OPERATOR.get(name, "")
    assert case.excluded_by in _reasons(report)


def test_folded_weight_has_the_unmet_requirement_as_its_reason() -> None:
    _, report = ecp.rewrite(CASES["4 bits, N 66"]().program, "vulkan", expect={"fold_dequantize": 1})
    assert "folded to float32, as large as before it was quantized: keep_vulkan_linear wanted out_features that 4" in (
        str(report)
    )
    assert "found N = 66; leave this layer unquantized" in str(report) and "has no kernel" not in str(report)


def test_convolution_is_named_where_it_has_no_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(64, 32, 1)).eval()
    quantize_(model, int4(), filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    program = export(model, torch.randn(1, 64, 3, 3))
    _, report = ecp.rewrite(program, "vulkan", expect={"fold_dequantize": 1})
    assert "vulkan has no kernel for aten.conv2d with this int4 group 32 weight" in str(report)
    assert "leave this layer unquantized" in str(report)


def test_kept_linear_drops_no_activation_quantization() -> None:
    _, report = ecp.rewrite(CASES["dynamic activations"]().program, "vulkan")
    assert report.applied == {"keep_vulkan_dynamic_linear": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stock_partitioner_agrees_with_prediction(name: str) -> None:
    case = CASES[name]()
    taken = _taken(case.program)
    assert bool(taken) if case.excluded_by else taken == OPERATOR.get(name, "")


class OneOfEach(nn.Module):
    """A table, and two linears that read its rows: a weight for each operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Quantized(64, 256, dtype=torch.float32, form=lambda x, weight, bias: F.embedding(x, weight))
        self.four, self.dynamic = nn.Linear(256, 68), nn.Linear(256, 64)
        for name, config in (("four", int4()), ("dynamic", dynamic_int4())):
            quantize_(self, config, filter_fn=lambda _, fqn, name=name: fqn == name)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        return self.four(x), self.dynamic(x)


# One lowering takes 4 seconds, nearly all of them in patterns that the stock partitioner makes anew each time. So the
# quick suite predicts the whole grid below, and lowers one program.
def test_lowered_weight_of_each_operator_has_the_graphs_numbers() -> None:
    model = OneOfEach().eval()
    program = torch.export.export(model, (torch.tensor([1, 5, 0, 2]),))
    found = lowered(program, VulkanPartitioner(expect={"kept": 3, "missed": 0}))
    assert not [each for each in (*found.names, *found.outside) if "dequantize" in each or ".quantize" in each]
    kept = {call.removesuffix(".default"): args for call, args in found.calls if call in KERNELS}
    wanted = {TABLE: model.table.weight(), LINEAR: model.four.weight, DYNAMIC: model.dynamic.weight}
    assert kept.keys() == wanted.keys()
    for call, weight in wanted.items():
        values = weight if call == TABLE else weight.dequantize()
        assert torch.equal(weight_in(f"{call}.default", kept[call]).to(values.dtype), values)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_lowered_program_has_the_graphs_numbers(name: str) -> None:
    case = CASES[name]()
    predicted, report = _predicted(case)
    (outcome,) = report.outcomes
    if outcome.status == "missed":
        with pytest.raises(ValueError, match="Vulkan cannot compute these quantized weights correctly"):
            lowered(case.program, VulkanPartitioner())
        return
    found = lowered(case.program, VulkanPartitioner())
    assert not [each for each in (*found.names, *found.outside) if "dequantize" in each or ".quantize" in each]
    kept = [(call, args) for call, args in found.calls if call in KERNELS]
    assert [call.removesuffix(".default") for call, _ in kept] == ([predicted] if predicted else [])
    if kept:
        wanted = _dequantized(case.program)
        assert torch.equal(weight_in(*kept[0]).to(wanted.dtype), wanted)


def _dequantized(program: ExportedProgram) -> Tensor:
    """The weight as the program dequantizes it."""
    passes = [DropActivationQuantization(), ecp.FoldDequantize()]
    folded, _ = ecp.rewrite(program, "vulkan", passes=passes)
    held = {**folded.state_dict, **folded.constants}
    (weight,) = [tensor for name, tensor in held.items() if name.endswith(".dequantized")]
    return weight


def test_stock_backend_ignores_zero_points() -> None:
    case = CASES["4 bits, asymmetric"]()
    ((call, args),) = lowered(case.program, _Stock()).calls
    wanted = _dequantized(case.program)
    stored = weight_in(call, args)
    assert float((stored - wanted).norm() / wanted.norm()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8 bits per row", "5 bits", "dynamic activations, 8 bits"])
def test_stock_backend_writes_operators_that_the_runtime_lacks(name: str) -> None:
    assert "torchao.dequantize_affine.default" in lowered(CASES[name]().program, _Stock()).names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4 bits, K 36"])
def test_stock_backend_pads_k_of_the_weight_alone(name: str) -> None:
    ((_, args),) = lowered(CASES[name]().program, _Stock()).calls
    assert unpacked(args[1]).shape == (64, 40)


class Tied(nn.Module):
    """An embedding and a linear of one quantized weight, as in a language model; or two linears."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.table, self.embedding = nn.Embedding(64, 64), embedding
        quantize_(self, int4(), filter_fn=lambda module, name: name == "last")
        self.table.weight = self.first.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x) if self.embedding else self.first(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "embedding", [pytest.param(True, id="embedding"), pytest.param(False, id="linears", marks=pytest.mark.slow)]
)
def test_tied_weight_is_copied_for_its_second_reader(embedding: bool) -> None:
    model = Tied(embedding).eval()
    x = torch.tensor([1, 5]) if embedding else torch.randn(4, 64)
    program = torch.export.export(model, (x,))
    with pytest.raises(Exception, match="FusePatternsPass"):
        lowered(program, _Stock())
    partitioner = VulkanPartitioner(expect={"kept": 2, "copy_tied_weight": 1})
    found = lowered(program, partitioner)
    wanted = model.last.weight.dequantize()
    assert found.names == [KERNELS[2] if embedding else KERNELS[0], KERNELS[0]]
    assert all(torch.equal(weight_in(call, args), wanted) for call, args in found.calls)


@pytest.mark.parametrize(
    ("view", "shape", "operator"),
    [
        pytest.param(lambda x: x.view(1, 4, 256).flatten(0, 1), (4, 256), LINEAR, id="a batch of 1"),
        pytest.param(lambda x: x.view(1, 4, 256), (1, 4, 2, 128), LINEAR, id="heads, with a batch of 1"),
        pytest.param(lambda x: x.flatten(0, 1), (2, 2, 256), "", id="a batch of 2"),
        pytest.param(lambda x: x.reshape(2, 512).view(4, 256), (2, 2, 256), "", id="two views"),
        pytest.param(lambda x: x.unflatten(0, (4, 2)).flatten(-2), (8, 128), "", id="unflatten"),
    ],
)
def test_linear_whose_view_the_delegate_would_remove_is_folded(
    view: Callable[[Tensor], Tensor], shape: tuple[int, ...], operator: str
) -> None:
    """The stock partitioner computes with a batch of 2 instead of its rows, and fails for heads."""
    assert _predicted(viewed(view, *shape))[0] == operator


def test_copies_of_a_tied_weight_without_a_kernel_are_folded_under_its_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            quantize_(self, int4())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    # The delegate has no kernel for three axes.
    model, x = Twice(), torch.randn(2, 3, 64)
    rewritten, report = ecp.rewrite(torch.export.export(model, (x,)), "vulkan")
    assert [(each.rule, each.fqn) for each in report.outcomes] == [("fold_dequantize", "layer.weight")] * 2
    assert torch.equal(rewritten.module()(x), model(x))


@pytest.mark.slow
def test_callers_program_is_not_changed() -> None:
    case = CASES["4 bits in groups"]()
    before = {name: tensor.clone() for name, tensor in case.program.state_dict.items()}
    wanted = case.program.module()(case.x)
    lowered(case.program, VulkanPartitioner())
    assert torch.equal(case.program.module()(case.x), wanted)
    assert before.keys() == case.program.state_dict.keys()


@pytest.mark.parametrize(
    "passes", [None, [rule for rule in ecp.default_passes("vulkan") if not isinstance(rule, Keep)]]
)
def test_partitioner_takes_passes(passes: list[ecp.Rule] | None) -> None:
    partitioner = VulkanPartitioner(passes=passes)
    partitioner.transform_for_pre_decomposition(export(Quantized(64, 256, dtype=torch.float32), torch.randn(4, 256)))
    assert partitioner.report.counts()["kept" if passes is None else "rewritten"] == 1


def test_dynamic_sizes_limit_the_delegate_to_operators_that_can_be_resized() -> None:
    fixed, resized = VulkanPartitioner(), VulkanPartitioner()
    fixed.transform_for_pre_decomposition(CASES["4 bits in groups"]().program)
    resized.transform_for_pre_decomposition(CASES["4 bits, dynamic length"]().program)
    assert fixed.options == {} and resized.options == {"require_dynamic_shapes": True}


@pytest.mark.slow
def test_import_leaves_the_level_of_the_root_logger() -> None:
    code = "import logging; import et_cuda_passes.executorch.vulkan; print(logging.getLogger().level)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == str(logging.WARNING)


def test_mapping_type_of_torchao_decides_about_the_kernel() -> None:
    case = linear(int4(mapping_type=MappingType.ASYMMETRIC), 64, 256, (4,))
    assert _predicted(case)[0] == "" and "zero points that are all 0" in _reasons(_predicted(case)[1])


def test_refused_weights_with_similar_reasons_share_one_text() -> None:
    model = nn.Sequential(*(Quantized(64, 64) for _ in range(5)))
    program = torch.export.export(model, (torch.zeros(1, 64, dtype=torch.bfloat16),))
    with pytest.raises(ValueError, match="cannot compute") as error:
        VulkanPartitioner().transform_for_pre_decomposition(program)
    message = str(error.value)
    # The first linear reads the input of the program, and each of the others a linear.
    assert message.count("(aten.linear)") == 2
    assert "correctly: 0.data (aten.linear): keep_vulkan_dynamic_linear wanted" in message
    assert "; 1.data, 2.data, 3.data and 1 more (aten.linear): keep_vulkan_dynamic_linear wanted" in message


@pytest.mark.slow
def test_infinite_number_of_a_lowered_program_is_read_back() -> None:
    class Limited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(x, min=float("-inf"), max=1.0) * x

    ((name, args), _) = lowered(torch.export.export(Limited(), (torch.ones(2, 3),)), VulkanPartitioner()).calls
    assert name == "aten.clamp.default" and args[1:3] == [float("-inf"), 1.0]
