"""The error of ExecuTorch's AOTInductor backends that docs/errors/missing-fallback-kernels.md explains."""

from typing import Any

import pytest
import torch
from executorch.backends.aoti.aoti_backend import AotiBackend
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir import to_edge
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor, nn

from docs.generate import ROOT


class OnCpu(AotiBackend):
    """ExecuTorch's own compilation, for the CPU, with the kernels that its CUDA runtime provides."""

    @classmethod
    def get_device_name(cls) -> str:
        return "cpu"

    @classmethod
    def get_supported_fallback_kernels(cls) -> dict[str, Any]:
        return CudaBackend.get_supported_fallback_kernels()

    @classmethod
    def get_decomposition_table(cls) -> dict[Any, Any]:
        return {}

    @classmethod
    def get_aoti_compile_options(cls, compile_specs: list[CompileSpec]) -> dict[str, Any]:
        # Only the C++ is written: the message comes before anything reads a library.
        options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
        return {**options, "aot_inductor.package_cpp_only": True}

    @classmethod
    def get_custom_passes(cls, compile_specs: list[CompileSpec]) -> list[Any]:
        return []


class Distances(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y)


def test_message_about_missing_fallback_kernels_is_that_of_the_page() -> None:
    edge = to_edge(torch.export.export(Distances(), (torch.randn(3, 8), torch.randn(5, 8)))).exported_program()
    with pytest.raises(RuntimeError, match="missing fallback kernels") as error:
        OnCpu.preprocess(edge, [CompileSpec("method_name", b"forward")])
    page = (ROOT / "docs" / "errors" / "missing-fallback-kernels.md").read_text(encoding="utf-8")
    assert f"```text\n{error.value}\n```" in page
    assert page.startswith(f"# `{str(error.value).partition(':')[0]}`\n")


def test_replacement_for_cdist_on_the_page_computes_the_same() -> None:
    page = (ROOT / "docs" / "errors" / "missing-fallback-kernels.md").read_text(encoding="utf-8")
    formula = "x.square().sum(-1, keepdim=True) - 2 * x @ y.mT + y.square().sum(-1)[..., None, :]"
    assert formula in " ".join(page.split())
    x, y = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    torch.testing.assert_close(eval(formula, {"x": x, "y": y}).sqrt(), torch.cdist(x, y))
