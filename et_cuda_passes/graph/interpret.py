"""Runs an exported program node by node, where other code sees and replaces values.

A value is freed after its last use, that of a tap included. So a run holds what the program itself would hold, beside
the values of one region at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.operators import op_name
from et_cuda_passes.graph.program import Program

Read = Callable[[Node], Any]
"""Returns the value of a node of the run."""


@dataclass(frozen=True)
class Region:
    """Nodes that compute one value from values of a run. They may be nodes of another program.

    Attributes:
        nodes: in their order; the last one computes the value.
        reads: the node of the run whose value an operand has, by operand.
        constants: the tensors of the other operands.
    """

    nodes: tuple[Node, ...]
    reads: Mapping[Node, Node]
    constants: Mapping[Node, Tensor] = field(default_factory=dict)

    def compute(self, read: Read, replaced: Mapping[Node, Tensor] = MappingProxyType({})) -> Any:
        """The value of the last node.

        Args:
            read: returns the values of the run.
            replaced: values to use instead of those that nodes of the region compute.

        Raises:
            UsageError: an operator of another package has no implementation for the device.
        """
        values: dict[Node, Any] = {}
        last = {operand: node for node in self.nodes for operand in node.all_input_nodes}

        def value(operand: Node) -> Any:
            if operand in values:
                return values[operand]
            return self.constants[operand] if operand in self.constants else read(self.reads[operand])

        for node in self.nodes:
            if node in replaced:
                values[node] = replaced[node]
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
            try:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except NotImplementedError as error:
                raise UsageError(
                    f"the operator {op_name(node.target)} has no implementation for the device of its arguments: "
                    "register a reference in plain torch with torch.library.impl"
                ) from error
            del args, kwargs
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    values.pop(operand, None)
        return values[self.nodes[-1]]


@dataclass(frozen=True)
class Tap:
    """A function that sees the value of a node as soon as it is computed.

    Attributes:
        node: the node.
        reads: nodes before it whose values the function reads.
        see: gets the value and a function that returns the values of ``reads``; returns the value to go on with.
    """

    node: Node
    reads: tuple[Node, ...]
    see: Callable[[Any, Read], Any]


class Runner:
    """Runs an exported program. The tensors of the program are not changed.

    Attributes:
        program: the private copy whose nodes taps refer to.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self.program = Program(exported)
        self._module = self.program.as_graph_module()
        self._exported = exported
        self._specs: list[InputSpec] = exported.graph_signature.input_specs
        outputs = exported.graph_signature.output_specs
        self._results = [index for index, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT]

    def bind(self, given: Sequence[Any]) -> list[Any]:
        """The value of each input of the program, from the arguments of one call, checked against the program.

        Args:
            given: positional arguments, then the values of keyword arguments in the order of the export. Arguments
                that are no tensors may be left out.

        Raises:
            UsageError: their number, a dtype or a size is not that of the program.
        """
        nodes = self.program.graph.find_nodes(op="placeholder")
        inputs = [(s, n) for s, n in zip(self._specs, nodes, strict=True) if s.kind is InputKind.USER_INPUT]
        leaves = tree_leaves(tuple(given))
        fixed = [isinstance(spec.arg, ConstantArgument) for spec, _ in inputs]
        if len(leaves) == len(inputs) - sum(fixed):
            rest = iter(leaves)
            leaves = [spec.arg.value if fix else next(rest) for (spec, _), fix in zip(inputs, fixed, strict=True)]  # type: ignore[union-attr]
        if len(leaves) != len(inputs):
            wanted = ", ".join(_form(node.meta["val"]) for spec, node in inputs if isinstance(spec.arg, TensorArgument))
            raise UsageError(
                f"an input set has {len(leaves)} values, the program takes {len(inputs)}: give the arguments of one "
                f"call as a tuple ({wanted or 'no tensors'})"
            )
        sizes: dict[Any, int] = {}
        for index, ((spec, node), value) in enumerate(zip(inputs, leaves, strict=True)):
            if isinstance(spec.arg, TensorArgument):
                self._check(f"input {index} ({node.name})", value, node.meta["val"], sizes)
            elif isinstance(spec.arg, ConstantArgument) and value != spec.arg.value:
                raise UsageError(
                    f"input {index} ({node.name}) is {value!r}; the program was exported for {spec.arg.value!r} alone"
                )
        return leaves

    def _check(self, what: str, value: Any, wanted: Tensor, sizes: dict[Any, int]) -> None:
        """Check dtype and sizes; ``sizes`` has the values of symbols that earlier inputs determine."""
        problem = UsageError(f"{what} is {_form(value)}, the program takes {_form(wanted)}")
        if not isinstance(value, Tensor) or value.dtype != wanted.dtype or value.dim() != wanted.dim():
            raise problem
        for size, expected in zip(value.shape, wanted.shape, strict=True):
            if isinstance(expected, int):
                if size != expected:
                    raise problem
                continue
            expression = expected.node.expr
            if expression.is_Symbol and expression not in sizes:
                bounds = self._exported.range_constraints.get(expression)
                if bounds is not None and not int(bounds.lower) <= size <= bounds.upper:
                    raise UsageError(f"{problem}, with {expression} from {bounds.lower} to {bounds.upper}")
                sizes[expression] = size
            known = expression.subs(sizes)
            if known.is_number and int(known) != size:
                raise UsageError(f"{problem}, and {expression} is {known}")

    def run(
        self,
        inputs: Sequence[Any],
        taps: Sequence[Tap] = (),
        replaced: Mapping[Node, Callable[..., Any]] = MappingProxyType({}),
        seed: int = 0,
    ) -> list[Any]:
        """Run the program once; returns the values that its caller gets.

        Args:
            inputs: from :meth:`bind`.
            taps: what is seen. Several taps of a node are called in their order.
            replaced: functions to call instead of the operators of nodes, with the same arguments.
            seed: of the random numbers that the program draws.

        Raises:
            UsageError: an operator refuses the inputs.
        """
        mutated = self.program.mutated
        given = iter(inputs)
        values = []
        for spec, node in zip(self._specs, self.program.graph.find_nodes(op="placeholder"), strict=True):
            if spec.kind is InputKind.USER_INPUT:
                value = next(given)
            else:
                held = self.program.constant(node)
                value = self._exported.constants.get(spec.target or "") if held is None else held
            values.append(value.clone() if node in mutated and isinstance(value, Tensor) else value)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            outputs = _Interpreter(self._module, taps, replaced).run(*values, enable_io_processing=False)
        return [outputs[index] for index in self._results]


