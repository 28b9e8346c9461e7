"""A launch of a Triton kernel whose caller names the tensors that the kernel mutates.

``wrap_triton`` determines them itself: it compiles the kernel to Triton's IR and analyses that. This costs a tenth of a
second for each launch in each of two traces, and a model's linears are a thousand launches. The node in the graph is
the same.

Inductor repeats the analysis twice later, at more than half of its time for a model of 30 layers. It therefore gets
the kernel as a :class:`_Declared`, whose body for the analysis has the declared reads and writes and nothing else.
"""

import ast
import functools
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import SymInt, Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    TMADescriptorMetadata,
    TraceableTritonKernelWrapper,
    TracingTritonHOPifier,
    create_tma_stable_metadata,
    triton_kernel_wrapper_functional,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class TensorDescriptorArg:
    """An argument that the kernel reads in blocks of one shape, by a tensor descriptor (TMA).

    Attributes:
        tensor: contiguous, with as many dimensions as ``shape`` and an address that is a multiple of 16 bytes.
        shape: shape of a block; 128 bytes in its last dimension.
    """

    tensor: Tensor
    shape: tuple[int, ...]


class _KnownWrites(TracingTritonHOPifier):
    """Traces a launch as the functional operator, which returns the mutated tensors."""

    def __init__(self, writes: Sequence[str], described: Mapping[str, TensorDescriptorArg]) -> None:
        self._writes = list(writes)
        self._metadata: TMADescriptorMetadata = {
            name: create_tma_stable_metadata(each.shape)  # type: ignore[arg-type]
            for name, each in described.items()
        }

    def call_HOP(self, variable: Any, grids: Any, combined_args: dict[str, Any], *_: Any) -> Any:
        """Called by torch with the arguments in their final form.

        From torch 2.14 on, torch also passes the names of the arguments that are options of Triton's backend. None of
        ours is one.
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


class _Declared(JITFunction):  # type: ignore[misc]
    """A kernel that torch analyses in place of ``kernel``: it reads all tensors and writes the declared ones.

    It has the function and the source of ``kernel``, which Inductor writes into its program and compiles there. Only
    :meth:`parse`, which torch's analysis calls to compile the kernel to Triton's IR, gives a body of one line a tensor.
    It is never launched.

    Args:
        kernel: the kernel.
        pointers: names of its arguments that are tensors.
        described: names of those that are tensor descriptors, with their number of dimensions.
        writes: names of the tensors among ``pointers`` that it writes.
    """

    def __init__(
        self, kernel: Any, pointers: Sequence[str], described: Sequence[tuple[str, int]], writes: Sequence[str]
    ) -> None:
        super().__init__(kernel.fn)
        self.launched = kernel
        lines = [f"tl.store({name}, tl.load({name}))" if name in writes else f"tl.load({name})" for name in pointers]
        lines += [f"{name}.load({[0] * rank})" for name, rank in described]
        self._body = f"def {kernel.fn.__name__}({', '.join(self.arg_names)}):\n" + "".join(f"  {x}\n" for x in lines)

    def parse(self) -> ast.Module:
        """The short body."""
        return ast.parse(self._body)

    def get_capture_scope(self) -> dict[str, Any]:
        """The names that the short body uses."""
        return {"tl": tl}


@functools.cache
def _declared(
    kernel: Any, pointers: tuple[str, ...], described: tuple[tuple[str, int], ...], writes: tuple[str, ...]
) -> _Declared:
    """One for equal arguments, since torch keeps every kernel that it is given."""
    return _Declared(kernel, pointers, described, writes)


def launch(
    kernel: Any, grid: tuple[int | SymInt, ...], arguments: Mapping[str, Any], writes: Sequence[str], sizes: str
) -> list[Tensor]:
    """Launch ``kernel[grid](**arguments)``, or trace it inside a ``triton_op``.

    Args:
        kernel: a ``triton.jit`` function that has a constant ``SALT``, which changes nothing but its machine code.
        grid: number of programs in each dimension.
        arguments: all other arguments by name, with num_warps and num_stages; :class:`TensorDescriptorArg` for a tensor
            descriptor.
        writes: names of all tensors that the kernel mutates, none of them a tensor descriptor. torch assumes that every
            other tensor keeps its value.
        sizes: text of the numbers that are passed. Inductor compiles a separate kernel for each set of them, and
            AOTInductor (torch 2.11) names the object file after the machine code: two kernels with the same machine
            code cannot be linked into one program. ``SALT``, derived from this text, makes them differ. An eager launch
            needs no salt.

    Returns:
        The mutated tensors, in the order of ``writes``: the given ones, or new ones while functional tensors are
            traced.
    """
    described = {name: value for name, value in arguments.items() if isinstance(value, TensorDescriptorArg)}
    tensors = {**arguments, **{name: each.tensor for name, each in described.items()}}
    if not any(isinstance(value, FunctionalTensor) for value in tensors.values()):
        descriptors = {name: TensorDescriptor.from_tensor(d.tensor, list(d.shape)) for name, d in described.items()}
        kernel[grid](**{**tensors, **descriptors}, SALT=1)
        return [tensors[name] for name in writes]
    salted = {**tensors, "SALT": 1 + zlib.crc32(sizes.encode()) % 2**30}
    pointers = tuple(name for name, value in arguments.items() if isinstance(value, Tensor))
    ranks = tuple((name, len(each.shape)) for name, each in described.items())
    declared = _declared(kernel, pointers, ranks, tuple(writes))
    wrapped = TraceableTritonKernelWrapper(declared, None, grid)
    written: Any = _KnownWrites(writes, described).call_triton_kernel(wrapped, (), salted, None)
    return [written[name] for name in writes]


_CONVERSIONS = (aten._to_copy.default, prims.convert_element_type.default)
_GATHERS = (aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.copy.default, *_CONVERSIONS)


def is_materialized(x: Tensor) -> bool:
    """Whether Inductor will hold ``x`` in a buffer, and not as a view of another tensor.

    AOTInductor (torch 2.11) writes a descriptor's tensor into Python code as C++ if it is a view, and fails. Certainly
    no views are inputs, constants, and results of Triton kernels, gathers and pointwise operators. A copy may be one:
    Inductor removes a copy that changes nothing, which leaves the tensor that was copied.
    """
    if not isinstance(x, FunctionalTensor):
        return True
    node = _node_of(x)
    if node is None or node.op in ("placeholder", "get_attr"):
        return node is not None
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and source.target is triton_kernel_wrapper_functional
    if node.target in _GATHERS:
        return True
    if node.target in _CONVERSIONS:
        given = node.args[0]
        return isinstance(given, Node) and given.meta["val"].dtype is not x.dtype
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise and node.target not in _COPIES


def _node_of(x: FunctionalTensor) -> Node | None:
    mode = get_proxy_mode()
    if mode is None:
        return None
    found = get_proxy_slot(torch._from_functional_tensor(x.elem), mode.tracer, None)
    return None if found is None else found.proxy.node
