"""VulkanPartitioner: ExecuTorch's partitioner with a pass list, and with an error instead of a wrong result."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

_level = logging.getLogger().level
from executorch.backends.vulkan.partitioner.vulkan_partitioner import (  # noqa: E402
    VulkanPartitioner as _Stock,
)

# The import makes the root logger write the messages of every library.
logging.getLogger().setLevel(_level)

from et_cuda_passes.executorch.partitioner import RewritingPartitioner  # noqa: E402

_DYNAMIC = "require_dynamic_shapes"


class VulkanPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # the class is marked final, and it has no other hook
    """ExecuTorch's ``VulkanPartitioner`` that first runs ``passes`` over every method.

    The stock partitioner takes every dequantized weight of a linear. Its kernels are 4-bit and symmetric: zero points
    are ignored without an error, and for int8 the program contains an operator that the runtime does not have. This
    partitioner folds such a weight to floats, and raises an error if that is not possible either.

    Args:
        compile_options: as for the stock partitioner. For a program with dynamic sizes, ``require_dynamic_shapes`` is
            set if it is missing: the delegate then takes only operators that can be resized.
        *args: as for the stock partitioner.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("vulkan")``.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **kwargs: as for the stock partitioner.
    """

    rewrite_target = "vulkan"
    _computes_only_outcomes = "Vulkan"

    def __init__(
        self,
        compile_options: dict[str, Any] | None = None,
        *args: Any,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dict(compile_options or {}), *args, passes=passes, expect=expect, **kwargs)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """ExecuTorch's hook."""
        program = super().transform_for_pre_decomposition(exported_program)
        if _has_dynamic_sizes(program):
            self.options.setdefault(_DYNAMIC, True)
        return program


def _has_dynamic_sizes(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.find_nodes(op="placeholder"))
    return any(
        isinstance(size, torch.SymInt) for value in values if isinstance(value, torch.Tensor) for size in value.shape
    )
