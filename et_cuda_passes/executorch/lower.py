"""Lowers a rewritten program to the files of its target: a .pte with its .ptd, or an AOTInductor package."""

import errno
import fcntl
import gc
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from et_cuda_passes._versions import version_problem
from et_cuda_passes.executorch.checked_output import checked_output
from et_cuda_passes.executorch.compile_specs import check_compile_specs
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.kernels.device import SHARED_MEMORY_LIMIT, compile_problem, gpu_requirement, needed_limit
from et_cuda_passes.targets import Target, get_target
from et_cuda_passes.targets.gpu import gpu_named_in
from et_cuda_passes.unfinished import TemporaryFolder

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
    compile_specs: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Lower a program to the files that ``target`` runs.

    Args:
        program: from :func:`et_cuda_passes.rewrite` for this target; it is not changed. One program becomes the method
            "forward" of a .pte, several become its methods by name. They share each constant that has the same FQN and
            the same bytes in both. An AOTInductor package has one model per method, which share constants likewise.
        target: "cpu" is compiled with AOTInductor, "mlx" and "tensorrt" have no lowering here, and every other target
            is lowered with ExecuTorch. A target of another package is lowered with ExecuTorch and its ``partitioner``,
            or as its ``lowered_as`` says.
        folder: the folder of the files; created if it does not exist.
        stem: the files' name: ``<stem>.pte`` and, where the backend keeps its weights outside, ``<stem>.ptd``;
            ``<stem>.pt2`` for cpu.
        progress: called as each step begins.
        compile_specs: for target cuda, those of ExecuTorch's backend, by key;
            :data:`~et_cuda_passes.executorch.compile_specs.CUDA_COMPILE_SPECS` lists them.

    Returns:
        The files written. None of them appears before all are complete.

    Raises:
        ValueError: the target is unknown or has no lowering, or the program names a GPU for which this machine cannot
            compile.
        Exception: any error of ExecuTorch, the backend or AOTInductor; then no file is written.
    """
    chosen = get_target(target)
    check_compile_specs(compile_specs, chosen.lowering if chosen.partitioner is None else chosen.name)
    make: Callable[[Methods, Path, str, Progress], None]
    if chosen.partitioner is not None:
        make = partial(_own, chosen.partitioner)
    elif chosen.lowering in _LOWERINGS:
        make = partial(_cuda, compile_specs=compile_specs) if compile_specs else _LOWERINGS[chosen.lowering]
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
    if target.lowering in _ELSEWHERE:
        return f"target {target.name} is not lowered here: {_ELSEWHERE[target.lowering]}"
    return (
        f"target {target.name} has no lowering: give its Target a partitioner=, which returns the ExecuTorch "
        f"partitioner of a method, or lowered_as= one of {', '.join(_LOWERINGS)}"
    )


def lowering_steps(target: str | Target, methods: int) -> int:
    """How often :func:`lower` calls ``progress`` for so many methods."""
    chosen = get_target(target)
    if chosen.partitioner is None and chosen.lowering == "cpu":
        return methods + 1 if methods > 1 else 1
    # Each is decomposed, all are lowered together, and then serialized.
    return methods + 2


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
    if problem := next(filter(None, map(version_problem, _PACKAGES.get(target, ()))), ""):
        return problem
    if target == "cpu":
        names = [inductor.cpp.cxx] if isinstance(inductor.cpp.cxx, str) else [name for name in inductor.cpp.cxx if name]
        if not any(shutil.which(name) for name in names):
            return f"a C++ compiler ({' or '.join(names)} is not found; install it, or name another one with CXX)"
    return None


@contextmanager
def atomic_output(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends; after an error, none does.

    Raises:
        IsADirectoryError: a file would have the name of a directory.
    """
    with staging_folder(folder) as staging:
        yield staging
        with uninterrupted(folder):
            move_files(staging, folder)


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside ``folder``, so that a move from one to the other is a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder(folder) as path:
        yield path


def move_files(staging: Path, folder: Path, last: str | None = None) -> None:
    """Move the files of one folder, and of its subfolders, into another; the file called ``last`` after all others.

    Raises:
        IsADirectoryError: a file would have the name of a directory.
    """
    paths = sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda path: (path.name == last, path))
    files = {path: folder / path.relative_to(staging) for path in paths}
    for file in files.values():
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the path of an output file is a directory", str(file))
    if len(files) > 1:
        # A process that is killed here leaves some of its files, and none of an earlier run beside them.
        for file in files.values():
            file.unlink(missing_ok=True)
    for path, file in files.items():
        file.parent.mkdir(exist_ok=True)
        os.replace(path, file)


@contextmanager
def uninterrupted(folder: Path) -> Iterator[None]:
    """Change ``folder`` while no other process does, and before SIGINT or SIGTERM ends this one."""
    received: list[int] = []
    former: dict[signal.Signals, Any] = {}
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system that has no locks has no other process to wait for, as far as this one can know.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # From here on nothing waits. A handler runs in the main thread, and only there it can be set.
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(each) is not None:
                    former[each] = signal.signal(each, lambda number, frame: received.append(number))
        yield
    finally:
        os.close(descriptor)
        for each, handler in former.items():
            signal.signal(each, handler)
    for number in received:
        signal.raise_signal(number)


