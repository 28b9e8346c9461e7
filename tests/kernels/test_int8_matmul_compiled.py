"""Every tiling of the int8 tables, compiled for its GPUs: it fits, spills and moves nothing, and waits where needed."""

import re
from collections import Counter
from pathlib import Path

import pytest

from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch
from et_cuda_passes.kernels.tiling import Tiling
from tests.kernels.compiled import (
    SPILLED,
    arch_of,
    check_for_others,
    code_for_hopper,
    int8_product,
    largest_of_each_kind,
    machine_code,
    overwritten_operands,
    parts_adder,
    resources,
    tilings_of,
)

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("group_size", [0, 32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tiling", largest_of_each_kind(tilings_of(HOPPER, 8)))
def test_tiling_for_hopper_moves_no_weights_between_threads(tiling: Tiling, group_size: int, tmp_path: Path) -> None:
    kernel = int8_product(tiling, 90, group_size=group_size)
    code = code_for_hopper(kernel, tiling, tmp_path)
    # A pair of weights is a load, a permute, two masks and a subtraction; the weights never go back to shared memory.
    counts = Counter(text.split()[0 if not text.startswith("@") else 1] for _, text in code)
    pairs = tiling.segments * tiling.block_n * tiling.block_k // (tiling.warps * 32) // 2
    assert pairs <= sum(count for name, count in counts.items() if name.startswith("LDS.U16")) <= pairs + 4
    # All loads of the loop are asynchronous, and the layout of the rows avoids bank conflicts.
    loop = kernel.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield", 1)[0]
    assert "tt.load" not in loop
    layout = re.search(r"ttg.local_load .*memdesc<\d+x\d+xi8, (#shared\d*),", loop)
    assert layout is not None
    swizzled = rf"{layout[1]} = #ttg.swizzled_shared<{{vec = (\d+), perPhase = (\d+), maxPhase = (\d+)"
    found = re.search(swizzled, kernel.asm["ttgir"])
    assert found is not None
    vector, per_phase, phases = map(int, found.groups())
    assert vector == 8 and per_phase * phases >= 8
    if tiling.waves:
        assert resources(parts_adder(tiling, 90), tmp_path)["STACK"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu != HOPPER], ids=str)
def test_tilings_of_a_gpu_compile_and_fit(gpu: GpuArch, group_size: int, tmp_path: Path) -> None:
    for tiling in tilings_of(gpu, 8):
        check_for_others(int8_product(tiling, arch_of(gpu), group_size=group_size, WGMMA=False), tmp_path, gpu)


ONE = Tiling(16, 64, 128, 1, 0, 4, 3)


@pytest.mark.parametrize(
    "others",
    [
        {"group_size": 0, "HAS_ZERO": True, "HAS_BIAS": True},
        {"group_size": 64, "HAS_ZERO": True, "EVEN_K": False},
        {"group_size": 32, "EVEN_K": False, "UNIT": 32},
        {"group_size": 128, "PAIRS": False, "EVEN_K": False},
        {"group_size": 256, "dtype": "fp16"},
        {"group_size": 0, "dtype": "fp16", "EVEN_K": False, "UNIT": 16},
        {"group_size": 32, "dtype": "fp16", "HAS_ZERO": True},
    ],
    ids=str,
)
def test_kernel_waits_in_every_form(others: dict[str, object], tmp_path: Path) -> None:
    kernel = int8_product(ONE, 90, **others)
    assert overwritten_operands(machine_code(kernel, tmp_path)) == []
    assert resources(kernel, tmp_path)["STACK"] == 0


@pytest.mark.parametrize("group_size", [0, 32])
def test_wait_occurs_once_in_every_step(group_size: int) -> None:
    text = int8_product(ONE, 90, group_size=group_size).asm["ptx"]
    assert text.count("wgmma.wait_group.sync.aligned 0; mov.b32") == 1


FLOATS = [
    {"group_size": 0, "FLOAT8": 4, "HAS_BIAS": True},
    {"group_size": 128, "FLOAT8": 4, "EVEN_K": False},
    {"group_size": 32, "FLOAT8": 5, "dtype": "fp16"},
]


def check_form(gpu: GpuArch, tiling: Tiling, form: dict[str, object], folder: Path) -> None:
    kernel = int8_product(tiling, arch_of(gpu), WGMMA=gpu == HOPPER, **form)
    assert kernel.metadata.shared <= gpu.program_memory
    assert resources(kernel, folder)["STACK"] <= SPILLED
    assert overwritten_operands(machine_code(kernel, folder)) == []


@pytest.mark.parametrize("form", FLOATS, ids=str)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_8_bit_floats_compile_and_fit(gpu: str, form: dict[str, object], tmp_path: Path) -> None:
    check_form(GPUS[gpu], ONE, form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FLOATS, ids=str)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_tilings_of_a_gpu_compile_with_8_bit_floats(gpu: GpuArch, form: dict[str, object], tmp_path: Path) -> None:
    for tiling in tilings_of(gpu, 8):
        check_form(gpu, tiling, form, tmp_path)
