"""GPUs by name, as data: what a kernel's shape has to fit, and what its time depends on.

The limits of a multiprocessor are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". Bandwidth and rate (bf16 with fp32 sums, without sparsity) are of the card in ``card``, by NVIDIA's data
sheets and architecture white papers; other cards of the same architecture differ in these and in multiprocessors.
"""

import re
from dataclasses import dataclass, replace

KIB = 1024
RESERVED = 1024
"""Bytes of shared memory that each program has beside its own."""


@dataclass(frozen=True)
class GpuArch:
    """A GPU.

    Attributes:
        name: as in ``sm_90``.
        card: the card that numbers which an architecture does not fix are of.
        processors: multiprocessors.
        program_memory: bytes of shared memory that a program can have.
        memory: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor holds.
        programs: that a multiprocessor holds.
        bandwidth: bytes a microsecond.
        rate: floating-point operations a microsecond.
        registers: of a multiprocessor, 32 bits each.
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
        """As :func:`gpu_arch` reads it."""
        return self.name if self == GPUS[self.name] else f"{self.name}:{self.processors}"

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs of so many registers a thread, bytes and warps that a multiprocessor holds at once; 0: none fits."""
        if shared > self.program_memory:
            return 0
        of_warp = -(-registers * 32 // 256) * 256  # given out in units of 256
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


def gpu_arch(name: str) -> GpuArch:
    """The GPU of a name: ``sm_89``, or ``sm_89:76`` for a card of 76 multiprocessors.

    Raises:
        ValueError: no such GPU is known, or the number is none.
    """
    found = re.fullmatch(r"(sm_\d+)(?::([1-9]\d{0,3}))?", name)
    if found is None or found[1] not in GPUS:
        known = ", ".join(GPUS)
        raise ValueError(f"{name!r} names no known GPU: use one of {known}, with its multiprocessors as in sm_90:114")
    gpu = GPUS[found[1]]
    return gpu if found[2] is None else replace(gpu, processors=int(found[2]))


def gpu_of_capability(capability: tuple[int, int], processors: int) -> GpuArch:
    """The GPU of a compute capability; of one that is not known, the nearest before it.

    Raises:
        ValueError: it is older than all that are known.
    """
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    if not older:
        least = next(iter(GPUS))
        raise ValueError(f"a GPU of compute capability {capability} is older than {least}, from which on kernels run")
    return replace(max(older, key=lambda gpu: gpu.capability), processors=processors)
