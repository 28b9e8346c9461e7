"""``doctor``: checks of the installation, each with its result and what to do about it."""

import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from et_cuda_passes._versions import RANGES, REASONS, require_version
from et_cuda_passes.cli.console import Steps, one_line, print_json, quiet_import, start_runtime
from et_cuda_passes.cli.documents import Check, Doctor
from et_cuda_passes.cli.options import TARGETS, Json
from et_cuda_passes.unfinished import TemporaryFolder

Status = Literal["ok", "note", "wrong"]
_REINSTALL = "pip install --force-reinstall et-cuda-passes"
_OPTIONAL = {"transformers": "export, generate and the folders of exports", "safetensors": "--inputs"}
_BACKENDS = {"coreml": ("coremltools",), "openvino": ("openvino", "nncf")}
"""The packages that only one target needs."""
_FREE = 2e9
"""Bytes that a compile may need in the cache of Inductor."""
_SOURCE = '#include <vector>\nextern "C" int answer() { return std::vector<int>(42).size(); }\n'


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not compile: cuda, metal and cpu are only rewritten for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the installation: versions, hooks, operators, this machine, and the smallest path for each target.

    Each check is ok, wrong with what to do, or a note about what is not needed or not tested.
    """
    began = time.monotonic()
    checks: list[Check] = []
    with Steps(len(_GROUPS)) as step, quiet_import(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, group in _GROUPS.items():
            step(f"checking {name}")
            try:
                for status, subject, found, fix in group(quick):
                    checks.append(Check(name, subject, status, found, fix))
            except Exception as error:  # a broken installation raises anything
                checks.append(Check(name, name, "wrong", one_line(error), _REINSTALL))
    wrong = sum(check.status == "wrong" for check in checks)
    if as_json:
        print_json(Doctor(not wrong, time.monotonic() - began, checks))
    else:
        _print(checks)
    if wrong:
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    colors: dict[Status, str] = {"ok": "green", "note": "yellow", "wrong": "red"}
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            typer.echo(group)
        typer.echo(f"  {typer.style(f'{check.status:<5}', fg=colors[check.status])} {check.subject}: {check.found}")
        if check.fix:
            typer.echo(f"        {check.fix}")
    wrong = [check.subject for check in checks if check.status == "wrong"]
    typer.echo(f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong")


Found = Iterator[tuple[Status, str, str, str]]


def _versions(quick: bool) -> Found:
    """The versions of the dependencies."""
    yield "ok", "python", platform.python_version(), ""
    for name in ("et-cuda-passes", *RANGES):
        try:
            found = version(name)
        except PackageNotFoundError:
            if name == "triton" and sys.platform != "linux":
                yield "note", name, "not installed: it does not exist for this system, and cuda needs it", ""
            elif target := next((each for each, names in _BACKENDS.items() if name in names), ""):
                fix = f"pip install 'et-cuda-passes[{target}]'"
                yield "note", name, f"not installed: lowering to {target} needs it", fix
            elif name == "et-cuda-passes":
                yield "note", name, "not installed: it runs from its source", ""
            else:
                yield "wrong", name, "not installed", f"pip install '{name}>={RANGES[name][0]}'"
            continue
        if name not in RANGES:
            yield "ok", name, found, ""
            continue
        lowest, beyond = RANGES[name]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                require_version(name)
        except ImportError:
            reason = f"; {REASONS[name]}" if name in REASONS else ""
            fix = f"pip install '{name}>={lowest},<{beyond}'"
            yield "wrong", name, f"{found} is not >={lowest},<{beyond}{reason}", fix
            continue
        if caught:
            yield (
                "note",
                name,
                f"{found} is beyond the tested >={lowest},<{beyond}",
                "the targets below show whether it works",
            )
        else:
            yield "ok", name, found, ""
    for name, use in _OPTIONAL.items():
        try:
            yield "ok", name, version(name), ""
        except PackageNotFoundError:
            yield "note", name, f"not installed: {use} need it", "pip install 'et-cuda-passes[hf]'"


def _hooks(quick: bool) -> Found:
    """The hook of ExecuTorch and the operator of torch.export that a rewrite needs."""
    import torch

    hook = "transform_for_pre_decomposition"
    partitioner = import_module("executorch.exir.backend.partitioner").Partitioner
    if hasattr(partitioner, hook):
        yield "ok", f"Partitioner.{hook}", "present", ""
    else:
        yield "wrong", f"Partitioner.{hook}", "missing", f"pip install 'executorch>={RANGES['executorch'][0]}'"
    for target, name in (
        ("cuda", "CudaPartitioner"),
        ("metal", "MetalPartitioner"),
        ("xnnpack", "XnnpackPartitioner"),
        ("vulkan", "VulkanPartitioner"),
    ):
        try:
            cls = getattr(import_module(f"et_cuda_passes.executorch.{target}"), name)
        except Exception as error:  # a backend that is not built raises anything
            needed = target != "metal"
            yield ("wrong" if needed else "note"), name, one_line(error), _REINSTALL if needed else ""
            continue
        # ExecuTorch's class may define the hook itself one day; then ours must still come first.
        own = getattr(cls, hook).__module__.startswith("et_cuda_passes.")
        yield ("ok" if own else "wrong"), name, "rewrites in the hook" if own else "does not rewrite", ""
    access = hasattr(torch.ops.export, "access_subclass_inner_tensor")
    found = "present" if access else "missing: quantized weights cannot be read from a program of torch.export"
    yield ("ok" if access else "wrong"), "torch.ops.export.access_subclass_inner_tensor", found, ""


_TORCH_OPERATORS = (
    "torchao::dequantize_affine",
    "torchao::quantize_affine",
    "torchao::choose_qparams_affine",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_convert_weight_to_int4pack_for_cpu",
    "aten::_weight_int8pack_mm",
)


def _operators(quick: bool) -> Found:
    """The operators of torch and torchao that rules read or build, and our own."""
    import torch
    import torchao.quantization.quant_primitives  # noqa: F401  (registers operators)

    from et_cuda_passes.ops.registry import OPERATORS

    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    missing = [name for name in _TORCH_OPERATORS if name not in known]
    if missing:
        yield (
            "wrong",
            "torch and torchao",
            f"missing: {', '.join(missing)}",
            f"pip install 'torch>={RANGES['torch'][0]}'",
        )
    else:
        yield "ok", "torch and torchao", f"all {len(_TORCH_OPERATORS)} are registered", ""
    ours = {str(operator) for operator in OPERATORS}
    yield ("ok" if ours else "wrong"), "et_cuda_passes", f"{len(ours)} are registered", "" if ours else _REINSTALL


def _machine(quick: bool) -> Found:
    """The GPU, the compiler, ExecuTorch's runtime, and the cache of Inductor."""
    yield _gpu()
    yield _compiler()
    from et_cuda_passes.executorch.run import runtime_problem

    if problem := runtime_problem():
        fix = "lowering works without it; executorch 1.5.1's needs torch 2.13"
        yield "note", "ExecuTorch's runtime for Python", problem, fix
    else:
        yield "ok", "ExecuTorch's runtime for Python", "runs programs for xnnpack", ""
    yield from _cache()


