"""Quantized weights in forms that no rule matches, with the reason and the scheme to use instead.

Three forms occur. A weight stays wrapped in a tensor subclass. The program computes with a narrow weight itself, with
no dequantize. The dequantize was decomposed before the rewrite.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from et_cuda_passes.graph.finish import finish_program
from et_cuda_passes.graph.operators import ACCESS_SUBCLASS_TENSOR, op_of
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.subgraphs import Subgraphs

aten = torch.ops.aten


@dataclass(frozen=True)
class SuggestedSchemes:
    """The schemes whose weights a target can rewrite, as a user of torchao writes them.

    Attributes:
        four_bits: the scheme for a weight of up to 4 bits an element.
        eight_bits: the scheme for a wider weight.
        table: the scheme for the table of an embedding, if it is another one.
    """

    four_bits: str = "IntxWeightOnlyConfig(torch.int4, PerGroup(32))"
    eight_bits: str = "IntxWeightOnlyConfig(torch.int8, PerAxis(0))"
    table: str = ""

    def for_bits(self, bits: int) -> str:
        """The scheme nearest to a weight of ``bits`` bits an element."""
        return self.four_bits if bits <= 4 else self.eight_bits


# Wrapped: a tensor subclass whose dequantize is not yet in the graph -------------------------------------------------


def wrapped_weights(exported: ExportedProgram) -> dict[str, Any]:
    """Parameters, buffers and constants of a tensor subclass that an operator reads whole, by FQN, in graph order."""
    signature = exported.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**exported.constants, **exported.state_dict}
    found = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        value = held.get(targets.get(node.name, ""))
        whole = isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)
        if whole and any(op_of(user) is not ACCESS_SUBCLASS_TENSOR for user in node.users):
            found[targets[node.name]] = value
    return found


def unwrapped(exported: ExportedProgram) -> tuple[ExportedProgram, str]:
    """The program with its wrapped weights unwrapped: their parts and their dequantize stand in the graph.

    ``run_decompositions({})`` unwraps most subclasses. Before torch 2.14 it fails for torchao's ``NVFP4Tensor``,
    since it does not find the constants that the subclass's dequantize creates.

    Returns:
        The program, unchanged if it has no wrapped weights or they could not be unwrapped; and the reason of the
        latter, empty otherwise.
    """
    weights = wrapped_weights(exported)
    if not weights:
        return exported, ""
    try:
        # On a copy: a retrace may add guards to the shape environment of the program.
        program = finish_program(Program(exported)).run_decompositions({})
    except Exception as error:  # tracing runs the subclass's own code, which may raise anything
        why = str(error).partition("\n")[0].rstrip(".")
    else:
        if not wrapped_weights(program):
            return program, ""
        why = "they stay wrapped"
    kinds = sorted({type(weight).__name__ for weight in weights.values()})
    # run_decompositions unwraps all weights or none, and does not say which weight failed.
    return exported, why if len(kinds) == 1 else f"{why}; {', '.join(kinds)} stand in one program"


def is_wrapped(value: torch.Tensor | None) -> bool:
    """Whether ``value`` is a tensor subclass that consists of other tensors."""
    return value is not None and is_traceable_wrapper_subclass(value)


def bits_of(weight: Any) -> int:
    """Bits an element of a tensor subclass's weight, computed from the largest of its parts."""
    parts: list[torch.Tensor] = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    stored = max(part.numel() * part.element_size() for part in parts)
    return 8 * stored // max(1, int(weight.numel()))


def wrapped_reason(weight: Any, why: str, schemes: SuggestedSchemes) -> str:
    """The reason of a miss for a wrapped weight: its subclass, ``why`` it stays wrapped, and the fix."""
    bits = bits_of(weight)
    return (
        f"its weight is {type(weight).__name__}, {bits} bits an element, and run_decompositions({{}}) does not unwrap "
        f"it ({why}): quantize with {schemes.for_bits(bits)}"
    )


# Narrow: the program computes with the weight itself -----------------------------------------------------------------

# torchao's Float8WeightOnlyConfig and Int8WeightOnlyConfig export a conversion and a product. With quantized
# activations (Float8DynamicActivationFloat8WeightConfig, Int8DynamicActivationInt8WeightConfig, MX formats) the product
# reads the narrow numbers themselves.

_CONVERSIONS = frozenset({aten.to.dtype, aten._to_copy.default})
NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2)
"""The dtypes of quantized numbers."""
_MOVE_OPS = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.slice.Tensor,
        aten.clone.default,
        aten.detach.default,
    }
)
PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.matmul.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.convolution.default,
    }
)
"""Readers of a weight. A table or a mask of bytes has other readers."""
_NARROW_PRODUCTS = frozenset({aten._int_mm.default, aten._scaled_mm.default, aten._scaled_mm_v2.default})
_DEQUANTIZE_STEPS = frozenset({aten.sub.Tensor, aten.mul.Tensor})
"""Steps of a decomposed dequantize after the conversion."""


