"""Registration of the package's operators: schema, checks, fake, implementation and decomposition in one call.

Operators of our own stand in a rewritten program because ExecuTorch's verifier refuses ``aten._weight_int4pack_mm`` in
an edge program (it is not in the core ATen operator set) and accepts an operator of another namespace. Inductor then
decomposes ours into the kernel that the device has.
"""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from et_cuda_passes.kernels.gpus import gpu_arch

NAMESPACE = "et_cuda_passes"

# A Library unregisters its operators when it is garbage-collected, so keep it.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

OPERATORS: set[torch._ops.OpOverload] = set()
"""Every operator of the package. Only rewrites create calls of them."""

TRITON_OPERATORS: set[torch._ops.OpOverload] = set()
"""The operators whose kernels have tilings. Their keyword ``gpu`` names the GPU of the tilings, as in ``sm_90:114``;
"" is the GPU that is present when the program is compiled."""


def define(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    devices: Container[str] | None = None,
) -> torch._ops.OpOverload:
    """Register an operator of plain torch operators.

    Args:
        name: without the namespace.
        schema: arguments and result, ``"(Tensor x, ...) -> Tensor"``.
        check: called with the arguments before ``compute`` and ``fake``; raises ValueError for arguments that do not
            fit each other.
        compute: the implementation on every device, and what Inductor decomposes the operator into.
        fake: an empty result of the right shape, dtype and strides.
        devices: types of the devices on which Inductor decomposes the operator; None for all. On another device a
            compiled program calls the operator.
    """

    def checked(*arguments: Any) -> Tensor:
        check(*arguments)
        return compute(*arguments)

    def checked_fake(*arguments: Any) -> Tensor:
        check(*arguments)
        return fake(*arguments)

    def decompose(*arguments: Any) -> Any:
        found = devices is None or arguments[0].device.type in devices
        return checked(*arguments) if found else NotImplemented

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_LIBRARY)
    operator = _overload(name)
    register_decomposition(operator)(decompose)
    return operator


def define_triton(name: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]) -> torch._ops.OpOverload:
    """Register a ``triton_op``, whose schema is the signature of ``compute``.

    AOTInductor traces through it and compiles the Triton kernels that ``compute`` launches into its library. Export and
    ExecuTorch's passes see one operator. ``compute`` and ``fake`` check the arguments themselves, because torch reads
    the source of ``compute`` to find the kernels. The exception is ``gpu``, a keyword of ``compute`` alone.
    """

    def fake_for(*arguments: Any, gpu: str = "", **keywords: Any) -> Tensor:
        if gpu:
            gpu_arch(gpu)
        return fake(*arguments, **keywords)

    torch.library.triton_op(f"{NAMESPACE}::{name}", compute, mutates_args=())
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_for)
    operator = _overload(name)
    TRITON_OPERATORS.add(operator)
    return operator


def _overload(name: str) -> torch._ops.OpOverload:
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPERATORS.add(operator)
    return operator
