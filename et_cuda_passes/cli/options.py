"""Options that several commands share, and what their help lists. The help of a command does not import torch."""

from pathlib import Path
from typing import Annotated

import typer

from et_cuda_passes.kernels.gpus import GPUS

TARGETS = ("cuda", "metal", "xnnpack", "cpu", "vulkan", "coreml", "openvino", "mlx", "tensorrt")
"""``ecp.targets()``"""
EXECUTABLE = ("cuda", "xnnpack", "cpu", "openvino")
"""The targets whose programs run in Python: :data:`et_cuda_passes.executorch.run.EXECUTABLE`."""

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A .pt2 from torch.export.save, or a packed one.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help=f"One of {', '.join(TARGETS)}, or MODULE:NAME.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read MODEL as torch.export.load does, which may run code from it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help=f"For cuda, the GPU that will run it: {', '.join(GPUS)}, or as in sm_90:114."),
]
InputsPath = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="SAFETENSORS", help="The inputs, named 0, 1, ... in order; a single one may have any name."
    ),
]
RandomSeed = Annotated[
    int | None,
    # The range of a seed of torch.Generator.
    typer.Option("--random-seed", metavar="N", min=0, max=2**64 - 1, help="Generate random inputs from this seed."),
]
ComponentName = Annotated[
    str | None,
    typer.Option("--component", metavar="NAME", help="The component of an export: prefill, decode, ..."),
]
