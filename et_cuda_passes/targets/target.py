"""The type of a target. The abilities of its kernels and its list of rules are data, so no rule depends on a target."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.layouts import LAYOUTS, Layout
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
    "int4_plain": INT4_EXPERTS,
}
"""The families of kernels, each with the layouts that its operators read.

"int4_linear" and "int8_linear" are linears, and "float4_linear" and "float8_linear" those of weights with floats of
these bits. "int4_table" is the table of an embedding. "int4_experts" are stacked
weights of experts, all of them or rows sorted by expert; "int4_indexed_experts" are those that a tensor of ids selects.
"int8_plain" are plain operators instead of a kernel: for integers that the target's int8 kernel does not support, or on
a target without one for a weight whose dequantize operator does not compile. "int4_plain" are those for 4-bit integers,
in a linear or a product of experts, that the target's int4 kernel does not support.
"""

PLAIN = Kernel(
    "plain operators",
    layout=INT8,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    group_sizes=(8, 16, 32, 64, 128, 256),
    scale_dtype=torch.float32,
    per_row=True,
)
"""The implementation of ``int8_linear`` without a kernel.

A compiled program dequantizes the weight at every call. On the CPU a product of one row does so while it sums.
"""

PLAIN_INT4 = replace(PLAIN, layout="by_row", scale_dtype=None, in_multiple=2)
"""The implementation of the int4 operators on the CPU without a kernel, and of a table."""


_KERNELS = 'from families to tuples of Kernel, such as {"int4_linear": (kernel,)}'


def _check_multiples(kernel: Kernel, layout: Layout) -> None:
    """Check that every weight that the kernel supports can be packed."""
    for name, number, multiple in (
        ("out_multiple", kernel.out_multiple, layout.row_multiple),
        ("in_multiple", kernel.in_multiple, layout.column_multiple),
    ):
        if number % multiple:
            raise ValueError(
                f"kernel {kernel.name!r} has {name}={number}, and the layout {layout.name} needs a multiple of "
                f"{multiple}: write {name}={-(-number // multiple) * multiple}"
            )


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
        TypeError: ``kernels`` is no such mapping, or ``passes`` no function.
        ValueError: the name cannot be one; a family is unknown; two kernels of a family have one name; no operator of a
            kernel's family reads the kernel's layout; or the layout cannot store each weight that the kernel supports.
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
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name):
            raise ValueError(
                f"a target cannot be named {self.name!r}, since --target and names of files contain the name: write "
                "letters, digits, _ and -"
            )
        if not isinstance(self.kernels, Mapping):
            raise TypeError(f"target {self.name!r}: kernels must be a mapping {_KERNELS}, not {self.kernels!r}")
        for family, kernels in self.kernels.items():
            if family not in FAMILIES:
                raise ValueError(f"there is no family of kernels {family!r}; known are {', '.join(FAMILIES)}")
            if not isinstance(kernels, tuple) or not all(isinstance(each, Kernel) for each in kernels):
                raise TypeError(f"target {self.name!r}: kernels must be a mapping {_KERNELS}, not {self.kernels!r}")
            names = [kernel.name for kernel in kernels]
            if len(set(names)) != len(names):
                raise ValueError(f"target {self.name!r}: two {family} kernels have one name ({', '.join(names)})")
            for kernel in kernels:
                if kernel.layout not in FAMILIES[family]:
                    raise ValueError(
                        f"kernel {kernel.name!r} reads the layout {kernel.layout!r}, and no {family} operator does; "
                        f"known are {', '.join(FAMILIES[family])}"
                    )
                if kernel.layout in LAYOUTS:
                    _check_multiples(kernel, LAYOUTS[kernel.layout])

    def rules(self) -> list[Rule]:
        """A new list of the rules, which ``passes`` returns.

        Raises:
            UsageError: ``passes`` raises, or returns no list.
        """
        try:
            listed = self.passes()
        except Exception as error:  # a function of another package raises anything
            raise UsageError(f"target {self.name!r}: its passes failed: {type(error).__name__}: {error}") from error
        if not isinstance(listed, (list, tuple)):
            raise UsageError(f"target {self.name!r}: passes must return a list of rules; it returned {listed!r}")
        return list(listed)

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
