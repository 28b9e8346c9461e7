"""MetalPartitioner: the stock one, with a pass list."""

from collections.abc import Iterable, Mapping
from typing import Any

from executorch.backends.apple.metal.metal_partitioner import MetalPartitioner as _Stock
from executorch.exir.backend.compile_spec_schema import CompileSpec

from et_cuda_passes.executorch.rewriting import RewritingPartitioner, with_method_name


class MetalPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # final is advice: ExecuTorch has no other hook
    """ExecuTorch's ``MetalPartitioner`` that first runs ``passes`` over every method, on the host.

    Args:
        compile_spec: as for the stock partitioner; ``method_name`` is supplied where it is missing.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("metal")``.
        expect: see :func:`et_cuda_passes.rewrite`; asked of every method.
    """

    _target = "metal"

    def __init__(
        self,
        compile_spec: list[CompileSpec] | None = None,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(with_method_name(compile_spec))
        self._set_passes(passes, expect)
