"""A method of a delegated program that is called with torch tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.delegate.files import DelegateError
from et_cuda_passes.delegate.library import Library
from et_cuda_passes.delegate.plan import Call, Dynamism, Free, Move, Plan, TensorSpec, Value

# AOTInductor's kernels assume addresses that the widest loads of CUDA can use.
_ALIGNMENT = 16


class Method:
    """A loaded method. Call it with its inputs in order.

    An input on another device is copied to the method's device, where the outputs stay. They are returned as a list,
    which has one tensor if the exported model returned one tensor.

    The inputs are checked against the .pte. It has an upper bound for a dynamic size, but no lower bound. A library
    without dynamic sizes also checks its inputs itself. A library with dynamic sizes does so if the environment has
    AOTI_RUNTIME_CHECK_INPUTS=1, and then refuses dynamic sizes of 0 and 1.

    Attributes:
        name: the name of the method.
        inputs: the spec of each input: dtype, sizes and order of dimensions of a tensor, or the constant.
        weights: by FQN, as they are on the device. Other methods of the program share them. Do not resize them.
        device: where the method runs.
    """

    def __init__(
        self,
        plan: Plan,
        libraries: Mapping[int, Library],
        weights: Mapping[str, Tensor],
        device: torch.device,
        where: str,
    ) -> None:
        self.name, self.device, self.weights = plan.name, device, dict(weights)
        self.inputs: tuple[Value, ...] = tuple(plan.values[index] for index in plan.inputs)
        self._plan, self._libraries, self._where = plan, libraries, where
        self._storages = {weight.untyped_storage().data_ptr() for weight in weights.values() if weight.numel()}
        self._constants = {
            index: value.constant
            for index, value in enumerate(plan.values)
            if value.tensor is None and not value.is_list
        }
        self._check_steps()

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the method.

        Args:
            *inputs: one for each of :attr:`inputs`: a tensor, or the constant (a number, text or None) with which the
                model was exported.

        Returns:
            The outputs.

        Raises:
            DelegateError: an input is not valid, which is found before anything runs; or a library fails.
        """
        plan = self._plan
        check_inputs(plan, inputs, self._where)
        values: dict[int, Any] = dict(self._constants)
        for index, spec, given in zip(plan.inputs, self.inputs, inputs, strict=True):
            values[index] = given if spec.tensor is None else to_device_layout(given, spec.tensor, self.device)
        for step in plan.steps:
            if isinstance(step, Call):
                library = self._libraries[step.delegate]
                split = library.signature.inputs
                arguments, results = step.args[:split], step.args[split:]
                outputs = library([values[index] for index in arguments], self._is_static(arguments))
                for index, output in zip(results, outputs, strict=True):
                    values[index] = self._check_value(index, output)
            elif isinstance(step, Move):
                source = values[step.source]
                values[step.target] = self._check_value(step.target, source) if isinstance(source, Tensor) else source
            elif isinstance(step, Free):
                values.pop(step.value, None)
        return [self._copy_if_weight(values[index]) for index in plan.outputs]

    def _is_static(self, indices: tuple[int, ...]) -> bool:
        specs = (self._plan.values[index].tensor for index in indices)
        return all(spec is not None and spec.dynamism == Dynamism.STATIC for spec in specs)

    def _copy_if_weight(self, output: Any) -> Any:
        """Copy an output that is a view of a weight: a later call may write to the weight."""
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() in self._storages:
            return output.clone()
        return output

    def _check_value(self, index: int, tensor: Tensor) -> Tensor:
        """``tensor``, if it fits the spec of value ``index``. The next library does not check it."""
        spec = self._plan.values[index].tensor
        problem = spec.mismatch(tensor) if spec else "is a tensor"
        if problem:
            raise DelegateError(
                f"{self._where}: value {index} {problem}, but the program has {self._plan.values[index]} there"
            )
        return tensor

    def _check_steps(self) -> None:
        """Check that every value is written before it is read, and that each call fits the signature of its library."""
        plan = self._plan
        written = set(self._constants) | set(plan.inputs)

        def read(index: int, reader: str) -> None:
            if index not in written:
                raise DelegateError(f"{self._where}: {reader} reads value {index}, which was not written before")

        for number, step in enumerate(plan.steps):
            name = f"instruction {number}"
            if isinstance(step, Call):
                signature = self._libraries[step.delegate].signature
                if len(step.args) != signature.inputs + signature.outputs:
                    raise DelegateError(
                        f"{self._where}: {name} passes {len(step.args)} values to delegate {step.delegate}, whose "
                        f"library has {signature.inputs} inputs and {signature.outputs} outputs"
                    )
                for index in step.args[: signature.inputs]:
                    read(index, name)
                written.update(step.args[signature.inputs :])
            elif isinstance(step, Move):
                read(step.source, name)
                source, target = plan.values[step.source], plan.values[step.target]
                if (source.tensor is None) != (target.tensor is None):
                    raise DelegateError(
                        f"{self._where}: {name} moves value {step.source}, {source}, to value {step.target}, {target}"
                    )
                written.add(step.target)
            elif isinstance(step, Free):
                written.discard(step.value)
        for index in plan.outputs:
            read(index, "an output")


def check_inputs(plan: Plan, inputs: tuple[Any, ...], where: str) -> None:
    """Check that a method can be called with ``inputs``.

    Raises:
        DelegateError: their number, or a type, dtype, rank, static size or upper bound of a size does not fit.
    """
    specs = [plan.values[index] for index in plan.inputs]
    if len(inputs) != len(specs):
        listed = "; ".join(map(str, specs)) or "none"
        raise DelegateError(f"{where} takes {len(specs)} inputs ({listed}), not {len(inputs)}")
    for position, (given, spec) in enumerate(zip(inputs, specs, strict=True)):
        name = f"{where}: input {position}"
        if spec.tensor is None:
            if type(given) is not type(spec.constant) or given != spec.constant:
                raise DelegateError(f"{name} was exported as the constant {spec}; found {given!r}")
        elif not isinstance(given, Tensor):
            raise DelegateError(f"{name} is a {type(given).__name__}; expected a tensor, {spec}")
        elif problem := spec.tensor.mismatch(given):
            raise DelegateError(f"{name} {problem}; expected {spec}")


def to_device_layout(tensor: Tensor, spec: TensorSpec, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, with the order of dimensions in memory and the alignment that a library assumes."""
    tensor = tensor.detach().to(device)
    order = spec.dim_order
    inverse = sorted(range(len(order)), key=order.__getitem__)
    tensor = tensor.permute(order).contiguous().permute(inverse)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
