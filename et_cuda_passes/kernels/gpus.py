"""GPUs by name: the limits for a tiling, and the speeds that determine its time.

The limits of a multiprocessor are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". Bandwidth and rate (bf16 with fp32 sums, without sparsity) are those of the card in ``card``, from NVIDIA's
data sheets and architecture white papers. Other cards of the same architecture differ in these and in multiprocessors.

The cards that run a program follow from the compute capability that it was compiled for. Machine code for X.y runs on
X.z with z >= y, and on no other X (NVIDIA's Ada Compatibility Guide, "Application Compatibility"). From 9.0 on, Triton
compiles with the features of one architecture (``sm_90a``), and such code runs on this compute capability alone
(Hopper and Blackwell Compatibility Guides). Between Tegra (8.7) and other cards no code is compatible.
"""

import re
from dataclasses import dataclass, replace

KIB = 1024
RESERVED = 1024
"""Bytes of shared memory that the system reserves for each program."""


@dataclass(frozen=True)
class GpuArch:
    """A GPU.

    Attributes:
        name: as in ``sm_90``.
        card: the card whose processors, bandwidth and rate these are.
        processors: number of multiprocessors.
        program_memory: largest number of bytes of shared memory of a program.
        memory: bytes of shared memory of a multiprocessor.
        warps: largest number of warps on a multiprocessor.
        programs: largest number of programs on a multiprocessor.
        bandwidth: bytes a microsecond.
        rate: floating-point operations a microsecond.
        registers: number of 32-bit registers of a multiprocessor.
    """

    name: str
    card: str
    processors: int
    program_memory: int
    memory: int
    warps: int
    programs: int
    bandwidth: float
    rate: float
    registers: int = 65536

    @property
    def wgmma(self) -> bool:
        """Whether the compiler multiplies with ``wgmma``, and x can be copied in bulk by a tensor descriptor."""
        return self.name == "sm_90"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        return divmod(int(self.name.removeprefix("sm_")), 10)

    def __str__(self) -> str:
        """The name that :func:`gpu_arch` parses."""
        usual = self.processors == GPUS[self.name].processors
        return self.name if usual else f"{self.name}:{self.processors}"

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a multiprocessor holds at once, by registers a thread, shared memory and warps; or 0."""
        if shared > self.program_memory:
            return 0
        of_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
        by_registers = self.registers // (of_warp * warps)
        return min(by_registers, self.memory // (shared + RESERVED), self.warps // warps, self.programs)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuArch("sm_80", "A100 SXM 80GB", 108, 163 * KIB, 164 * KIB, 64, 32, 2.039e6, 312e6),
        GpuArch("sm_86", "GeForce RTX 3090", 82, 99 * KIB, 100 * KIB, 48, 16, 0.936e6, 71e6),
        GpuArch("sm_89", "GeForce RTX 4090", 128, 99 * KIB, 100 * KIB, 48, 24, 1.008e6, 165.2e6),
        GpuArch("sm_90", "H100 SXM", 132, 227 * KIB, 228 * KIB, 64, 32, 3.35e6, 989e6),
        GpuArch("sm_100", "B200", 148, 227 * KIB, 228 * KIB, 64, 32, 8.0e6, 2250e6),
        GpuArch("sm_120", "GeForce RTX 5090", 170, 99 * KIB, 100 * KIB, 48, 24, 1.792e6, 209.5e6),
    )
}
HOPPER = GPUS["sm_90"]
TEGRA = (8, 7)


def runs_on(code: tuple[int, int], device: tuple[int, int]) -> bool:
    """Whether a GPU of compute capability ``device`` runs machine code that Triton compiled for ``code``."""
    if code >= (9, 0) or TEGRA in (code, device):
        return code == device
    return code[0] == device[0] and code[1] <= device[1]


def cards_of(gpu: GpuArch) -> list[str]:
    """The names of the GPUs that run every program that was compiled for ``gpu``, with its shared memory."""
    return [
        other.name
        for other in GPUS.values()
        if runs_on(gpu.capability, other.capability) and other.program_memory >= gpu.program_memory
    ]


def compilers_of(gpu: GpuArch) -> list[str]:
    """The names of the GPUs on which a program for ``gpu`` can be compiled, ``gpu`` first."""
    names = [other.name for other in GPUS.values() if runs_on(other.capability, gpu.capability)]
    return sorted(names, key=lambda name: name != gpu.name)


def gpu_arch(name: str) -> GpuArch:
    """The GPU of a name: ``sm_89``, or ``sm_89:76`` for a card of 76 multiprocessors.

    Raises:
        ValueError: the name or the number is unknown.
    """
    found = re.fullmatch(r"(sm_\d+)(?::([1-9]\d{0,3}))?", name)
    if found is None or found[1] not in GPUS:
        known = ", ".join(GPUS)
        raise ValueError(f"{name!r} names no known GPU: use one of {known}, with its multiprocessors as in sm_90:114")
    gpu = GPUS[found[1]]
    return gpu if found[2] is None else replace(gpu, processors=int(found[2]))


def gpu_of_capability(capability: tuple[int, int], processors: int) -> GpuArch:
    """The GPU of a compute capability, or for an unknown one the nearest older GPU.

    Raises:
        ValueError: the capability is older than every known GPU.
    """
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    if not older:
        least = next(iter(GPUS))
        raise ValueError(
            f"a GPU of compute capability {capability} is older than {least}, the oldest that the kernels support"
        )
    return replace(max(older, key=lambda gpu: gpu.capability), processors=processors)
