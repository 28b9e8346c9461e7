"""Before and after as text: what each target makes of what torch.export leaves. `make golden` rewrites the texts."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

import et_cuda_passes as ecp
from et_cuda_passes.graph.operators import op_name
from tests import golden_models
from tests.golden_models import CASES, exported


def text(program: ExportedProgram) -> str:
    """A line a node: what it calls on what, and the shape and dtype of its value."""

    def show(node: Node) -> str:
        value = node.meta.get("val")
        shape = (
            f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
        )
        if node.op == "placeholder":
            return f"{node.name}{shape}"
        arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        return f"{node.name} = {op_name(node.target) if node.op == 'call_function' else node.op}({arguments}){shape}"

    return "\n".join(show(node) for node in program.graph.nodes)


@pytest.mark.parametrize("target", ["cuda", "metal", "cpu", "xnnpack"])
@pytest.mark.parametrize("case", CASES)
def test_before_and_after(
    case: str, target: str, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report names hosts on which a kernel is slower.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    before = exported(case)
    after, report = ecp.rewrite(before, target)
    page = f"before\n\n{text(before)}\n\nafter\n\n{text(after)}\n\nreport\n\n{report}"
    # Names of symbols are torch's own affair, and the path is that of this checkout.
    golden(f"graphs/{case}-{target}", re.sub(r"\bs\d+\b", "s", page).replace(golden_models.__file__, "model.py"))
