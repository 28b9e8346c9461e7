"""A private copy of an ExportedProgram that can be changed without a retrace.

Everything here is linear in the size of the graph. The signature is read once, and written once by
:meth:`Program.to_exported`.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.aliasing import all_mutated_nodes
from et_cuda_passes.graph.constants import (
    ConstantCache,
    Planned,
    check_name,
    module_names,
    strip_parametrization,
    tensor_identity,
)
from et_cuda_passes.graph.errors import NameTaken, Unmet
from et_cuda_passes.graph.module_calls import boundary_nodes, preserved_modules_of, rename_in_signatures
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, Target, op_of
from et_cuda_passes.graph.subgraphs import Subgraphs

_T = TypeVar("_T")
_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class _Raises:
    """In place of a memoized value: the function raises ``Unmet`` with this text."""

    text: str


NodeKeys = set[tuple[str, Target]]
"""Nodes by their paths and their operators."""


class Program:
    """A copy of an exported program that can be changed. The original does not change; the two share tensors."""

    def __init__(self, exported: ExportedProgram, pool: ConstantCache | None = None) -> None:
        self._source = exported
        self.pool = pool or ConstantCache()
        self.is_edge = exported.dialect == "EDGE"
        self._root, self.graph = copy_graph(exported)
        self._meta = dict(exported.graph_module.meta)
        self.state_dict: dict[str, Any] = dict(exported.state_dict)
        self.constants: dict[str, Any] = dict(exported.constants)
        self._specs = {spec.arg.name: spec for spec in copy.deepcopy(exported.graph_signature.input_specs)}
        self._outputs = list(copy.deepcopy(exported.graph_signature.output_specs))
        self._updated = {spec.target for spec in self._outputs} - {None}
        self._derived: dict[tuple[Any, Node], Any] = {}
        self.dead: dict[Node, None] = {}
        """Nodes to erase unless something still reads them."""
        self.added: dict[str, Node] = {}
        """The placeholders of new constants, by FQN."""
        self._fqns: dict[str, str | None] = {}
        """The FQN of the weight to which each of them belongs."""
        self._planned: set[str] = set()
        """The FQNs of constants that are not computed yet."""
        self._modules = module_names([*self.state_dict, *self.constants])
        self.kept: set[Node] = set()
        """Nodes that a rule keeps as they are."""
        self.kept_operands: set[Node] = set()
        """Shared nodes of kept matches: kept nodes go on reading them if they are replaced."""
        self.replaced: dict[Node, Node] = {}
        """The replacement of each replaced node, in the order of the replacements."""
        self.dropped: list[Any] = []
        """The tensors of removed constants."""
        self._renamed: dict[str, str] = {}
        self.refresh()
        self._first_name: dict[Hashable, str] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            if (held := self.held(node)) is not None and (target := self.fqn_key(node)) is not None:
                self._first_name.setdefault(tensor_identity(held), target)

    def as_graph_module(self) -> GraphModule:
        """The program as a GraphModule for a callable pass; :meth:`replace_graph` reads the result of the pass."""
        self._inputs = [node.name for node in self.graph.find_nodes(op="placeholder")]
        self.subgraphs.recompile()
        module = GraphModule(self._root, self.graph)
        module.meta.update(self._meta)
        return module

    def refresh(self) -> None:
        """Compute again what depends on the graph, after anything but a ``Builder`` changed it."""
        self._derived.clear()
        self.subgraphs = Subgraphs(self._root, self.graph)
        """The program's graph and the subgraphs of its control flow."""
        self.boundary_nodes = boundary_nodes(self.graph, self._source.module_call_graph, self._renamed)
        nodes = list(self.subgraphs.nodes())
        self.order: dict[Node, int] = {node: position for position, node in enumerate(nodes)}
        """The position of every node, those of subgraphs included."""
        self.calls: dict[Target, list[Node]] = defaultdict(list)
        """The nodes that call each operator, in graph order."""
        for node in nodes:
            self.calls[op_of(node)].append(node)
        updated = filter(self.is_mutated_buffer, self.graph.find_nodes(op="placeholder"))
        self.mutated = all_mutated_nodes(nodes, updated, self.held, self.subgraphs.views)
        self.fake_mode = next(
            (n.meta["val"].fake_mode for n in nodes if isinstance(n.meta.get("val"), FakeTensor)), None
        ) or FakeTensorMode(allow_non_fake_inputs=True)

    def memoize(self, function: Callable[["Program", Node], _T], node: Node) -> _T:
        """``function(self, node)``, computed once until the graph changes.

        An ``Unmet`` that the function raises is remembered by its text, and raised as a new exception each time: one
        exception object would collect the traceback of every raise.
        """
        key = (function, node)
        if key not in self._derived:
            try:
                self._derived[key] = function(self, node)
            except Unmet as unmet:
                self._derived[key] = _Raises(str(unmet))
                raise
        value = self._derived[key]
        if isinstance(value, _Raises):
            raise Unmet(value.text)
        return cast(_T, value)

    # Reading ---------------------------------------------------------------------------------------------------------

    def resolve(self, node: Node) -> Node:
        """The node that ``node`` stands for: for the placeholder of a subgraph, the captured operand."""
        while (operand := self.subgraphs.captured_operand(node)) is not None:
            node = self.replacement_of(operand)
        return node

    def fqn_key(self, node: Node) -> str | None:
        """The name of constant ``node`` in the signature; None if it is not a constant."""
        node = self.resolve(node)
        spec = self._specs.get(node.name) if node.graph is self.graph else None
        return spec.target if spec is not None and spec.kind in _CONSTANT_KINDS else None

    def held(self, node: Node) -> torch.Tensor | None:
        """The tensor of ``node`` if it is a parameter, buffer, lifted constant, or inner tensor of one; else None.

        That of a constant that is only planned holds no values: it is on the meta device.
        """
        node = self.resolve(node)
        if op_of(node) is ACCESS_SUBCLASS_TENSOR:
            whole = self.held(cast(Node, node.args[0]))
            return None if whole is None else cast(torch.Tensor, getattr(whole, cast(str, node.args[1])))
        target = self.fqn_key(node)
        if node.op != "placeholder" or target is None:
            return None
        value = self.state_dict.get(target, self.constants.get(target))
        return value if isinstance(value, torch.Tensor) else None

    def constant(self, node: Node) -> torch.Tensor | None:
        """:meth:`held` with its values: a constant that is only planned is computed."""
        tensor = self.held(node)
        if tensor is not None and (name := self.fqn_key(node)) in self._planned:
            assert name is not None
            self.compute([name])
            return cast(torch.Tensor, self.state_dict[name])
        return tensor

    def plan(self, node: Node) -> Planned | None:
        """The plan of constant ``node``, if a rule of this rewrite or of another method planned it."""
        name = self.fqn_key(node)
        return self.pool.plan(name) if name in self.added else None

    def release(self, exported: ExportedProgram) -> None:
        """Remove the constants of ``exported`` that this program no longer has, so that they can be freed."""
        for table in (exported.state_dict, exported.constants):
            for name in [name for name in table if name not in self.state_dict and name not in self.constants]:
                del table[name]

    def compute(self, names: Iterable[str]) -> None:
        """Compute the planned constants with these names."""
        for name, tensor in self.pool.tensors(names).items():
            self.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False)
            self._planned.discard(name)

    def fqn(self, node: Node) -> str | None:
        """The FQN of the weight to which a constant belongs, the same in every form of the weight.

        ``l.weight`` for the inner tensors of a subclass parameter ``l.weight``, and for the decomposed
        ``l.parametrizations.weight.original0``. A tied weight has its first name. A constant that a rule added belongs
        to the weight of its first source.
        """
        held, target = self.held(node := self._owner(node)), self.fqn_key(node)
        if held is None or target is None:
            return None
        return self._fqns.get(target) or strip_parametrization(self._first_name.get(tensor_identity(held), target))

    def drawn_fqn(self, node: Node) -> str | None:
        """:meth:`fqn`, but a constant that a rule added has its own."""
        return key if (key := self.fqn_key(node)) in self.added else self.fqn(node)

    def is_buffer(self, node: Node) -> bool:
        """Whether constant ``node`` is a buffer, rather than a parameter or a lifted constant."""
        spec = self._specs.get(self.resolve(node).name)
        return spec is not None and spec.kind == InputKind.BUFFER

    def is_mutated_buffer(self, node: Node) -> bool:
        """Whether the program updates constant ``node``, by its signature."""
        return self.fqn_key(node) in self._updated

    def preserved_modules_of(self, node: Node) -> tuple[str, ...]:
        """See :func:`~et_cuda_passes.graph.module_calls.preserved_modules_of`."""
        return preserved_modules_of(node, self._source.module_call_graph)

    def is_mutated(self, node: Node) -> bool:
        """Whether the memory of constant ``node`` changes while the program runs."""
        return self._owner(node) in self.mutated

    def _owner(self, node: Node) -> Node:
        """The placeholder, outside of subgraphs, of constant ``node`` or of the subclass that contains it."""
        while op_of(node := self.resolve(node)) is ACCESS_SUBCLASS_TENSOR:
            node = cast(Node, node.args[0])
        return node

    # Changing --------------------------------------------------------------------------------------------------------

    def add_constant(
        self,
        fqn: str,
        sources: Iterable[Node],
        layout: Hashable,
        make: Callable[[], torch.Tensor] | Planned,
        graph: Graph,
    ) -> Node:
        """A parameter that holds ``make()``, or the existing one with equal sources and layout.

        Args:
            fqn: the name of the new parameter, which extends that of the original (``<fqn>.packed``).
            sources: the constants from which it is computed.
            layout: distinguishes constants with the same sources; equal layouts must mean equal results.
            make: computes the tensor, or is its plan: then it is computed when the program is finished.
            graph: the graph that reads it, the program's own or a subgraph.

        Returns:
            The placeholder in ``graph``, with a fake value in ``meta["val"]``.

        Raises:
            ValueError: no module can hold a constant with this FQN beside the program's others.
        """
        nodes = tuple(sources)
        if fqn not in self.added:
            check_name(fqn, self._modules, self.added)
        name, value = self.pool.get(fqn, tuple(map(self._source_of, nodes)), layout, make)
        if name not in self.added:
            self._fqns[name] = self.fqn(nodes[0])
            self.added[name] = self._placeholder_of(name, value, nodes[0])
            self._modules |= module_names([name])
        return self.subgraphs.thread_through(self.added[name], graph)

    def _source_of(self, node: Node) -> torch.Tensor | str | None:
        """The tensor of constant ``node``, or its FQN if a rule created it: it may be only planned."""
        name = self.fqn_key(node)
        return name if name in self.added else self.constant(node)

    def _placeholder_of(self, name: str, value: torch.Tensor | Planned, source: Node) -> Node:
        held_already, tensor = self.state_dict.get(name), value if isinstance(value, torch.Tensor) else None
        if tensor is not None and held_already is not None and held_already.data_ptr() == tensor.data_ptr():
            # An earlier rewrite with the same cache added it.
            there = (node for node in self.graph.find_nodes(op="placeholder") if self.fqn_key(node) == name)
            return cast(Node, next(there))
        if name in self.state_dict or name in self.constants:
            raise NameTaken(f"the program already has a constant named {name!r}; rename it before the rewrite")
        if isinstance(value, torch.Tensor):
            return self.insert_parameter(name, value, self._owner(source))
        self._planned.add(name)
        tensor = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return self.insert_parameter(name, tensor, self._owner(source), value.device)

    def insert_parameter(
        self, name: str, tensor: torch.Tensor, before: Node, device: torch.device | None = None
    ) -> Node:
        """The placeholder of a new parameter ``name`` that holds ``tensor``, before placeholder ``before``.

        ``device`` is that of its value in the graph, by default the tensor's.
        """
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        with self.graph.inserting_before(before):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        # The verifier requires that target and name are equal, and the graph may have changed the name.
        node.target = node.name
        form = (tensor.shape, tensor.stride())
        with self.fake_mode:
            node.meta["val"] = torch.empty_strided(*form, dtype=tensor.dtype, device=device or tensor.device)
        self._specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
        self.state_dict[name] = parameter
        return node

    def rename_constant(self, node: Node, name: str) -> None:
        """Give constant ``node`` another name."""
        spec = self._specs[node.name]
        for table in (self.state_dict, self.constants):
            if spec.target in table:
                table[name] = table.pop(spec.target)
        spec.target = name

    def replace(self, old: Node, new: Node) -> None:
        """Make every reader of ``old`` read ``new``, except a reader that is kept together with ``old``."""
        leave = self.kept if old in self.kept_operands else set()
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in leave and user is not new)
        self.replaced[old] = new

    def replacement_of(self, node: Node) -> Node:
        """The node that now stands for ``node``. A rule finds all its matches before it rewrites the first."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def mark_dead(self, nodes: Iterable[Node]) -> None:
        """Mark ``nodes`` as dead: :func:`.finish.eliminate_dead_nodes` erases those that nothing reads."""
        self.dead.update(dict.fromkeys(nodes))

    def transfer_name(self, gone: Node) -> None:
        """Give the name of ``gone`` to its replacement: signatures of preserved modules, and people, refer to it."""
        new = self.replaced.get(gone)
        if new is None:
            return
        if new.op == "call_function" and new.name not in self._renamed.values():
            new.name = gone.name
        elif gone.graph is self.graph:
            self._renamed[gone.name] = new.name

    def remove_constant(self, node: Node) -> None:
        """Remove constant ``node`` and its tensor from the program; the caller erases the node."""
        target = cast(str, self._specs.pop(node.name).target)
        self.added.pop(target, None)
        self._planned.discard(target)
        self.dropped += [table.pop(target) for table in (self.state_dict, self.constants) if target in table]

    def replace_graph(self, module: GraphModule, name: str) -> None:
        """Continue with the graph that pass ``name`` returned, with the same inputs and number of outputs.

        Raises:
            ValueError: the pass added, removed, renamed or moved inputs, or changed the number of outputs.
        """
        kept, kept_inputs = self.node_keys()
        self._root, self.graph, self._meta = module, module.graph, module.meta
        before, after = list(self._inputs), [node.name for node in self.graph.nodes if node.op == "placeholder"]
        if before != after:
            changed = ", ".join(sorted(set(before) ^ set(after))) or "their order"
            raise ValueError(
                f"pass {name} changed the program's inputs ({changed}); a pass that adds or removes constants must be "
                "an ExecuTorch ExportedProgramPassBase, which can change the signature"
            )
        if len(cast(tuple[Any, ...], self.graph.output_node().args[0])) != len(self._outputs):
            raise ValueError(f"pass {name} changed the number of the program's outputs")
        self.refresh()
        nodes = ((self.fqn_key(n), n) for n in self.graph.find_nodes(op="placeholder"))
        self.added = {target: node for target, node in nodes if target in self.added}
        self.restore_kept(kept, kept_inputs)

    def node_keys(self) -> tuple[NodeKeys, NodeKeys]:
        """The keys of the kept nodes and of their operands, for :meth:`restore_kept`."""
        return node_keys(self.kept, self.subgraphs), node_keys(self.kept_operands, self.subgraphs)

    def restore_kept(self, kept: NodeKeys, inputs: NodeKeys) -> None:
        """Keep the nodes with these keys: a pass may have copied the kept nodes of an earlier graph."""
        self.kept, self.kept_operands = find_nodes(kept, self.subgraphs), find_nodes(inputs, self.subgraphs)

    def to_exported(self) -> ExportedProgram:
        """The program with its signature updated. torch lints the graph and runs the dialect's verifier."""
        if self.pool.stream is not None:
            # From here on only the plans hold what they are computed from.
            self.dropped.clear()
            self._derived.clear()
            self.pool.forget_plans(self._planned)
            self.release(self._source)
        self.compute(sorted(self._planned))
        self.subgraphs.recompile()
        values = self.graph.output_node().args[0]
        for spec, value in zip(self._outputs, cast(Iterable[Any], values), strict=True):
            if isinstance(value, Node) and not isinstance(spec.arg, ConstantArgument):
                spec.arg.name = value.name
        source, inputs = self._source, self.graph.find_nodes(op="placeholder")
        signature = ExportGraphSignature([self._specs[node.name] for node in inputs], self._outputs)
        program = ExportedProgram(
            root=self._root,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state_dict,
            range_constraints=copy.copy(source.range_constraints),
            module_call_graph=rename_in_signatures(source.module_call_graph, self._renamed),
            example_inputs=source.example_inputs,
            constants=self.constants,
            verifiers=source.verifiers,
        )
        program.graph_module.meta.update(self._meta)
        return program


