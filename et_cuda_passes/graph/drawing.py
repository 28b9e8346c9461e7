"""Drawings of rewrites: the operators before and after, one drawing for all places that look alike.

Two places look alike if they have the same operators, edges, dtypes and numbers of dimensions. A size that differs
between them is a letter in the drawing, and the drawing lists the sizes that occur.
"""

import itertools
import string
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from et_cuda_passes.graph.operators import argument_names, op_name, schema_of

Kind = Literal["operator", "constant", "input"]


@dataclass(frozen=True)
class DrawnNode:
    """A node of a drawing.

    Attributes:
        label: the short name of an operator; for the others the name of the argument that they are.
        kind: "operator"; "constant", which the program holds; or "input", which other operators compute.
        value: dtype and shape, such as "bfloat16 [1, A, 256]"; empty if it is no tensor.
        inputs: positions of its inputs in the list of the nodes.
    """

    label: str
    kind: Kind
    value: str
    inputs: list[int]


@dataclass(frozen=True)
class DrawnSizes:
    """Sizes that occur together.

    Attributes:
        count: the number of places that have them.
        sizes: the size for each letter of a drawing.
    """

    count: int
    sizes: dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """The operators before and after one distinct rewrite; each node comes before its inputs.

    Attributes:
        rule: the rule.
        count: how often it acted so.
        before: the nodes that the rule matched, and their inputs.
        after: the nodes that it built, and their inputs.
        sizes: what the letters in the values stand for; empty if all places have the same sizes.
    """

    rule: str
    count: int
    before: list[DrawnNode]
    after: list[DrawnNode]
    sizes: list[DrawnSizes] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """A node as it was found: its value has a placeholder for each size."""

    label: str
    kind: Kind
    value: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """One side of a rewrite at one place: the nodes without sizes, and all sizes in their order."""

    nodes: tuple[_Part, ...]
    sizes: tuple[str, ...]


def drawn_nodes(roots: Sequence[Node], inside: Container[Node], fqn: Callable[[Node], str | None]) -> Parts:
    """The nodes of ``inside`` that ``roots`` are computed from, and the inputs of these.

    Args:
        roots: the results.
        inside: the operators to draw.
        fqn: the FQN of a constant; None for any other node.
    """
    operands: dict[Node, list[tuple[Node, str]]] = {}
    backwards: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in operands:
            operands[node] = list(_operands(node)) if node.op == "call_function" and node in inside else []
            for operand, _ in reversed(operands[node]):
                visit(operand)
            backwards[node] = None

    for root in reversed(roots):
        visit(root)
    positions = {node: position for position, node in enumerate(reversed(backwards))}
    names: dict[Node, dict[str, None]] = {node: {} for node in positions}
    for node in positions:
        for operand, argument in operands[node]:
            names[operand][argument] = None
    sizes: list[str] = []
    parts = []
    for node in positions:
        value, shape = _value(node.meta.get("val"))
        sizes += shape
        inputs = dict.fromkeys(positions[operand] for operand, _ in operands[node])
        if inputs or node in inside:
            parts.append(_Part(_call(node), "operator", value, tuple(inputs)))
        else:
            held = fqn(node)
            # A node's own name would differ from place to place.
            label = ", ".join(filter(None, names[node])) or (held or "input").rpartition(".")[2]
            parts.append(_Part(label, "input" if held is None else "constant", value, ()))
    return Parts(tuple(parts), tuple(sizes))


def _given(node: Node) -> Iterator[tuple[str, Any]]:
    """The arguments that a call states, with their names; empty names without a schema."""
    yield from zip(argument_names(node) or [""] * len(node.args), node.args, strict=False)
    yield from node.kwargs.items()


def _operands(node: Node) -> Iterator[tuple[Node, str]]:
    """The nodes that ``node`` reads, each with the name of its argument."""
    for name, value in _given(node):
        for leaf in [value] if isinstance(value, Node) else pytree.tree_leaves(value):
            if isinstance(leaf, Node):
                yield leaf, name


