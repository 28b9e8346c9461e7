"""A mutated buffer that the model also reaches under another name keeps one name."""

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp


class Holder:
    """An object that is not a module, and so its tensors are not buffers."""

    def __init__(self, tensor: Tensor, table: Tensor) -> None:
        self.tensor, self.table = tensor, table


class Counter(nn.Module):
    """Adds its input to a buffer that it reaches through another object, and reads the buffer under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(4), persistent=False)
        self.register_buffer("table", torch.arange(4.0))
        self.holder = Holder(self.sum, self.table)
        self.linear = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        before = self.sum + 0
        self.holder.tensor.add_(x)
        return before + 2 * self.sum + self.table * self.holder.table, self.linear(y)


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    model = Counter()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return torch.export.export(model, (torch.ones(4), torch.ones(2, 32)), strict=False)


def names(program: torch.export.ExportedProgram) -> set[str]:
    return {spec.target for spec in program.graph_signature.input_specs if spec.target is not None}


def test_mutated_buffer_with_two_names_keeps_its_own(program: torch.export.ExportedProgram) -> None:
    with pytest.raises(AssertionError, match="expected compiled_fn to be GraphModule"):
        program.run_decompositions({})
    before = names(program)
    (lifted,) = {
        name for name in before if name.startswith("lifted") and program.constants[name] is program.constants["sum"]
    }
    rewritten, report = ecp.rewrite(program, "xnnpack")
    assert report.counts()["rewritten"] == 1
    assert lifted not in names(rewritten)
    assert {"sum", "table"} <= names(rewritten)
    # Names of a tensor that nothing writes to stay.
    assert {name for name in before if name.startswith("lifted")} - {lifted} <= names(rewritten)
    assert names(program) == before, "the caller's program was changed"
    decomposed = rewritten.run_decompositions({})
    mutations = [spec for spec in decomposed.graph_signature.output_specs if spec.kind == OutputKind.BUFFER_MUTATION]
    assert [spec.target for spec in mutations] == ["sum"]


def test_mutated_buffer_with_two_names_has_the_values_of_eager(program: torch.export.ExportedProgram) -> None:
    rewritten, _ = ecp.rewrite(program, "xnnpack")
    model, module = Counter(), rewritten.run_decompositions({}).module()
    for _ in range(3):
        x, y = torch.rand(4), torch.rand(2, 32)
        torch.testing.assert_close(module(x, y)[0], model(x, y)[0])


def test_partitioner_lowers_a_program_with_two_names_of_a_mutated_buffer(
    program: torch.export.ExportedProgram,
) -> None:
    with pytest.raises(AssertionError, match="expected compiled_fn to be GraphModule"):
        to_edge_transform_and_lower(program, partitioner=[])
    assert to_edge_transform_and_lower(program, partitioner=[ecp.XnnpackPartitioner()]).to_executorch().buffer


def test_mutated_buffer_registered_twice_keeps_one_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("first", torch.zeros(4))
            self.register_buffer("second", self.first)

        def forward(self, x: Tensor) -> Tensor:
            self.second.add_(x)
            return self.first * 2

    exported = torch.export.export(Twice(), (torch.ones(4),), strict=False)
    rewritten, _ = ecp.rewrite(exported, "cpu")
    assert len(names(rewritten)) == 1
    module = rewritten.run_decompositions({}).module()
    assert [module(torch.ones(4)).tolist() for _ in range(2)] == [[2.0] * 4, [4.0] * 4]
