"""GPUs by name, and the programs that fit on a multiprocessor."""

from dataclasses import replace

import pytest

from et_cuda_passes.kernels.gpus import (
    GPUS,
    HOPPER,
    KIB,
    cards_of,
    compilers_of,
    gpu_arch,
    gpu_of_capability,
    runs_on,
)


@pytest.mark.parametrize("name", [*GPUS, "sm_90:114", "sm_86:28"])
def test_gpu_arch_reads_what_it_prints(name: str) -> None:
    gpu = gpu_arch(name)
    assert str(gpu) == name
    assert gpu.processors == (int(name.partition(":")[2]) if ":" in name else GPUS[name].processors)


@pytest.mark.parametrize("name", ["", "sm_70", "90", "sm_90:", "sm_90:0", "sm_90:x", "h100"])
def test_gpu_arch_rejects_an_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"names no known GPU: use one of sm_80, .* as in sm_90:114"):
        gpu_arch(name)


def test_gpu_of_capability_falls_back_to_the_nearest_before_it() -> None:
    assert str(gpu_of_capability((9, 0), 132)) == "sm_90"
    assert str(gpu_of_capability((8, 7), 16)) == "sm_86:16"
    assert str(gpu_of_capability((12, 1), 48)) == "sm_120:48"


def test_gpu_of_capability_rejects_a_gpu_older_than_all() -> None:
    with pytest.raises(ValueError, match=r"\(7, 5\) is older than sm_80"):
        gpu_of_capability((7, 5), 40)


@pytest.mark.parametrize(
    ("code", "device", "expected"),
    [
        ((8, 0), (8, 0), True),
        ((8, 0), (8, 6), True),
        ((8, 6), (8, 9), True),  # the example of NVIDIA's Ada Compatibility Guide
        ((8, 9), (8, 6), False),  # and its counterexample
        ((8, 6), (8, 0), False),
        ((8, 0), (8, 7), False),  # Tegra
        ((8, 9), (9, 0), False),
        ((9, 0), (9, 0), True),
        ((9, 0), (10, 0), False),
        ((10, 0), (10, 3), False),  # sm_100a
        ((12, 0), (12, 1), False),  # sm_120a
    ],
)
def test_machine_code_runs_on_later_minor_versions_before_nine(
    code: tuple[int, int], device: tuple[int, int], expected: bool
) -> None:
    assert runs_on(code, device) == expected


def test_cards_of_a_gpu_have_its_shared_memory() -> None:
    found = {name: cards_of(gpu) for name, gpu in GPUS.items()}
    assert found == {name: [name] for name in GPUS} | {"sm_86": ["sm_86", "sm_89"]}
    # The GPUs of 8.6 and 8.9 run code for 8.0 if it uses no more shared memory than they have.
    small = replace(GPUS["sm_80"], program_memory=GPUS["sm_86"].program_memory)
    assert cards_of(small) == ["sm_80", "sm_86", "sm_89"]


def test_compilers_of_a_gpu_begin_with_itself() -> None:
    assert compilers_of(GPUS["sm_89"]) == ["sm_89", "sm_80", "sm_86"]
    assert compilers_of(GPUS["sm_86"]) == ["sm_86", "sm_80"]
    assert compilers_of(HOPPER) == ["sm_90"]


def test_only_hopper_has_wgmma() -> None:
    assert [name for name, gpu in GPUS.items() if gpu.wgmma] == ["sm_90"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "count"),
    [
        (64, 0, 4, 8),  # 65536 / (64 * 128)
        (65, 0, 4, 7),  # registers are allocated to a warp in units of 256
        (32, 0, 1, 32),  # programs
        (32, 0, 8, 8),  # warps
        (32, 75 * KIB, 4, 3),  # 228 / (75 + 1)
        (32, 227 * KIB, 4, 1),
        (32, 227 * KIB + 1, 4, 0),
    ],
)
def test_resident_is_bounded_by_each_resource(registers: int, shared: int, warps: int, count: int) -> None:
    assert HOPPER.resident(registers, shared, warps) == count