def converted_weight(program: Program, node: Node) -> Node | None:
    """The narrow constant that ``node`` converts to floating point, moved or not; None for any other node."""
    if op_of(node) not in _CONVERSIONS:
        return None
    value, source = node.meta.get("val"), _unmoved(node.args[0])
    held = program.constant(source) if source is not None else None
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1
    narrow = held is not None and held.dim() > 1 and held.dtype in NARROW
    if held is not None and held.dtype.itemsize == 1 and not held.dtype.is_floating_point:
        # Integers that are scaled next are a decomposed dequantize: the report warns about it elsewhere.
        narrow = narrow and all(op_of(user) not in _DEQUANTIZE_STEPS for user in node.users)
    return source if floating and narrow else None


def multiplied_weight(program: Program, node: Node) -> Node | None:
    """The narrow constant that ``node`` multiplies without a conversion, moved or not; None for any other node."""
    if op_of(node) not in _NARROW_PRODUCTS:
        return None
    for source in map(_unmoved, node.args[:2]):
        held = program.constant(source) if source is not None else None
        if held is not None and held.dtype in NARROW:
            return source
    return None


def _unmoved(source: object) -> Node | None:
    """The node that ``source`` moves, or ``source`` if it moves none; None if that is no node."""
    while isinstance(source, Node) and op_of(source) in _MOVE_OPS:
        source = source.args[0]
    return source if isinstance(source, Node) else None


def unsupported_reason(program: Program, weight: Node, how: str, elements: int, schemes: SuggestedSchemes) -> str:
    """The reason of a miss for a narrow weight, and the fix.

    Args:
        program: the program.
        weight: the narrow constant.
        how: what the program does with it: "converted", or "multiplied as it is".
        elements: the number of elements of the weight before packing.
        schemes: the schemes of the target.
    """
    held = program.constant(weight)
    assert held is not None
    kind, bits = str(held.dtype).removeprefix("torch."), 4 if held.dtype is torch.float4_e2m1fn_x2 else 8
    whole = program.constant(weight.args[0]) if op_of(weight) is ACCESS_SUBCLASS_TENSOR else None  # type: ignore[arg-type]
    if whole is not None and bits_of(whole) < bits:
        # The program converts the scales of a narrower weight.
        kind, bits = type(whole).__name__, bits_of(whole)
    elif held.numel() * 8 // bits < elements:
        largest = _largest_part(program, weight)
        bits = 8 * largest.numel() * largest.element_size() // elements
        scales = "" if largest is held else f", with scales in {kind}"
        kind = f"packed in {bits} bits an element{scales}"
    return (
        f"its weight is {kind}, {how} by the program itself, and no kernel reads that form: "
        f"quantize with {schemes.for_bits(bits)}, which leaves a dequantize"
    )


def _largest_part(program: Program, part: Node) -> torch.Tensor:
    """The constant with the most bytes among the parts of a weight: all parts of a weight share its FQN."""
    fqn = program.fqn(part)
    parts = (program.constant(node) for node in part.graph.find_nodes(op="placeholder") if program.fqn(node) == fqn)
    return max((held for held in parts if held is not None), key=lambda held: held.numel() * held.element_size())


# Decomposed: the dequantize is arithmetic already --------------------------------------------------------------------

_VIEW_OPS = frozenset({aten.view.default, aten.unsqueeze.default})


def decomposed_weights(exported: ExportedProgram, rules: Collection[str]) -> list[str]:
    """The names of integer matrices that the program itself scales as floating point, in graph order.

    A conversion that one of ``rules`` wrote is that of an earlier rewrite, and is left out.

    The default decomposition table replaces ``dequantize_affine`` by a view, a conversion, a subtraction and a
    multiplication by another constant; ``run_decompositions({})`` keeps it. A buffer that the program mutates is no
    weight.
    """
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**targets, **signature.inputs_to_lifted_tensor_constants}
    mutated = set(signature.buffers_to_mutate.values())
    fixed: set[Node] = set()
    names: dict[Node, str] = {}
    conversions: list[Node] = []
    subgraphs = Subgraphs(exported.graph_module, exported.graph)
    for node in subgraphs.nodes():
        value, source = node.meta.get("val"), subgraphs.captured_operand(node)
        if op_of(node) in _VIEW_OPS | _CONVERSIONS:
            source = cast(Node, node.args[0])
        if source in fixed or (source is None and constants.get(node.name, "") not in {"", *mutated}):
            fixed.add(node)
        if source in names:
            names[node] = names[source]
            conversions += [node] if op_of(node) in _CONVERSIONS and not _is_written_by(node, rules) else []
        elif node in fixed and node.name in targets and _is_integer_matrix(value):
            names[node] = targets[node.name]
    return list(dict.fromkeys(names[node] for node in conversions if _is_scaled_as_float(node, fixed)))


def _is_written_by(node: Node, rules: Collection[str]) -> bool:
    """Whether one of ``rules`` wrote the node, or the node from which a decomposition built it."""
    sources = list(node.meta.get("from_node", ()))
    for source in sources:  # grows
        sources += source.from_node
    return any(source.pass_name in rules for source in sources)


def _is_integer_matrix(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8) and value.dim() > 1


def _is_scaled_as_float(conversion: Node, fixed: set[Node]) -> bool:
    value = conversion.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    shifted = (user for user in conversion.users if op_of(user) is aten.sub.Tensor and user.args[0] is conversion)
    operands = [conversion, *shifted]
    scaled = (user for node in operands for user in node.users if op_of(user) is aten.mul.Tensor)
    return any(source in fixed for user in scaled for source in user.all_input_nodes if source not in operands)