class _Interpreter(Interpreter):
    def __init__(self, module: GraphModule, taps: Sequence[Tap], replaced: Mapping[Node, Callable[..., Any]]) -> None:
        super().__init__(module, graph=module.graph)
        self.extra_traceback = False
        self._taps: dict[Node, list[Tap]] = {}
        self._replaced = replaced
        order = {node: index for index, node in enumerate(module.graph.nodes)}
        # A value that nothing reads ends where it is computed.
        last = {node: node for node in order if node.op != "output"}
        last |= {value: user for user, values in self.user_to_last_uses.items() for value in values}
        for tap in taps:
            self._taps.setdefault(tap.node, []).append(tap)
            for value in tap.reads:
                last[value] = max(last[value], tap.node, key=order.__getitem__)
        self.user_to_last_uses = {}
        for value, user in last.items():
            self.user_to_last_uses.setdefault(user, []).append(value)

    def run_node(self, n: Node) -> Any:
        if n in self._replaced:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = self._replaced[n](*args, **kwargs)
        else:
            try:
                value = super().run_node(n)
            except Exception as error:  # operators raise many kinds
                text = str(error).strip().partition("\n")[0]
                raise UsageError(f"the program does not run with these inputs: {n.name}: {text}") from error
        for tap in self._taps.get(n, ()):
            value = tap.see(value, self.env.__getitem__)
        return value


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]"
