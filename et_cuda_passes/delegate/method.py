"""A method of a delegated program that is called with torch tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from et_cuda_passes.delegate.dataflow import ExecutableStep, View, analyse
from et_cuda_passes.delegate.files import DelegateError
from et_cuda_passes.delegate.library import Library
from et_cuda_passes.delegate.operators import FAILURES, Operation
from et_cuda_passes.delegate.plan import Call, Copy, Dynamism, Move, Plan, TensorSpec, Value

# AOTInductor's kernels assume addresses that the widest loads of CUDA can use.
_ALIGNMENT = 16


class Method:
    """A loaded method. Call it with its inputs in order.

    An input on another device is copied to the method's device, where the outputs stay. They are returned as a list,
    which has one tensor if the exported model returned one tensor.

    The program may write to an input, such as a KV cache. ExecuTorch's runtime copies an input whose memory is planned,
    writes to the copy, and returns it as one of the first outputs. Here the outputs are the same, and the caller's own
    tensor also has the new value after the call: the method writes to it in place, or, if the input had to be copied,
    copies the new value back. After a call that fails, it may have the old value or the new one.

    A buffer that the program writes to outside the delegates begins with the value in the file, or with zeros if the
    file has none, and each call continues with what the last call of this method wrote.

    The inputs are checked against the .pte. It has an upper bound for a dynamic size, but no lower bound. A library
    without dynamic sizes also checks its inputs itself. A library with dynamic sizes does so if the environment has
    AOTI_RUNTIME_CHECK_INPUTS=1, and then refuses dynamic sizes of 0 and 1.

    Attributes:
        name: the name of the method.
        inputs: the spec of each input: dtype, sizes and order of dimensions of a tensor, or the constant.
        mutated: the positions of the inputs that the program writes to.
        weights: of the delegates, by FQN, as they are on the device. Other methods of the program share them. Do not
            resize them.
        device: where the method runs.
    """

    def __init__(
        self,
        plan: Plan,
        libraries: Mapping[int, Library],
        weights: Mapping[str, Tensor],
        stored: Mapping[int, Tensor],
        device: torch.device,
        where: str,
    ) -> None:
        self.name, self.device, self.weights = plan.name, device, dict(weights)
        self.inputs: tuple[Value, ...] = tuple(plan.values[index] for index in plan.inputs)
        self._plan, self._libraries, self._where = plan, libraries, where
        signatures = {
            index: (library.signature.inputs, library.signature.outputs) for index, library in libraries.items()
        }
        flow = analyse(plan, signatures, where)
        self.mutated = flow.mutated
        self._steps = flow.steps
        # For each operator, the sizes and numbers that it read when the sizes of its results were last checked.
        self._checked: dict[int, list[Any]] = {}
        self._values: dict[int, Any] = {
            index: value.constant
            for index, value in enumerate(plan.values)
            if value.tensor is None and not value.is_list
        }
        self._values |= {index: stored[index] for index in flow.constants}
        states = {index: self._state(index, stored) for index in flow.states}
        self._values |= states
        kept = (*weights.values(), *stored.values(), *states.values())
        self._storages = {storage_ptr(tensor) for tensor in kept if tensor.numel()}
        self._written = {storage_ptr(tensor) for tensor in states.values() if tensor.numel()}

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the method.

        Args:
            *inputs: one for each of :attr:`inputs`: a tensor, or the constant (a number, text or None) with which the
                model was exported.

        Returns:
            The outputs.

        Raises:
            DelegateError: an input is not valid, which is found before anything runs; or a library or an operator
                fails.
        """
        plan = self._plan
        check_inputs(plan, inputs, self._where)
        self._check_mutated(inputs)
        with torch.no_grad():
            values = dict(self._values)
            for index, spec, given in zip(plan.inputs, self.inputs, inputs, strict=True):
                values[index] = given if spec.tensor is None else to_device_layout(given, spec.tensor, self.device)
            own = {position: values[plan.inputs[position]] for position in self.mutated}
            outputs = self._run(values)
            for position, tensor in own.items():
                if storage_ptr(tensor) != storage_ptr(inputs[position]):
                    inputs[position].copy_(tensor)
            return outputs

    def _run(self, values: dict[int, Any]) -> list[Any]:
        """Run all steps. ``values`` has the constants, the states and the inputs, and gets the results of the steps."""
        own = (values[self._plan.inputs[position]] for position in self.mutated)
        # The memory that steps write to in place.
        written = self._written | {storage_ptr(tensor) for tensor in own if tensor.numel()}
        for number, step in enumerate(self._steps):
            self._execute(step, number, values, written)
        return [self._copy_if_kept(values[index]) for index in self._plan.outputs]

    def _execute(self, step: ExecutableStep, number: int, values: dict[int, Any], written: set[int]) -> None:
        """Run one step, which reads from ``values`` and adds its results to them."""
        if isinstance(step, Call):
            library = self._libraries[step.delegate]
            split = library.signature.inputs
            arguments, results = step.args[:split], step.args[split:]
            outputs = library([values[index] for index in arguments], self._is_static(arguments))
            for index, output in zip(results, outputs, strict=True):
                self._check_value(index, output)
                # A library may return an input. A later write to the input must not change the output.
                values[index] = output.clone() if written and storage_ptr(output) in written else output
        elif isinstance(step, Operation):
            self._operate(step, number, values)
        elif isinstance(step, Move | Copy):
            source = values[step.source]
            if isinstance(source, Tensor):
                self._check_value(step.target, source)
            values[step.target] = source.clone() if isinstance(step, Copy) else source
        elif isinstance(step, View):
            target = self._plan.values[step.target].tensor
            assert target is not None
            values[step.target] = self._fail_with(step.target, number, values[step.source].view, target.sizes)
        else:
            values.pop(step.value, None)

    def _operate(self, step: Operation, number: int, values: dict[int, Any]) -> None:
        specs = [self._plan.values[index].tensor for index in step.results]
        outs = [torch.empty(0, dtype=spec.dtype, device=self.device) for spec in specs if spec] if step.outs else []
        # A damaged file may ask for more memory than the machine has.
        given = [_size_or_value(values[index]) for index in step.reads()]
        if self._checked.get(number) != given:
            planned = self._fail_with(step.name, number, step.sizes, values, outs)
            for index, tensor in zip(step.results if planned else (), planned, strict=True):
                self._check_value(index, tensor)
            self._checked[number] = given
        results = self._fail_with(step.name, number, step, values, outs)
        for index, spec, result in zip(step.results, specs, results, strict=True):
            if spec is not None:
                self._check_value(index, result)
                result = in_dim_order(result, spec)
            values[index] = result

    def _fail_with(self, name: object, number: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function``, and turn its error into one that names the step."""
        try:
            return function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            problem = str(error).strip().partition("\n")[0]
            raise DelegateError(f"{self._where}: instruction {number}, {name}, failed: {problem}") from error

    def _state(self, index: int, stored: Mapping[int, Tensor]) -> Tensor:
        if index in stored:
            return stored[index].clone()
        spec = self._plan.values[index].tensor
        assert spec is not None
        return in_dim_order(torch.zeros(spec.sizes, dtype=spec.dtype, device=self.device), spec)

    def _is_static(self, indices: tuple[int, ...]) -> bool:
        specs = (self._plan.values[index].tensor for index in indices)
        return all(spec is not None and spec.dynamism == Dynamism.STATIC for spec in specs)

    def _copy_if_kept(self, output: Any) -> Any:
        """Copy an output that is a view of a weight or of a buffer: a later call may write to it."""
        if isinstance(output, Tensor) and storage_ptr(output) in self._storages:
            return output.clone()
        return output

    def _check_value(self, index: int, tensor: Tensor) -> None:
        """Check that ``tensor`` fits the spec of value ``index``. The next library does not check it."""
        spec = self._plan.values[index].tensor
        problem = spec.mismatch(tensor) if spec else "is a tensor"
        if problem:
            raise DelegateError(
                f"{self._where}: value {index} {problem}, but the program has {self._plan.values[index]} there"
            )

    def _check_mutated(self, inputs: tuple[Any, ...]) -> None:
        """Check that the program can write to its mutated inputs without changing another input."""
        by_storage: dict[int, list[int]] = {}
        for position, given in enumerate(inputs if self.mutated else ()):
            if isinstance(given, Tensor) and given.numel():
                by_storage.setdefault(storage_ptr(given), []).append(position)
        for position in self.mutated:
            given, name = inputs[position], f"{self._where}: input {position}, which the program writes to,"
            if given.is_inference() and not torch.is_inference_mode_enabled():
                raise DelegateError(
                    f"{name} was created in inference mode. Call the method in inference mode too, or clone the input"
                )
            if any(size > 1 and stride == 0 for size, stride in zip(given.shape, given.stride(), strict=True)):
                raise DelegateError(f"{name} is expanded: several elements are one place in memory. Clone it")
            for other in by_storage.get(storage_ptr(given), ()) if given.numel() else ():
                if other != position and _overlap(given, inputs[other]):
                    raise DelegateError(f"{name} shares memory with input {other}. Clone one of them")


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
    tensor = in_dim_order(tensor.detach().to(device), spec)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def in_dim_order(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """``tensor`` with its dimensions in memory as ``spec`` has them."""
    order = spec.dim_order
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def storage_ptr(tensor: Tensor) -> int:
    """The address of the memory that ``tensor`` is a view of."""
    return tensor.untyped_storage().data_ptr()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether the memory between the first and the last element of one tensor has elements of the other."""
    (start, end), (other_start, other_end) = _extent(first), _extent(second)
    return start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _size_or_value(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value
