"""The reads and writes of a method, and which of its values share memory.

ExecuTorch plans the memory of a method when it writes the .pte. Two consequences are visible there: a static view has
no instruction, only the place of its base, and an input that the model writes to is written in its planned place. Here
every value is a tensor of torch, so views are found again by their place, and a value in place is the caller's tensor.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from et_cuda_passes.delegate.files import DelegateError
from et_cuda_passes.delegate.operators import Operation, bind
from et_cuda_passes.delegate.plan import Call, Copy, Dynamism, Free, Jump, Kernel, Move, Plan, Step


@dataclass(frozen=True)
class View:
    """Make value ``target`` a view of value ``source``, which is at the same place in memory."""

    source: int
    target: int


ExecutableStep = Call | Operation | Move | Copy | View | Free


@dataclass(frozen=True)
class Dataflow:
    """A method whose reads and writes have been checked.

    Attributes:
        steps: the steps to execute.
        mutated: the positions of the inputs that the method writes to.
        states: the values that keep what one call wrote for the next call.
        constants: the stored values that are only read.
    """

    steps: tuple[ExecutableStep, ...]
    mutated: tuple[int, ...]
    states: tuple[int, ...]
    constants: tuple[int, ...]


def analyse(plan: Plan, signatures: Mapping[int, tuple[int, int]], where: str) -> Dataflow:
    """Check that a method reads only what it has, and find out which values share memory.

    Args:
        plan: the method, which has passed :meth:`~et_cuda_passes.delegate.plan.Plan.check_runnable`.
        signatures: for each delegate that runs, the number of its inputs and outputs.
        where: the name of the method, for messages.

    Raises:
        DelegateError: a value is read before it is written, or a constant or an input is overwritten.
    """
    return _Analysis(plan, signatures, where).run()


class _Analysis:
    def __init__(self, plan: Plan, signatures: Mapping[int, tuple[int, int]], where: str) -> None:
        self._plan, self._signatures, self._where = plan, signatures, where
        self._source = [self._bind(step) for step in plan.steps]
        tensors = {index: value.tensor for index, value in enumerate(plan.values) if value.tensor is not None}
        stored = {index for index, tensor in tensors.items() if tensor.stored} - set(plan.inputs)
        produced = {index for step in self._source for index in self._results(step)}
        in_place = {index for step in self._source if isinstance(step, Operation) for index in step.mutated}
        self._states = {index for index in stored if tensors[index].place is not None} | {
            index
            for index in in_place - produced - set(plan.inputs)
            if index in tensors and tensors[index].place is not None
        }
        self._constants = stored - self._states
        self._kept = self._states | self._constants | set(plan.inputs)
        numbers = {index for index, value in enumerate(plan.values) if value.tensor is None and not value.is_list}
        self._written = numbers | self._kept
        # The value that was last written to a place, and the value that each view is a view of.
        self._at_place = {tensors[index].place: index for index in self._kept if index in tensors}
        self._base: dict[int, int] = {}
        self._steps: list[ExecutableStep] = []
        # By the value that others are views of: the numbers of the instructions that write to it, and of its last read.
        self._mutations: dict[int, list[int]] = defaultdict(list)
        self._last_read: dict[int, int] = {}

    def _bind(self, step: Step) -> ExecutableStep:
        assert not isinstance(step, Jump), "check_runnable refuses jumps"
        return bind(step, self._plan.values) if isinstance(step, Kernel) else step

    def run(self) -> Dataflow:
        copies: list[tuple[int, int, int]] = []
        for number, step in enumerate(self._source):
            name = f"instruction {number}"
            reads, writes = self._operands(step, name)
            for index in reads:
                self._read(index, name, number)
            if isinstance(step, Copy):
                copies.append((len(self._steps), number, self._root(step.source)))
            self._steps.append(step)
            if isinstance(step, Operation):
                for index in step.mutated:
                    self._mutate(index, name, number)
            for index in writes:
                self._write(index, name)
            if isinstance(step, Free):
                self._written.discard(step.value)
            elif isinstance(step, Move):
                self._alias(step.target, step.source)
            elif isinstance(step, Operation) and step.alias_of is not None:
                self._alias(step.results[0], step.alias_of)
        for index in self._plan.outputs:
            self._read(index, "an output", len(self._source))
        self._skip_copies(copies)
        inputs = enumerate(self._plan.inputs)
        mutated = tuple(position for position, index in inputs if index in self._mutations)
        return Dataflow(tuple(self._steps), mutated, tuple(sorted(self._states)), tuple(sorted(self._constants)))

    def _skip_copies(self, copies: list[tuple[int, int, int]]) -> None:
        """Make a copy the same tensor if nothing writes to it, and to its source not before the last read of the copy.

        A KV cache is copied to the device, read there, and written at the end, so it need not be copied.

        Args:
            copies: the position of each copy in the steps, the number of its instruction, and the root of its source.
        """
        targets = Counter(self._steps[position].target for position, _, _ in copies)  # type: ignore[union-attr]
        same: dict[int, int] = {}
        for position, number, root in copies:
            copy = self._steps[position]
            assert isinstance(copy, Copy)
            # If the source is itself a copy that was skipped, both are the first source.
            source = same.get(root, root)
            later = [mutation for mutation in self._mutations.get(source, ()) if mutation > number]
            last = self._last_read.get(copy.target, -1)
            is_written = copy.target in self._mutations or targets[copy.target] > 1
            if not is_written and all(last < mutation for mutation in later):
                same[copy.target] = source
                self._steps[position] = Move(copy.source, copy.target)

    def _results(self, step: object) -> tuple[int, ...]:
        """The values that a step writes to, other than in place."""
        if isinstance(step, Call):
            return step.args[self._signatures[step.delegate][0] :]
        if isinstance(step, Operation):
            return step.results
        return (step.target,) if isinstance(step, Move | Copy) else ()

    def _operands(self, step: object, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The values that a step reads, and those that it writes."""
        if isinstance(step, Call):
            inputs, outputs = self._signatures[step.delegate]
            if len(step.args) != inputs + outputs:
                self._fail(
                    f"{name} passes {len(step.args)} values to delegate {step.delegate}, whose library has {inputs} "
                    f"inputs and {outputs} outputs"
                )
            return step.args[:inputs], step.args[inputs:]
        if isinstance(step, Operation):
            return tuple(step.reads()), step.results
        if isinstance(step, Move | Copy):
            source, target = (self._plan.values[index] for index in (step.source, step.target))
            if (source.tensor is None) != (target.tensor is None):
                self._fail(f"{name} moves value {step.source}, {source}, to value {step.target}, {target}")
            return (step.source,), (step.target,)
        return (), ()

    def _read(self, index: int, reader: str, number: int) -> None:
        """Check that a value exists. A view without an instruction is created when it is first read."""
        if index not in self._written:
            self._find_view(index, reader)
        self._last_read[self._root(index)] = number

    def _find_view(self, index: int, reader: str) -> None:
        if self._plan.values[index].is_list:
            self._fail(f"{reader} reads value {index}, a {self._plan.values[index]}, which only an operator can read")
        tensor = self._plan.values[index].tensor
        base = self._at_place.get(tensor.place) if tensor is not None and tensor.place is not None else None
        if tensor is None or base is None or base not in self._written:
            self._fail(f"{reader} reads value {index}, which was not written before")
        other = self._plan.values[base].tensor
        assert other is not None
        is_view = tensor.dtype == other.dtype and tensor.numel == other.numel
        if not is_view or {tensor.dynamism, other.dynamism} != {Dynamism.STATIC}:
            self._fail(
                f"{reader} reads value {index}, {tensor}, which was not written before, and is no view of value "
                f"{base}, {other}, which was last written to its place in memory"
            )
        self._steps.append(View(base, index))
        self._written.add(index)
        self._alias(index, base)

    def _write(self, index: int, writer: str) -> None:
        value = self._plan.values[index]
        if index in self._kept:
            self._fail(f"{writer} overwrites value {index}, which is an input, a constant or a state")
        if value.tensor is None:
            return
        if index in self._written:
            self._fail(f"{writer} writes to value {index}, which was written before")
        self._written.add(index)
        self._base.pop(index, None)
        if value.tensor.place is not None:
            self._at_place[value.tensor.place] = index

    def _mutate(self, index: int, writer: str, number: int) -> None:
        root = self._root(index)
        if root in self._constants:
            self._fail(f"{writer} writes to value {index}, which is a constant")
        self._mutations[root].append(number)

    def _alias(self, index: int, base: int) -> None:
        if self._plan.values[index].tensor is not None:
            self._base[index] = self._root(base)

    def _root(self, index: int) -> int:
        return self._base.get(index, index)

    def _fail(self, problem: str) -> NoReturn:
        raise DelegateError(f"{self._where}: {problem}")
