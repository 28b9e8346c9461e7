"""The user's source line of a node."""

import pytest
import torch

from et_cuda_passes.graph.report import user_source_line

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