def _gpu() -> tuple[Status, str, str, str]:
    import torch

    if not torch.cuda.is_available():
        fix = "`lower --target cuda` writes the packed program, which a machine with a GPU lowers"
        return "note", "GPU", "torch finds no CUDA device", fix
    from et_cuda_passes.kernels.choose import costs_of
    from et_cuda_passes.kernels.device import present_gpu

    properties = torch.cuda.get_device_properties()
    free, total = torch.cuda.mem_get_info()
    found = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, {free / 1e9:.1f} of "
        f"{total / 1e9:.1f} GB free"
    )
    try:
        gpu = present_gpu()
        assert gpu is not None
        tilings = "measured" if costs_of(gpu, 4).measured else "predicted"
    except ValueError as error:
        return "note", "GPU", f"{found}; {error}", "lower for another GPU on a machine that has it"
    return "ok", "GPU", f"{found}; tilings for {gpu} are {tilings}", ""


def _compiler() -> tuple[Status, str, str, str]:
    from et_cuda_passes.executorch.lower import missing_requirement

    subject, install = "C++ compiler", "install g++ (Debian: apt install g++), or name a compiler with CXX"
    if lacking := missing_requirement("cpu"):
        return "wrong", subject, f"lowering to cpu and cuda needs {lacking}", install
    from torch._inductor import cpp_builder

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:  # Inductor finds none that works
        return "wrong", subject, one_line(error), install
    with TemporaryFolder() as folder:
        source, library = folder / "answer.cpp", folder / "answer.so"
        source.write_text(_SOURCE)
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True, timeout=60
        )
        if done.returncode or not library.exists():
            line = (done.stderr.strip() or "no library was written").splitlines()[0]
            return "wrong", subject, f"{compiler} does not compile: {line}", install
    first = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout.partition("\n")[
        0
    ]
    return "ok", subject, f"{shutil.which(compiler) or compiler}: {first}", ""


