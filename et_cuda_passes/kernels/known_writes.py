"""A launch that says what its kernel writes to, so that torch need not find out.

``wrap_triton`` finds it out by turning the kernel into Triton's IR and reading that: a tenth of a second for each
launch, each time the program is traced, which is twice. A model's linears are a thousand launches. What results is the
same node of the graph. (Inductor asks twice more, later.)
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    TMADescriptorMetadata,
    TraceableTritonKernelWrapper,
    TracingTritonHOPifier,
    create_tma_stable_metadata,
    triton_kernel_wrapper_functional,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Described:
    """An argument that the kernel reads in blocks of one shape, by a tensor descriptor (TMA).

    Attributes:
        tensor: contiguous, of as many dimensions as ``shape``, and at an address that is a multiple of 16 bytes.
        shape: of a block; 128 bytes in its last dimension.
    """

    tensor: Tensor
    shape: tuple[int, ...]


class _KnownWrites(TracingTritonHOPifier):
    """Traces a launch as the functional operator, which returns what is written."""

    def __init__(self, writes: Sequence[str], described: Mapping[str, Described]) -> None:
        self._writes = list(writes)
        self._metadata: TMADescriptorMetadata = {
            name: create_tma_stable_metadata(each.shape)  # type: ignore[arg-type]
            for name, each in described.items()
        }

    def call_HOP(self, variable: Any, grids: Any, combined_args: dict[str, Any], *_: Any) -> Any:
        """Called by torch with the arguments in their final form.

        From torch 2.14 on their names come too, for those that are options of Triton's backend: none of ours is.
        """
        given, constants = self.store_non_graphable_args(combined_args)
        return triton_kernel_wrapper_functional(
            kernel_idx=variable.kernel_idx,
            constant_args_idx=constants,
            grid=grids,
            tma_descriptor_metadata=self._metadata,
            kwargs=given,
            tensors_to_clone=self._writes,
        )


def launch(
    kernel: Any, grid: tuple[int | SymInt, ...], arguments: Mapping[str, Any], writes: Sequence[str], sizes: str
) -> list[Tensor]:
    """Launch ``kernel[grid](**arguments)``, or trace it inside a ``triton_op``.

    Args:
        kernel: a ``triton.jit`` function that has a constant ``SALT``, which changes nothing but its machine code.
        grid: programs, by dimension.
        arguments: all others by name, num_warps and num_stages too; :class:`Described` for a tensor descriptor.
        writes: names of the tensors that the kernel writes to; one that is left out is taken to keep its value.
        sizes: the numbers that are passed. Inductor makes a kernel of its own for each set of them, and AOTInductor
            (torch 2.11) names its object file by its machine code: with the same in two, a program cannot be linked.
            A launch made now needs no more than one.

    Returns:
        Those tensors as they are then, in order: the given ones, or new ones while functional tensors are traced.
    """
    described = {name: value for name, value in arguments.items() if isinstance(value, Described)}
    tensors = {**arguments, **{name: each.tensor for name, each in described.items()}}
    if not any(isinstance(value, FunctionalTensor) for value in tensors.values()):
        descriptors = {name: TensorDescriptor.from_tensor(d.tensor, list(d.shape)) for name, d in described.items()}
        kernel[grid](**{**tensors, **descriptors}, SALT=1)
        return [tensors[name] for name in writes]
    salted = {**tensors, "SALT": 1 + zlib.crc32(sizes.encode()) % 2**30}
    wrapped = TraceableTritonKernelWrapper(kernel, None, grid)
    written: Any = _KnownWrites(writes, described).call_triton_kernel(wrapped, (), salted, None)
    return [written[name] for name in writes]
