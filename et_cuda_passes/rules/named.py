"""Which of a target's kernels a rule's option names."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from et_cuda_passes.graph.errors import UsageError


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """What an option calls it."""


Kernel = TypeVar("Kernel", bound=Named)


def named(kernels: Sequence[Kernel], name: str | None, kind: str) -> Kernel | None:
    """The kernel of that name, the first for None; None where there is none to choose from and none was named.

    Raises:
        Mistake: there is no kernel of that name; ``kind`` says of what, as in "target cuda has no int4 kernel".
    """
    if name is None:
        return kernels[0] if kernels else None
    for kernel in kernels:
        if kernel.name == name:
            return kernel
    raise UsageError(f"{kind} {name!r}; it has: {', '.join(kernel.name for kernel in kernels) or 'none'}")