@contextmanager
def gc_throttled() -> Iterator[None]:
    """Cyclic garbage collection at a hundredth of the frequency, and only of objects created inside.

    Lowering takes long, and nearly all objects that it creates stay alive. Its garbage can hold tensors, so some
    collection is needed. Objects from before are excluded until the end, unless the caller has excluded some itself:
    ``gc.unfreeze`` would include those too.
    """
    thresholds, excluded = gc.get_threshold(), gc.get_freeze_count()
    gc.collect()
    if not excluded:
        gc.freeze()
    gc.set_threshold(thresholds[0] * 100, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not excluded:
            gc.unfreeze()


def _has_torchao_mps() -> bool:
    try:
        # ExecuTorch's Metal backend imports this module, which raises if the operators are not built.
        import torchao.experimental.ops.mps.cshim  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        return False
    return True


def _cuda(
    methods: Methods,
    folder: Path,
    stem: str,
    progress: Progress,
    compile_specs: Mapping[str, str] = MappingProxyType({}),
) -> None:
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    from et_cuda_passes.executorch.cuda import CudaPartitioner

    specs = [CompileSpec(key, value.encode()) for key, value in compile_specs.items()]
    partitioners = {name: CudaPartitioner(_method_name(name) + specs, passes=[]) for name in methods}
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


_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "coreml": ("coremltools",),
    # ExecuTorch's module for OpenVINO imports nncf too.
    "openvino": ("openvino", "nncf"),
}
"""The packages that ExecuTorch's module for a target needs beside executorch itself."""


_ELSEWHERE: Mapping[str, str] = {
    "mlx": "on a Mac with Apple silicon and an executorch that is built with MLX (pip install "
    "'executorch>=1.5.1,<1.6'; the package for Linux is built without it), give the rewritten program to ExecuTorch's "
    "MLXPartitioner",
    "tensorrt": "give the rewritten program to torch-tensorrt after 2.14, which reads dequantize_affine, and compile "
    "with immutable_weights=True, which int4 needs; 2.14 itself reads the forms of ModelOpt alone "
    "(pip install 'et-cuda-passes[tensorrt]' installs the newest)",
}
"""How a target is lowered whose lowering was never run."""


