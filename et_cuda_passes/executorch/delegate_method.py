"""A method of a delegated program that can be called with torch tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.executorch.delegate_bytes import DelegateError
from et_cuda_passes.executorch.delegate_library import Library
from et_cuda_passes.executorch.delegate_plan import Call, Free, Move, Plan, TensorSpec, Value

# What CUDA's widest loads, and AOTInductor's kernels, count on.
_ALIGNMENT = 16


class Method:
    """A loaded method; call it with its inputs in order.

    Inputs on another device are copied to the method's. Outputs stay on the method's device, in a list; where the
    exported model returned one tensor, the list has one. The check of inputs is that of the .pte, which knows an upper
    bound of a dynamic size and no lower one. A library without dynamic sizes checks its inputs too; one with them does
    so with AOTI_RUNTIME_CHECK_INPUTS=1 in the environment, and then takes no dynamic size of 0 or 1.

    Attributes:
        name: the method's.
        inputs: what each input must be.
        weights: by FQN, as they are on the device; shared with the program's other methods. Do not resize them.
        device: where it runs.
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
            if value.tensor is None and not value.kind.startswith("list")
        }
        self._check_flow()

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the method.

        Args:
            *inputs: as many as :attr:`inputs`; a tensor for each, or for one that was exported as a constant (a number,
                text or None) that same constant.

        Raises:
            DelegateError: an input is not what the method takes, found before anything runs; or the library failed.
        """
        plan = self._plan
        check_inputs(plan, inputs, self._where)
        values: dict[int, Any] = dict(self._constants)
        for index, wanted, given in zip(plan.inputs, self.inputs, inputs, strict=True):
            values[index] = given if wanted.tensor is None else _placed(given, wanted.tensor, self.device)
        for step in plan.steps:
            if isinstance(step, Call):
                library = self._libraries[step.delegate]
                split = library.wants.inputs
                results = library([values[index] for index in step.args[:split]], self._is_static(step.args[:split]))
                for index, result in zip(step.args[split:], results, strict=True):
                    values[index] = self._as_planned(index, result)
            elif isinstance(step, Move):
                source = values[step.source]
                values[step.target] = self._as_planned(step.target, source) if isinstance(source, Tensor) else source
            elif isinstance(step, Free):
                values.pop(step.value, None)
        return [self._owned(values[index]) for index in plan.outputs]

    def _is_static(self, indices: tuple[int, ...]) -> bool:
        specs = (self._plan.values[index].tensor for index in indices)
        return all(spec is not None and spec.dynamism == 0 for spec in specs)

    def _owned(self, output: Any) -> Any:
        """A result that is a weight, or a view of one, is copied: a later call would write to it."""
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() in self._storages:
            return output.clone()
        return output

    def _as_planned(self, index: int, tensor: Tensor) -> Tensor:
        """``tensor``, checked to be what value ``index`` may be: the delegate that reads it counts on that."""
        spec = self._plan.values[index].tensor
        if spec is None or (objection := spec.objection(tensor)):
            problem = objection if spec else "is a tensor"
            raise DelegateError(f"{self._where}: value {index} {problem}; the program says {self._plan.values[index]}")
        return tensor

    def _check_flow(self) -> None:
        """Check that every value is there when it is read, and that each library is called with what it takes."""
        plan = self._plan
        known = set(self._constants) | set(plan.inputs)

        def read(index: int, reader: str) -> None:
            if index not in known:
                raise DelegateError(f"{self._where}: {reader} reads value {index}, which nothing has written")

        for number, step in enumerate(plan.steps):
            what = f"instruction {number}"
            if isinstance(step, Call):
                wants = self._libraries[step.delegate].wants
                if len(step.args) != wants.inputs + wants.outputs:
                    raise DelegateError(
                        f"{self._where}: {what} passes {len(step.args)} values to delegate {step.delegate}, whose "
                        f"library has {wants.inputs} inputs and {wants.outputs} outputs"
                    )
                for index in step.args[: wants.inputs]:
                    read(index, what)
                known.update(step.args[wants.inputs :])
            elif isinstance(step, Move):
                read(step.source, what)
                if (plan.values[step.source].tensor is None) != (plan.values[step.target].tensor is None):
                    raise DelegateError(
                        f"{self._where}: {what} moves value {step.source}, {plan.values[step.source]}, to value "
                        f"{step.target}, {plan.values[step.target]}"
                    )
                known.add(step.target)
            elif isinstance(step, Free):
                known.discard(step.value)
        for index in plan.outputs:
            read(index, "an output")


def check_inputs(plan: Plan, inputs: tuple[Any, ...], where: str) -> None:
    """Check that ``inputs`` are what the method takes.

    Raises:
        DelegateError: their number, or a type, dtype, rank, static size or upper bound of a size is wrong.
    """
    specs = [plan.values[index] for index in plan.inputs]
    if len(inputs) != len(specs):
        listed = "; ".join(map(str, specs)) or "none"
        raise DelegateError(f"{where} takes {len(specs)} inputs ({listed}), not {len(inputs)}")
    for position, (given, wanted) in enumerate(zip(inputs, specs, strict=True)):
        what = f"{where}: input {position}"
        if wanted.tensor is None:
            if type(given) is not type(wanted.constant) or given != wanted.constant:
                raise DelegateError(f"{what} was exported as {wanted}, and is nothing else: found {given!r}")
        elif not isinstance(given, Tensor):
            raise DelegateError(f"{what} is a {type(given).__name__}; wanted a tensor, {wanted}")
        elif objection := wanted.tensor.objection(given):
            raise DelegateError(f"{what} {objection}; wanted {wanted}")


def _placed(tensor: Tensor, spec: TensorSpec, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, laid out in memory as the method was compiled for."""
    tensor = tensor.detach().to(device)
    order = spec.dim_order
    inverse = sorted(range(len(order)), key=order.__getitem__)
    tensor = tensor.permute(order).contiguous().permute(inverse)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