def _call(node: Node) -> str:
    """The short name of an operator, with the texts and flags among its arguments that are no defaults."""
    name = op_name(node.target).removeprefix("et_cuda_passes.")
    stated = {key: value for key, value in _given(node) if value is True or isinstance(value, str)}
    if not stated:
        return name
    schema = schema_of(node)
    defaults = {} if schema is None else {each.name: each.default_value for each in schema.arguments}
    options = [str(key if value is True else value) for key, value in stated.items() if value != defaults.get(key)]
    return f"{name}({', '.join(options)})" if options else name


def _value(value: Any) -> tuple[str, list[str]]:
    """Dtype and shape of a value, with a placeholder for each size; and the sizes."""
    if not isinstance(value, torch.Tensor):
        return "", []
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} [{', '.join(['{}'] * value.dim())}]", [str(size) for size in value.shape]


class DrawingRecorder:
    """Counts the rewrites that look alike."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, tuple[_Part, ...], tuple[_Part, ...]], Counter[tuple[str, ...]]] = {}

    def add(self, rule: str, before: Parts, after: Parts) -> None:
        """Record one rewrite."""
        found = self._sizes.setdefault((rule, before.nodes, after.nodes), Counter())
        found[before.sizes + after.sizes] += 1

    def drawings(self) -> list[Drawing]:
        """A drawing of each distinct rewrite, in the order in which they were first recorded."""
        return [_drawing(*parts, sizes) for parts, sizes in self._sizes.items()]


def _drawing(
    rule: str, before: tuple[_Part, ...], after: tuple[_Part, ...], found: Counter[tuple[str, ...]]
) -> Drawing:
    letters: dict[tuple[str, ...], str] = {}
    names = _letters()
    shown = []
    for column in zip(*found, strict=True):
        # Sizes that are equal at every place have the same letter.
        if len(set(column)) > 1 and column not in letters:
            letters[column] = next(names)
        shown.append(letters.get(column, column[0]))
    remaining = iter(shown)

    def with_sizes(parts: tuple[_Part, ...]) -> list[DrawnNode]:
        return [
            DrawnNode(
                part.label,
                part.kind,
                part.value.format(*itertools.islice(remaining, part.value.count("{}"))),
                [*part.inputs],
            )
            for part in parts
        ]

    values = zip(*letters, strict=True)
    sizes = [
        DrawnSizes(count, dict(zip(letters.values(), each, strict=True)))
        for count, each in zip(found.values(), values, strict=False)
    ]
    return Drawing(rule, found.total(), with_sizes(before), with_sizes(after), sizes)


def _letters() -> Iterator[str]:
    """A, B, ..., Z, AA, AB, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


# As coordinates -------------------------------------------------------------------------------------------------------


# As text --------------------------------------------------------------------------------------------------------------

_SHOWN_SIZES = 6
"""The number of combinations of sizes that a text names."""


def drawing_text(drawing: Drawing) -> str:
    """A drawing as two trees, each from the results down to the inputs."""
    lines = [f"{drawing.rule}, {_times(drawing.count)}"]
    for title, nodes in (("before", drawing.before), ("after", drawing.after)):
        lines += [f"  {title}", *(f"    {line}" for line in _tree(nodes))]
    for sizes in drawing.sizes[:_SHOWN_SIZES]:
        named = ", ".join(f"{letter} = {size}" for letter, size in sizes.sizes.items())
        lines.append(f"  {_times(sizes.count)} with {named}")
    if len(drawing.sizes) > _SHOWN_SIZES:
        lines.append(f"  and {len(drawing.sizes) - _SHOWN_SIZES} other combinations of sizes")
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _tree(nodes: Sequence[DrawnNode]) -> Iterator[str]:
    read = {source for node in nodes for source in node.inputs}
    shown: set[int] = set()

    def lines(position: int, first: str, rest: str) -> Iterator[str]:
        node = nodes[position]
        again = position in shown and bool(node.inputs)
        yield f"{first}{node.label}  {node.value}{'  (as above)' if again else ''}".rstrip()
        shown.add(position)
        inputs = [] if again else node.inputs
        for index, source in enumerate(inputs):
            last = index == len(inputs) - 1
            yield from lines(source, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    for position in range(len(nodes)):
        if position not in read:
            yield from lines(position, "", "")