def constants_read(program: Program, node: Node) -> Iterator[Node]:
    """The placeholders of the constants that ``node`` reads itself or past operators of one operand."""
    for operand in node.all_input_nodes:
        source = program.resolve(operand)
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = program.resolve(source.all_input_nodes[0])
        if program.held(source) is not None:
            yield source


def copy_graph(exported: ExportedProgram) -> tuple[torch.nn.Module, Graph]:
    """Copies of the modules of subgraphs and of the graph; tensors are shared.

    The values in ``node.meta`` get a shape environment of their own: a guard on a dynamic size of the copy does not
    change the original program.
    """
    tensors = {id(tensor): tensor for tensor in (*exported.state_dict.values(), *exported.constants.values())}
    root = torch.nn.Module()
    for name, child in exported.graph_module.named_children():
        root.add_module(name, copy.deepcopy(child, tensors))
    graph = Graph()
    ours: dict[Node, Node] = {}
    graph.output(graph.graph_copy(exported.graph, ours)).meta.update(exported.graph.output_node().meta)
    for old, new in ours.items():
        # The copy renames nodes with the name of a Python builtin, such as `input`. The signature has the old names.
        new.name = old.name
    shapes = _PrivateShapes()
    for each in (graph, *(module.graph for module in root.modules() if isinstance(module, GraphModule))):
        for node in each.nodes:
            for key in _VALUES & node.meta.keys():
                node.meta[key] = shapes.move(node.meta[key])
    return root, graph


