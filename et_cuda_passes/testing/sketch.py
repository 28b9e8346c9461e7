"""Exported programs written node by node: no module, no trace, and forms that no trace gives."""

from typing import Any

import torch
import torchao.quantization.quant_primitives  # noqa: F401  (registers dequantize_affine)
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.utils import _pytree as pytree

DEQUANTIZE = torch.ops.torchao.dequantize_affine.default


class Sketch:
    """A builder of an exported program: inputs, constants and calls, all with fake values."""

    def __init__(self) -> None:
        self.graph = torch.fx.Graph()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.state: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self._held: list[tuple[Node, InputSpec]] = []
        self._inputs: list[tuple[Node, InputSpec]] = []

    def _placeholder(self, name: str, value: torch.Tensor) -> Node:
        before = next((n for n in self.graph.nodes if n.op != "placeholder"), self.graph._root)
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(name)
        node.target = node.name
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        """A user input."""
        node = self._placeholder(name, torch.empty(shape, dtype=dtype))
        self._inputs.append((node, InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)))
        return node

    def parameter(self, fqn: str, value: torch.Tensor) -> Node:
        """A parameter holding ``value``."""
        node = self._placeholder("p_" + fqn.replace(".", "_"), value)
        self.state[fqn] = torch.nn.Parameter(value, requires_grad=False)
        self._held.append((node, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), fqn)))
        return node

    def buffer(self, fqn: str, value: torch.Tensor) -> Node:
        """A persistent buffer holding ``value``."""
        node = self._placeholder("b_" + fqn.replace(".", "_"), value)
        self.state[fqn] = value
        self._held.append((node, InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True)))
        return node

    def constant(self, name: str, value: torch.Tensor) -> Node:
        """A lifted tensor constant holding ``value``."""
        node = self._placeholder("c_" + name, value)
        self.constants[name] = value
        self._held.append((node, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name)))
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of ``target``."""
        node = self.graph.call_function(target, args, kwargs)
        concrete, named = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*concrete, **named)
        return node

    def raw(self, target: Any, *args: Any, val: torch.Tensor, **kwargs: Any) -> Node:
        """A call that the operator itself would reject; ``val`` is its value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.mode.from_tensor(val, static_shapes=True)
        return node

    def weight(
        self, fqn: str, n: int = 16, k: int = 64, group: int = 32, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> Node:
        """A dequantized int4 weight [n, k] in ``dtype``; the constants are ``fqn.data``, ``.scale`` and ``.zero``."""
        random = torch.Generator().manual_seed(seed)
        data = self.buffer(f"{fqn}.data", torch.randint(-8, 8, (n, k), generator=random, dtype=torch.int8))
        scale = self.buffer(f"{fqn}.scale", (torch.rand(n, k // group, generator=random) * 0.02 + 0.005).to(dtype))
        zero = self.buffer(f"{fqn}.zero", torch.randint(-8, 8, (n, k // group), generator=random, dtype=torch.int8))
        return self.call(DEQUANTIZE, data, [1, group], scale, zero, torch.int8, -8, 7, dtype)

    def program(
        self, *outputs: Node, writes: dict[str, Node] | None = None, verifiers: Any = (TrainingIRVerifier,)
    ) -> ExportedProgram:
        """The program that returns ``outputs``, a single one without a tuple.

        ``writes`` maps a buffer's FQN to its new value. ``verifiers`` are those of the dialect, by default that of
        ``torch.export.export``, which allows mutation in place.
        """
        written = writes or {}
        held, inputs = list(self._held), list(self._inputs)
        by_node = dict([*held, *inputs])
        for node in outputs:
            node.meta.setdefault("stack_trace", f'  File "model.py", line 7, in forward\n    y = f({node.name})\n')
        self.graph.output((*written.values(), *outputs))
        # Placeholders have the order of the signature: constants, then user inputs.
        for node, _ in [*held, *inputs]:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            first.prepend(node)
        specs = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), fqn) for fqn, n in written.items()]
        specs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        in_spec = pytree.tree_structure(((0,) * len(inputs), {}))
        out_spec = pytree.tree_structure(0 if len(outputs) == 1 else (0,) * len(outputs))
        entry = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec, [n.name for n, _ in inputs]))
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature([by_node[n] for n in placeholders], specs),
            state_dict=self.state,
            range_constraints={},
            module_call_graph=[entry],
            example_inputs=(tuple(torch.randn(n.meta["val"].shape).to(n.meta["val"].dtype) for n, _ in inputs), {}),
            constants=self.constants,
            verifiers=list(verifiers),
        )
