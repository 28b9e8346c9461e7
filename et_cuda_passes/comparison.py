"""Where a quantized layer is compared with its float form and with its rewritten form.

A form of a layer is a :class:`~.graph.interpret.Region`: nodes that compute the output of the layer from values of a
run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from et_cuda_passes.graph.aliasing import mutated_operands
from et_cuda_passes.graph.errors import UsageError
from et_cuda_passes.graph.interpret import Region, Runner, Tap
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.outcomes import Candidate
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.report import Report
from et_cuda_passes.quant.activations import is_quantize
from et_cuda_passes.quant.candidates import find_candidates, forwards_weight
from et_cuda_passes.quant.decoders import dequantized_data, is_dequantize
from et_cuda_passes.rules.restore import normalised

aten = torch.ops.aten

FloatWeights = ExportedProgram | Mapping[str, Tensor]
"""The program before its quantization, or its weights by FQN."""


# Rounding -------------------------------------------------------------------------------------------------------------


def rounding_limit(dtypes: Iterable[torch.dtype], fused: int, terms: int) -> float:
    """The smallest ratio of a rewritten layer that rounding explains, in dB.

    Both forms round to the dtype of the activations or of the scales, the coarser of the two. With its unit roundoff u
    (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32), these are the relative errors in the 2-norm, at most:

    - u each for the scale, for the zero, for the output as exported and for the output as rewritten, which the two
      forms may round differently;
    - u for each further operator that was fused, because the exported program rounds its result;
    - sqrt(K) 2^-24 each for two sums of K terms in float32, in different orders.

    They are independent, so their powers add up. With K = 4096 the limit is 42.1 dB in bfloat16, 60.2 in float16 and
    105.4 in float32.

    Args:
        dtypes: those of the activations and of the packed constants.
        fused: the number of further operators that the rewritten operator replaces.
        terms: K, in_features.
    """
    infos = [torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    coarsest = max((info.eps for info in infos), default=torch.finfo(torch.float32).eps) / 2
    double = bool(infos) and all(info.bits == 64 for info in infos)
    summed = torch.finfo(torch.float64 if double else torch.float32).eps / 2
    return -10 * math.log10((4 + fused) * coarsest**2 + 2 * max(terms, 1) * summed**2)


# Layers of the quantized program --------------------------------------------------------------------------------------


class QuantizedProgram:
    """A quantized program with its layers.

    Attributes:
        exported: the program with its weights unwrapped.
        runner: runs it.
        candidates: the operators that read a quantized weight.
    """

    def __init__(self, program: ExportedProgram) -> None:
        if not isinstance(program, ExportedProgram):
            raise TypeError(
                f"accuracy needs a torch.export.ExportedProgram, not {type(program).__name__}; export the model with "
                "torch.export.export(model, args) first"
            )
        self.exported, why = normalised(program)
        self.runner = Runner(self.exported)
        self.candidates: list[Candidate] = find_candidates(self.program, wrapped=why)
        if not self.candidates:
            raise UsageError(
                "the program has no quantized weight that an operator reads, so there is nothing to measure"
            )

    @property
    def program(self) -> Program:
        """The copy of the program whose nodes are measured."""
        return self.runner.program

    def weight_name(self, dequantize: Node) -> str:
        """The FQN of the weight that ``dequantize`` reads."""
        data = dequantized_data(dequantize)
        while data is not None and self.program.fqn(data) is None and data.all_input_nodes:
            data = data.all_input_nodes[0]
        return (data is not None and self.program.fqn(data)) or dequantize.name

    def unmeasurable(self, candidate: Candidate) -> str:
        """Why the output of a candidate cannot be measured; empty if it can."""
        if candidate.node.graph is not self.program.graph:
            return "it is inside control flow, of which only the whole output is measured"
        if not all(is_dequantize(weight) for weight in candidate.weights) or not candidate.weights:
            return candidate.unreachable_reason or "its weight has no dequantize"
        value = candidate.node.meta.get("val")
        return "" if isinstance(value, Tensor) else "its result is not one tensor"


class FloatRun:
    """The quantized program with floating-point weights, without the quantization of activations.

    Attributes:
        program: the float program, or None if only weights are given.
        weights: the floating-point tensor of each dequantize that is replaced.
        missing: why a weight has no floating-point tensor, by FQN.
        replaced: functions that compute the replaced nodes.
        layers: the candidates whose quantized form can be computed from values of the run, each with that form.
    """

    def __init__(self, quantized: QuantizedProgram, floats: FloatWeights) -> None:
        self.quantized = quantized
        self.program = floats if isinstance(floats, ExportedProgram) else None
        self._tensors: Mapping[str, Any] = _tensors(floats) if isinstance(floats, ExportedProgram) else floats
        self._from_left = _left_stored(floats) if isinstance(floats, ExportedProgram) else set()
        self.weights: dict[Node, Tensor] = {}
        self.missing: dict[str, str] = {}
        read = {weight for each in quantized.candidates for weight in each.weights if is_dequantize(weight)}
        for node in sorted(read & set(quantized.program.graph.nodes), key=quantized.program.order.__getitem__):
            name = quantized.weight_name(node)
            found = self._find(name, node)
            if isinstance(found, str):
                self.missing[name] = found
            else:
                self.weights[node] = found
        if not self.weights and read:
            names = [name for name, value in self._tensors.items() if isinstance(value, Tensor)]
            raise UsageError(
                f"no quantized weight has a floating-point one: {next(iter(self.missing.values()), '')}; its weights "
                f"are {', '.join(names[:5]) or 'none'}{', ...' if len(names) > 5 else ''}. Give the program of the "
                "same model before it was quantized"
            )
        self.replaced: dict[Node, Any] = {
            node: lambda *_, node=node, **__: self.float_weight(node) for node in self.weights
        }
        self.replaced |= dict(_activations(quantized.program))
        self.layers: dict[Candidate, Region] = {}
        for candidate in quantized.candidates:
            if not quantized.unmeasurable(candidate) and self.weights.keys() >= set(candidate.weights):
                self.layers[candidate] = self._region(candidate.node)

    def float_weight(self, dequantize: Node) -> Tensor:
        """The floating-point weight in the dtype of the dequantized one."""
        return self.weights[dequantize].detach().to(dequantize.meta["val"].dtype)

    def _find(self, name: str, dequantize: Node) -> Tensor | str:
        """The floating-point tensor for ``dequantize``, or why it has none."""
        tensor = self._tensors.get(name)
        shape = tuple(dequantize.meta["val"].shape)
        if not isinstance(tensor, Tensor):
            return f"the float program has no weight {name}"
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.dtype.is_floating_point:
            return f"{name} of the float program is {type(tensor).__name__} in {tensor.dtype}, not floating-point"
        # A Conv1D of transformers stores [K, N]; the quantized linear that replaces it has [N, K].
        turned = tensor.dim() == 2 and name in self._from_left and not _is_right_operand(dequantize)
        tensor = tensor.t() if turned else tensor
        if tuple(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)} in the float program and {list(shape)} in this one"
        return tensor

    def _region(self, root: Node) -> Region:
        """The quantized form of candidate ``root``: itself, its dequantized weights, and quantized activations."""
        program = self.quantized.program
        found: dict[Node, bool] = {root: True}

        def is_inner(node: Node) -> bool:
            if node not in found:
                moves = forwards_weight(node) and any(map(is_inner, node.all_input_nodes))
                found[node] = node in self.replaced or moves
            return found[node]

        inner, work = {root}, [root]
        while work:
            for source in work.pop().all_input_nodes:
                if source not in inner and is_inner(source):
                    inner.add(source)
                    work.append(source)
        nodes = tuple(sorted(inner, key=program.order.__getitem__))
        return Region(
            nodes, {source: source for node in nodes for source in node.all_input_nodes if source not in inner}
        )

    def run(self, inputs: Sequence[Any], taps: Sequence[Tap] = (), seed: int = 0) -> list[Any]:
        """Run the program with floating-point weights."""
        return self.quantized.runner.run(inputs, taps, self.replaced, seed)


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    return {**program.constants, **program.state_dict}


def _left_stored(program: ExportedProgram) -> set[str]:
    """The weights that a program multiplies as they are stored, [K, N]."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = (node for node in program.graph.find_nodes(op="placeholder") if node.name in names)
    return {names[node.name] for node in nodes if _is_right_operand(node)}


