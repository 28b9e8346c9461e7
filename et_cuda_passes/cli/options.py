"""Options that several commands share, what their help lists, and what a shell completes.

The help of a command and a completion import no torch.
"""

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from et_cuda_passes.kernels.gpus import GPUS

TARGETS = ("cuda", "metal", "xnnpack", "cpu", "vulkan", "coreml", "openvino", "mlx", "tensorrt")
"""``ecp.targets()``"""
EXECUTABLE = ("cuda", "xnnpack", "cpu", "openvino")
"""The targets whose programs run in Python: :data:`et_cuda_passes.executorch.run.EXECUTABLE`."""

SCHEMES = ("4w", "4w_hqq", "8w", "8da4w", "8da8w", "8da4w,8da8w", "fpa4w")
"""The schemes of linears: ``et_cuda_passes.hf.support.SCHEMES``."""
EMBEDDING_SCHEMES = ("4w", "8w", "4w_hqq")
"""The schemes of embeddings: ``et_cuda_passes.hf.support.FOR_EMBEDDINGS``."""
STATUSES = ("rewritten", "kept", "missed")
"""``et_cuda_passes.graph.report.STATUSES``"""


_SWITCHES = (
    "low_memory_mode",
    "max_autotune",
    "autotune_at_compile_time",
    "emulate_precision_casts",
    "triton_kernel_mode",
)


def completes(*words: str) -> Callable[[str], list[str]]:
    """Completes an option that has one of ``words``."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def complete_targets(incomplete: str) -> list[str]:
    """The targets of this package and of installed ones; after a comma, those that are not listed yet."""
    before, comma, last = incomplete.rpartition(",")
    # The group is et_cuda_passes.targets.GROUP, whose module imports torch.
    names = dict.fromkeys([*TARGETS, *sorted(entry_points(group="et_cuda_passes.targets").names)])
    listed = before.split(",")
    return [before + comma + name for name in names if name.startswith(last) and name not in listed]


def complete_rules(incomplete: str) -> list[str]:
    """The names of the rules of this package."""
    about = json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8"))
    rules = dict.fromkeys(entry["name"] for target in about.values() for entry in target["passes"])
    return [name for name in rules if name.startswith(incomplete)]


def complete_expectations(incomplete: str) -> list[str]:
    """The names of ``--expect`` with "=", for the count."""
    return [f"{name}=" for name in (*completes(*STATUSES)(incomplete), *complete_rules(incomplete))]


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A .pt2 from torch.export.save, or a packed one.")]
TargetName = Annotated[
    str,
    typer.Option(
        "--target", "-t", help=f"One of {', '.join(TARGETS)}, or MODULE:NAME.", autocompletion=complete_targets
    ),
]
TargetWithDefault = TargetName
TargetNames = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help=f"Of {', '.join(TARGETS)}, or MODULE:NAME; several with commas.",
        autocompletion=complete_targets,
    ),
]
TargetOfExport = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="The target of an export; default: the first that runs here.",
        show_default=False,
        autocompletion=complete_targets,
    ),
]
ExecutableTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help=f"One of {', '.join(EXECUTABLE)}; default for an export: all that run here.",
        show_default=False,
        autocompletion=completes(*EXECUTABLE),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="The device that runs it: cpu, cuda, cuda:1, ...; by default the one that it was lowered for.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read MODEL as torch.export.load does, which may run code from it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help=f"For cuda, the GPU that will run it: {', '.join(GPUS)}, or as in sm_90:114.",
        autocompletion=completes(*GPUS),
    ),
]
Stream = Annotated[
    Path | None,
    typer.Option(
        "--stream",
        metavar="DIR",
        help="Keep packed weights in files of a folder instead of memory, for a model larger than half of it.",
        show_default=False,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR|URL",
        envvar="ETCP_CACHE",
        help="Packed weights of earlier runs: a folder, or a URL of fsspec (s3://, gs://).",
        show_default=False,
    ),
]
CacheLimit = Annotated[
    float | None,
    typer.Option(
        "--cache-limit",
        metavar="GB",
        min=0.001,
        help="Size of the --cache folder, beyond which the least recently used weights are removed.",
        show_default=False,
    ),
]
CompileSpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--compile-spec",
        metavar="KEY=VALUE",
        help="For cuda, an option of ExecuTorch's backend, such as low_memory_mode=ON; may be repeated.",
        autocompletion=completes(
            *(f"{name}={value}" for name in _SWITCHES for value in ("ON", "OFF")), "platform=linux", "platform=windows"
        ),
    ),
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
