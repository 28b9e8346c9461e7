"""Compiles the Triton kernels for a GPU that this machine does not have, and inspects their machine code."""

import hashlib
import re
import subprocess
from dataclasses import astuple
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from et_cuda_passes.kernels.choose import Weight, candidates, costs_of
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.int4_matmul import int4_matmul
from et_cuda_passes.kernels.int8_matmul import int8_matmul
from et_cuda_passes.kernels.tiles import add_parts
from et_cuda_passes.kernels.tiling import Tiling

KINDS = {"parts_ptr": "fp32", "zero_ptr": "fp32", "words_ptr": "i32", "packed_ptr": "i8"}
"""Element types of the pointers whose type is not the dtype of the activations."""
BLOCKS = {"x_ptr": "BLOCK_M", "extra_ptr": "EXTRA_M"}
"""Pointers that are tensor descriptors in bulk copies, and the constants with the rows of their blocks."""
SPILLED = 16
"""Bytes of registers that a kernel may spill on GPUs other than Hopper. The tables were written with Triton 3.6, which
spills none. Triton 3.9 spills 8 bytes in some tilings, and 16 in one on sm_120."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def shape(tiling: Tiling, group_size: int = 32, processors: int = 132, **others: Any) -> dict[str, Any]:
    """The compile-time constants of a launch."""
    constants = {
        "BLOCK_M": tiling.block_m,
        "EXTRA_M": tiling.extra_m,
        "TILE_M": tiling.tile_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "SEGMENTS": tiling.segments,
        "SLOTS": tiling.waves * processors,
        "GROUP_SIZE": group_size,
        "EVEN_K": True,
        "BULK": 3 * tiling.bulk,
        "HAS_ZERO": False,
        "HAS_BIAS": False,
        "ACTIVATION": "",
        "HAS_FACTOR": False,
        "HAS_ADDEND": False,
        "GATED": False,
        "FLOAT4": False,
        "FLOAT8": 0,
        "USE_ASM": True,
        "WGMMA": True,
        "SALT": 1,
    }
    return constants | others


def compiled(kernel: Any, constants: dict[str, Any], arch: int, warps: int, stages: int, dtype: str = "bf16") -> Any:
    """``kernel`` compiled for compute capability ``arch``, N a multiple of 16, as is usual."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif constants.get("BULK") and name in BLOCKS and constants[BLOCKS[name]]:
            block = [1] * (constants["BULK"] - 2) + [constants[BLOCKS[name]], constants["BLOCK_K"]]
            signature[name] = f"tensordesc<{dtype}{block}>"
        elif name.endswith("_ptr"):
            signature[name] = f"*{KINDS.get(name, dtype)}"
        else:
            signature[name] = "i32"
        if signature[name][0] == "*" or name == "N":
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@cache
def matmul(tiling: Tiling, arch: int, dtype: str = "bf16", **others: Any) -> Any:
    """The matrix product in one tiling."""
    return compiled(int4_matmul, shape(tiling, **others), arch, tiling.warps, tiling.stages, dtype)


@cache
def int8_product(tiling: Tiling, arch: int, dtype: str = "bf16", **others: Any) -> Any:
    """The matrix product of int8 weights in one tiling."""
    constants = shape(tiling, **others)
    constants = {"UNIT": 1024, "PAIRS": constants["GROUP_SIZE"] > 0} | constants
    return compiled(int8_matmul, constants, arch, tiling.warps, tiling.stages, dtype)


@cache
def parts_adder(tiling: Tiling, arch: int) -> Any:
    """The kernel that adds the parts of split tiles."""
    return compiled(add_parts, shape(tiling) | {"HEIGHT": min(tiling.tile_m, 8)}, arch, 4, 3)