_PRODUCTS: dict[Any, int] = {aten.mm.default: 1, aten.matmul.default: 1, aten.bmm.default: 1, aten.addmm.default: 2}
"""The position of the right operand, which is [K, N]."""


def _is_right_operand(weight: Node) -> bool:
    return any(
        op_of(user) in _PRODUCTS and user.args[_PRODUCTS[op_of(user)] :][:1] == (weight,) for user in weight.users
    )


def _activations(program: Program) -> Iterator[tuple[Node, Any]]:
    """Functions that pass activations through their quantization."""
    for node in program.graph.nodes:
        data = dequantized_data(node)
        if data is not None and is_quantize(data) and all(map(is_dequantize, data.users)):
            dtype = node.meta["val"].dtype
            yield data, lambda x, *_, **__: x
            yield node, lambda x, *_, dtype=dtype, **__: x.to(dtype)


# The rewritten program ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Where a layer of the exported program is compared with its rewritten form.

    Attributes:
        points: nodes of the exported program, each with the rewritten nodes that compute its value.
        limit_db: see :func:`rounding_limit`.
        why: why the layer is not compared; empty if it is.
    """

    points: tuple[tuple[Node, Region], ...] = ()
    limit_db: float = math.nan
    why: str = ""


class RewrittenProgram:
    """The rewritten form of a quantized program, compared with it layer by layer.

    A rewrite gives the name of each operator that it replaces to the replacement. So an activation that both programs
    have by one name is the same value in both. The nodes between such activations, and those that constants alone
    determine, are computed again from values of the exported run.
    """

    def __init__(self, quantized: QuantizedProgram, rewritten: ExportedProgram, report: Report) -> None:
        self.quantized, self.report = quantized, report
        self.runner = Runner(rewritten)
        self._before = {node.name: node for node in quantized.program.graph.nodes}
        self._after = {node.name: node for node in self.runner.program.graph.nodes}
        self._varying = _varying(self.runner.program)
        statuses = {outcome.node: outcome.status for outcome in report.outcomes}
        self.comparisons = {
            each: self._compared(each, statuses.get(each.name or each.node.name, "missed"))
            for each in quantized.candidates
        }

    def _counterpart(self, node: Node) -> Node | None:
        """The node of the rewritten program with the value of ``node``; None if it has no such node."""
        other = self._after.get(node.name)
        if other is None or other.op != node.op:
            return None
        stands_for = any(source.name == node.name for source in other.meta.get("from_node", ()))
        return other if op_of(other) is op_of(node) or stands_for else None

    def _is_shared(self, node: Node) -> bool:
        """Whether the value of rewritten ``node`` can be read in the exported run."""
        before = self._before.get(node.name)
        return before is not None and self._counterpart(before) is node and self._is_read(node)

    def _is_read(self, node: Node) -> bool:
        return node.op == "placeholder" or node in self._varying

    def _compared(self, candidate: Candidate, status: str) -> Comparison:
        if candidate.node.graph is not self.quantized.program.graph:
            return Comparison(why="it is inside control flow, of which only the whole output is measured")
        points, gone = self._points(candidate.node)
        if not points:
            return Comparison(why="nothing that the rewritten program computes depends on it")
        found: list[tuple[Node, Region]] = []
        for point in points:
            region = self._region(cast(Node, self._counterpart(point)))
            if isinstance(region, str):
                return Comparison(why=region)
            if not all(map(self._is_unchanged, region.nodes)):
                found.append((point, region))
        if not found:
            return Comparison(why=f"{status}, so it is as exported")
        nodes = [candidate.node, *gone, *(node for _, region in found for node in region.nodes)]
        values = [node.meta.get("val") for node in nodes]
        held = [tensor for _, region in found for tensor in region.constants.values()]
        dtypes = {value.dtype for value in (*values, *held) if isinstance(value, Tensor)}
        terms = max((weight.meta["val"].shape[-1] for weight in candidate.weights if "val" in weight.meta), default=1)
        return Comparison(tuple(found), rounding_limit(dtypes, max(0, len(gone) - 1 + len(points)), int(terms)))

    def _points(self, node: Node) -> tuple[list[Node], list[Node]]:
        """The first nodes from ``node`` on that both programs have, and the nodes before them that are gone."""
        points: dict[Node, None] = {}
        gone: dict[Node, None] = {}
        work = [node]
        while work:
            here = work.pop()
            if self._counterpart(here) is not None and isinstance(here.meta.get("val"), Tensor):
                points[here] = None
            elif here not in gone:
                gone[here] = None
                work.extend(here.users)
        return sorted(points, key=self.quantized.program.order.__getitem__), list(gone)

    def _region(self, root: Node) -> Region | str:
        """The rewritten nodes that compute ``root`` from shared values, or why they cannot be computed again."""
        program = self.runner.program
        inner: dict[Node, None] = {root: None}
        reads: dict[Node, Node] = {}
        constants: dict[Node, Tensor] = {}
        work = [root]
        while work:
            node = work.pop()
            if mutated_operands(node):
                return f"its rewritten form mutates a value ({node.name})"
            for source in node.all_input_nodes:
                if source in inner or source in reads or source in constants:
                    continue
                if self._is_shared(source):
                    reads[source] = self._before[source.name]
                elif source.op == "call_function":
                    inner[source] = None
                    work.append(source)
                elif (tensor := program.constant(source)) is not None:
                    constants[source] = tensor
                else:
                    return f"its rewritten form reads {source.name}, which is neither a value nor a constant"
        return Region(tuple(sorted(inner, key=program.order.__getitem__)), reads, constants)

    def _is_unchanged(self, node: Node) -> bool:
        """Whether the exported program has the same operator with the same operands."""
        before = self._before.get(node.name)
        if before is None or op_of(before) is not op_of(node):
            return False
        return [each.name for each in before.all_input_nodes] == [each.name for each in node.all_input_nodes]


def _varying(program: Program) -> set[Node]:
    """The nodes whose values depend on the inputs of the program, or on memory that it mutates."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            varies = program.constant(node) is None or node in program.mutated
        else:
            varies = node in program.mutated or not found.isdisjoint(node.all_input_nodes)
        if varies:
            found.add(node)
    return found
