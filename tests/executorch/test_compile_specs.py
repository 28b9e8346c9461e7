"""The compile specs of the CUDA backend: those that it has, and errors for others, which it would ignore."""

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # ExecuTorch's backend imports it

from executorch.backends.cuda import cuda_backend

import et_cuda_passes as ecp
from et_cuda_passes.executorch.compile_specs import CUDA_COMPILE_SPECS, check_compile_specs, parse_compile_specs
from et_cuda_passes.executorch.lower import lower
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.testing import Quantized, export, floats


def test_listed_specs_are_those_that_the_backend_reads() -> None:
    read = set(re.findall(r'spec\.key == "(\w+)"', inspect.getsource(cuda_backend)))
    assert read == set(CUDA_COMPILE_SPECS)


def test_default_values_are_those_of_the_backend() -> None:
    options = cuda_backend.CudaBackend.get_aoti_compile_options([])
    assert (options["max_autotune"], options["emulate_precision_casts"]) == (True, True)
    off = [cuda_backend.CompileSpec(key, b"OFF") for key in ("max_autotune", "emulate_precision_casts")]
    options = cuda_backend.CudaBackend.get_aoti_compile_options(off)
    assert (options["max_autotune"], options["emulate_precision_casts"]) == (False, False)


def test_texts_become_specs() -> None:
    texts = ["low_memory_mode=ON", "shim_library_path=/a=b"]
    assert parse_compile_specs(texts) == {"low_memory_mode": "ON", "shim_library_path": "/a=b"}


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["low_memory_mode"], r"'low_memory_mode' has no value: write KEY=VALUE, such as low_memory_mode=ON"),
        (["max_autotune=ON", "max_autotune=OFF"], "max_autotune is given twice"),
        (["low_memory=ON"], "the CUDA backend has no compile spec 'low_memory': it has low_memory_mode, "),
        (["low_memory_mode=on"], "low_memory_mode is ON or OFF, not 'on'"),
        (["platform=macos"], "platform is linux or windows, not 'macos'"),
    ],
)
def test_wrong_specs_are_refused(texts: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_compile_specs(texts)


def test_specs_for_another_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the target is xnnpack: leave them out"):
        check_compile_specs({"max_autotune": "ON"}, "xnnpack")
    program, _ = ecp.rewrite(export(Quantized(32, 32), floats(2, 32)), "cpu")
    with pytest.raises(UsageError, match="the target is cpu"):
        lower(program, "cpu", tmp_path, "model", compile_specs={"max_autotune": "ON"})
