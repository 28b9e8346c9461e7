"""Every choice of blocks, compiled for its GPUs: it fits, spills nothing, and its products are not serialised."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from et_cuda_passes.kernels.attention import attention
from et_cuda_passes.kernels.attention_launch import FEW_ROWS, HEAD_DIMS, Blocks, blocks
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, GpuArch
from tests.kernels.compiled import arch_of, check_for_others, compiled, machine_code, overwritten_operands, resources

pytestmark = pytest.mark.compiled


def built(chosen: Blocks, head_dim: int, arch: int, dtype: str = "bf16", **others: Any) -> Any:
    """The kernel for 20 heads, all tensors as linears write and read them."""
    constants = {
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "D": head_dim,
        "HEADS": 20,
        "KV_HEADS": 20,
        **{f"{name}_ROW": 20 * head_dim for name in "QKVY"},
        "SCALE": head_dim**-0.5 * math.log2(math.e),
        "NEGATED": False,
        "USE_ASM": True,
        "SALT": 1,
    }
    return compiled(attention, constants | others, arch, chosen.warps, chosen.stages, dtype)


def check_for_hopper(kernel: Any, folder: Path) -> None:
    """Check for wgmma, no spills, and one wait for each of a block's two products, before the loop and in it."""
    code = machine_code(kernel, folder)
    assert kernel.metadata.shared <= 227 * 1024
    assert resources(kernel, folder)["STACK"] == 0
    products = [address for address, text in code if text.startswith("HGMMA")]
    back = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"\bBRA.*?(0x[0-9a-f]+)", text))]
    loops = [begin for begin, end in back if begin <= products[-1] < end]
    assert len(loops) == 1
    waits = [text for _, text in code if text.startswith("WARPGROUP.DEPBAR.LE gsb0")]
    assert len(waits) <= 4
    inside = [(at, text) for at, text in code if at >= loops[0]]
    assert len(products) == 2 * sum(text.startswith("HGMMA") for _, text in inside)
    assert overwritten_operands(inside) == []
    # Keys and values are copied asynchronously, 8 or 16 bytes at a time.
    loads = [text for _, text in inside if re.search(r"\bLDG(STS)?\.", text)]
    assert loads
    assert all(re.search(r"LDGSTS\S*\.(64|128)\b", text) for text in loads)


@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_for_hopper_spill_nothing_and_do_not_serialise(head_dim: int, rows: int, tmp_path: Path) -> None:
    check_for_hopper(built(blocks(HOPPER, head_dim, rows), head_dim, 90), tmp_path)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "others",
    [
        {"dtype": "fp16", "NEGATED": True, "KV_HEADS": 4, "K_ROW": 512, "V_ROW": 512},
        {"Q_ROW": "heads first", "K_ROW": "heads first", "V_ROW": "heads first", "Y_ROW": "heads first"},
        {"Q_ROW": 6144, "K_ROW": "heads first", "V_ROW": 6144, "HEADS": 32, "KV_HEADS": 8},
    ],
    ids=str,
)
def test_forms_for_hopper_spill_nothing_and_do_not_serialise(
    others: dict[str, Any], head_dim: int, tmp_path: Path
) -> None:
    others = {name: head_dim if value == "heads first" else value for name, value in others.items()}
    check_for_hopper(built(blocks(HOPPER, head_dim, 1500), head_dim, 90, **others), tmp_path)


@pytest.mark.parametrize("gpu", [GPUS["sm_80"], GPUS["sm_120"]], ids=str)
@pytest.mark.parametrize(
    "head_dim", [pytest.param(dim, marks=() if dim in (64, 128) else pytest.mark.slow) for dim in HEAD_DIMS]
)
def test_blocks_for_other_gpus_fit_and_spill_nothing(head_dim: int, gpu: GpuArch, tmp_path: Path) -> None:
    for chosen in {blocks(gpu, head_dim, rows) for rows in (FEW_ROWS, FEW_ROWS + 1)}:
        # sm_86 has the smallest memory of the GPUs with these blocks.
        check_for_others(built(chosen, head_dim, arch_of(gpu)), tmp_path, GPUS["sm_120"])


@pytest.mark.parametrize("ones", [{"M": 1}, {"L": 1}, {"M": 1, "L": 1}], ids=str)
def test_length_of_1_compiles_as_a_constant(ones: dict[str, int], tmp_path: Path) -> None:
    kernel = built(blocks(HOPPER, 64, 1), 64, 90, **ones)
    assert resources(kernel, tmp_path)["STACK"] == 0
    # With one key the kernel has no loop, and two products of four instructions each.
    products = [text for _, text in machine_code(kernel, tmp_path) if text.startswith("HGMMA")]
    assert len(products) == (8 if "L" in ones else 16)