def _cache() -> Found:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    subject = "the cache of Inductor"
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()
    fix = "set TORCHINDUCTOR_CACHE_DIR to another folder"
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield "wrong", subject, f"{folder} cannot be written", fix
        return
    if any(character.isspace() for character in str(folder)):
        # Inductor passes the paths to the compiler without quotes.
        yield "wrong", subject, f"{folder} has spaces in its path, with which no C++ compile works", fix
        return
    free = shutil.disk_usage(nearest).free
    enough = free >= _FREE
    found = f"{folder}, {free / 1e9:.1f} GB free"
    yield ("ok" if enough else "wrong"), subject, found, "" if enough else f"free 2 GB there, or {fix}"


def _targets(quick: bool) -> Found:
    """The smallest path for each target."""
    from et_cuda_passes.cli.smallest import walk
    from et_cuda_passes.executorch.lower import no_lowering
    from et_cuda_passes.targets import get_target

    start_runtime()
    for target in TARGETS:
        # These compile nothing with a compiler of this machine.
        lowering = not quick or target in ("xnnpack", "vulkan")
        try:
            walked = walk(target, lowering)
        except Exception as error:  # so do torch, ExecuTorch and compilers
            fix = "if the checks above are ok, report it with the output of `et-cuda-passes doctor --json`"
            yield "wrong", target, one_line(error), fix
            continue
        compared = [each for each in (walked.rewritten, walked.lowered) if each is not None]
        failed = [str(each) for each in compared if not each.holds]
        if failed:
            yield "wrong", target, "; ".join(failed), "do not use this target with these versions"
        elif walked.lowered is not None:
            text = f"rewritten, lowered to {walked.bytes:,} bytes and run, relative error {walked.lowered.relative:.1e}"
            yield "ok", target, text, ""
        elif walked.bytes:
            yield "ok", target, f"rewritten and lowered to {walked.bytes:,} bytes; it does not run here", ""
        elif walked.missing:
            yield (
                "note",
                target,
                f"rewritten, relative error {walked.rewritten.relative:.1e}",
                no_lowering(get_target(target)) or f"to lower, it needs {walked.missing}",
            )
        else:
            yield "ok", target, f"rewritten, relative error {walked.rewritten.relative:.1e}; not lowered (--quick)", ""


_GROUPS: dict[str, Callable[[bool], Found]] = {
    "versions": _versions,
    "hooks": _hooks,
    "operators": _operators,
    "machine": _machine,
    "targets": _targets,
}
