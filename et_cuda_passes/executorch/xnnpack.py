"""XnnpackPartitioner: ExecuTorch's partitioner with a pass list, and with an error instead of a wrong result."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner as _Stock
from torch.export import ExportedProgram

from et_cuda_passes.executorch.partitioner import RewritingPartitioner
from et_cuda_passes.rules.xnnpack import KeepDynamicInt4, SplitBroadcastBias
from et_cuda_passes.targets import default_passes


class XnnpackPartitioner(RewritingPartitioner, _Stock):  # type: ignore[misc]  # ExecuTorch's class is untyped
    """ExecuTorch's ``XnnpackPartitioner`` that first runs ``passes`` over every method.

    The stock partitioner treats every ``dequantize_affine`` as its own quantization. For a weight-only scheme the
    delegate then computes with the raw integers and reports no error. This partitioner folds such a weight to floats,
    and raises an error if that is not possible either.

    Args:
        *args: as for the stock partitioner.
        passes: see :func:`et_cuda_passes.rewrite`; None for ``default_passes("xnnpack")``. A list without
            ``SplitBroadcastBias`` gets it as its first pass, because the delegate misreads a bias that broadcasts.
        expect: see :func:`et_cuda_passes.rewrite`; checked for every method.
        **kwargs: as for the stock partitioner.
    """

    _target = "xnnpack"

    def __init__(
        self,
        *args: Any,
        passes: Iterable[Any] | None = None,
        expect: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if passes is None and kwargs.get("enable_bf16"):
            passes = [
                dataclasses.replace(rule, bf16=True) if isinstance(rule, KeepDynamicInt4) else rule
                for rule in default_passes(self._target)
            ]
        listed = default_passes(self._target) if passes is None else list(passes)
        if not any(isinstance(rule, SplitBroadcastBias) for rule in listed):
            listed = [SplitBroadcastBias(), *listed]
        self._set_passes(listed, expect)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """ExecuTorch's hook.

        Raises:
            ValueError: a quantized weight would reach the delegate in a form that it computes wrongly.
        """
        program = super().transform_for_pre_decomposition(exported_program)
        if self.reports[-1].warnings:
            raise ValueError("; ".join(self.reports[-1].warnings))
        missed = [outcome for outcome in self.reports[-1].outcomes if outcome.status == "missed"]
        if missed:
            listed = "; ".join(
                f"{outcome.fqn} ({outcome.op}): {', '.join(map(str, outcome.reasons))}" for outcome in missed
            )
            raise ValueError(f"XNNPACK cannot compute these quantized weights correctly: {listed}")
        return program
