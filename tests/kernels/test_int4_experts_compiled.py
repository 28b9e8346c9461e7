"""The experts' kernel, compiled for GPUs that this machine does not have, in every tiling that a launch may choose."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch
from et_cuda_passes.kernels.int4_experts import int4_experts
from et_cuda_passes.kernels.tiling import Tiling
from tests.kernels.compiled import (
    arch_of,
    check_for_others,
    code_for_hopper,
    compiled,
    largest_of_each_kind,
    machine_code,
    overwritten_operands,
    resources,
    shape,
    tilings_of,
)

pytestmark = pytest.mark.compiled

FORM = {"GROUPED": False, "HAS_IDS": True, "WIDTH": 16, "BULK": 0}
GROUPED = {"GROUPED": True, "HAS_IDS": False, "WIDTH": 128}
BULK = GROUPED | {"BULK": 2}
ONE = Tiling(16, 64, 128, 1, 0, 4, 3)
COPIED = Tiling(64, 128, 64, 1, 0, 4, 4, 1)


@cache
def experts(tiling: Tiling, arch: int, dtype: str = "bf16", **others: Any) -> Any:
    constants = shape(tiling) | FORM | (BULK if tiling.bulk else {}) | others
    return compiled(int4_experts, constants, arch, tiling.warps, tiling.stages, dtype)


@pytest.mark.parametrize("tiling", largest_of_each_kind(tilings_of(HOPPER, experts=True, grouped=True)))
def test_tiling_for_hopper_is_as_expected(tiling: Tiling, tmp_path: Path) -> None:
    code_for_hopper(experts(tiling, 90), tiling, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu != HOPPER], ids=str)
def test_tilings_of_a_gpu_compile_and_fit(gpu: GpuArch, tmp_path: Path) -> None:
    for tiling in tilings_of(gpu, experts=True, grouped=True):
        check_for_others(experts(tiling, arch_of(gpu), WGMMA=False), tmp_path, gpu)


@pytest.mark.parametrize(
    ("tiling", "others"),
    [
        (ONE, GROUPED),
        (ONE, GROUPED | {"HAS_ZERO": True, "EVEN_K": False}),
        (ONE, GROUPED | {"GROUP_SIZE": 128, "dtype": "fp16"}),
        (ONE, {"HAS_IDS": False, "HAS_ZERO": True}),
        (ONE, {"EVEN_K": False, "GROUP_SIZE": 64}),
        (COPIED, {"HAS_ZERO": True}),
        (COPIED, {"GROUP_SIZE": 128, "HAS_ZERO": True}),
        (COPIED, {"GROUP_SIZE": 64, "dtype": "fp16"}),
    ],
    ids=str,
)
def test_kernel_waits_in_every_form(tiling: Tiling, others: dict[str, Any], tmp_path: Path) -> None:
    kernel = experts(tiling, 90, **others)
    code = machine_code(kernel, tmp_path)
    assert any(text.startswith("HGMMA") for _, text in code)
    assert resources(kernel, tmp_path)["STACK"] == 0
    assert overwritten_operands(code) == []