def machine_code(kernel: Any, folder: Path) -> list[tuple[int, str]]:
    """Address and text of every instruction."""
    # Triton's cache has the compiled kernel from an earlier run, and then its text too: cuobjdump takes longer to start
    # than all other checks of a kernel.
    kept = get_cache_manager(hashlib.sha256(kernel.asm["cubin"]).hexdigest())
    path = kept.get_file("kernel.sass")
    if path is None:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        dump = subprocess.run([_TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
        path = kept.put(dump, "kernel.sass", binary=False)
    lines = (re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", line) for line in Path(path).read_text().splitlines())
    return [(int(found[1], 16), found[2]) for found in lines if found]


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """The resource usage of the kernel: REG, STACK and so on."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([_TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.stdout)}


def overwritten_operands(code: list[tuple[int, str]]) -> list[str]:
    """Writes to the left operand of a wgmma before a wait has retired it; the loop around it is followed twice.

    ``HGMMA R24, R152, gdesc[..]`` reads R152 to R155 while later instructions run, until a ``WARPGROUP.DEPBAR.LE gsb0,
    n`` leaves at most n groups in flight; ``gsb0`` on the instruction ends a group.
    """
    place = {address: index for index, (address, _) in enumerate(code)}
    products = [index for index, (_, text) in enumerate(code) if text.startswith("HGMMA")]
    if not products:
        return []
    branches = [
        (place[int(found[1], 16)], index)
        for index, (address, text) in enumerate(code)
        if (found := re.search(r"\bBRA.*?(0x[0-9a-f]+)", text)) and int(found[1], 16) in place
        if int(found[1], 16) < address
    ]
    around = [(end - begin, begin, end) for begin, end in branches if begin <= products[0] and end >= products[-1]]
    assert around, "the products are in no loop"
    _, begin, end = min(around)
    flying: list[tuple[str, set[int], bool]] = []
    found_writes = []
    for index in [*range(begin, end + 1), *range(begin, end + 1)]:
        text = re.sub(r"^@!?U?P\w+\s+", "", code[index][1])
        if text.startswith("HGMMA"):
            operand = re.match(r"HGMMA\S*\s+R\d+, R(\d+)", text)
            first = int(operand[1]) if operand else -4
            flying.append((text, set(range(first, first + 4)), "gsb0" in text))
        elif text.startswith("WARPGROUP.DEPBAR"):
            allowed = int(re.search(r"gsb0, (0x[0-9a-f]+)", text)[1], 16)  # type: ignore[index]
            kept, groups = [], 0
            for product in reversed(flying):
                groups += product[2]
                if groups <= allowed:
                    kept.append(product)
            flying = kept[::-1]
        elif written := re.match(r"([A-Z][A-Z0-9_.]*)\s+R(\d+)", text):
            if written[1].startswith(("ST", "RED", "LDGSTS", "BAR")):
                continue
            width = (
                4 if ".128" in written[1] or "M88.4" in written[1] else 2 if re.search(r"64|WIDE", written[1]) else 1
            )
            registers = set(range(int(written[2]), int(written[2]) + width))
            found_writes += [f"{text} overwrites {product}" for product, read, _ in flying if read & registers]
    return found_writes


def waits_between_products(code: list[tuple[int, str]]) -> int:
    """The number of products of a step that wait until the previous product is done.

    ptxas serialises all of them if it cannot prove how their registers are used on every path through the kernel. Its
    warning is not shown.
    """
    products = [index for index, (_, text) in enumerate(code) if text.startswith("HGMMA")]
    waits = [re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0").match(text) for _, text in code]
    return sum(any(waits[first:second]) for first, second in pairwise(products))


def arch_of(gpu: GpuArch) -> int:
    """Triton's number of a compute capability."""
    major, minor = gpu.capability
    return 10 * major + minor


def tilings_of(gpu: GpuArch, bits: int = 4, *, experts: bool = False, grouped: bool = False) -> list[Tiling]:
    """Every tiling that a weight of any size can get on a GPU; one of those that differ only in SLOTS."""
    weights = [Weight(1024, k, 32, bits, experts=experts, grouped=grouped) for k in (1024, 1056)]
    found = {tiling for weight in weights for tiling, _ in candidates(costs_of(gpu, bits), weight) if tiling.waves < 2}
    assert found
    return sorted(found, key=astuple)


def largest_of_each_kind(tilings: list[Tiling]) -> list[Any]:
    """Test parameters: all tilings, with the slow mark on each that is not the largest of its kind.

    A kind is a path through the kernel's source. Its largest tile has the most registers, so that it spills first.
    """
    kinds: dict[tuple[int, ...], list[Tiling]] = {}
    for tiling in tilings:
        kind = (tiling.segments > 1, tiling.waves, tiling.bulk, tiling.extra_m > 0, tiling.warps)
        kinds.setdefault(kind, []).append(tiling)

    def size(tiling: Tiling) -> tuple[int, ...]:
        return (tiling.segments**2 * tiling.tile_m * tiling.block_n, tiling.block_k, *astuple(tiling))

    largest = {max(members, key=size) for members in kinds.values()}
    return [pytest.param(each, marks=() if each in largest else pytest.mark.slow, id=str(each)) for each in tilings]


def code_for_hopper(kernel: Any, tiling: Tiling, folder: Path) -> list[tuple[int, str]]:
    """The machine code of a product, after checks: it fits, spills nothing, uses wgmma, and waits where needed.

    For eight columns or for two warps Triton 3.6 uses the instruction of a warp instead of wgmma.
    """
    code = machine_code(kernel, folder)
    assert kernel.metadata.shared <= 227 * 1024
    assert resources(kernel, folder)["STACK"] == 0
    products = ("HGMMA",) if tiling.block_m * tiling.segments > 8 and tiling.warps >= 4 else ("HGMMA", "HMMA")
    assert sum(text.startswith(products) for _, text in code) >= tiling.block_k // 16 * (1 + (tiling.extra_m > 0))
    assert overwritten_operands(code) == []
    assert waits_between_products(code) == 0
    return code


def check_for_others(kernel: Any, folder: Path, gpu: GpuArch) -> None:
    """Check that a product fits the shared memory of a program, and spills at most ``SPILLED`` bytes."""
    assert kernel.metadata.shared <= gpu.program_memory
    assert resources(kernel, folder)["STACK"] <= SPILLED
    # The tensor cores' instructions have another name from compute capability 10.0 on.
    assert any(text.startswith(("HMMA", "UTC")) for _, text in machine_code(kernel, folder))
