"""What a target is: data. A kernel's abilities and which passes run are stated here, never in a rule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.kernels.int8 import Int8Kernel
from et_cuda_passes.ops import INT4_EMBEDDINGS, INT4_EXPERTS, INT4_LINEARS
from et_cuda_passes.quant.advised import SuggestedSchemes


@dataclass(frozen=True)
class Target:
    """A backend: its int4 and int8 kernels, the default one first, and its ordered pass list.

    ``int4_table`` is the form of an int4 embedding's table: that of a linear where it can be read row by row.
    ``int4_experts`` is that of experts' weights of which a product reads all or a part that is sorted by expert, and
    ``int4_chosen_experts`` where a tensor chooses among them. ``int8_plain`` stands for the plain operators of
    ``int8_linear``, which hold a weight whose own operator the target's compiler has no code for. ``advised`` is what
    to quantize with in place of a form that no rule knows.

    Raises:
        ValueError: a kernel reads a layout that no operator reads.
    """

    name: str
    summary: str
    int4_kernels: tuple[Int4Kernel, ...]
    passes: Callable[[], list[Rule]] = field(compare=False)
    int8_kernels: tuple[Int8Kernel, ...] = ()
    int8_plain: Int8Kernel | None = None
    int4_table: Int4Kernel | None = None
    int4_experts: Int4Kernel | None = None
    int4_chosen_experts: Int4Kernel | None = None
    advised: SuggestedSchemes = field(default_factory=SuggestedSchemes)

    def __post_init__(self) -> None:
        for kernel in self.int4_kernels:
            _check_layout(kernel, INT4_LINEARS)
        _check_layout(self.int4_table, INT4_EMBEDDINGS)
        for experts in (self.int4_experts, self.int4_chosen_experts):
            _check_layout(experts, INT4_EXPERTS)


def _check_layout(kernel: Int4Kernel | None, known: Iterable[str]) -> None:
    if kernel is not None and kernel.layout not in known:
        raise ValueError(
            f"kernel {kernel.name!r} reads the layout {kernel.layout!r}, and no operator does there; known are "
            f"{', '.join(known)}"
        )