def _vulkan(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from et_cuda_passes.executorch.vulkan import VulkanPartitioner

    # With their rules, as for xnnpack: what these keep stands in the program as before.
    partitioners = {name: VulkanPartitioner() for name in methods}
    _executorch(methods, partitioners, folder, stem, progress)


def _coreml(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from et_cuda_passes.executorch.coreml import CoreMLPartitioner

    partitioners = {name: CoreMLPartitioner() for name in methods}
    _executorch(methods, partitioners, folder, stem, progress)


def _openvino(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from executorch.exir import EdgeCompileConfig

    from et_cuda_passes.executorch.openvino import OpenvinoPartitioner

    partitioners = {name: OpenvinoPartitioner() for name in methods}
    # The verifier refuses the operators that unpack two integers from a byte, which the delegate takes.
    config = EdgeCompileConfig(_check_ir_validity=False)
    _executorch(methods, partitioners, folder, stem, progress, {"compile_config": config})


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
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    from et_cuda_passes.executorch.memory_planning import KeepResultsOfControlFlow

    with torch.no_grad(), gc_throttled():
        _report_phases(partitioners, progress)
        edge = to_edge_transform_and_lower(
            dict(methods),
            partitioner={name: [partitioner] for name, partitioner in partitioners.items()},
            **(options or {}),
        )
        for name, program in methods.items():
            _check_sizes_stay_dynamic(name, program, edge.exported_program(name))
            _check_has_no_while_loop(name, edge.exported_program(name))
        progress("serializing")
        stored = [name for method in methods for name in _states_with_values(edge.exported_program(method))]
        config = ExecutorchBackendConfig(
            passes=[InitializedMutableBufferPass(stored)] if stored else [],
            memory_planning_pass=KeepResultsOfControlFlow(),
        )
        lowered = edge.to_executorch(config)
    with open(folder / f"{stem}.pte", "wb") as file:
        lowered.write_to_file(file)
    lowered.write_tensor_data_to_file(str(folder))
    # A backend names its data after itself. The runtime is handed the file and looks for keys inside, so that one file
    # can be called after the program that it belongs to.
    data = sorted(folder.glob("*.ptd"))
    for path in data:
        path.rename(folder / (f"{stem}.ptd" if len(data) == 1 else f"{stem}.{path.name}"))


def _states_with_values(program: ExportedProgram) -> list[str]:
    """The placeholders of the buffers that the program writes to and whose first values are not all 0.

    ExecuTorch stores the first values of such a buffer only where a pass asks for it. Without, the first call would
    compute with zeros.
    """
    signature, values = program.graph_signature, {**program.constants, **program.state_dict}
    written = set(signature.buffers_to_mutate.values())
    return [
        name
        for name, fqn in signature.inputs_to_buffers.items()
        if fqn in written and isinstance(values.get(fqn), torch.Tensor) and bool(values[fqn].any())
    ]


def _report_phases(partitioners: Mapping[str, Any], progress: Progress) -> None:
    """Report the decomposition of each method, and then the lowering of all, which ExecuTorch does together.

    A partitioner that does not derive from RewritingPartitioner cannot say when a method begins.
    """
    from et_cuda_passes.executorch.partitioner import RewritingPartitioner

    methods, lowering = iter(partitioners), iter(["lowering"])

    def began(phase: str) -> None:
        if phase == "decomposing":
            progress(f"decomposing {next(methods)}")
        elif step := next(lowering, None):
            progress(step)

    if not all(isinstance(each, RewritingPartitioner) for each in partitioners.values()):
        progress("lowering")
        return
    for partitioner in partitioners.values():
        partitioner.began = began


def _check_sizes_stay_dynamic(method: str, before: ExportedProgram, after: ExportedProgram) -> None:
    """Refuse a lowering that created a dynamic size of an input a constant, or its largest value smaller.

    ExecuTorch's passes interpret the program. One that compares a size with a number guards on the size that the
    program was exported with, and reports nothing. The .pte then fails for each other size when it runs.

    Raises:
        UsageError: there is such a size.
    """
    values, lowered = ({node.name: node.meta.get("val") for node in program.graph.nodes} for program in (before, after))
    pairs = zip(before.graph_signature.user_inputs, after.graph_signature.user_inputs, strict=True)
    for name, other in ((name, other) for name, other in pairs if isinstance(values.get(name), torch.Tensor)):
        for axis, (size, now) in enumerate(zip(values[name].shape, lowered[other].shape, strict=True)):
            if isinstance(size, int) or _largest(now) >= _largest(size):
                continue
            largest = _largest(size)
            exported = "any size" if largest is int_oo else f"sizes up to {largest}"
            raise UsageError(
                f"{method}: ExecuTorch's lowering limits axis {axis} of {name} to {_largest(now)}, and it was exported "
                f"for {exported}{_guarded_at(now, after)}: export the model with fixed sizes "
                "(EtConfig(dynamic=False), or no dynamic_shapes for torch.export)"
            )


def _check_has_no_while_loop(method: str, lowered: ExportedProgram) -> None:
    """Refuse a loop that no backend took: executorch 1.5.1 has cond, map and scan, and stops with an internal error.

    Raises:
        UsageError: there is such a loop.
    """
    for module in lowered.graph_module.modules():
        graph = module.graph if isinstance(module, torch.fx.GraphModule) else torch.fx.Graph()
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop):
            raise UsageError(
                f"{method}: ExecuTorch has no while_loop outside a delegate ({node.name}): write the loop with "
                "torch.scan, or unroll it, or compile the program for the target cpu, whose AOTInductor has one"
            )


def _largest(size: int | torch.SymInt) -> Any:
    """The largest value of a size."""
    if isinstance(size, int):
        return size
    return size.node.shape_env.bound_sympy(size.node.expr).upper


def _guarded_at(size: int | torch.SymInt, program: ExportedProgram) -> str:
    """The operator whose size a guard compares with a number, and the code that guards; empty if it is not known."""
    if isinstance(size, int):
        return ""
    guards = (guard for guard in size.node.shape_env.guards if any(each.is_number for each in guard.expr.args))
    guard = next((guard for guard in guards if guard.expr.free_symbols & size.node._expr.free_symbols), None)
    if guard is None:
        return ""
    found = (node for node in program.graph.nodes if node.op == "call_function" and _has_size(node, guard.expr.args))
    where = f" for {node.name}" if (node := next(found, None)) else ""
    return f", because it assumes {guard.expr}{where} (at {str(guard.sloc).strip('()')})"


def _has_size(node: torch.fx.Node, expressions: tuple[Any, ...]) -> bool:
    """Whether the value of the node has a size that is one of ``expressions``."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return any(isinstance(size, torch.SymInt) and size.node._expr in expressions for size in shape)


def _cpu(methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    from torch._inductor import aot_compile, aoti_compile_and_package
    from torch.export.pt2_archive._package import package_pt2

    path = folder / f"{stem}.pt2"
    if len(methods) == 1:
        progress("compiling with AOTInductor")
        with torch.no_grad(), gc_throttled(), checked_output(path) as file:
            aoti_compile_and_package(*methods.values(), package_path=file)
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
        with checked_output(path) as file:
            package_pt2(file, aoti_files=files)


def _own(partitioner: Callable[[str], Any], methods: Methods, folder: Path, stem: str, progress: Progress) -> None:
    _executorch(methods, {name: partitioner(name) for name in methods}, folder, stem, progress)


_LOWERINGS: Mapping[str, Callable[[Methods, Path, str, Progress], None]] = {
    "cuda": _cuda,
    "metal": _metal,
    "xnnpack": _xnnpack,
    "cpu": _cpu,
    "vulkan": _vulkan,
    "coreml": _coreml,
    "openvino": _openvino,
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
