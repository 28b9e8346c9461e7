"""The experts' kernel compiled for GPUs that are not here, in every tiling that a launch may choose."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from et_cuda_passes.kernels.experts_launch import plain
from et_cuda_passes.kernels.int4_experts import int4_experts
from et_cuda_passes.kernels.tiling import HOPPER, OTHER, Tiling
from tests.kernels.compiled import (
    check_for_others,
    code_for_hopper,
    compiled,
    machine_code,
    overwritten_operands,
    resources,
    shape,
    tilings_of,
)

FORM = {"GROUPED": False, "HAS_IDS": True, "WIDTH": 16}
GROUPED = {"GROUPED": True, "HAS_IDS": False, "WIDTH": 128}
ONE = Tiling(16, 64, 128, 1, 0, 4, 3)


def of(family: Any) -> list[Tiling]:
    return sorted({plain(tiling, 32) for tiling in tilings_of(family.name)}, key=str)


@cache
def experts(tiling: Tiling, arch: int, dtype: str = "bf16", **others: Any) -> Any:
    constants = shape(tiling) | FORM | others
    return compiled(int4_experts, constants, arch, tiling.warps, tiling.stages, dtype)


@pytest.mark.parametrize("tiling", of(HOPPER), ids=str)
def test_a_tiling_of_hopper(tiling: Tiling, tmp_path: Path) -> None:
    code_for_hopper(experts(tiling, 90), tiling, tmp_path)


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("tiling", of(OTHER), ids=str)
def test_a_tiling_of_other_gpus(tiling: Tiling, arch: int, tmp_path: Path) -> None:
    kernel = experts(tiling, arch, WGMMA=False)
    check_for_others(kernel, tmp_path)


@pytest.mark.parametrize(
    "others",
    [
        GROUPED,
        GROUPED | {"HAS_ZERO": True, "EVEN_K": False},
        GROUPED | {"GROUP_SIZE": 128, "dtype": "fp16"},
        {"HAS_IDS": False, "HAS_ZERO": True},
        {"EVEN_K": False, "GROUP_SIZE": 64},
    ],
    ids=str,
)
def test_every_form_of_the_kernel_waits_too(others: dict[str, Any], tmp_path: Path) -> None:
    kernel = experts(ONE, 90, **others)
    code = machine_code(kernel, tmp_path)
    assert any(text.startswith("HGMMA") for _, text in code)
    assert resources(kernel, tmp_path)["STACK"] == 0
    assert overwritten_operands(code) == []
