"""Lowers a rewritten program to the files of its target: a .pte with its .ptd, or an AOTInductor package."""

import errno
import gc
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.export import ExportedProgram

from et_cuda_passes.kernels.device import SHARED_MEMORY_LIMIT, compile_problem, gpu_requirement, needed_limit
from et_cuda_passes.targets import Target, get_target
from et_cuda_passes.targets.gpu import gpu_named_in

Progress = Callable[[str], None]
"""Called with the name of each step as it begins."""

Methods = Mapping[str, ExportedProgram]
"""The programs of one model by method name."""


def lower(
    program: ExportedProgram | Methods,
    target: str | Target,
    folder: Path,
    stem: str,
    progress: Progress = lambda step: None,
) -> list[Path]:
    """Lower a program to the files that ``target`` runs.

    Args:
        program: from :func:`et_cuda_passes.rewrite` for this target; it is not changed. One program becomes the method
            "forward" of a .pte, several become its methods by name. They share each constant that has the same FQN and
            the same bytes in both. An AOTInductor package has one model per method, which share constants likewise.
        target: "cuda", "metal" and "xnnpack" are lowered with ExecuTorch, "cpu" is compiled with AOTInductor. A target
            of another package is lowered with ExecuTorch and its ``partitioner``, or as its ``lowered_as`` says.
        folder: the folder of the files; created if it does not exist.
        stem: the files' name: ``<stem>.pte`` and, where the backend keeps its weights outside, ``<stem>.ptd``;
            ``<stem>.pt2`` for cpu.
        progress: called as each step begins.

    Returns:
        The files written. None of them appears before all are complete.

    Raises:
        ValueError: the target is unknown or has no lowering, or the program names a GPU for which this machine cannot
            compile.
        Exception: any error of ExecuTorch, the backend or AOTInductor; then no file is written.
    """
    chosen = get_target(target)
    make: Callable[[Methods, Path, str, Progress], None]
    if chosen.partitioner is not None:
        make = partial(_own, chosen.partitioner)
    elif chosen.lowering in _LOWERINGS:
        make = _LOWERINGS[chosen.lowering]
    else:
        raise ValueError(no_lowering(chosen))
    methods = {"forward": program} if isinstance(program, ExportedProgram) else program
    gpu = gpu_of_methods(methods)
    if gpu is not None and (problem := compile_problem(gpu)):
        raise ValueError(problem)
    with _shared_memory_of(gpu), atomic_output(folder) as staging:
        make(methods, staging, stem, progress)
        names = sorted(path.name for path in staging.iterdir())
    return [folder / name for name in names]


def no_lowering(target: Target) -> str:
    """The error message for a target that cannot be lowered; empty if it can be."""
    if target.partitioner is not None or target.lowering in _LOWERINGS:
        return ""
    return (
        f"target {target.name} has no lowering: give its Target a partitioner=, which returns the ExecuTorch "
        f"partitioner of a method, or lowered_as= one of {', '.join(_LOWERINGS)}"
    )


def lowering_steps(target: str, methods: int) -> int:
    """How often :func:`lower` calls ``progress`` for so many methods."""
    return 2 if target != "cpu" else methods + 1 if methods > 1 else 1


def gpu_of_methods(methods: Methods) -> str | None:
    """The GPU that the methods name; None if they name none.

    Raises:
        ValueError: they name several.
    """
    names = sorted({gpu for program in methods.values() if (gpu := gpu_named_in(program))})
    if len(names) > 1:
        raise ValueError(f"the methods name several GPUs, {', '.join(names)}: rewrite all with one gpu=")
    return names[0] if names else None


@contextmanager
def _shared_memory_of(gpu: str | None) -> Iterator[None]:
    """Limit the shared memory of ExecuTorch's own kernels to that of the named GPU."""
    limit = None if gpu is None else needed_limit(gpu)
    before = os.environ.get(SHARED_MEMORY_LIMIT)
    if limit is not None:
        os.environ[SHARED_MEMORY_LIMIT] = str(limit)
    try:
        yield
    finally:
        if before is not None:
            os.environ[SHARED_MEMORY_LIMIT] = before
        elif limit is not None:
            del os.environ[SHARED_MEMORY_LIMIT]


def missing_requirement(name: str | Target, gpu: str | None = None) -> str | None:
    """The requirement for lowering to target ``name`` that this machine lacks, with the fix; None if it lacks nothing.

    ``gpu`` is the GPU that the program names.

    The lowerings to cuda and metal compile and tune kernels on the device itself. A rewrite works on every machine, and
    :mod:`et_cuda_passes.executorch.packed` saves its result for a machine that has the device.
    """
    chosen = get_target(name)
    target = "" if chosen.partitioner is not None else chosen.lowering
    if target == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"a CUDA device and a torch built for it (this one, {torch.__version__}, is built without CUDA)"
        return "a CUDA device (torch.cuda.is_available() is False)"
    if target == "cuda" and gpu is not None:
        return gpu_requirement(gpu)
    if target == "metal":
        if platform.system() != "Darwin" or not torch.backends.mps.is_available():
            return f"macOS with an MPS device, and torchao's MPS operators (this is {platform.system()})"
        if not _has_torchao_mps():
            return "torchao's MPS operators (build torchao with TORCHAO_BUILD_EXPERIMENTAL_MPS=1)"
    if target == "cpu":
        names = [inductor.cpp.cxx] if isinstance(inductor.cpp.cxx, str) else [name for name in inductor.cpp.cxx if name]
        if not any(shutil.which(name) for name in names):
            return f"a C++ compiler ({' or '.join(names)} is not found; install it, or name another one with CXX)"
    return None


