"""Runs an exported component: with AOTInductor on the CPU, with ExecuTorch's runtime, or as a CUDA delegate."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES
from transformers.exporters.metadata import ExportMetadata, load_treespec
from transformers.exporters.runners.base import ModelRunner

from et_cuda_passes.delegate.files import read_pte
from et_cuda_passes.delegate.plan import read_plans
from et_cuda_passes.executorch.run import runtime_problem
from et_cuda_passes.hf.artifact import Build, Component, ExportError

RUNNABLE = ("cuda", "cpu", "xnnpack")
"""The targets whose programs run in Python."""

Call = Callable[[list[Any]], list[Any]]
"""From the flat inputs to the flat outputs. Tensors that the program mutates hold their new values afterwards."""


class EtModelRunner(ModelRunner):  # type: ignore[misc]  # transformers is not followed
    """Runs one component for one of its targets: ``runner(**kwargs)`` returns what the model's forward returns.

    THIS EXECUTES CODE FROM THE FILES, except for xnnpack: load only exports that you trust.

    A tensor that the model mutates, such as those of a static cache, holds its new values after the call.

    Args:
        component: from the exporter, or read from a folder.
        metadata: as transformers recorded it.
        target: one of the component's targets.

    Raises:
        ExportError: the component has nothing to run for this target, or its file cannot be loaded.
    """

    def __init__(self, component: Component, metadata: ExportMetadata, target: str) -> None:
        super().__init__(metadata)
        self.component, self.target = component, target
        component.check_interface(metadata)
        build = component.builds[target]
        if build.missing is not None:
            raise ExportError(
                f"{component.name} is not lowered for {target}: the machine that exported it lacked {build.missing}. "
                f"Its packed program is {build.files[0]}; on a machine that has it, finish the saved folder with "
                "et_cuda_passes.hf.finish_export(folder)"
            )
        if target not in RUNNABLE:
            raise ExportError(f"programs for {target} do not run in Python, only those for {', '.join(RUNNABLE)}")
        self.in_spec = load_treespec(metadata.in_spec)
        kwargs = self.in_spec.children()[1]
        self._names: tuple[str, ...] = tuple(kwargs.context)
        self._loaded = _Loaded.of(target, build)
        self._call = self._loaded.method(component.method)

    @property
    def device(self) -> torch.device:
        """Where the program runs."""
        return torch.device("cuda" if self.target == "cuda" else "cpu")

    @classmethod
    def from_program(
        cls, program: Component, metadata: ExportMetadata, device: Any = None, target: str | None = None
    ) -> "EtModelRunner":
        """The runner of a component.

        Args:
            program: the component.
            metadata: as transformers recorded it.
            device: "cpu" or "cuda"; None for any.
            target: one of the component's targets; None for the first that runs here, and on ``device``.

        Raises:
            ExportError: the component does not have the target, or none that runs here.
        """
        if target is not None and target not in program.builds:
            raise ExportError(
                f"{program.name} was not exported for {target}, only for {', '.join(program.builds)}: "
                f"choose one of them, or export the model with target={target!r}"
            )
        kind = None if device is None else torch.device(device).type
        candidates = list(program.builds) if target is None else [target]
        if kind is not None:
            candidates = [name for name in candidates if (name == "cuda") == (kind == "cuda")]
            if not candidates:
                raise ExportError(
                    f"{program.name} has nothing to run on {device}: it was exported for {', '.join(program.builds)}"
                )
        if target is None:
            usable = [name for name in candidates if program.builds[name].missing is None and runs_here(name)]
            candidates = usable or candidates
        return cls(program, metadata, candidates[0])

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """Run the component on the kwargs of the traced forward.

        Args:
            share_inputs: False runs on copies, so that no input is mutated.
            share_outputs: ignored; the outputs are never overwritten by a later call.
            **kwargs: as traced.

        Raises:
            ExportError: an argument is missing, unknown, or not as the export fixed it.
        """
        leaves = self._flatten(kwargs)
        if not share_inputs:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return self.run(leaves)

    def run(self, leaves: list[Any]) -> Any:
        """Run the component on the leaves of its inputs, in the order of the signature.

        Raises:
            ExportError: a leaf is not as the export fixed it.
        """
        self.component.signature.check(leaves, self.component.name)
        with torch.no_grad():
            return self.unflatten(self._call(leaves))

    def _flatten(self, kwargs: dict[str, Any]) -> list[Any]:
        """The leaves in the order of the program."""
        constants = self.metadata.in_constants
        for name, value in kwargs.items():
            if name in constants and (isinstance(value, Tensor) or value != constants[name]):
                raise ExportError(
                    f"{self.component.name} was traced with {name}={constants[name]!r}; it cannot be {value!r}"
                )
        given = {**constants, **kwargs}
        missing = [name for name in self._names if name not in given]
        # None is what forward has for an argument that is not passed.
        unknown = [name for name, value in given.items() if name not in self._names and value is not None]
        if missing or unknown:
            problem = f"needs {', '.join(missing)}" if missing else f"was not traced with {', '.join(unknown)}"
            raise ExportError(f"{self.component.name} {problem}; it takes {', '.join(self._names)}")
        leaves: list[Any] = []
        for name, spec in zip(self._names, self.in_spec.children()[1].children(), strict=True):
            leaves += _flatten(given[name], spec, f"{self.component.name} was traced with {name}")
        return leaves


def _flatten(value: Any, spec: Any, where: str) -> list[Any]:
    """The leaves of ``value`` in the order of ``spec``.

    Raises:
        ExportError: it has another structure.
    """
    if spec.is_leaf():
        return [value]
    keys = spec.context
    if isinstance(value, Mapping) and isinstance(keys, list) and all(isinstance(key, str) for key in keys):
        # A dict, or a ModelOutput of any class, in any order.
        names = [key for key, part in value.items() if part is not None or key in keys]
        if set(names) != set(keys):
            raise ExportError(f"{where} with the keys {', '.join(keys)}; found {', '.join(names) or 'none'}")
        children = [value[key] for key in keys]
    else:
        if type(value) is not spec.type:
            raise ExportError(f"{where} as a {spec.type.__name__}; found a {type(value).__name__}")
        children, context = SUPPORTED_NODES[spec.type].flatten_fn(value)
        if _without_devices(context) != _without_devices(spec.context):
            raise ExportError(
                f"{where} as a {spec.type.__name__} of another state or size: an empty cache for a prefill that was "
                "traced with one, a filled one for a decode, and as long as in the export"
            )
    parts = zip(children, spec.children(), strict=True)
    return [leaf for child, part in parts for leaf in _flatten(child, part, where)]


def _without_devices(context: Any) -> Any:
    """The context of a pytree node as transformers writes it for caches, without the devices of their tensors.

    A program that was traced on the CPU runs on another device, where its caches are.
    """
    if isinstance(context, dict):
        return {key: _without_devices(value) for key, value in context.items() if context.get("_t") != "device"}
    if isinstance(context, (list, tuple)):
        return [_without_devices(value) for value in context]
    return context


def runs_here(target: str) -> bool:
    """Whether this machine runs programs for a target."""
    return target in RUNNABLE and (target != "cuda" or torch.cuda.is_available())


class _Loaded:
    """The files of a target, loaded once for all components that they contain."""

    def __init__(self, target: str, path: Path) -> None:
        self.target, self.path = target, path

    @staticmethod
    def of(target: str, build: Build) -> "_Loaded":
        """The loaded files. While a runner has them, the next runner gets the same object, and so the same weights.

        Raises:
            ExportError: a file is not the one that the export wrote.
        """
        path = next(file for file in build.files if file.suffix in (".pte", ".pt2")).resolve()
        status = path.stat()
        key = (target, path, status.st_mtime_ns, status.st_ino)
        loaded = _LOADED.get(key)
        if loaded is None:
            # A damaged weight would give wrong numbers without any error.
            build.check()
            loaded = _LOADED[key] = _Loaded(target, path)
        return loaded

    def method(self, name: str) -> Call:
        """The method, which runs on flat inputs."""
        make = {"cpu": self._cpu_method, "xnnpack": self._xnnpack_method, "cuda": self._cuda_method}[self.target]
        return make(name)

    @cached_property
    def _package(self) -> dict[str, Any]:
        from torch.export.pt2_archive._package import load_pt2

        try:
            runners: dict[str, Any] = load_pt2(str(self.path), load_weights_from_disk=True).aoti_runners
        except RuntimeError as error:
            raise ExportError(
                f"{self.path} cannot be loaded ({_first_line(error)}): export the model again here"
            ) from error
        return runners

    def _cpu_method(self, name: str) -> Call:
        models = self._package
        loader = (models[name] if name in models else next(iter(models.values()))).loader

        def call(leaves: list[Any]) -> list[Any]:
            # A kernel may assume the strides of the trace. In a mutated input they stay those of the caller.
            feed = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            dense = [leaf.contiguous() for leaf in feed]
            outputs = list(loader.boxed_run(list(dense)))
            for leaf, copy in zip(feed, dense, strict=True):
                if copy is not leaf and not torch.equal(copy, leaf):
                    leaf.copy_(copy)
            return outputs

        return call

    @cached_property
    def _plans(self) -> Any:
        return read_plans(read_pte(self.path))

    @cached_property
    def _runtime_program(self) -> Any:
        if problem := runtime_problem():
            raise ExportError(f"ExecuTorch's runtime for Python cannot be used: {problem}")
        import executorch.kernels.quantized  # noqa: F401  (the kernels of quantized_embedding)
        from executorch.runtime import Runtime

        try:
            return Runtime.get().load_program(self.path)
        except RuntimeError as error:
            raise ExportError(f"{self.path} cannot be loaded ({_first_line(error)}): export the model again") from error

    def _xnnpack_method(self, name: str) -> Call:
        method = self._runtime_program.load_method(name)
        plan = self._plans[name]

        def call(leaves: list[Any]) -> list[Any]:
            # The runtime ignores strides and reads the memory as dense. It takes no texts: they are in the program.
            feed = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return list(method.execute([None if isinstance(leaf, str) else leaf for leaf in feed]))

        return _with_mutations(call, plan.inputs, plan.outputs)

    @cached_property
    def _delegate_program(self) -> Any:
        from et_cuda_passes.delegate import Program

        return Program(self.path)

    def _cuda_method(self, name: str) -> Call:
        method = self._delegate_program.method(name)
        plan = self._plans[name]
        return _with_mutations(lambda leaves: method(*leaves), plan.inputs, plan.outputs)


_LOADED: "WeakValueDictionary[tuple[str, Path, int, int], _Loaded]" = WeakValueDictionary()


def _with_mutations(call: Call, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Call:
    """``call``, after which mutated inputs hold their new values.

    Args:
        call: runs on inputs that it may copy.
        inputs: the value of the program that each input is.
        outputs: likewise. An output that is an input's value is what the program wrote to that input.
    """
    mutated = {position: inputs.index(value) for position, value in enumerate(outputs) if value in inputs}

    def called(leaves: list[Any]) -> list[Any]:
        results = call(leaves)
        for position, index in mutated.items():
            if isinstance(leaves[index], Tensor) and leaves[index].data_ptr() != results[position].data_ptr():
                leaves[index].copy_(results[position])
        return results

    return called


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