_VALUES = {"val", "tensor_meta", "example_value"}
"""The entries of ``node.meta`` that hold sizes."""


class _PrivateShapes:
    """Copies values, so that they refer to copies of their fake mode and of its shape environment."""

    def __init__(self) -> None:
        self._environments: dict[ShapeEnv, ShapeEnv] = {}
        self._modes: dict[FakeTensorMode, FakeTensorMode] = {}
        self._moved: dict[int, tuple[Any, Any]] = {}
        """By the id of a tensor: the tensor, which must stay alive so that its id stays unique, and its copy."""

    def move(self, value: Any) -> Any:
        """``value``, or a copy if its environment has symbols; containers are copied."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._moved:
                self._moved[id(value)] = (value, self._tensor(value))
            return self._moved[id(value)][1]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._number(value)
        if isinstance(value, torch.Size):
            return torch.Size(map(self.move, value))
        return value if pytree.tree_is_leaf(value) else pytree.tree_map(self.move, value)

    def _number(self, number: Any) -> Any:
        node = number.node
        environment = getattr(node, "shape_env", None)
        if environment is None:
            return number
        return type(number)(SymNode(node.expr, self._environment(environment), node.pytype, node._hint, node.constant))

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return self._fake(tensor)
        if not is_traceable_wrapper_subclass(tensor):
            return tensor
        attributes, context = tensor.__tensor_flatten__()
        parts = {name: self.move(getattr(tensor, name)) for name in attributes}
        if all(part is getattr(tensor, name) for name, part in parts.items()):
            return tensor
        sizes, strides = map(self.move, tensor.shape), map(self.move, tensor.stride())
        return type(tensor).__tensor_unflatten__(parts, context, torch.Size(sizes), tuple(strides))

    def _fake(self, tensor: FakeTensor) -> torch.Tensor:
        old = tensor.fake_mode
        if old.shape_env is None or not old.shape_env.var_to_range or tensor.layout is not torch.strided:
            return tensor  # without symbols there is nothing to guard on
        if old not in self._modes:
            self._modes[old] = FakeTensorMode(
                allow_fallback_kernels=old.allow_fallback_kernels,
                allow_non_fake_inputs=old.allow_non_fake_inputs,
                shape_env=self._environment(old.shape_env),
                static_shapes=old.static_shapes,
            )
        sizes, strides, offset = (self.move(form) for form in (tensor.shape, tensor.stride(), tensor.storage_offset()))
        with self._modes[old]:
            new = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
            if not isinstance(offset, int) or offset:
                new = new.as_strided(sizes, strides, offset)
        assert isinstance(new, FakeTensor)
        new.constant = tensor.constant
        return new.requires_grad_(tensor.requires_grad)

    def _environment(self, old: ShapeEnv) -> ShapeEnv:
        if old not in self._environments:
            new = copy.copy(old)
            for name, value in vars(old).items():
                if isinstance(value, dict):
                    value = copy.copy(value)
                    value.update((key, list(item)) for key, item in value.items() if isinstance(item, list))
                    setattr(new, name, value)
                elif isinstance(value, (list, set)):
                    setattr(new, name, copy.copy(value))
            new.fake_tensor_cache = {}  # its values refer to the old environment
            self._environments[old] = new
        return self._environments[old]


def node_keys(nodes: Iterable[Node], subgraphs: Subgraphs) -> NodeKeys:
    """Keys by which :func:`find_nodes` finds ``nodes`` in another copy of their program."""
    return {(subgraphs.path(node), node.target) for node in nodes}


def find_nodes(wanted: NodeKeys, subgraphs: Subgraphs) -> set[Node]:
    """The nodes with the keys ``wanted``; a key without a node is left out."""
    return {node for node in subgraphs.nodes() if (subgraphs.path(node), node.target) in wanted} if wanted else set()


@contextmanager
def forbid_new_guards(program: Program, who: str) -> Iterator[None]:
    """Refuse comparisons of dynamic sizes in Python: torch would assume their result for every run, as a guard.

    Raises:
        ValueError: there was one; ``who`` names the code.
    """
    shapes = program.fake_mode.shape_env
    known = 0 if shapes is None else len(shapes.guards)
    yield
    if shapes is not None and len(shapes.guards) > known:
        expression = shapes.guards[-1].expr
        raise ValueError(
            f"{who} holds only if {expression}, which depends on the program's dynamic shapes; call "
            "torch.fx.experimental.symbolic_shapes.statically_known_true(...) instead of comparing in Python"
        )
