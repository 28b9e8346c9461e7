"""The smallest path for a target: a small quantized layer is rewritten, lowered, run and compared."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from et_cuda_passes.cli.compare import Comparison, compare
from et_cuda_passes.executorch.lower import lower, missing_requirement, no_lowering
from et_cuda_passes.executorch.run import EXECUTABLE, execute, runtime_problem
from et_cuda_passes.rewrite import rewrite
from et_cuda_passes.targets import get_target
from et_cuda_passes.unfinished import TemporaryFolder

# The kernels of cuda take bfloat16. The other targets take float32.
_BF16 = ("cuda", "metal", "cpu", "mlx", "tensorrt")
_INT4: Any = torch.int4  # type: ignore[attr-defined]  # a dtype that torch's stubs lack


@dataclass(frozen=True)
class Walked:
    """How far a target's path could be walked.

    Attributes:
        rewritten: the rewritten program compared with the original, both in eager.
        lowered: the lowered program compared with the original; None if it was not lowered or not run.
        bytes: the size of the lowered files.
        missing: what this machine lacks for the lowering; None if it lacks nothing or it was not to be lowered.
    """

    rewritten: Comparison
    lowered: Comparison | None = None
    bytes: int = 0
    missing: str | None = None


def small_program(dtype: torch.dtype) -> ExportedProgram:
    """A linear of 128 inputs and 64 outputs with int4 weights in groups of 32, exported for two rows."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(128, 64).to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(32)))
    return torch.export.export(model, (torch.randn(2, 128, generator=generator).to(dtype),))


def walk(target: str, lowering: bool = True) -> Walked:
    """Rewrite a small program for a target, and lower and run it where this machine can.

    Args:
        target: one of :func:`et_cuda_passes.targets`.
        lowering: False only rewrites.

    Raises:
        ExpectationError: the layer is not rewritten.
        Exception: any error of the lowering or the runtime.
    """
    program = small_program(torch.bfloat16 if target in _BF16 else torch.float32)
    args, kwargs = program.example_inputs or ((), {})
    with torch.no_grad():
        (wanted,) = tree_leaves(program.module()(*args, **kwargs))
    result, _ = rewrite(program, target, expect={"missed": 0})
    with torch.no_grad():
        (got,) = tree_leaves(result.module()(*args, **kwargs))
    rewritten = compare("rewritten", got, wanted, None, False)
    if not lowering:
        return Walked(rewritten)
    if missing := missing_requirement(target) or no_lowering(get_target(target)):
        return Walked(rewritten, missing=missing)
    with TemporaryFolder() as folder:
        files = lower(result, target, folder, "small")
        size = sum(path.stat().st_size for path in files)
        if target not in EXECUTABLE or (target in ("xnnpack", "openvino") and runtime_problem()):
            return Walked(rewritten, bytes=size)
        (output,) = execute(target, files, args, kwargs)
    # OpenVINO computes in bfloat16 on a CPU that has instructions for it.
    return Walked(rewritten, compare("lowered", output, wanted, None, target == "openvino"), size)
