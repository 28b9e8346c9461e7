"""The type of a target. The abilities of its kernels and its list of rules are data, so no rule depends on a target."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT4_EXPERTS, INT4_LINEARS
from et_cuda_passes.quant.unsupported import SuggestedSchemes

INT8 = "int8"
"""The ``layout`` of the int8 kernels: int8 [N, K], row by row."""

FAMILIES: Mapping[str, Iterable[str]] = {
    "int4_linear": INT4_LINEARS,
    "int4_table": INT4_EMBEDDINGS,
    "int4_experts": INT4_EXPERTS,
    "int4_indexed_experts": INT4_EXPERTS,
    "float4_linear": INT4_LINEARS,
    "int8_linear": (INT8,),
    "float8_linear": (INT8,),
    "int8_plain": (INT8,),
}
"""The families of kernels, each with the layouts that its operators read.

"int4_linear" and "int8_linear" are linears, and "float4_linear" and "float8_linear" those of weights with floats of
these bits. "int4_table" is the table of an embedding. "int4_experts" are stacked
weights of experts, all of them or rows sorted by expert; "int4_indexed_experts" are those that a tensor of ids selects.
"int8_plain" are plain operators instead of a kernel, for a weight whose dequantize operator does not compile.
"""

PLAIN = Kernel(
    "plain operators",
    layout=INT8,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    group_sizes=(8, 16, 32, 64, 128, 256),
    scale_dtype=torch.float32,
    per_row=True,
)
"""The implementation of ``int8_linear`` without a kernel. A compiled program dequantizes the weight at every call."""


@dataclass(frozen=True)
class Target:
    """A backend: its kernels by family, and its ordered list of rules.

    Attributes:
        name: the name for ``rewrite`` and the command line.
        summary: one line for people.
        kernels: kernels by family, one of :data:`FAMILIES`; the first of a family is its default.
        passes: returns a new list of the rules, in their order.
        advised: the quantization to suggest instead of a form that no rule rewrites.
        dtypes: the floating-point dtypes that the backend computes in; empty for any.
        dynamic_sizes: whether the backend's runtime takes inputs of dynamic sizes.
        refuses_misses: whether its partitioner refuses a program with a quantized weight that no rule rewrote, kept or
            folded.
        gpu: the GPU whose tilings a report describes; None for a target whose kernels have none.
        partitioner: for the lowering of a target outside of this package: returns the ExecuTorch partitioner of the
            method of that name, which gets the rewritten program.
        lowered_as: the name of the target of this package as which this one is lowered, if it is not its own name.

    Raises:
        ValueError: a family is unknown, or no operator of a kernel's family reads the kernel's layout.
    """

    name: str
    summary: str
    kernels: Mapping[str, tuple[Kernel, ...]] = field(hash=False)
    passes: Callable[[], list[Rule]] = field(compare=False)
    advised: SuggestedSchemes = field(default_factory=SuggestedSchemes)
    dtypes: tuple[torch.dtype, ...] = ()
    dynamic_sizes: bool = True
    refuses_misses: bool = False
    gpu: GpuArch | None = None
    partitioner: Callable[[str], Any] | None = field(default=None, compare=False)
    lowered_as: str = ""

    def __post_init__(self) -> None:
        if not callable(self.passes):
            raise TypeError(
                f"target {self.name!r}: passes must be a function that returns the list, not the list itself: write "
                "passes=lambda: [...]"
            )
        for family, kernels in self.kernels.items():
            if family not in FAMILIES:
                raise ValueError(f"there is no family of kernels {family!r}; known are {', '.join(FAMILIES)}")
            for kernel in kernels:
                if kernel.layout not in FAMILIES[family]:
                    raise ValueError(
                        f"kernel {kernel.name!r} reads the layout {kernel.layout!r}, and no {family} operator does; "
                        f"known are {', '.join(FAMILIES[family])}"
                    )

    @property
    def lowering(self) -> str:
        """The name of the target as which this one is lowered."""
        return self.lowered_as or self.name

    def kernel(self, family: str, name: str | None = None) -> Kernel | None:
        """The kernel with that name, or for None the family's default, which is None in an empty family.

        Raises:
            UsageError: the family has no kernel with that name.
        """
        kernels = self.kernels.get(family, ())
        if name is None:
            return kernels[0] if kernels else None
        for kernel in kernels:
            if kernel.name == name:
                return kernel
        known = ", ".join(kernel.name for kernel in kernels) or "none"
        raise UsageError(f"target {self.name} has no {family.partition('_')[0]} kernel {name!r}; it has: {known}")
