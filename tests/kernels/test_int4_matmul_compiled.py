"""Every tiling of the tables, compiled for its GPUs: it fits, spills nothing, and waits where needed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from et_cuda_passes.kernels.choose import Weight, tiling_for
from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch
from et_cuda_passes.kernels.tiling import Tiling
from tests.kernels.compiled import (
    SPILLED,
    arch_of,
    check_for_others,
    code_for_hopper,
    largest_of_each_kind,
    machine_code,
    matmul,
    overwritten_operands,
    parts_adder,
    resources,
    tilings_of,
)

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("tiling", largest_of_each_kind(tilings_of(HOPPER)))
def test_tiling_for_hopper_moves_no_weights_between_threads(tiling: Tiling, tmp_path: Path) -> None:
    kernel = matmul(tiling, 90)
    code_for_hopper(kernel, tiling, tmp_path)
    # The weights reach the tensor cores without a move between threads.
    moved = [line for line in kernel.asm["ttgir"].splitlines() if "convert_layout %w" in line and "dot_op" not in line]
    assert moved == []
    if tiling.waves:
        assert resources(parts_adder(tiling, 90), tmp_path)["STACK"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("tiling", tilings_of(HOPPER), ids=str)
def test_tiling_for_hopper_with_larger_groups_is_as_expected(tiling: Tiling, group: int, tmp_path: Path) -> None:
    code_for_hopper(matmul(tiling, 90, group_size=group), tiling, tmp_path)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(256, 128, 64, 1, 0, 8, 4, 1),
        Tiling(128, 64, 64, 1, 1, 4, 4, 1),
        Tiling(64, 64, 128, 1, 1, 4, 4),
        Tiling(8, 16, 128, 4, 0, 4, 4),
    ],
    ids=str,
)
def test_scales_are_copied_asynchronously_in_every_step(tiling: Tiling, group: int, tmp_path: Path) -> None:
    """Copies are asynchronous and go to the threads that need them: no load goes to registers."""
    code = code_for_hopper(matmul(tiling, 90, group_size=group, HAS_ZERO=True), tiling, tmp_path)
    products = [index for index, (_, text) in enumerate(code) if text.startswith(("HGMMA", "HMMA"))]
    loop = [text for _, text in code[products[0] - 100 : products[-1]]]
    assert not any(text.startswith(("LDG.", "SHFL", "STS")) for text in loop)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    "tiling", [Tiling(128, 64, 64, 1, 0, 4, 4, 1, 64), Tiling(256, 128, 64, 1, 0, 8, 3, 1, 64)], ids=str
)
def test_two_pieces_of_rows_share_the_weights_of_a_step(tiling: Tiling, group: int, tmp_path: Path) -> None:
    two = code_for_hopper(matmul(tiling, 90, group_size=group, HAS_ZERO=True), tiling, tmp_path)
    one_piece = replace(tiling, extra_m=0)
    one = code_for_hopper(matmul(one_piece, 90, group_size=group, HAS_ZERO=True), one_piece, tmp_path)
    products, arithmetic = (
        [Counter(text.split()[0] for _, text in code if text.startswith(start)) for code in (two, one)]
        for start in ("HGMMA", "HFMA2")
    )
    wanted = {f"HGMMA.64x{rows}x16.F32.BF16": 4 for rows in (tiling.block_m, tiling.extra_m)}
    assert products[0] == wanted
    assert products[1] == {f"HGMMA.64x{tiling.block_m}x16.F32.BF16": 4}
    assert arithmetic[0].total() == arithmetic[1].total() > 0
    # Each piece has its own copy in every buffer.
    assert [sum("UTMALDG" in text for _, text in code) for code in (two, one)] == [2 * tiling.stages, tiling.stages]


@pytest.mark.parametrize(
    "others",
    [
        {"HAS_ZERO": True, "HAS_BIAS": True, "group_size": 64},
        {"BULK": 0, "EVEN_K": False, "HAS_ZERO": True},
        {"ACTIVATION": "gelu", "HAS_FACTOR": True, "HAS_ADDEND": True, "HAS_BIAS": True},
        {"GATED": True, "ACTIVATION": "silu", "HAS_BIAS": True, "HAS_ADDEND": True},
        {"SLOTS": 132, "dtype": "fp16"},
    ],
    ids=str,
)
def test_form_of_two_pieces_fits_and_spills_nothing(others: dict[str, object], tmp_path: Path) -> None:
    tiling = Tiling(128, 64, 64, 1, 0, 4, 4, 1, 64)
    code_for_hopper(matmul(tiling, 90, **others), tiling, tmp_path)


def test_parts_of_two_pieces_are_added_without_spills(tmp_path: Path) -> None:
    assert resources(parts_adder(Tiling(128, 64, 64, 1, 1, 4, 4, 1, 64), 90), tmp_path)["STACK"] == 0


@pytest.mark.parametrize("rank", [2, 3])
def test_tile_of_x_is_copied_by_one_instruction(rank: int, tmp_path: Path) -> None:
    tiling = Tiling(256, 128, 64, 1, 0, 8, 4, 1)
    code = code_for_hopper(matmul(tiling, 90, BULK=rank), tiling, tmp_path)
    # Each buffer has its first copy before the loop, and one copy is in the loop.
    assert sum(f"UTMALDG.{rank}D" in text for _, text in code) == tiling.stages
    by_all = code_for_hopper(matmul(tiling, 90, BULK=0), tiling, tmp_path)
    copies = [sum("LDGSTS" in text for _, text in each) for each in (code, by_all)]
    assert copies[0] == copies[1] - 8 * tiling.stages  # 256 threads copy 16 bytes each: 8 copies for 256 x 64


OTHERS = [gpu for gpu in GPUS.values() if gpu != HOPPER]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", OTHERS, ids=str)
def test_tilings_of_a_gpu_compile_and_fit(gpu: GpuArch, tmp_path: Path) -> None:
    for tiling in tilings_of(gpu):
        check_for_others(matmul(tiling, arch_of(gpu), WGMMA=False), tmp_path, gpu)


@pytest.mark.parametrize("gpu", OTHERS, ids=str)
def test_chosen_tilings_of_a_gpu_compile_and_fit(gpu: GpuArch, tmp_path: Path) -> None:
    weight = Weight(4096, 4096, 32)
    for tiling in {tiling_for(gpu, weight, rows) for rows in (1, 16, 64, 256, 2048)}:
        check_for_others(matmul(tiling, arch_of(gpu), WGMMA=False), tmp_path, gpu)


ONE = Tiling(16, 64, 128, 1, 0, 4, 3)


@pytest.mark.parametrize(
    "others",
    [
        {"HAS_ZERO": True, "HAS_BIAS": True},
        {"EVEN_K": False, "group_size": 64},
        {"group_size": 128, "ACTIVATION": "silu"},
        {"ACTIVATION": "gelu", "HAS_FACTOR": True, "HAS_ADDEND": True},
        {"ACTIVATION": "gelu_tanh", "dtype": "fp16", "HAS_ZERO": True},
        {"GATED": True, "ACTIVATION": "silu", "HAS_BIAS": True, "HAS_ADDEND": True},
    ],
    ids=str,
)
def test_kernel_waits_in_every_form(others: dict[str, object], tmp_path: Path) -> None:
    assert overwritten_operands(machine_code(matmul(ONE, 90, **others), tmp_path)) == []


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("tiling", [Tiling(256, 128, 64, 1, 0, 8, 4), Tiling(128, 64, 128, 1, 1, 4, 3)], ids=str)
def test_activation_spills_no_registers(activation: str, tiling: Tiling, tmp_path: Path) -> None:
    code_for_hopper(matmul(tiling, 90, ACTIVATION=activation), tiling, tmp_path)


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(8, 16, 256, 4, 0, 4, 3),
        Tiling(64, 64, 256, 1, 0, 4, 3),
        Tiling(128, 64, 128, 1, 1, 4, 3),
        Tiling(256, 128, 64, 1, 0, 8, 4),
    ],
    ids=str,
)
def test_gate_stores_half_and_moves_nothing(tiling: Tiling, tmp_path: Path) -> None:
    """Half of the sums are activated and stored. The halves meet in one thread, so that no shuffle is needed."""
    gated = code_for_hopper(matmul(tiling, 90, GATED=True, ACTIVATION="silu"), tiling, tmp_path)
    plain = code_for_hopper(matmul(tiling, 90, ACTIVATION="silu"), tiling, tmp_path)
    assert len(gated) <= len(plain)
    moved = [[text for _, text in code if text.startswith(("SHFL", "STS."))] for code in (gated, plain)]
    assert len(moved[0]) <= len(moved[1]) + 2


@pytest.mark.slow
@pytest.mark.parametrize("gpu", OTHERS, ids=str)
def test_gate_on_other_gpus_fits(gpu: GpuArch, tmp_path: Path) -> None:
    for tiling in tilings_of(gpu):
        kernel = matmul(tiling, arch_of(gpu), GATED=True, ACTIVATION="silu", WGMMA=False)
        assert kernel.metadata.shared <= gpu.program_memory
        assert resources(kernel, tmp_path)["STACK"] <= 8


def _loop(*body: str) -> list[tuple[int, str]]:
    texts = [*body, "@P0 BRA 0x0"]
    return [(16 * index, text) for index, text in enumerate(texts)]


PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R152, gdesc[UR8], R24, gsb0"


def test_check_finds_an_operand_written_before_the_wait() -> None:
    early = _loop("LDS.128 R152, [R3]", "WARPGROUP.DEPBAR.LE gsb0, 0x0", PRODUCT)
    # The load of the next iteration comes before the wait.
    assert overwritten_operands([*early[:3], (48, "@P0 BRA 0x0")]) == [f"LDS.128 R152, [R3] overwrites {PRODUCT}"]
    late = _loop("WARPGROUP.DEPBAR.LE gsb0, 0x0", "LDS.128 R152, [R3]", PRODUCT)
    assert overwritten_operands([*late[:3], (48, "@P0 BRA 0x0")]) == []


def test_check_counts_the_groups_that_a_wait_leaves() -> None:
    second = PRODUCT.replace("R152", "R156")
    code = _loop("WARPGROUP.DEPBAR.LE gsb0, 0x1", "LDS.128 R152, [R3]", "LDS.128 R156, [R3]", PRODUCT, second)
    # The wait retires the first of the two groups of the last iteration, and not the second.
    assert overwritten_operands(code) == [f"LDS.128 R156, [R3] overwrites {second}"]


FORMS = [
    {"group_size": 16},
    {"group_size": 16, "HAS_ZERO": True, "EVEN_K": False},
    {"group_size": 16, "FLOAT4": True},
    {"group_size": 32, "FLOAT4": True, "dtype": "fp16"},
]


def check_form(gpu: GpuArch, tiling: Tiling, form: dict[str, object], folder: Path) -> None:
    kernel = matmul(tiling, arch_of(gpu), WGMMA=gpu == HOPPER, **(form | {"EVEN_K": True} if tiling.bulk else form))
    assert kernel.metadata.shared <= gpu.program_memory
    assert resources(kernel, folder)["STACK"] <= SPILLED
    assert overwritten_operands(machine_code(kernel, folder)) == []


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("gpu", "rows"), [("sm_80", 1), ("sm_90", 1), ("sm_90", 300), ("sm_100", 300)])
def test_groups_of_16_and_floats_compile_and_fit(gpu: str, rows: int, form: dict[str, object], tmp_path: Path) -> None:
    arch = GPUS[gpu]
    check_form(arch, tiling_for(arch, Weight(4096, 4096, 16), rows), form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_tilings_of_a_gpu_compile_with_groups_of_16_and_floats(
    gpu: GpuArch, form: dict[str, object], tmp_path: Path
) -> None:
    for tiling in tilings_of(gpu):
        check_form(gpu, tiling, form, tmp_path)