@contextmanager
def atomic_output(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends; after an error, none does.

    It is inside ``folder``, so that the move is a rename and never leaves a partial file under its final name. The file
    called ``last`` moves after all others.

    Raises:
        IsADirectoryError: a file would have the name of a directory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
        staging = Path(name)
        yield staging
        paths = sorted(
            (path for path in staging.rglob("*") if path.is_file()), key=lambda path: (path.name == last, path)
        )
        files = {path: folder / path.relative_to(staging) for path in paths}
        for file in files.values():
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "the path of an output file is a directory", str(file))
        for path, file in files.items():
            file.parent.mkdir(exist_ok=True)
            os.replace(path, file)


@contextmanager
def gc_throttled() -> Iterator[None]:
    """Cyclic garbage collection at a hundredth of the frequency, and only of objects created inside.

    Lowering takes long, and nearly all objects that it creates stay alive. Its garbage can hold tensors, so some
    collection is needed. Objects from before are excluded until the end.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(thresholds[0] * 100, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _has_torchao_mps() -> bool:
    try:
        # ExecuTorch's Metal backend imports this module, which raises if the operators are not built.
        import torchao.experimental.ops.mps.cshim  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        return False
    return True


def _cuda(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from et_cuda_passes.executorch.cuda import CudaPartitioner

    partitioners = {name: CudaPartitioner(_method_name(name), passes=[]) for name in methods}
    _executorch(methods, partitioners, folder, stem, progress)


def _metal(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from et_cuda_passes.executorch.metal import MetalPartitioner

    partitioners = {name: MetalPartitioner(_method_name(name), passes=[]) for name in methods}
    _executorch(methods, partitioners, folder, stem, progress)


def _xnnpack(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.backends.xnnpack.utils.configs import get_xnnpack_edge_compile_config

    from et_cuda_passes.executorch.xnnpack import XnnpackPartitioner, simplify_views

    # With its rules: what they keep stands in the program as before, and the partitioner refuses whatever they do not.
    # One for all methods, so that a weight that several methods read is folded once.
    partitioner = XnnpackPartitioner()
    partitioners = dict.fromkeys(methods, partitioner)
    # Copies and views that the delegate does not take would split its partitions.
    transforms = [RemoveCloneOpsTransform(preserve_input_output_copies=True), simplify_views]
    config = get_xnnpack_edge_compile_config(skip_dim_order=True)
    _executorch(
        methods, partitioners, folder, stem, progress, {"compile_config": config, "transform_passes": transforms}
    )


def _method_name(name: str) -> list[Any]:
    """The compile spec that keeps the libraries of several methods apart."""
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return [CompileSpec("method_name", name.encode())]


def _executorch(
    methods: Methods,
    partitioners: Mapping[str, Any],
    folder: Path,
    stem: str,
    progress: Progress,
    options: Mapping[str, Any] | None = None,
) -> None:
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad(), gc_throttled():
        progress("lowering with ExecuTorch")
        edge = to_edge_transform_and_lower(
            dict(methods),
            partitioner={name: [partitioner] for name, partitioner in partitioners.items()},
            **(options or {}),
        )
        progress("serializing")
        lowered = edge.to_executorch()
    with open(folder / f"{stem}.pte", "wb") as file:
        lowered.write_to_file(file)
    lowered.write_tensor_data_to_file(str(folder))
    # A backend names its data after itself. The runtime is handed the file and looks for keys inside, so that one file
    # can be called after the program that it belongs to.
    data = sorted(folder.glob("*.ptd"))
    for path in data:
        path.rename(folder / (f"{stem}.ptd" if len(data) == 1 else f"{stem}.{path.name}"))


def _cpu(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from torch._inductor import aot_compile, aoti_compile_and_package
    from torch.export.pt2_archive._package import package_pt2

    path = str(folder / f"{stem}.pt2")
    if len(methods) == 1:
        progress("compiling with AOTInductor")
        with torch.no_grad(), gc_throttled():
            aoti_compile_and_package(*methods.values(), package_path=path)
        return
    # A library that contains its constants cannot share them with another library. These leave them to the package.
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    files: dict[str, list[Any]] = {}
    with torch.no_grad(), gc_throttled():
        for name, program in methods.items():
            progress(f"compiling {name} with AOTInductor")
            args, kwargs = program.example_inputs
            module = program.module(check_guards=False)
            compiled: Any = aot_compile(module, args, kwargs, options=dict(options))
            files[name] = compiled
        progress("serializing")
        _share_weights(files)
        package_pt2(path, aoti_files=files)


def _own(partitioner: Callable[[str], Any], methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    _executorch(methods, {name: partitioner(name) for name in methods}, folder, stem, progress)


_LOWERINGS: Mapping[str, Callable[[Methods, Path, str, Progress], None]] = {
    "cuda": _cuda,
    "metal": _metal,
    "xnnpack": _xnnpack,
    "cpu": _cpu,
}


def _share_weights(files: Mapping[str, list[Any]]) -> None:
    """Make the compiled methods refer to one tensor for each constant that has the same FQN and value in several.

    AOTInductor copies constants that it compiles, and its packaging recognizes shared ones by their address alone.
    """
    from torch.export.pt2_archive._package_weights import Weights

    shared: dict[str, list[Any]] = {}
    for weights in (file for listed in files.values() for file in listed if isinstance(file, Weights)):
        for name, (tensor, properties) in weights.items():
            known = shared.setdefault(name, [])
            same = (
                entry
                for entry in known
                if (entry[1].shape, entry[1].stride, entry[1].offset, entry[0].dtype)
                == (properties.shape, properties.stride, properties.offset, tensor.dtype)
                and torch.equal(entry[0], tensor)
            )
            found = next(same, None)
            if found is None:
                known.append((tensor, properties))
            else:
                weights[name] = found
